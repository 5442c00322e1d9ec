"""Log-probabilities of responses from a language model's logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _checks
from gamma_loss._backend import get_backend

# How many logits are in memory a second time at once: on a CPU as its caches hold, elsewhere enough
# to keep the device busy.
CPU_CHUNK, DEVICE_CHUNK = 2**19, 2**24


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    average: bool = False,
    *,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Return the log-probability of each response, from a causal language model's logits.

        log π(y) = Σ_t log softmax(logits_{t-1})[y_t]    over the labels y_t that count

    Sums for γ-DPO and, with ``average=True``, means over tokens for γ-SimPO. The softmax of a few
    tokens at a time is in memory, in float32; the gradient takes its own memory and no more.

    Parameters
    ----------
    logits : Tensor, shape (responses, length, vocabulary)
        Of any floating dtype and any strides; -inf rules a token out.
    labels : integer Tensor, shape (responses, length)
        Token ids, usually the model's ``input_ids``.
    mask : boolean Tensor, shape (responses, length), optional
        True for the labels that count (the response), False for prompt and padding. All by default.
    average : bool
        Whether to divide by the number of labels that count.
    shift : bool
        True if position t of the logits predicts label t + 1, as models return them: the first
        label and the last logits are then not used. False if it predicts label t.
    ignore_index : int
        A label that does not count.

    Returns
    -------
    Tensor, shape (responses,)
        In nats; float32 or, for float64 logits, float64. A response without a label that counts
        has 0, with a zero gradient. Logits of labels that do not count may even be NaN.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, device or shape, naming the argument.
    IndexError
        On the CPU, for a label that counts and is not in [0, vocabulary). Elsewhere it is an
        assertion on the device, as in `torch.nn.functional.cross_entropy`.
    RuntimeError
        From autograd, for a second derivative.

    Notes
    -----
    In a graph of torch.compile or torch.export it is one operator each way, which takes no more
    memory. torch.vmap refuses it, and so does torch.func inside torch.compile. On a CPU, torch's
    float32 softmax of 128,256 logits leaves an error of some 1e-5 nats a token.

    Examples
    --------
    >>> probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]])
    >>> labels = torch.tensor([[0, 1, 2]])  # with probabilities 0.25 and 0.8 after the first
    >>> sequence_logps(probabilities.log(), labels).exp()
    tensor([0.2000])
    >>> response = torch.tensor([[False, False, True]])
    >>> sequence_logps(probabilities.log(), labels, response, average=True).exp()
    tensor([0.8000])
    """
    _check(logits, labels, mask)
    average, shift = _checks.flag("average", average), _checks.flag("shift", shift)
    _checks.whole_number("ignore_index", ignore_index, least=-(2**63))
    labels = labels.long()
    unused = labels == ignore_index
    if mask is not None:
        unused = unused | ~mask
    if shift:
        labels, unused = labels[:, 1:], unused[:, 1:]
    # A graph gets the operator with a gradient of its own, which torch.func does not take.
    apply: Any = _operator if torch.compiler.is_compiling() else _TokenLogps.apply
    each = apply(logits, labels.masked_fill(unused, 0)).masked_fill(unused, 0)
    total: Tensor = each.sum(1)
    return total / (~unused).sum(1).clamp(min=1) if average else total


def _empty(logits: Tensor, targets: Tensor) -> Tensor:
    """Return room for log-probabilities: float32, or float64 for float64 logits."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty(targets.shape, dtype=dtype, device=logits.device)


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each target's log-probability by the logits at its position; more are not used."""
    if targets.device.type == "cpu":  # where a value is free to read
        wrong = targets[(targets < 0) | (targets >= logits.shape[2])]
        if wrong.numel():
            raise IndexError(
                f"labels must be in [0, {logits.shape[2]}) where they count, got {int(wrong[0])}"
            )
    logps = _empty(logits, targets)
    for chunk in _chunks(logits, targets):
        each = torch.log_softmax(logits[chunk], -1, dtype=logps.dtype)
        logps[chunk] = each.gather(2, targets[chunk].unsqueeze(2)).squeeze(2)
    return logps


def _token_logps_gradient(slopes: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of Σ slopes · `_token_logps` in the logits, in their dtype."""
    gradient = torch.empty_like(logits)
    gradient[:, targets.shape[1] :] = 0
    for chunk in _chunks(logits, targets):
        slope = slopes[chunk].unsqueeze(2)
        each = torch.softmax(logits[chunk], -1, dtype=slopes.dtype).mul_(-slope)
        each.scatter_add_(2, targets[chunk].unsqueeze(2), slope)
        gradient[chunk] = each.masked_fill_(slope == 0, 0)  # also where the logits are NaN
    return gradient


def _chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of responses and positions, with a limited number of logits or one token."""
    responses, length = targets.shape
    limit = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    tokens = max(limit // logits.shape[2], 1)
    wide = max(min(tokens, length), 1)
    high = tokens // wide
    for row in range(0, responses, high):
        for position in range(0, length, wide):
            yield slice(row, row + high), slice(position, min(position + wide, length))


def _check(logits: Tensor, labels: Tensor, mask: Tensor | None) -> None:
    _checks.tensors(logits=logits, labels=labels)
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(
            f"logits must have shape (responses, length, vocabulary), got {tuple(logits.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            "labels must have the shape of logits without the vocabulary, "
            f"{tuple(logits.shape[:2])}, got {tuple(labels.shape)}"
        )
    _checks.same_home("labels", labels, "logits", logits, get_backend(logits))
    if mask is not None:
        _checks.tensors(mask=mask)
        _checks.mask("mask", mask, "labels", labels, get_backend(labels))


class _Gradient(torch.autograd.Function):
    """`_token_logps_gradient`, of which a derivative is refused instead of taken as 0."""

    forward = staticmethod(_token_logps_gradient)
    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("sequence_logps has no second derivative")


class _TokenLogps(torch.autograd.Function):
    """`_token_logps` with its gradient."""

    forward = staticmethod(_token_logps)
    setup_context = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        return _Gradient.apply(slopes, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


# A graph takes each of the two as one operator, so that it needs no more memory there.
_operator = torch.library.custom_op("gamma_loss::token_logps", _token_logps, mutates_args=())
_gradient_operator = torch.library.custom_op(
    "gamma_loss::token_logps_gradient", _token_logps_gradient, mutates_args=()
)
_operator.register_fake(_empty)
_gradient_operator.register_fake(lambda slopes, logits, targets: torch.empty_like(logits))
_operator.register_autograd(
    lambda ctx, slopes: (_gradient_operator(slopes, *ctx.saved_tensors), None),
    setup_context=_TokenLogps.setup_context,
)

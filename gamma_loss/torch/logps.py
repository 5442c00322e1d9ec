"""Log-probabilities of responses from a language model's logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _checks

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
    """Log-probability of each response, from the logits of a causal language model.

        log π(y) = Σ_t log softmax(logits_{t-1})[y_t]    over the labels y_t that count

    Sums for γ-DPO and, with ``average=True``, means over tokens for γ-SimPO. The softmax is formed
    for a few tokens at a time, in float32: beside the logits it needs no second copy of them, and
    its gradient no memory but the gradient itself.

    Parameters
    ----------
    logits : Tensor, shape (responses, length, vocabulary)
        Of any floating dtype and any strides. May be -inf for tokens that are ruled out.
    labels : integer Tensor, shape (responses, length)
        Token ids, usually the model's ``input_ids``.
    mask : boolean Tensor, shape (responses, length), optional
        Which labels count, as in ``labels``' positions: True for the tokens of the response, False
        for its prompt and for padding. All by default.
    average : bool
        Whether to divide by the number of labels that count.
    shift : bool
        Whether position t of the logits predicts label t + 1, as models return them; the first
        label and the last logits are not used then. With False it predicts label t.
    ignore_index : int
        A label that does not count.

    Returns
    -------
    Tensor, shape (responses,)
        In nats; float32 or, for float64 logits, float64. A response without any label that counts
        has 0, with a zero gradient. What does not count leaves no trace, not even logits that are
        NaN.

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
    torch.compile and torch.export leave the work in one operator each way, so that it takes no more
    memory in a graph. torch.vmap refuses it, and so does torch.func inside torch.compile.

    On a CPU, torch's float32 softmax leaves an error of some 1e-5 nats a token where the vocabulary
    has 128,256 entries.

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
    compiling = torch.compiler.is_compiling()
    apply: Any = _operator if compiling else _TokenLogps.apply
    each = apply(logits, labels.masked_fill(unused, 0)).masked_fill(unused, 0)
    total: Tensor = each.sum(1)
    return total / (~unused).sum(1).clamp(min=1) if average else total


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


class _TokenLogps(torch.autograd.Function):
    """`_token_logps` with its gradient."""

    setup_context = staticmethod(_keep)

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> Any:
        return _token_logps(logits, targets)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        gradient = _Gradient.apply(slopes, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return gradient, None


class _Gradient(torch.autograd.Function):
    """`_token_logps_gradient`, of which a derivative is refused instead of taken as 0."""

    @staticmethod
    def forward(slopes: Tensor, logits: Tensor, targets: Tensor) -> Any:
        return _token_logps_gradient(slopes, logits, targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("sequence_logps has no second derivative")


def _backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
    return _gradient_operator(slopes, *ctx.saved_tensors), None


def _token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target from the logits at its position; more logits are not used."""
    if targets.device.type == "cpu":  # where looking makes nothing wait
        wrong = targets[(targets < 0) | (targets >= logits.shape[2])]
        if wrong.numel():
            raise IndexError(
                f"labels must be in [0, {logits.shape[2]}) where they count, got {int(wrong[0])}"
            )
    logps = torch.empty(targets.shape, dtype=_accumulated(logits), device=logits.device)
    for chunk in _chunks(logits, targets):
        each = torch.log_softmax(logits[chunk], -1, dtype=logps.dtype)
        logps[chunk] = each.gather(2, targets[chunk].unsqueeze(2)).squeeze(2)
    return logps


def _token_logps_gradient(slopes: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of Σ slopes · `token_logps` with respect to the logits, in their dtype."""
    gradient = torch.empty_like(logits)
    gradient[:, targets.shape[1] :] = 0
    for chunk in _chunks(logits, targets):
        slope = slopes[chunk].unsqueeze(2)
        each = torch.softmax(logits[chunk], -1, dtype=slopes.dtype).mul_(-slope)
        each.scatter_add_(2, targets[chunk].unsqueeze(2), slope)
        gradient[chunk] = each.masked_fill_(slope == 0, 0)  # also where the logits are NaN
    return gradient


def _chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slice responses and positions into chunks of so many logits at most, or of one token."""
    responses, length = targets.shape
    limit = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    tokens = max(limit // logits.shape[2], 1)
    wide = max(min(tokens, length), 1)
    high = tokens // wide
    for row in range(0, responses, high):
        for position in range(0, length, wide):
            yield slice(row, row + high), slice(position, min(position + wide, length))


def _accumulated(logits: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(logits.dtype, torch.float32)


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
    if mask is not None:
        _checks.tensors(mask=mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must have a boolean dtype, got {mask.dtype}")
    for name, array in (("labels", labels), ("mask", mask)):
        if array is None:
            continue
        if array.shape != logits.shape[:2]:
            raise ValueError(
                f"{name} must have the shape of logits without the vocabulary, "
                f"{tuple(logits.shape[:2])}, got {tuple(array.shape)}"
            )
        if array.device != logits.device:
            raise ValueError(
                f"{name} must be on the device of logits, {logits.device}, got {array.device}"
            )


# A graph takes each of the two as one operator, so that it needs no more memory there.
_operator = torch.library.custom_op("gamma_loss::token_logps", _token_logps, mutates_args=())
_gradient_operator = torch.library.custom_op(
    "gamma_loss::token_logps_gradient", _token_logps_gradient, mutates_args=()
)


@_operator.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.empty(targets.shape, dtype=_accumulated(logits), device=logits.device)


@_gradient_operator.register_fake
def _(slopes: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return torch.empty_like(logits)


_operator.register_autograd(_backward, setup_context=_keep)

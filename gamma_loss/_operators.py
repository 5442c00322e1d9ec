"""What torch adds: the choice of an implementation, and operators that compilers leave whole.

    gamma_loss::solve   margins of a pool; ν and the certificate
    gamma_loss::loss    the same, with losses, pair weights and gradients, in one launch;
                        gamma_loss::differentiable_loss has its gradient registered with autograd

On a device that Triton knows they launch its kernels, elsewhere they run the array-API code (on the
CPU with NumPy, which may look at values and so end early). The first launch that fails warns, and
from then on everything on that device is solved eagerly.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gamma_loss import _newton

_given_up: set[str] = set()  # types of device on which kernels don't run


def choose(impl: str, gaps: Tensor, size: int, gamma0: float, tau: float) -> str:
    """Return which of "eager", "compile", "triton" and "operator" an ``impl`` stands for.

    The rule of "auto" is in `gamma_loss.solve_margins`; docs/benchmarks.md has the figures behind
    it. In a graph being traced, mild settings become part of it. Others would add some thousand
    nodes to it, and become one operator.
    """
    if gamma0 == 0:
        return "eager"
    if impl == "triton" and _launcher(gaps.device):
        return "triton"
    mild = _newton.mild_passes(gamma0, tau, gaps.dtype == torch.float64)
    if torch.compiler.is_compiling():
        return "eager" if mild or impl == "eager" else "operator"
    if impl == "compile":
        return "compile" if size > 1 else "eager"
    if impl in ("eager", "triton"):
        return "eager"
    if gaps.device.type == "cpu":
        return "eager" if mild else "operator"  # whose passes end when they are done
    return "triton" if gaps.device.type in ("cuda", "xpu") and _launcher(gaps.device) else "eager"


def can_fuse(size: int) -> bool:
    """Whether `fused_loss` can take a pool of a size: one launch, and not for torch.func."""
    from gamma_loss.kernels import launch

    return size <= launch.POOL_LIMIT and not _transforming()


def solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, ν and the certificate by the operator ``gamma_loss::solve``."""
    margins, certificate = torch.ops.gamma_loss.solve(
        gaps, mask, context, context_mask, gamma0, tau, kernel
    )
    nu, residual = certificate.unbind()
    return margins, nu, residual


def fused_loss(
    chosen: Tensor,
    rejected: Tensor | None,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, the eight rows of `_loss`, (ν, certificate) and mask, with the gradient of the loss."""
    arguments = (chosen, rejected, reference_chosen, reference_rejected, *settings)
    # A graph gets the operator with a gradient of its own. Called eagerly, that takes several times
    # as long on the host as the class below.
    if torch.compiler.is_compiling():
        operator = torch.ops.gamma_loss.differentiable_loss
        result: tuple[Tensor, Tensor, Tensor, Tensor] = operator(*arguments)
        return result
    result = _FusedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


# Whether torch.func is at work; taken as given where torch doesn't tell.
_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rows, certificate, mask = output
    ctx.save_for_backward(rows)
    ctx.mark_non_differentiable(rows, certificate, mask)


def _scale(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Scale the gradient, which has been ready since the forward pass."""
    (rows,) = ctx.saved_tensors
    chosen, rejected = (gradient * rows[4:6]).unbind()
    of_inputs = zip((chosen, rejected, rejected, chosen), ctx.needs_input_grad[:4], strict=True)
    return *(each if wanted else None for each, wanted in of_inputs), *[None] * 9


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.gamma_loss.loss(*arguments)
        _keep(ctx, arguments, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _scale(ctx, *gradients)


def _launcher(device: torch.device) -> ModuleType | None:
    """Return the module that launches kernels, or None with a warning, the first time."""
    if device.type in _given_up:
        return None
    try:
        from gamma_loss.kernels import launch
    except Exception as error:  # not installed, or not for this system
        _give_up(device, f"{type(error).__name__}: {error}")
        return None
    if device.type == "cpu" and not launch.INTERPRETED:
        _give_up(device, "it has no kernels for the CPU")
        return None
    return launch


def _give_up(device: torch.device, reason: str) -> None:
    _given_up.add(device.type)
    warnings.warn(
        f"Triton can't be used on {device.type}, gamma_loss solves eagerly there: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    from gamma_loss.margins import solve_pool

    if (kernel or gaps.device.type != "cpu") and (launch := _launcher(gaps.device)):
        try:
            return launch.solve(gaps, mask, context, context_mask, gamma0, tau)  # type: ignore[no-any-return]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _give_up(gaps.device, f"{type(error).__name__}: {error}")
    pool = (gaps, mask, context, context_mask)
    if gaps.device.type == "cpu":
        values, *more = (None if array is None else array.numpy() for array in pool)
        margins, *certificate = solve_pool(values, more[0], more[1], more[2], gamma0, tau)
        return torch.from_numpy(margins), torch.from_numpy(np.array(certificate))
    margins, *certificate = solve_pool(*pool, gamma0, tau)
    return margins, torch.stack(certificate)


def _loss(
    chosen: Tensor,
    rejected: Tensor | None,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    beta: float,
    gamma0: float,
    tau: float,
    tilt: float,
    centered: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss; rows; ν and the certificate; and which pairs count.

    The rows are margins, shifts, reward gaps, pair weights, the gradients with respect to the
    chosen and to the rejected log-probabilities, and the two rewards. Nothing rejected: gaps.
    """
    logps = (chosen, rejected, reference_chosen, reference_rejected)
    outputs = _outputs(*logps, reduction)
    pool = (mask, context, context_mask)
    settings = (beta, gamma0, tau, tilt, centered, reduction)
    if launch := _launcher(chosen.device):
        try:
            launch.loss(outputs, *logps, *pool, *settings)
            return outputs
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _give_up(chosen.device, f"{type(error).__name__}: {error}")
    from gamma_loss._arrays import namespace
    from gamma_loss.losses import array_loss

    upcast: Any = [None if array is None else array.to(outputs[0].dtype) for array in logps]
    more: Any = (*pool, *settings, "eager")
    loss, aux = array_loss(namespace(chosen), *upcast, *more)
    slope = -beta * aux.pair_weights
    if reduction == "mean":
        slope = slope / aux.mask.sum().clamp(min=1)
    rows = [aux.margins, aux.shifts, aux.reward_gaps, aux.pair_weights, slope, -slope]
    rows += [aux.chosen_rewards, aux.rejected_rewards]
    certificate = torch.stack([aux.multiplier, aux.residual])
    return loss, torch.stack(rows), certificate, aux.mask.clone()


def _outputs(
    chosen: Tensor,
    rejected: Tensor | None,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, dtype = chosen.shape[0], torch.float32
    for array in (chosen, rejected, reference_chosen, reference_rejected):
        if array is not None:
            dtype = torch.promote_types(dtype, array.dtype)
    return (
        chosen.new_empty(n if reduction == "none" else (), dtype=dtype),
        chosen.new_empty((8, n), dtype=dtype),
        chosen.new_empty(2, dtype=dtype),
        chosen.new_empty(n, dtype=torch.bool),
    )


# Registered at this level because custom_op takes three times as long on the host.
_library = torch.library.Library("gamma_loss", "DEF")
_library.define(
    "solve(Tensor gaps, Tensor? mask, Tensor? context, Tensor? context_mask, "
    "float gamma0, float tau, bool kernel) -> (Tensor, Tensor)"
)
_library.impl("solve", _solve, "CompositeExplicitAutograd")


def _fake_solve(gaps: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gaps), gaps.new_empty(2)


def _fake_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected, reference_chosen, reference_rejected, *_, reduction = arguments
    return _outputs(chosen, rejected, reference_chosen, reference_rejected, reduction)


torch.library.register_fake("gamma_loss::solve", _fake_solve, lib=_library)
for _name in ("loss", "differentiable_loss"):
    _library.define(
        f"{_name}(Tensor chosen, Tensor? rejected, Tensor? reference_chosen, "
        "Tensor? reference_rejected, Tensor? mask, Tensor? context, Tensor? context_mask, "
        "float beta, float gamma0, float tau, float tilt, bool centered, str reduction) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl(_name, _loss, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gamma_loss::{_name}", _fake_loss, lib=_library)
torch.library.register_autograd(
    "gamma_loss::differentiable_loss", _scale, setup_context=_keep, lib=_library
)


def _map(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """Let torch.vmap make one call for each pool."""
    rows = (
        torch.ops.gamma_loss.solve(
            *(
                argument if dim is None else argument.select(dim, i)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    )
    margins, certificates = zip(*rows, strict=True)
    return (torch.stack(margins), torch.stack(certificates)), (0, 0)


torch.library.register_vmap("gamma_loss::solve", _map, lib=_library)

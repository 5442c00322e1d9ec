"""Operators that compilers leave whole, and the choice of an implementation on torch.

    gamma_loss::solve   margins of a pool; ν and the certificate
    gamma_loss::loss    the same, with losses, pair weights and gradients, in one launch;
                        gamma_loss::differentiable_loss has its gradient registered with autograd

On a device that Triton knows they launch its kernels, elsewhere they solve eagerly. The first
launch that fails warns, and from then on everything on that device is solved eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _pool
from gamma_loss._arrays import is_transforming
from gamma_loss._loss import GammaLossAux, Logps, LossSettings, Rows, array_loss, slopes_of
from gamma_loss._mild import mild_passes
from gamma_loss._pool import Beside, Problem
from gamma_loss._spread import WHOLE
from gamma_loss._torch import host
from gamma_loss._torch.gradient import scaled, with_slopes
from gamma_loss._torch.library import register
from gamma_loss.kernels.outputs import Outputs

_given_up: set[str] = set()  # types of device on which kernels don't run


def choose(impl: str, gaps: Tensor, problem: Problem) -> str:
    """Return the name of an implementation in `gamma_loss._dispatch.TABLE`.

    In a graph being traced, and under torch.func and its like, mild settings become part of it.
    Others would be a loop in it, and become one operator.
    """
    eager = "host" if host.can_take(gaps, problem.size) else "eager"
    if problem.gamma0 == 0:
        return eager
    if impl == "triton" and _launcher(gaps.device):
        return "triton"
    if torch.compiler.is_compiling() or is_transforming():
        return "eager" if impl == "eager" or _is_mild(gaps, problem) else "operator"
    if impl == "compile":
        # Outside mild settings NumPy lets few pairs step on alone, where a program takes all.
        sooner = eager == "host" and not _is_mild(gaps, problem)
        return eager if sooner or problem.size == 1 else "compile"
    kernels = impl == "auto" and gaps.device.type in ("cuda", "xpu") and _launcher(gaps.device)
    return "triton" if kernels else eager


def _is_mild(gaps: Tensor, problem: Problem) -> bool:
    return mild_passes(problem.gamma0, problem.tau, gaps.dtype == torch.float64) > 0


def can_fuse(size: int) -> bool:
    """Whether `fused_loss` can take a pool of a size: one launch, and not for torch.func."""
    from gamma_loss.kernels import launch

    return size <= launch.POOL_LIMIT and not is_transforming()


def solve(gaps: Tensor, problem: Problem, kernel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, ν and the certificate by the operator ``gamma_loss::solve``."""
    margins, certificate = _solve_operator(
        gaps.detach(), *problem.beside, problem.gamma0, problem.tau, kernel
    )
    return margins, *certificate.unbind()


def fused_loss(logps: Logps, beside: Beside, settings: LossSettings) -> tuple[Tensor, GammaLossAux]:
    """Loss and what it knows, by one operator."""
    # A graph gets the operator with a gradient of its own. Called eagerly, that takes several times
    # as long on the host as the slopes.
    compiling = torch.compiler.is_compiling()
    if compiling:
        outputs = _differentiable_loss_operator(*logps, *beside, *settings)
    else:
        with torch.no_grad():
            outputs = _loss_operator(*logps, *beside, *settings)
    loss, rows, certificate, mask = outputs
    named, (multiplier, residual) = Rows(*rows.unbind()), certificate.unbind()
    aux = GammaLossAux(
        margins=named.margins,
        shifts=named.shifts,
        reward_gaps=named.reward_gaps,
        chosen_rewards=named.chosen_rewards,
        rejected_rewards=named.rejected_rewards,
        pair_weights=named.pair_weights,
        residual=residual,
        multiplier=multiplier,
        mask=mask,
    )
    if compiling:
        return loss, aux
    return with_slopes(loss, named.slopes, aux, logps, settings), aux


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


def _launched(device: torch.device, launch_it: Callable[[ModuleType], Any]) -> Any:
    """Return what a launch returns, or None where kernels don't run."""
    if launch := _launcher(device):
        try:
            return launch_it(launch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _give_up(device, f"{type(error).__name__}: {error}")
    return None


def _solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    beside = Beside(mask, context, context_mask)
    if kernel or gaps.device.type != "cpu":
        result = _launched(gaps.device, lambda launch: launch.solve(gaps, beside, gamma0, tau))
        if result is not None:
            margins, certificate = result
            return margins, certificate
    margins, *numbers = _pool.solve(gaps, Problem(gamma0, tau, beside, 0))
    return margins, torch.stack(numbers)


def _loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss; the `Rows`; ν and the certificate; and which pairs count."""
    logps, beside, settings = _grouped(arguments)
    outputs = _outputs(logps, settings.reduction)

    def fill(launch: ModuleType) -> Outputs:
        launch.loss(logps, beside, settings, outputs)
        return outputs

    if _launched(logps.chosen.device, fill) is not None:
        return outputs
    problem = Problem(settings.gamma0, settings.tau, beside, 0)
    upcast = Logps(*(each if each is None else each.to(outputs.rows.dtype) for each in logps))
    solve = lambda gaps: _pool.solve(gaps, problem)  # noqa: E731
    loss, aux = array_loss(upcast, beside.mask, settings, solve, WHOLE)
    slopes = slopes_of(aux, beside.mask, settings)
    known = {name: value for name, value in aux._asdict().items() if name in Rows._fields}
    rows = torch.stack(Rows(slopes=slopes, **known))
    return loss, rows, torch.stack([aux.multiplier, aux.residual]), aux.mask.clone()


def _grouped(arguments: tuple[Any, ...]) -> tuple[Logps, Beside, LossSettings]:
    """Undo the flattening that an operator's signature asks for."""
    return Logps(*arguments[:4]), Beside(*arguments[4:7]), LossSettings(*arguments[7:])


def _outputs(logps: Logps, reduction: str) -> Outputs:
    chosen, dtype = logps.chosen, torch.float32
    for array in logps:
        if array is not None:
            dtype = torch.promote_types(dtype, array.dtype)
    n = chosen.shape[0]
    return Outputs(
        loss=chosen.new_empty(n if reduction == "none" else (), dtype=dtype),
        rows=chosen.new_empty((len(Rows._fields), n), dtype=dtype),
        certificate=chosen.new_empty(2, dtype=dtype),
        mask=chosen.new_empty(n, dtype=torch.bool),
    )


def _fake_solve(gaps: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gaps), gaps.new_empty(2)


def _fake_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logps, _, settings = _grouped(arguments)
    return _outputs(logps, settings.reduction)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rows, certificate, mask = output
    ctx.save_for_backward(rows)
    ctx.mark_non_differentiable(rows, certificate, mask)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Scale the gradient, which has been ready since the forward pass."""
    slopes = Rows(*ctx.saved_tensors[0].unbind()).slopes
    others = len(Beside._fields) + len(LossSettings._fields)
    return *scaled(ctx, gradient, slopes), *[None] * others


_LOSS_ARGUMENTS = (
    "(Tensor chosen, Tensor? rejected, Tensor? reference_chosen, Tensor? reference_rejected, "
    "Tensor? mask, Tensor? context, Tensor? context_mask, "
    "float beta, float gamma0, float tau, float tilt, bool centered, str reduction) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_solve_operator = register(
    "solve(Tensor gaps, Tensor? mask, Tensor? context, Tensor? context_mask, "
    "float gamma0, float tau, bool kernel) -> (Tensor, Tensor)",
    _solve,
    _fake_solve,
)
_loss_operator = register("loss" + _LOSS_ARGUMENTS, _loss, _fake_loss)
_differentiable_loss_operator = register(
    "differentiable_loss" + _LOSS_ARGUMENTS, _loss, _fake_loss, _backward, _keep
)


def _map(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """Let torch.vmap make one call for each pool."""
    rows = (
        _solve_operator(
            *(
                argument if dim is None else argument.select(dim, i)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    )
    margins, certificates = zip(*rows, strict=True)
    return (torch.stack(margins), torch.stack(certificates)), (0, 0)


torch.library.register_vmap("gamma_loss::solve", _map)

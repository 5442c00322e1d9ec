"""The Triton kernels as torch operators: launching, registration, and the way out.

    gamma_loss::solve   margins of a pool, ν and the certificate
    gamma_loss::loss    the same, then losses, pair weights and gradients

Both allocate their outputs and launch; nothing is read back. The first launch that fails warns, and
from then on the same operators run the array-API code.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _newton

POOL_LIMIT = 16_384  # the largest pool that one program takes
PROGRAMS = 1024  # at most, for a larger one
ROUNDS = {True: 8, False: 48}  # levels that a large pool may try: mild, any; those left over return

MARGINS, SHIFTS, GAPS, WEIGHTS, TO_CHOSEN, TO_REJECTED, CHOSEN, REJECTED = range(8)  # rows of a loss

_reason: object = None  # why the kernels are not used


def give_up(reason: object) -> None:
    """Let the array-API code answer from now on, and say so once."""
    global _reason
    if _reason is None:
        _reason = reason
        warnings.warn(
            f"Triton can't be used here, so gamma_loss solves eagerly: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def runs_on(device: torch.device) -> bool:
    """Whether a kernel may be tried on a device."""
    if _reason is not None:
        return False
    try:
        from gamma_loss.kernels import _triton
    except Exception as error:  # not installed, or not for this system
        if device.type != "cpu":
            give_up(error)
        return False
    return device.type != "cpu" or type(_triton.pool_kernel).__name__ == "InterpretedFunction"


def _settings(T: torch.dtype, size: int, gamma0: float, tau: float) -> dict[str, Any]:
    import triton
    import triton.language as tl

    double = torch.float64 == T
    block = min(max(triton.next_power_of_2(size), 32), 1024 if double else 2048)
    return {
        "gamma0": gamma0,
        "a": gamma0 / tau,
        "T": tl.float64 if double else tl.float32,
        "EPS": torch.finfo(T).eps,
        "BLOCK": block,
        "PASSES": _newton.mild_passes(gamma0, tau, double),
        "num_warps": max(block // 128, 1),
    }


def _on_device_of(array: Tensor) -> contextlib.AbstractContextManager[Any]:
    if array.device.type == "cuda" and array.device.index != torch.cuda.current_device():
        return torch.cuda.device(array.device)
    return contextlib.nullcontext()


def _contiguous(*arrays: Tensor | None) -> list[Tensor | None]:
    return [None if array is None else array.contiguous() for array in arrays]


def _solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
) -> tuple[Tensor, Tensor]:
    if runs_on(gaps.device):
        try:
            return _launch_solve(gaps, mask, context, context_mask, gamma0, tau)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            give_up(error)
    from gamma_loss.margins import solve_pool

    margins, nu, residual = solve_pool(gaps, mask, context, context_mask, gamma0, tau)
    return margins, torch.stack([nu, residual])


def _launch_solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
) -> tuple[Tensor, Tensor]:
    from gamma_loss.kernels import _triton

    gaps, mask, context, context_mask = _contiguous(gaps, mask, context, context_mask)
    n, m = gaps.shape[0], 0 if context is None else context.shape[0]
    settings = _settings(gaps.dtype, n + m, gamma0, tau)
    margins, certificate = torch.empty_like(gaps), gaps.new_empty(2)
    pool = (gaps, mask, context, context_mask)
    with _on_device_of(gaps):
        if n + m <= POOL_LIMIT:
            _triton.pool_kernel[(1,)](
                gaps, None, None, None, mask, context, context_mask,
                margins, certificate, None, None, gaps.new_empty(3 * (n + m)), n, m,
                beta=1.0, tilt=0.0, CENTERED=False, REDUCTION="none", **settings,
            )  # fmt: skip
            return margins, certificate

        settings["BLOCK"], settings["num_warps"] = 1024, 8
        eps, passes = settings.pop("EPS"), settings.pop("PASSES")
        P, programs = PROGRAMS, min(-(-(n + m) // 1024), PROGRAMS)
        # Each launch reads what the one before has left.
        partials = gaps.new_empty(2, 5, P)
        rounds = ROUNDS[passes > 0]
        state = gaps.new_empty(rounds, 8)
        _triton.start_kernel[(programs,)](*pool, partials[0], n, m, P=P, **settings)
        settings |= {"EPS": eps, "PASSES": passes}
        for k in range(rounds):
            old, new = partials[k % 2], partials[(k + 1) % 2]
            _triton.step_kernel[(programs,)](*pool, old, new, state, k, n, m, P=P, **settings)
        old, new = partials[rounds % 2], partials[(rounds + 1) % 2]
        _triton.finish_kernel[(programs,)](
            *pool, old, new, state, rounds, margins, certificate, n, m, P=P, **settings
        )
        _triton.certify_kernel[(1,)](new, certificate, programs, P=P)
    return margins, certificate


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
    arguments = (
        chosen, rejected, reference_chosen, reference_rejected, mask, context, context_mask,
        beta, gamma0, tau, tilt, centered, reduction,
    )  # fmt: skip
    if runs_on(chosen.device):
        try:
            return _launch_loss(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            give_up(error)
    return _eager_loss(*arguments)


def _outputs(
    chosen: Tensor, rejected: Tensor | None, reference: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = chosen.shape[0]
    T = torch.float32
    for array in (chosen, rejected, reference):
        if array is not None:
            T = torch.promote_types(T, array.dtype)
    return (
        chosen.new_empty(n if reduction == "none" else (), dtype=T),
        chosen.new_empty((5 if rejected is None else 8, n), dtype=T),
        chosen.new_empty(2, dtype=T),
        chosen.new_empty(n, dtype=torch.bool),
    )


def _launch_loss(
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
    from gamma_loss.kernels import _triton

    loss, rows, certificate, mask_out = _outputs(chosen, rejected, reference_chosen, reduction)
    n, m = chosen.shape[0], 0 if context is None else context.shape[0]
    inputs = _contiguous(
        chosen, rejected, reference_chosen, reference_rejected, mask, context, context_mask
    )
    with _on_device_of(chosen):
        _triton.pool_kernel[(1,)](
            *inputs, rows, certificate, loss, mask_out, rows.new_empty(3 * (n + m)), n, m,
            beta=beta, tilt=tilt, CENTERED=centered, REDUCTION=reduction,
            **_settings(rows.dtype, n + m, gamma0, tau),
        )  # fmt: skip
    return loss, rows, certificate, mask_out


_library = torch.library.Library("gamma_loss", "DEF")
_library.define(
    "solve(Tensor gaps, Tensor? mask, Tensor? context, Tensor? context_mask, "
    "float gamma0, float tau) -> (Tensor, Tensor)"
)
_library.define(
    "loss(Tensor chosen, Tensor? rejected, Tensor? reference_chosen, Tensor? reference_rejected, "
    "Tensor? mask, Tensor? context, Tensor? context_mask, float beta, float gamma0, float tau, "
    "float tilt, bool centered, str reduction) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("solve", _solve, "CompositeExplicitAutograd")
_library.impl("loss", _loss, "CompositeExplicitAutograd")

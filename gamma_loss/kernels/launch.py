"""Launches of the Triton kernels. Nothing is read back from the device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gamma_loss import _newton
from gamma_loss.kernels import triton_kernels as kernels

POOL_LIMIT = 16_384  # the largest pool that one program takes
PROGRAMS = 1024  # at most, for a larger one
# (entries at a time, warps) for pools that fit, and for others: they spill no registers on sm_90.
SMALL, LARGE = {False: (256, 8), True: (512, 16)}, (1024, 8)
# Levels that a large pool may try, in mild settings and in others; rounds left over return at once.
ROUNDS = {True: 6, False: 48}

# Whether Triton runs its kernels on the CPU, in Python.
INTERPRETED = type(kernels.pool_kernel).__name__ == "InterpretedFunction"


def _settings(T: torch.dtype, size: int, gamma0: float, tau: float) -> dict[str, Any]:
    double = torch.float64 == T
    block, warps = SMALL[double] if size <= SMALL[double][0] else LARGE
    return {
        "gamma0": gamma0,
        "a": gamma0 / tau,
        "T": tl.float64 if double else tl.float32,
        "EPS": torch.finfo(T).eps,
        "BLOCK": block,
        "PASSES": _newton.mild_passes(gamma0, tau, double),
        "num_warps": warps,
    }


def _on_device_of(array: Tensor) -> contextlib.AbstractContextManager[Any]:
    if array.device.type == "cuda" and array.device.index != torch.cuda.current_device():
        return torch.cuda.device(array.device)
    return contextlib.nullcontext()


def _contiguous(*arrays: Tensor | None) -> list[Tensor | None]:
    return [None if array is None else array.contiguous() for array in arrays]


def solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Return the margins, and ν with the certificate, of a pool of any size."""
    pool = _contiguous(gaps, mask, context, context_mask)
    n, m = gaps.shape[0], 0 if context is None else context.shape[0]
    settings = _settings(gaps.dtype, n + m, gamma0, tau)
    margins, certificate = torch.empty_like(gaps), gaps.new_empty(2)
    with _on_device_of(gaps):
        if n + m <= POOL_LIMIT:
            kernels.pool_kernel[(1,)](
                pool[0], None, None, None, *pool[1:],
                margins, certificate, None, None, gaps.new_empty(3 * (n + m)), n, m,
                beta=1.0, tilt=0.0, CENTERED=False, REDUCTION="none", **settings,
            )  # fmt: skip
            return margins, certificate

        eps, passes = settings.pop("EPS"), settings.pop("PASSES")
        P, programs = PROGRAMS, min(-(-(n + m) // LARGE[0]), PROGRAMS)
        # Each launch reads what the one before has left.
        partials = gaps.new_empty(2, 5, P)
        rounds = ROUNDS[passes > 0]
        state = gaps.new_empty(rounds, 8)
        kernels.start_kernel[(programs,)](*pool, partials[0], n, m, P=P, **settings)
        settings |= {"EPS": eps, "PASSES": passes}
        for k in range(rounds):
            old, new = partials[k % 2], partials[(k + 1) % 2]
            kernels.step_kernel[(programs,)](*pool, old, new, state, k, n, m, P=P, **settings)
        old, new = partials[rounds % 2], partials[(rounds + 1) % 2]
        kernels.finish_kernel[(programs,)](
            *pool, old, new, state, rounds, margins, certificate, n, m, P=P, **settings
        )
        kernels.certify_kernel[(1,)](new, certificate, programs, P=P)
    return margins, certificate


def loss(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
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
) -> None:
    """Fill loss, rows, certificate and mask of a pool of at most `POOL_LIMIT`."""
    loss, rows, certificate, mask_out = outputs
    n, m = chosen.shape[0], 0 if context is None else context.shape[0]
    inputs = _contiguous(
        chosen, rejected, reference_chosen, reference_rejected, mask, context, context_mask
    )
    with _on_device_of(chosen):
        kernels.pool_kernel[(1,)](
            *inputs, rows, certificate, loss, mask_out, rows.new_empty(3 * (n + m)), n, m,
            beta=beta, tilt=tilt, CENTERED=centered, REDUCTION=reduction,
            **_settings(rows.dtype, n + m, gamma0, tau),
        )  # fmt: skip

"""The launch of the Triton kernel. Nothing is read back from the device."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from gamma_loss._solver import mild_passes
from gamma_loss.kernels import math
from gamma_loss.kernels.solve import solve_kernel

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):  # of named tuples they take no None
    raise ImportError(f"the kernel needs Triton 3.5 or later, this is {triton.__version__}")
INTERPRETED: bool = math.INTERPRETED.value
if not INTERPRETED:
    _ = triton.runtime.driver.active  # raises without a driver or a C compiler

# The largest block that spills no registers on sm_90, in mild settings and in others; and the most
# warps, so that each has many registers.
LIMITS = {torch.float32: (8192, 4096), torch.float64: (4096, 2048)}
WARPS = {torch.float32: 16, torch.float64: 8}


def fits(gaps: Tensor, gamma0: float, tau: float) -> bool:
    """Return whether one program takes a pool."""
    mild, other = LIMITS[gaps.dtype]
    return gaps.shape[0] <= (mild if _passes(gaps, gamma0, tau) else other)


def solve(gaps: Tensor, weights: Tensor | None, gamma0: float, tau: float) -> tuple[Tensor, Tensor]:
    """Return the margins of a pool that fits, and ν with the error bound.

    The first call compiles the kernel, once for each dtype, power of two that holds the pool, kind
    of setting, and with or without weights. A CUDA graph needs such a call before its capture.
    """
    gaps, weights = gaps.contiguous(), None if weights is None else weights.contiguous()
    margins, numbers = torch.empty_like(gaps), gaps.new_empty(2)
    block, warps = block_of(gaps.shape[0], gaps.dtype)
    with _on_device_of(gaps):
        solve_kernel[(1,)](
            gaps, weights, margins, numbers, gaps.shape[0], gamma0=gamma0, a=gamma0 / tau,
            PASSES=_passes(gaps, gamma0, tau), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return margins, numbers


def block_of(size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the size of the block for a pool, and its warps."""
    block = max(128, triton.next_power_of_2(size))
    return block, min(block // 32, WARPS[dtype])


def _passes(gaps: Tensor, gamma0: float, tau: float) -> int:
    return mild_passes(gamma0, tau, gaps.dtype == torch.float64)


def _on_device_of(array: Tensor) -> contextlib.AbstractContextManager[None]:
    if array.device.type == "cuda" and array.device.index != torch.cuda.current_device():
        return torch.cuda.device(array.device)
    return contextlib.nullcontext()

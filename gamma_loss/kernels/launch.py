"""Launches of the Triton kernels. Nothing is read back from the device."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gamma_loss._loss import Logps, LossSettings
from gamma_loss._mild import mild_passes
from gamma_loss.kernels import large, math, pool
from gamma_loss.kernels.outputs import Outputs
from gamma_loss.kernels.passes import Memory

if TYPE_CHECKING:
    from gamma_loss._pool import Beside

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):  # of named tuples they take no None
    raise ImportError(f"the kernels need Triton 3.5 or later, this is {triton.__version__}")

INTERPRETED: bool = math.INTERPRETED.value
POOL_LIMIT = 16_384  # the largest pool that one program takes
PROGRAMS = 256  # at most, for a larger one
# Levels that it may try, in mild settings and in others; rounds left over return at once.
ROUNDS = {True: 6, False: 24}

# What spills no registers on sm_90: the largest pool that is one block, and what a warp gets of it
# if there are no more than 16; the block and the warps for a larger one.
SINGLE = {torch.float32: (2048, 64), torch.float64: (512, 32)}
BLOCK, WARPS = 1024, 8


def solve(gaps: Tensor, beside: Beside, gamma0: float, tau: float) -> tuple[Tensor, Tensor]:
    """Return the margins, and ν with the certificate, of a pool of any size."""
    nothing: Any = None
    outputs = Outputs(nothing, torch.empty_like(gaps), gaps.new_empty(2), nothing)
    if _size(gaps, beside) <= POOL_LIMIT:
        loss(Logps(gaps), beside, LossSettings(1.0, gamma0, tau, 0.0, False, "none"), outputs)
    else:
        _solve_large(Logps(gaps), beside, outputs, gamma0, tau)
    return outputs.rows, outputs.certificate


def loss(logps: Logps, beside: Beside, settings: LossSettings, outputs: Outputs) -> None:
    """Fill the outputs for a pool of at most `POOL_LIMIT`."""
    size, dtype = _size(logps.chosen, beside), outputs.rows.dtype
    block, warps = block_of(size, dtype)
    memory = None if size <= block else Memory(*outputs.rows.new_empty(3, size).unbind())
    with _on_device_of(logps.chosen):
        pool.pool_kernel[(1,)](
            _contiguous(logps), _contiguous(beside), outputs, memory, logps.chosen.shape[0], size,
            beta=settings.beta, tilt=settings.tilt, CENTERED=settings.centered,
            REDUCTION=settings.reduction, SINGLE=size <= block, BLOCK=block, num_warps=warps,
            PASSES=mild_passes(settings.gamma0, settings.tau, dtype == torch.float64),
            EPS=torch.finfo(dtype).eps, **_problem(dtype, settings.gamma0, settings.tau),
        )  # fmt: skip


def block_of(size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the entries that a pool's program takes at a time, and its warps."""
    limit, share = SINGLE[dtype]
    if size > limit:
        return BLOCK, WARPS
    block = max(128, triton.next_power_of_2(size))
    return block, min(block // share, 16)


def _solve_large(logps: Logps, beside: Beside, outputs: Outputs, gamma0: float, tau: float) -> None:
    gaps, n, size = logps.chosen, logps.chosen.shape[0], _size(logps.chosen, beside)
    pool, grid = (
        (_contiguous(logps), _contiguous(beside)),
        (min(triton.cdiv(size, BLOCK), PROGRAMS),),
    )
    settings = _problem(gaps.dtype, gamma0, tau) | {
        "P": PROGRAMS,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
    eps, rounds = torch.finfo(gaps.dtype).eps, ROUNDS[mild_passes(gamma0, tau, False) > 0]
    memory = Memory(*gaps.new_empty(3, size).unbind())
    # Each launch reads what the one before has left.
    old, new = gaps.new_empty(2, 6, PROGRAMS, dtype=torch.float64)
    states = gaps.new_empty(rounds, large.STATE.value, dtype=torch.float64)
    with _on_device_of(gaps):
        large.start_kernel[grid](*pool, memory, old, n, size, **settings)
        for turn in range(rounds):
            large.step_kernel[grid](memory, old, new, states, turn, size, EPS=eps, **settings)
            old, new = new, old
        large.finish_kernel[grid](
            *pool, outputs, memory, new, states[-1], n, size, EPS=eps, **settings
        )
        large.certify_kernel[(1,)](new, outputs.certificate, grid[0], P=PROGRAMS)


def _problem(dtype: torch.dtype, gamma0: float, tau: float) -> dict[str, Any]:
    T = tl.float64 if dtype == torch.float64 else tl.float32
    return {"gamma0": gamma0, "a": gamma0 / tau, "T": T}


def _size(gaps: Tensor, beside: Beside) -> int:
    return gaps.shape[0] + (0 if beside.context is None else beside.context.shape[0])


def _contiguous(arrays: Any) -> Any:
    return type(arrays)(*(None if array is None else array.contiguous() for array in arrays))


def _on_device_of(array: Tensor) -> contextlib.AbstractContextManager[Any]:
    if array.device.type == "cuda" and array.device.index != torch.cuda.current_device():
        return torch.cuda.device(array.device)
    return contextlib.nullcontext()

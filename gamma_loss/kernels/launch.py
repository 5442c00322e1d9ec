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
from gamma_loss.kernels import large, pool
from gamma_loss.kernels.math import INTERPRETED as _INTERPRETED
from gamma_loss.kernels.outputs import Outputs
from gamma_loss.kernels.passes import Memory

if TYPE_CHECKING:
    from gamma_loss._pool import Beside

INTERPRETED: bool = _INTERPRETED.value  # whether Triton runs its kernels on the CPU, in Python
POOL_LIMIT = 16_384  # the largest pool that one program takes
SINGLE_LIMIT = 4096  # the largest that it keeps in registers
BLOCK, WARPS = 1024, 8  # of a larger one
PROGRAMS = 256  # at most, for one beyond POOL_LIMIT
ROUNDS = 24  # levels that such a pool may try; rounds left over return at once


def solve(gaps: Tensor, beside: Beside, gamma0: float, tau: float) -> tuple[Tensor, Tensor]:
    """Return the margins, and ν with the certificate, of a pool of any size."""
    margins, certificate = torch.empty_like(gaps), gaps.new_empty(2)
    if _size(gaps, beside) <= POOL_LIMIT:
        settings = LossSettings(1.0, gamma0, tau, 0.0, False, "none")
        outputs: Any = Outputs(None, margins, certificate, None)  # type: ignore[arg-type]
        loss(Logps(gaps), beside, settings, outputs)
    else:
        _solve_large(gaps.contiguous(), beside, margins, certificate, (gamma0, tau))
    return margins, certificate


def loss(logps: Logps, beside: Beside, settings: LossSettings, outputs: Outputs) -> None:
    """Fill the outputs for a pool of at most `POOL_LIMIT`."""
    size, n = _size(logps.chosen, beside), logps.chosen.shape[0]
    block, warps = block_of(size, outputs.rows.dtype)
    single = size <= block
    memory = None if single else Memory(*outputs.rows.new_empty(3, size).unbind())
    with _on_device_of(logps.chosen):
        pool.pool_kernel[(1,)](
            _contiguous(logps), _contiguous(beside), outputs, memory, n, size - n,
            beta=settings.beta, tilt=settings.tilt, CENTERED=settings.centered,
            REDUCTION=settings.reduction, SINGLE=single, BLOCK=block, num_warps=warps,
            **_problem(outputs.rows.dtype, settings.gamma0, settings.tau),
        )  # fmt: skip


def block_of(size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the entries that a pool's program takes at a time, and its warps."""
    if size > SINGLE_LIMIT:
        return BLOCK, WARPS
    block = max(128, triton.next_power_of_2(size))
    return block, min(max(block // 64, 4), 16)


def _solve_large(
    gaps: Tensor, beside: Beside, margins: Tensor, certificate: Tensor, of: tuple[float, float]
) -> None:
    n, size = gaps.shape[0], _size(gaps, beside)
    programs = min(triton.cdiv(size, BLOCK), PROGRAMS)
    settings = _problem(gaps.dtype, *of) | {"P": PROGRAMS, "BLOCK": BLOCK, "num_warps": WARPS}
    passes, eps = settings.pop("PASSES"), settings.pop("EPS")
    more = settings | {"EPS": eps, "MILD": passes > 0}
    rounds = passes - 1 if passes else ROUNDS
    memory = Memory(*gaps.new_empty(3, size).unbind())
    # Each launch reads what the one before has left.
    partials = gaps.new_empty(2, 6, PROGRAMS, dtype=torch.float64)
    states = gaps.new_empty(rounds + 1, large.STATE.value, dtype=torch.float64)
    inputs = Logps(gaps), _contiguous(beside)
    with _on_device_of(gaps):
        large.start_kernel[(programs,)](*inputs, memory, partials[0], n, size - n, **settings)
        for turn in range(rounds + 1):
            kernel = large.step_kernel if turn < rounds else large.weigh_kernel
            old, new = partials[turn % 2], partials[(turn + 1) % 2]
            kernel[(programs,)](memory, old, new, states, turn, size, **more)
        large.finish_kernel[(programs,)](
            gaps, inputs[1].mask, margins, certificate, memory, new, old, states, rounds, n,
            size - n, **more,
        )  # fmt: skip
        large.certify_kernel[(1,)](old, certificate, programs, EPS=eps, P=PROGRAMS, MILD=passes > 0)


def _problem(dtype: torch.dtype, gamma0: float, tau: float) -> dict[str, Any]:
    double = dtype == torch.float64
    return {
        "gamma0": gamma0,
        "a": gamma0 / tau,
        "T": tl.float64 if double else tl.float32,
        "EPS": torch.finfo(dtype).eps,
        "PASSES": mild_passes(gamma0, tau, double),
    }


def _size(gaps: Tensor, beside: Beside) -> int:
    return gaps.shape[0] + (0 if beside.context is None else beside.context.shape[0])


def _contiguous(arrays: Any) -> Any:
    return type(arrays)(*(None if array is None else array.contiguous() for array in arrays))


def _on_device_of(array: Tensor) -> contextlib.AbstractContextManager[Any]:
    if array.device.type == "cuda" and array.device.index != torch.cuda.current_device():
        return torch.cuda.device(array.device)
    return contextlib.nullcontext()

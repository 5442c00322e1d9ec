"""``impl="compile"``: the solvers through torch.compile, compiled once for each kind of pool.

γ0 and τ enter as tensors and sizes as symbols, so neither a schedule nor another batch size
compiles anew. What does change a program is in its key in `_programs`. Outside mild settings there
are three: to begin, to advance by one pass, which is called as often as needed, and to finish.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _solver
from gamma_loss._mild import mild_passes, newton
from gamma_loss._pool import Beside, Problem, as_part, assemble, deliver, weights_of

_programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
_lock = threading.RLock()  # for calls as well: Dynamo's state is not one thread's


def solve(gaps: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return margins, ν and the certificate."""
    gaps, beside = gaps.detach(), problem.beside
    g0, a = _settings(gaps, problem.gamma0, problem.gamma0 / problem.tau)
    if passes := mild_passes(problem.gamma0, problem.tau, gaps.dtype == torch.float64):
        kind = (passes, gaps.dtype, gaps.device, *map(_size_class, (gaps, *beside)))
        result: tuple[Tensor, Tensor, Tensor] = _call(_mild, kind, gaps, *beside, g0, a, passes)
        return result
    pool, kind = as_part(assemble(gaps, beside)), (gaps.dtype, gaps.device)
    state = _call(_solver.begin, kind, pool.gaps, weights_of(pool), g0, a)
    for _ in range(_solver.MOST):
        state = _call(_solver.advance, kind, state)
        if gaps.device.type == "cpu" and state.done:  # elsewhere a look at it would wait
            break
    margins, *numbers = _call(_solver.finish, kind, state)
    return deliver(margins, gaps, beside.mask, pool, problem.gamma0), *numbers


def _settings(like: Tensor, *values: float) -> tuple[Tensor, ...]:
    if like.device.type == "cpu":
        return _kept(like.dtype, *values)
    # Made anew on a GPU: a CUDA graph may outlive what is kept.
    return tuple(like.new_full((), value) for value in values)


@functools.lru_cache
@torch.inference_mode(mode=False)  # whose tensors would ask for a program of their own
def _kept(dtype: torch.dtype, *values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=dtype, device="cpu") for value in values)


def _mild(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: Tensor,
    a: Tensor,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pool = assemble(gaps, Beside(mask, context, context_mask))
    margins, *numbers = newton(pool.gaps, weights_of(pool), gamma0, a, passes)
    return deliver(margins, gaps, mask, pool, gamma0), *numbers


def _call(function: Callable[..., Any], kind: tuple[Any, ...], *arguments: Any) -> Any:
    """Call a function's program for a kind of arguments."""
    key = function, kind
    with _lock:
        program = _programs.get(key)
        if program is None:
            program = torch.compile(_own_code(function), fullgraph=True, dynamic=True)
            _programs[key] = program
        return program(*arguments)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function with a code object of its own: Dynamo counts recompilations by these."""
    code, defaults = function.__code__.replace(), function.__defaults__
    return types.FunctionType(code, function.__globals__, argdefs=defaults)


def _size_class(array: Tensor | None) -> int:
    """Sizes of 0 and 1 are constants of a program; others are symbols."""
    return -1 if array is None else min(array.shape[0], 2)

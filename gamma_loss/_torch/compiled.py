"""``impl="compile"``: the solvers through torch.compile, compiled once for each kind of pool.

γ0 and τ enter as tensors and sizes as symbols, so neither a schedule nor another batch size
compiles anew. What does change a program is in its key in `_programs`.
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
from gamma_loss._pool import Beside, Problem, assemble, deliver, weights_of

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
    # One pass is compiled, and called as often as needed: a loop of it would be unrolled.
    pool = assemble(gaps, beside)
    state = _solver.begin(pool.gaps, weights_of(pool), g0, a, run=_run)
    state = _solver.iterate(state, run=_run)
    margins, *numbers = _solver.finish(state, run=_run)
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


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function's program, which takes a number that changes as a tensor."""
    like = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0].start
    numbers = functools.partial(torch.tensor, dtype=like.dtype, device=like.device)
    arguments = tuple(numbers(each) if isinstance(each, float) else each for each in arguments)
    kind = (like.dtype, like.device, *map(_kind, arguments))
    return _call(function, kind, *arguments)


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
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def _kind(argument: Any) -> Any:
    """Return what of an argument changes a program."""
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, Tensor):
        return _size_class(argument) if argument.ndim else ()
    return argument


def _size_class(array: Tensor | None) -> int:
    """Sizes of 0 and 1 are constants of a program; others are symbols."""
    return -1 if array is None else min(array.shape[0], 2)

"""``impl="compile"``: the array-API solver through torch.compile, compiled once for each kind.

γ0 and τ enter as tensors and sizes as symbols, so neither a schedule nor another batch size
compiles anew. What does change the program is in its key in `_programs`.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _newton
from gamma_loss.margins import as_weights, assemble, deliver

_programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
_lock = threading.Lock()


def solve(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return margins, ν and the certificate, as `gamma_loss.margins.solve_pool` does."""
    pool = (gaps, mask, context, context_mask)
    g0, a = _scalars(gamma0, tau, gaps)
    home = (gaps.dtype, gaps.device)
    if passes := _newton.mild_passes(gamma0, tau, gaps.dtype == torch.float64):
        same = context is not None and len(context) == len(gaps)  # one symbol or two
        kind = (passes, *home, *map(_size_class, pool), same)
        result: tuple[Tensor, Tensor, Tensor] = _run(_mild, kind, *pool, g0, a, passes)
        return result

    # One safeguarded pass is compiled, and called as often as needed: the whole, unrolled, would
    # take minutes to compile.
    values, in_pool, finite = assemble(*pool)
    inside = as_weights(in_pool, values, mask is not None or context_mask is not None)
    state = _newton.bracketed_start(torch, values, inside, g0, a)
    look = gaps.device.type == "cpu"  # where a value costs no synchronisation
    quiet = 0
    for _ in range(_newton.bracketed_passes(gamma0, tau)):
        state, settled = _run(_pass, ("pass", *home, _size_class(values)), state)
        quiet = quiet + 1 if look and settled.item() else 0
        if quiet == 2:
            break
    margins, nu, residual = _newton.bracketed_end(torch, inside, state)
    return deliver(margins, finite, mask, len(gaps), gamma0), nu, residual


def _mild(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: Tensor,
    a: Tensor,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pool, in_pool, finite = assemble(gaps, mask, context, context_mask)
    inside = as_weights(in_pool, pool, mask is not None or context_mask is not None)
    margins, nu, residual = _newton.newton(torch, pool, inside, gamma0, a, passes)
    return deliver(margins, finite, mask, gaps.shape[0], gamma0), nu, residual


def _pass(state: _newton.BracketedState) -> tuple[_newton.BracketedState, Tensor]:
    new = _newton.bracketed_pass(state)
    return new, _newton.settled(state, new)


def _run(function: Callable[..., Any], kind: tuple[Any, ...], *arguments: Any) -> Any:
    program = _programs.get(kind)
    if program is not None:
        return program(*arguments)
    with _lock:  # one thread compiles, the others wait and find it
        program = _programs.get(kind)
        if program is None:
            program = torch.compile(_own_code(function), fullgraph=True, dynamic=True)
        result = program(*arguments)
        _programs[kind] = program
    return result


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function with a code object of its own: Dynamo counts recompilations by these."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def _scalars(gamma0: float, tau: float, like: Tensor) -> tuple[Tensor, Tensor]:
    if like.device.type == "cpu":
        return _kept_scalars(gamma0, gamma0 / tau, like.dtype)
    # Made anew on a GPU: a CUDA graph may outlive what is kept here.
    return like.new_full((), gamma0), like.new_full((), gamma0 / tau)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _kept_scalars(gamma0: float, a: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor(gamma0, dtype=dtype), torch.tensor(a, dtype=dtype)


def _size_class(array: Tensor | None) -> int:
    """Sizes of 0 and 1 are constants of a program; others are symbols."""
    return -1 if array is None else min(len(array), 2)

"""``impl="compile"``: the array-API solver through torch.compile, compiled once for each kind.

γ0 and τ enter as tensors and sizes as symbols, so neither a schedule nor another batch size
compiles anew. What does change the program is in the key of `_compiled`.
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
from gamma_loss.margins import assemble, deliver

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
    passes = _newton.mild_passes(gamma0, tau, gaps.dtype == torch.float64)
    hyperparameters = _scalars(gamma0, tau, gaps.dtype, gaps.device)
    kind = (gaps.dtype, gaps.device.type, *map(_kind_of_size, pool), _same_size(gaps, context))
    if passes:
        result: tuple[Tensor, Tensor, Tensor] = _run(
            _mild, (passes, *kind), *pool, *hyperparameters, passes
        )
        return result

    # The safeguarded passes are one program, called as often as needed: unrolled they would take
    # minutes to compile.
    inside, finite, state = _run(_start, ("start", *kind), *pool, *hyperparameters)
    look = gaps.device.type == "cpu"  # where a value costs no synchronisation
    kind = ("pass", gaps.dtype, gaps.device.type, min(inside.shape[0], 2))
    quiet = 0
    for _ in range(_newton.bracketed_passes(gamma0, tau)):
        state, settled = _run(_pass, kind, state)
        quiet = quiet + 1 if look and settled.item() else 0
        if quiet == 2:
            break
    kind = ("end", *kind[1:], mask is None, _kind_of_size(gaps), inside.shape == gaps.shape)
    result = _run(_end, kind, inside, finite, mask, gaps, state)
    return result


def _mild(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: Tensor,
    a: Tensor,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pool, inside, finite = assemble(gaps, mask, context, context_mask)
    margins, nu, residual = _newton.newton(torch, pool, inside, gamma0, a, passes)
    return deliver(margins, finite, mask, gaps.shape[0], gamma0), nu, residual


def _start(
    gaps: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    gamma0: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, _newton.BracketedState]:
    pool, inside, finite = assemble(gaps, mask, context, context_mask)
    return inside, finite, _newton.bracketed_start(torch, pool, inside, gamma0, a)


def _pass(state: _newton.BracketedState) -> tuple[_newton.BracketedState, Tensor]:
    new = _newton.bracketed_pass(state)
    return new, _newton.settled(state, new)


def _end(
    inside: Tensor,
    finite: Tensor,
    mask: Tensor | None,
    gaps: Tensor,
    state: _newton.BracketedState,
) -> tuple[Tensor, Tensor, Tensor]:
    margins, nu, residual = _newton.bracketed_end(torch, inside, state)
    return deliver(margins, finite, mask, gaps.shape[0], state.gamma0), nu, residual


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


@functools.lru_cache(maxsize=64)
def _scalars(
    gamma0: float, tau: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(gamma0, dtype=dtype, device=device),
        torch.tensor(gamma0 / tau, dtype=dtype, device=device),
    )


def _kind_of_size(array: Tensor | None) -> int:
    """Sizes 0 and 1 are constants of a program; others are symbols."""
    return -1 if array is None else min(array.shape[0], 2)


def _same_size(gaps: Tensor, context: Tensor | None) -> bool:
    return context is not None and context.shape == gaps.shape

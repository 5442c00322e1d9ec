"""The pool of a margin problem: which gaps are in it, and what its solution means for each pair.

What makes a gap *inside* is decided here and nowhere else: the masks of batch and context, and that
it is finite. A pool with nothing inside counts as one of equal gaps, so that every margin is γ0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gamma_loss import _checks, _solver
from gamma_loss._arrays import (
    Array,
    as_floats,
    detach,
    device,
    is_free_to_read,
    isfinite,
    namespace,
    quiet,
    solver_namespace,
)


class Beside(NamedTuple):
    """What comes beside a batch of gaps: which of them are inside, and others that join them."""

    mask: Array | None = None
    context: Array | None = None
    context_mask: Array | None = None


ALONE = Beside()

Solution = tuple[Array, Array, Array]  # margins, ν, certificate


class Pool(NamedTuple):
    """The gaps of batch and context, 0 for one that is not inside."""

    gaps: Array
    inside: Array | None  # None: all are


class Problem(NamedTuple):
    """A checked margin problem, but for the gaps of the batch."""

    gamma0: float
    tau: float
    beside: Beside
    size: int  # of the pool, as far as it is here
    group: Any = None  # who else has parts of it


def check(
    name: str, gaps: Array, beside: Beside, *, gamma0: float, tau: float, group: Any
) -> Problem:
    """Check a problem over the gaps called ``name``. A queue as context brings its own mask."""
    gamma0, tau = _checks.problem(gamma0, tau)
    xp = namespace(gaps)
    mask, context, context_mask = beside
    if mask is not None:
        _checks.mask("mask", mask, name, gaps, xp)
    queue: Any = context if hasattr(context, "gaps") else None
    if queue is not None:
        if context_mask is not None:
            raise ValueError("context_mask must be None for a queue as context, which has its own")
        context, context_mask = queue.gaps, queue.mask
    size = int(gaps.shape[0])
    if context is None:
        if context_mask is not None:
            raise ValueError("context_mask was given without a context")
    else:
        _checks.real(**{name: gaps, "context": context})
        context = _checks.upcast(xp, context)  # NumPy knows no bfloat16
        _checks.pairs(group is not None, context=context)
        if queue is not None or context_mask is not None:
            _checks.mask("context_mask", context_mask, "context", context, xp)
        size += int(context.shape[0])
    return Problem(gamma0, tau, Beside(mask, context, context_mask), size, group)


def solve(gaps: Array, problem: Problem) -> Solution:
    """Solve a problem whose pool is here in one piece, by array operations."""
    pool = assemble(gaps, problem.beside)
    with quiet(gaps):
        margins, *numbers = _solver.solve(pool.gaps, weights_of(pool), problem.gamma0, problem.tau)
    return deliver(margins, gaps, problem.beside.mask, pool, problem.gamma0), *numbers


def assemble(gaps: Array, beside: Beside = ALONE) -> Pool:
    """Put batch and context together, as constants for automatic differentiation."""
    xp, gaps = solver_namespace(gaps), detach(gaps)
    mask, context, context_mask = beside
    parts = [(gaps, mask)]
    if context is not None:
        parts.append((namespace(context).astype(detach(context), gaps.dtype), context_mask))
        gaps = xp.concat([values for values, _ in parts])
    inside = isfinite(gaps)
    if mask is not None or context_mask is not None:
        masks = [
            xp.ones_like(values, dtype=xp.bool) if mask is None else mask for values, mask in parts
        ]
        inside = inside & (xp.concat(masks) if len(masks) > 1 else masks[0])
    if is_free_to_read(gaps) and bool(xp.all(inside)):
        return Pool(gaps, None)
    return Pool(xp.where(inside, gaps, xp.zeros_like(gaps)), inside)


def as_part(pool: Pool) -> Pool:
    """Return the pool with its mask; of an empty part, one gap that is not inside."""
    gaps, inside = pool
    xp = solver_namespace(gaps)
    if not gaps.shape[0]:
        gaps = xp.zeros(1, dtype=gaps.dtype, device=device(gaps))
        return Pool(gaps, xp.zeros_like(gaps, dtype=xp.bool))
    return Pool(gaps, xp.ones_like(gaps, dtype=xp.bool) if inside is None else inside)


def weights_of(pool: Pool, empty: Array | None = None) -> Array | None:
    """Return 1 for a gap inside and 0 for others, as a solver takes them, or None for all 1.

    ``empty`` says whether nothing is inside, where this is only a part of the pool.
    """
    if pool.inside is None:
        return None
    if empty is None:
        empty = ~solver_namespace(pool.gaps).any(pool.inside)
    return as_floats(pool.inside | empty, pool.gaps)


def deliver(
    margins: Array, gaps: Array, mask: Array | None, pool: Pool, gamma0: Array | float
) -> Array:
    """Return the margins of a batch: NaN for a gap that is not finite, γ0 for a masked one."""
    xp = solver_namespace(margins)
    margins = margins[: gaps.shape[0]]
    if pool.inside is not None:
        margins = xp.where(isfinite(detach(gaps)), margins, xp.full_like(margins, math.nan))
    if mask is None:
        return margins
    return xp.where(mask, margins, xp.ones_like(margins) * gamma0)

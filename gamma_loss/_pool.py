"""The pool of a margin problem: batch and context on the way in, margins on the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gamma_loss import _checks, _comm, _solver
from gamma_loss._backend import Array
from gamma_loss._comm import Comm


class PoolInputs(NamedTuple):
    """Optional inputs: mask and weights of the batch, and context gaps with their mask."""

    mask: Array | None = None
    weights: Array | None = None
    context: Array | None = None
    context_mask: Array | None = None


NO_INPUTS = PoolInputs()


def check_inputs(
    name: str, gaps: Array, xp: Any, group: Any, context: Any, context_mask: Array | None,
    mask: Array | None, weights: Array | None,
) -> PoolInputs:  # fmt: skip
    """Check the optional inputs against the gaps called ``name``; a queue brings its own mask."""
    if mask is weights is context is context_mask is None:
        return NO_INPUTS
    if mask is not None:
        _checks.mask("mask", mask, name, gaps, xp)
    if weights is not None:
        weights = _checks.weights(weights, name, gaps, xp)
    context, context_mask, *_ = split_queue(context, context_mask)
    if context is not None:
        _, (_, context) = _checks.floats(**{name: gaps, "context": context})
        _checks.pairs(group is not None, context=context)
        if context_mask is not None:
            _checks.mask("context_mask", context_mask, "context", context, xp)
    elif context_mask is not None:
        raise ValueError("context_mask was given without a context")
    return PoolInputs(mask, weights, context, context_mask)


def split_queue(context: Any, context_mask: Array | None, *others: Any) -> tuple[Any, ...]:
    """Return the gaps and the mask of a queue that is given as context, and the others as given."""
    if hasattr(context, "gaps"):
        if context_mask is not None:
            raise ValueError("context_mask must be None for a queue as context, which has its own")
        context, context_mask = context.gaps, context.mask
        if context_mask is None:
            raise TypeError("context_mask must be an array in a queue, got NoneType")
    return context, context_mask, *others


def solve_in(
    solver: Callable[..., _solver.Solution], xp: Any, gaps: Array, inputs: PoolInputs,
    gamma0: float, tau: float,
) -> _solver.Solution:  # fmt: skip
    """Return the margins of the batch, ν and the error bound, by a solver of pools."""
    if inputs is NO_INPUTS:
        return solver(xp, xp.detach(gaps), None, gamma0, tau)
    margins, *numbers = solver(xp, *build_pool(xp, gaps, inputs), gamma0, tau)
    return scatter_margins(xp, margins, gaps, inputs, gamma0), *numbers


def build_pool(xp: Any, gaps: Array, inputs: PoolInputs) -> tuple[Array, Array | None]:
    """Return the gaps of batch and context, with a weight for each, or None for equal weights."""
    gaps = xp.detach(gaps)
    mask, weights, context, context_mask = inputs
    if mask is not None:
        counted = xp.astype(mask, gaps.dtype)
        weights = counted if weights is None else xp.where(mask, weights, 0 * counted)
    if context is None:
        return gaps, weights
    others = xp.astype(xp.detach(context), gaps.dtype)
    if weights is not None or context_mask is not None:
        weights = xp.ones_like(gaps) if weights is None else weights
        more = xp.ones_like(others) if context_mask is None else xp.astype(context_mask, gaps.dtype)
        weights = xp.concat([weights, more])
    return xp.concat([gaps, others]), weights


def scatter_margins(
    xp: Any, margins: Array, gaps: Array, inputs: PoolInputs, gamma0: float
) -> Array:
    """Return the margins of the batch, gamma0 for a pair that takes no part."""
    margins = margins[: gaps.shape[0]]
    for kept in (inputs.mask, None if inputs.weights is None else inputs.weights > 0):
        if kept is not None:
            margins = xp.where(kept, margins, xp.full_like(margins, gamma0))
    return margins


def solve_eagerly(
    xp: Any, gaps: Array, weights: Array | None, gamma0: float, tau: float
) -> _solver.Solution:
    """Solve a pool whose gaps may be not finite: these take no part, and their margin is NaN."""
    with xp.ignore_fp_errors():
        if xp.is_host and weights is None and math.isfinite(xp.sum(gaps)):
            return _solver.solve(xp, gaps, None, gamma0, tau)
        weights, lost = finite_pool(xp, gaps, weights)
        margins, nu, bound = _solver.solve(xp, gaps, weights, gamma0, tau)
        return margins + lost, nu, bound


def finite_pool(xp: Any, gaps: Array, weights: Array | None) -> tuple[Array, Array]:
    """Return weight 0 for each entry that takes no part, and NaN for its margin."""
    lost, zero = gaps - gaps, xp.zeros_like(gaps)
    valid = lost == 0 if weights is None else (lost == 0) & (weights > 0)
    return xp.where(valid, zero + 1 if weights is None else weights, zero), lost


def solve_shards(
    xp: Any, gaps: Array, weights: Array | None, gamma0: float, tau: float, comm: Comm
) -> _solver.Solution:
    """Gather a small pool and solve it everywhere; of a large pool reduce sums only."""
    size = comm.pool_size(gaps, gamma0=gamma0, tau=tau)
    weights = xp.ones_like(gaps) if weights is None else weights
    if is_small := size <= _comm.GATHER_LIMIT:
        gaps, weights = comm.all_gather(xp.stack([gaps, weights]))
    weights, lost = finite_pool(xp, gaps, weights)
    pool = gaps
    if not gaps.shape[0]:  # no gap becomes one entry that takes no part
        pool = weights = xp.zeros(1, dtype=gaps.dtype, device=xp.device(gaps))
    within = _comm.LOCAL if is_small else comm
    margins, *numbers = _solver.solve(xp, pool, weights, gamma0, tau, within)
    margins = margins[: gaps.shape[0]] + lost
    nu, bound = comm.mark_replicated(*numbers)
    return comm.local_shard(margins) if is_small else margins, nu, bound

"""The passes over a pool, or over the part of it that one program has.

Where the pool is one block (SINGLE) it stays in registers from pass to pass, and the loop over
blocks is none. Else `Memory` holds pointers to what is kept of each entry.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gamma_loss._loss import Rows
from gamma_loss.kernels.level import (
    Problem,
    Seen,
    both,
    certify,
    first_guess,
    look,
    settle,
    side_of,
)
from gamma_loss.kernels.math import is_finite, log1p, sigmoid, sigmoids, softplus, sums2


class Part(NamedTuple):
    """The blocks that a program goes over, and the size of the whole pool."""

    first: tl.tensor
    stride: tl.tensor
    size: tl.tensor


class Memory(NamedTuple):
    """What is kept of each entry. Its u is ``u + change * slope``, once the change is known."""

    gaps: tl.tensor  # NaN for one that is not inside
    u: tl.tensor
    slope: tl.tensor


class Survey(NamedTuple):
    """What the first step needs, and how many pairs of the batch count."""

    count: tl.tensor
    pairs: tl.tensor
    of_p: tl.tensor  # Σ p / D of equal margins
    of_q: tl.tensor
    least: tl.tensor  # γ0 - g
    largest: tl.tensor


# --- entries ---


@triton.jit
def _load(pointer, at, here, T: tl.constexpr):
    return tl.load(pointer + at, mask=here, other=0.0).to(T)


@triton.jit
def _member(mask, at, here):
    return here if mask is None else here & (tl.load(mask + at, mask=here, other=0) != 0)


@triton.jit
def _reward(i, n, responses, references, beta, T: tl.constexpr):
    logps = _load(responses, i, i < n, T)
    if references is not None:
        logps -= _load(references, i, i < n, T)
    return beta * logps


@triton.jit
def _rewards(logps, i, n, beta, T: tl.constexpr):
    """Return the rewards, of which the gaps are the differences."""
    if logps.rejected is None:
        gaps = _load(logps.chosen, i, i < n, T)
        return gaps, tl.zeros_like(gaps)
    else:
        chosen = _reward(i, n, logps.chosen, logps.reference_chosen, beta, T)
        return chosen, _reward(i, n, logps.rejected, logps.reference_rejected, beta, T)


@triton.jit
def _assemble(logps, beside, i, n, size, beta, T: tl.constexpr):
    """Return the gaps of batch and context, and which of the batch's pairs count."""
    chosen, rejected = _rewards(logps, i, n, beta, T)
    counted = _member(beside.mask, i, i < n)
    gaps, inside = chosen - rejected, counted
    if beside.context is not None:
        here = (i >= n) & (i < size)
        gaps = tl.where(i < n, gaps, _load(beside.context, i - n, here, T))
        inside |= _member(beside.context_mask, i - n, here)
    return tl.where(inside & is_finite(gaps), gaps, float("nan")), counted


@triton.jit
def _recall(memory, i, size, problem, change, SINGLE: tl.constexpr):
    """Return gaps, which of them are inside, and u after the change."""
    gaps, u, slope = memory
    if not SINGLE:
        gaps = tl.load(gaps + i, mask=i < size, other=float("nan"))
        u = tl.load(u + i, mask=i < size, other=0.0)
        slope = tl.load(slope + i, mask=i < size, other=0.0)
    inside = gaps == gaps
    inside = tl.where(problem.empty, i < size, inside)
    return tl.where(gaps == gaps, gaps, 0.0), inside, u + change.to(u.dtype) * slope


@triton.jit
def _keep(memory, i, size, u, slope, SINGLE: tl.constexpr):
    if SINGLE:
        memory = Memory(memory.gaps, u, slope)
    else:
        tl.store(memory.u + i, u, mask=i < size)
        tl.store(memory.slope + i, slope, mask=i < size)
    return memory


# --- passes ---


@triton.jit
def survey(
    logps, beside, memory, part, n, beta, gamma0, a,
    T: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """Assemble the pool, and take what Newton's step from equal margins needs."""
    zero, least = tl.full((), 0.0, tl.float64), tl.full((), float("inf"), T)
    count, pairs, of_p, of_q, largest = zero, zero, zero, zero, -least
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, counted = _assemble(logps, beside, i, n, part.size, beta, T)
        inside = gaps == gaps
        z = gamma0 - tl.where(inside, gaps, 0.0)
        p, q = sigmoids(z)
        slope = 1 / (1 + a * gamma0 * p * q)
        if SINGLE:
            memory = Memory(gaps, gaps, gaps)
        else:
            tl.store(memory.gaps + i, gaps, mask=i < part.size)
        memory = _keep(memory, i, part.size, -a * p * slope, slope, SINGLE)
        counts = sums2(inside.to(T), counted.to(T))
        sums = sums2(tl.where(inside, p * slope, 0.0), tl.where(inside, q * slope, 0.0))
        count, pairs, of_p, of_q = (
            count + counts[0],
            pairs + counts[1],
            of_p + sums[0],
            of_q + sums[1],
        )
        if not MILD:
            least = tl.minimum(least, tl.min(tl.where(inside, z, float("inf")), 0))
            largest = tl.maximum(largest, tl.max(tl.where(inside, z, float("-inf")), 0))
    return memory, Survey(count, pairs, of_p, of_q, least, largest)


@triton.jit
def problem_of(seen, size, gamma0, a):
    """Return the problem, and the survey, which is of equal gaps if there is nothing inside."""
    empty = seen.count == 0
    if empty:
        p, q = sigmoids(gamma0)
        count, of_p, of_q = size.to(tl.float64), p.to(tl.float64), q.to(tl.float64)
        seen = Survey(count, seen.pairs, of_p, of_q, gamma0, gamma0)
    room = (log1p(a) + 50 - seen.least) / gamma0  # as z <= λ where x > 1
    return Problem(gamma0, a, log1p(tl.maximum(room, 0.0)), seen.count, empty), seen


@triton.jit
def mild_pass(memory, part, problem, nu, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Take a step of the arrowhead Newton of `gamma_loss._mild`; return also its ν."""
    bottom = tl.full((), 0.0, tl.float64)
    top = problem.count * problem.gamma0
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, inside, u = _recall(memory, i, part.size, problem, nu, SINGLE)
        y = problem.gamma0 * tl.exp(u)
        p = sigmoid(y - gaps)
        at = problem.a * p
        v, d = u + at, 1 + y * (at - at * p)
        slope = 1 / d
        memory = _keep(memory, i, part.size, u - v * slope, slope, SINGLE)
        w = tl.where(inside, y * slope, 0.0)
        sums = sums2(w, w * (v - d))
        bottom, top = bottom + sums[0], top + sums[1]
    return memory, top / bottom


@triton.jit
def weigh(memory, part, problem, nu, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Return Σ x."""
    mass = tl.full((), 0.0, tl.float64)
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        _, inside, u = _recall(memory, i, part.size, problem, nu, SINGLE)
        mass += tl.sum(tl.where(inside, tl.exp(u), 0.0), 0).to(tl.float64)
    return mass


@triton.jit
def level_pass(
    memory, part, problem, state, turn,
    EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """Take a step of the pairs at a level, or all that it takes; return also what it tells."""
    zero, top = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float32)
    seen = Seen(zero, zero, top, top, top, top)
    s, k = side_of(state.at, problem.a)
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, inside, u = _recall(memory, i, part.size, problem, state.d_nu, SINGLE)
        u = tl.minimum(u, problem.most)
        if turn == 0:
            u = first_guess(problem, gaps, state.at, s, k)
        if SETTLE:
            u, slope, more = settle(problem, gaps, inside, u, s, k, state.far, EPS)
        else:
            u, slope, more = look(problem, gaps, inside, u, s, k, state.far)
        memory = _keep(memory, i, part.size, u, slope, SINGLE)
        seen = both(seen, more)
    return memory, seen


@triton.jit
def deliver(
    logps, beside, outputs, memory, part, problem, at, change, log_mass, n, beta, scale, tilt,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    MILD: tl.constexpr, CENTERED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Write what there is of each pair; return the sum of losses, and the extremes of the errors.

    ``at`` is λ, or ν for mild settings.
    """
    total, least = tl.full((), 0.0, tl.float64), tl.full((), float("inf"), T)
    largest = -least
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, inside, u = _recall(memory, i, part.size, problem, change, SINGLE)
        margins = problem.gamma0 * tl.exp(u - log_mass)
        if MILD:
            error = (u - log_mass) + problem.a * sigmoid(margins - gaps)
        else:
            s, k = side_of(at, problem.a)
            error = certify(problem, gaps, u, s, k, log_mass, EPS)
        least = tl.minimum(least, tl.min(tl.where(inside, error, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(inside, error, float("-inf")), 0))

        chosen, rejected = _rewards(logps, i, n, beta, T)
        counted, gaps = _member(beside.mask, i, i < n), chosen - rejected
        margins = tl.where(is_finite(gaps), margins, float("nan"))
        margins = tl.where(counted, margins, problem.gamma0)
        if outputs.loss is None:
            tl.store(outputs.rows + i, margins, mask=i < n)
        else:
            shifts = margins - problem.gamma0
            s = tl.where(counted, gaps, 0.0) - (shifts if CENTERED else margins)
            losses = tl.where(counted, softplus(-s) + tilt * s, 0.0)
            weights = tl.where(counted, tl.where(s == s, sigmoid(-s), s) - tilt, 0.0)
            rows = Rows(
                margins=margins,
                shifts=shifts,
                reward_gaps=gaps,
                pair_weights=weights,
                slopes=scale * weights,
                chosen_rewards=chosen,
                rejected_rewards=rejected,
            )
            for j in tl.static_range(len(rows)):
                tl.store(outputs.rows + j * n + i, rows[j], mask=i < n)
            tl.store(outputs.mask + i, counted, mask=i < n)
            if REDUCTION == "none":
                tl.store(outputs.loss + i, losses, mask=i < n)
            total += tl.sum(losses, 0).to(tl.float64)
    return total, least, largest

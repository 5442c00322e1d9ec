"""The passes over a pool, or over the part of it that one program has.

Where the pool is one block (SINGLE) it stays in registers from pass to pass, and the loop over
blocks is none. Else `Memory` holds pointers to what is kept of each entry.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gamma_loss._loss import Rows
from gamma_loss.kernels.level import (
    CLOSE,
    Level,
    Pairs,
    Seen,
    at_rounding,
    both,
    certify,
    first_guess,
    first_level,
    level_step,
    look,
    settle,
    side_of,
)
from gamma_loss.kernels.math import is_finite, log1p, sigmoid, sigmoids, softplus, sums2, sums4

MOST = tl.constexpr(96)  # passes
MILD_ROUNDING = tl.constexpr(16)  # machine epsilons by which a mild certificate may be wrong


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
    of_p: tl.tensor  # Σ p / D of equal margins
    of_q: tl.tensor
    pairs: tl.tensor
    least: tl.tensor  # γ0 - g
    largest: tl.tensor


class Problem(NamedTuple):
    """The settings, and what `Survey` says of the pool. One with nothing inside is of equal gaps."""

    gamma0: tl.tensor
    a: tl.tensor
    most: tl.tensor
    count: tl.tensor
    empty: tl.tensor


class State(NamedTuple):
    """What one pass of the level's solver hands to the next."""

    level: Level
    d_nu: tl.tensor
    left: tl.tensor
    far: tl.tensor
    done: tl.tensor


# --- entries ---


@triton.jit
def load(pointer, at, mask, T: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0.0).to(T)


@triton.jit
def member(mask, at, here):
    if mask is None:
        return here
    else:
        return here & (tl.load(mask + at, mask=here, other=0) != 0)


@triton.jit
def _reward(i, n, responses, references, beta, T: tl.constexpr):
    logps = load(responses, i, i < n, T)
    if references is not None:
        logps -= load(references, i, i < n, T)
    return beta * logps


@triton.jit
def rewards(logps, i, n, beta, T: tl.constexpr):
    """Return the rewards, of which the gaps are the differences."""
    if logps.rejected is None:
        gaps = load(logps.chosen, i, i < n, T)
        return gaps, tl.zeros_like(gaps)
    else:
        chosen = _reward(i, n, logps.chosen, logps.reference_chosen, beta, T)
        return chosen, _reward(i, n, logps.rejected, logps.reference_rejected, beta, T)


@triton.jit
def assemble(logps, beside, i, n, m, beta, T: tl.constexpr):
    """Return the gaps of batch and context, and which of the batch's pairs count."""
    chosen, rejected = rewards(logps, i, n, beta, T)
    counted = member(beside.mask, i, i < n)
    gaps, inside = chosen - rejected, counted
    if beside.context is not None:
        here = (i >= n) & (i < n + m)
        gaps = tl.where(i < n, gaps, load(beside.context, i - n, here, T))
        inside |= member(beside.context_mask, i - n, here)
    return tl.where(inside & is_finite(gaps), gaps, float("nan")), counted


@triton.jit
def recall(memory, i, size, problem, SINGLE: tl.constexpr):
    """Return gaps, which of them are inside, u and slope."""
    gaps, u, slope = memory
    if not SINGLE:
        gaps = tl.load(gaps + i, mask=i < size, other=float("nan"))
        u = tl.load(u + i, mask=i < size, other=0.0)
        slope = tl.load(slope + i, mask=i < size, other=0.0)
    inside = gaps == gaps
    gaps = tl.where(inside, gaps, 0.0)
    return gaps, tl.where(problem.empty, i < size, inside), u, slope


@triton.jit
def keep(memory, i, size, u, slope, SINGLE: tl.constexpr):
    if SINGLE:
        memory = Memory(memory.gaps, u, slope)
    else:
        tl.store(memory.u + i, u, mask=i < size)
        tl.store(memory.slope + i, slope, mask=i < size)
    return memory


# --- passes over a part of the pool ---


@triton.jit
def survey(
    logps, beside, memory, part, n, m, beta, gamma0, a,
    T: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """Assemble, and take the sums of Newton's step from equal margins."""
    zero = tl.full((), 0.0, tl.float64)
    count, of_p, of_q, pairs = zero, zero, zero, zero
    least = tl.full((), float("inf"), T)
    largest = -least
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, counted = assemble(logps, beside, i, n, m, beta, T)
        inside = gaps == gaps
        z = gamma0 - tl.where(inside, gaps, 0.0)
        p, q = sigmoids(z)
        slope = 1 / (1 + a * gamma0 * p * q)
        if SINGLE:
            memory = Memory(gaps, gaps, gaps)
        else:
            tl.store(memory.gaps + i, gaps, mask=i < part.size)
        memory = keep(memory, i, part.size, -a * p * slope, slope, SINGLE)
        w = tl.where(inside, slope, 0.0)
        sums = sums4(inside.to(T), w * p, w * q, counted.to(T))
        count, of_p, of_q, pairs = count + sums[0], of_p + sums[1], of_q + sums[2], pairs + sums[3]
        if not MILD:
            least = tl.minimum(least, tl.min(tl.where(inside, z, float("inf")), 0))
            largest = tl.maximum(largest, tl.max(tl.where(inside, z, float("-inf")), 0))
    return memory, Survey(count, of_p, of_q, pairs, least, largest)


@triton.jit
def problem_of(seen, size, gamma0, a):
    """Return the problem, and the survey, which is of equal gaps if there is nothing inside."""
    empty = seen.count == 0
    if empty:
        p, q = sigmoids(gamma0)
        count, of_p, of_q = size.to(tl.float64), p.to(tl.float64), q.to(tl.float64)
        seen = Survey(count, of_p, of_q, seen.pairs, gamma0, gamma0)
    room = (log1p(a) + 50 - seen.least) / gamma0  # as z <= λ where x > 1
    return Problem(gamma0, a, log1p(tl.maximum(room, 0.0)), seen.count, empty), seen


@triton.jit
def mild_pass(memory, part, problem, nu, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Take a step of the arrowhead Newton of `gamma_loss._mild`; return Σ w and Σ w (v - D)."""
    bottom = tl.full((), 0.0, tl.float64)
    top = bottom
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, inside, u, slope = recall(memory, i, part.size, problem, SINGLE)
        u += nu.to(u.dtype) * slope
        y = problem.gamma0 * tl.exp(u)
        p = sigmoid(y - gaps)
        at = problem.a * p
        v, d = u + at, 1 + y * (at - at * p)
        slope = 1 / d
        memory = keep(memory, i, part.size, u - v * slope, slope, SINGLE)
        w = tl.where(inside, y * slope, 0.0)
        sums = sums2(w, w * (v - d))
        bottom, top = bottom + sums[0], top + sums[1]
    return memory, bottom, top


@triton.jit
def level_pass(
    memory, part, problem, state, turn,
    EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """Take a step of the pairs at a level, or all it takes."""
    zero, top = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float32)
    seen = Seen(zero, zero, top, top, top, top)
    s, k = side_of(state.level.at, problem.a)
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, inside, u, slope = recall(memory, i, part.size, problem, SINGLE)
        pairs = Pairs(gaps, inside, problem.gamma0, problem.a, problem.most)
        u = tl.minimum(u + state.d_nu * slope, problem.most)
        if turn == 0:
            u = first_guess(pairs, state.level.at, s, k)
        if SETTLE:
            u, slope, more = settle(pairs, u, s, k, state.far, EPS, MOST)
        else:
            u, slope, more = look(pairs, u, s, k, state.far)
        memory = keep(memory, i, part.size, u, slope, SINGLE)
        seen = both(seen, more)
    return memory, seen


@triton.jit
def begin(problem, seen):
    """Return the first state."""
    T: tl.constexpr = problem.gamma0.dtype
    count, of_p, of_q = seen.count.to(T), seen.of_p.to(T), seen.of_q.to(T)
    level = first_level(problem.gamma0, problem.a, count, of_p, of_q, seen.least, seen.largest)
    return State(level, 0 * level.at, level.error, level.at == level.at, level.at != level.at)


@triton.jit
def advance(state, problem, seen, EPS: tl.constexpr):
    """Take a step of the level."""
    T: tl.constexpr = problem.gamma0.dtype
    budget = problem.count * problem.gamma0
    mass, rate = (seen.mass / budget).to(T), (seen.rate / budget).to(T)
    off = seen.left * (1 + mass)  # >= mean x du² (1 + y), as x <= (1 + x) x / (1 + x)
    level, d_nu, near = level_step(state.level, problem.a, mass, rate, off, seen.reach, EPS)
    reach = seen.reach + tl.abs(d_nu) * seen.reach_by_nu
    left = 2 * (seen.left + d_nu * d_nu * seen.left_by_nu)
    left = tl.where(near & (reach <= CLOSE), left, float("inf"))
    return State(level, d_nu, left, reach > CLOSE, near & at_rounding(left, state.left, EPS))


@triton.jit
def weigh(memory, part, problem, change, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Let the pairs follow the last change, and return Σ x."""
    mass = tl.full((), 0.0, tl.float64)
    if not SINGLE:
        tl.debug_barrier()
    for start in range(part.first, BLOCK if SINGLE else part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        gaps, inside, u, slope = recall(memory, i, part.size, problem, SINGLE)
        u += change.to(u.dtype) * slope
        memory = keep(memory, i, part.size, u, slope, SINGLE)
        mass += tl.sum(tl.where(inside, tl.exp(u), 0.0), 0).to(tl.float64)
    return memory, mass


@triton.jit
def finish(
    memory, i, size, problem, at, log_mass,
    EPS: tl.constexpr, SINGLE: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """Return margins that meet the budget, and the extremes of what certifies them."""
    gaps, inside, u, _ = recall(memory, i, size, problem, SINGLE)
    if MILD:
        x = tl.exp(u - log_mass)
        error = (u - log_mass) + problem.a * sigmoid(problem.gamma0 * x - gaps)
    else:
        s, k = side_of(at, problem.a)
        pairs = Pairs(gaps, inside, problem.gamma0, problem.a, problem.most)
        error = certify(pairs, u, s, k, log_mass, EPS)
        x = tl.exp(u - log_mass)
    least = tl.min(tl.where(inside, error, float("inf")), 0)
    return problem.gamma0 * x, least, tl.max(tl.where(inside, error, float("-inf")), 0)


@triton.jit
def residual_of(least, largest, EPS: tl.constexpr, MILD: tl.constexpr):
    return 0.5 * (largest - least) + MILD_ROUNDING * EPS if MILD else log1p(2 * largest)


@triton.jit
def masked(margins, gaps, counted, gamma0):
    """Return NaN for a gap that is not finite, and γ0 for a masked one."""
    return tl.where(counted, tl.where(is_finite(gaps), margins, float("nan")), gamma0)


@triton.jit
def deliver(
    logps, beside, outputs, i, n, margins, scale, beta, gamma0, tilt,
    T: tl.constexpr, CENTERED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Write what there is to write of a block of pairs, and return the sum of their losses."""
    chosen, rejected = rewards(logps, i, n, beta, T)
    counted, gaps = member(beside.mask, i, i < n), chosen - rejected
    margins = masked(margins, gaps, counted, gamma0)
    total = tl.full((), 0.0, tl.float64)
    if outputs.loss is None:
        tl.store(outputs.rows + i, margins, mask=i < n)
    else:
        shifts = margins - gamma0
        s = tl.where(counted, gaps, 0.0) - (shifts if CENTERED else margins)
        losses = tl.where(counted, softplus(-s) + tilt * s, 0.0)
        weights = tl.where(counted, tl.where(s == s, sigmoid(-s), s) - tilt, 0.0)
        rows = Rows(
            margins=margins,
            shifts=shifts,
            reward_gaps=gaps,
            pair_weights=weights,
            chosen_slopes=scale * weights,
            rejected_slopes=-scale * weights,
            chosen_rewards=chosen,
            rejected_rewards=rejected,
        )
        for j in tl.static_range(len(rows)):
            tl.store(outputs.rows + j * n + i, rows[j], mask=i < n)
        tl.store(outputs.mask + i, counted, mask=i < n)
        if REDUCTION == "none":
            tl.store(outputs.loss + i, losses, mask=i < n)
        total += tl.sum(losses, 0).to(tl.float64)
    return total

"""The loops around the algebra of `gamma_loss._level`, for a pool in one piece or in parts."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from gamma_loss._arrays import (
    Array,
    as_floats,
    bits,
    epsilon,
    inner,
    is_free_to_read,
    is_jax,
    is_numpy,
    jitted,
    numbers_namespace,
    reader,
    repeat,
    sigmoid,
    sigmoids,
    solver_namespace,
    total,
)
from gamma_loss._level import (
    CLOSE,
    FAR,
    Level,
    Pairs,
    Step,
    at_rounding,
    careful_step,
    certify,
    first_guess,
    first_level,
    level_step,
    pair_step,
    side_of,
    what_is_left,
)
from gamma_loss._mild import mild_passes, newton
from gamma_loss._spread import WHOLE, Spread, count_of, weighted

MOST = 96  # passes: all pairs stepping together, the worst of 116,000 random pools took 64


class State(NamedTuple):
    """What one pass hands to the next."""

    pairs: Pairs
    budget: Array  # N γ0
    u: Array
    level: Level
    left: Array  # bound on what is left of |x - x*| / (1 + x*), inf where there is none
    done: Array


def solve(
    gaps: Array, weights: Array | None, gamma0: float, tau: float, spread: Spread = WHOLE
) -> tuple[Array, Array, Array]:
    """Return margins, ν and the certificate of a pool, the last two of shape ().

    ``weights`` is 1 for a gap of the pool and 0 for one left out, which is finite as well.
    """
    xp, zero = solver_namespace(gaps), gaps[0] * 0
    if gamma0 == 0:  # nothing to share out, and no scale to measure x by
        return xp.zeros_like(gaps), zero, zero
    passes = mild_passes(gamma0, tau, bits(gaps) >= 64)
    run = jitted(_solve, (4, 5)) if is_jax(gaps) and spread is WHOLE else _solve
    result: tuple[Array, Array, Array] = run(
        gaps, weights, zero + gamma0, zero + gamma0 / tau, passes, spread
    )
    return result


def _solve(
    gaps: Array, weights: Array | None, gamma0: Array, a: Array, passes: int, spread: Spread
) -> tuple[Array, Array, Array]:
    if passes:
        return newton(gaps, weights, gamma0, a, passes, spread)
    return finish(iterate(begin(gaps, weights, gamma0, a, spread), spread), spread)


def iterate(state: State, spread: Spread = WHOLE) -> State:
    """Advance until done."""
    # For JAX the same function each time.
    step = advance if spread is WHOLE else functools.partial(advance, spread=spread)
    return repeat(MOST, step, state, is_done)


def begin(
    gaps: Array, weights: Array | None, gamma0: Array, a: Array, spread: Spread = WHOLE
) -> State:
    """Take the first level from Newton's step at equal margins, and the pairs in closed form."""
    read = reader(gaps, spread.parts > 1)
    sums, extremes = survey(gaps, weights, gamma0, a)
    sums, extremes = spread.sums(*sums), spread.extremes(*extremes)
    level = first_level(*map(read, (gamma0, a, *sums, *extremes)))
    pairs = pairs_of(gaps, weights, gamma0, a, extremes[0])
    return State(
        pairs=pairs,
        budget=read(sums[0]) * read(gamma0),
        u=first_guess(pairs, level.at, *side_of(level)),
        level=level,
        left=0 * level.a + math.inf,
        done=read(a) < 0,
    )


def survey(
    gaps: Array, weights: Array | None, gamma0: Array, a: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """Return the sums that the first level needs, and the extremes of γ0 - g."""
    xp, start = solver_namespace(gaps), gamma0 - gaps
    p, q = sigmoid(start), sigmoid(-start)
    w = weighted(weights, 1 / (1 + a * gamma0 * p * q))
    sums = count_of(gaps, weights), inner(w, p), inner(w, q)
    least = largest = start
    if weights is not None:
        outside = xp.where(weights > 0, 0 * start, 0 * start + math.inf)
        least, largest = start + outside, start - outside
    return sums, (xp.min(least), xp.max(largest))


def pairs_of(
    gaps: Array, weights: Array | None, gamma0: Array, a: Array, least_start: Array
) -> Pairs:
    """Return what the pairs are, with what is above every root of theirs."""
    # Where x > 1, z is below λ, and λ below log(1 + a) + 50.
    xp = solver_namespace(gaps)
    room = (xp.log1p(a) + 50 - least_start) / gamma0
    return Pairs(weights, gamma0 - gaps, gamma0, a, xp.log1p(xp.maximum(room, 0 * room)))


def advance(state: State, spread: Spread = WHOLE) -> State:
    """Take a step of the pairs, and one of the level if its side is proven."""
    pairs, budget, u, level, before, _ = state
    in_parts = spread.parts > 1
    read, eps = reader(u, in_parts), epsilon(u)
    if in_parts:  # which all have to decide alike
        _, u, _, step, (*sums, _), _, _ = settle(pairs, u, level)
        off, reach = 0 * level.a, 0 * level.a
    else:
        u, step, (*sums, off), reach = step_and_look(pairs, u, level)
    excess, rate = (read(each) / budget for each in spread.sums(*sums))
    off, reach = read(off) / budget, read(reach)
    level, d_nu, near = level_step(level, excess, rate, off, reach, eps)
    near = near & (excess * excess <= 16 * eps)  # else more is left than that

    u, left = follow(pairs, u, step, d_nu, near)
    if near is not False:
        left = spread.extremes(-left, left)[1]
    left = read(left) + 0 * level.a
    return State(pairs, budget, u, level, left, near & at_rounding(left, before, eps))


def step_and_look(
    pairs: Pairs, u: Array, level: Level
) -> tuple[Array, Step, tuple[Array, Array, Array], Array]:
    """Take a step of the pairs, a careful one where they are far, from u or closer to the roots.

    Return u before it, and also Σ (y - γ0) after it, Σ y / D, what the first is off, and the
    largest |du| (1 + y).
    """
    xp, (s, k) = solver_namespace(u), side_of(level)
    step = pair_step(pairs, u, s, k)
    reach = xp.abs(step.du + step.y * step.du)
    if not is_free_to_read(u):
        du = xp.where(reach > FAR, careful_step(pairs, u, s, k, step), step.du)
        step = Step(step.change, step.y, step.d, du)  # torch.compile of 2.6 knows no _replace
    elif xp.max(reach) > CLOSE:
        u, step = approach(pairs, u, s, k, step, reach)
    grown = step.y * step.du
    reach = step.du + grown
    excess = total(weighted(pairs.weights, step.change + grown))
    rate, off = total(weighted(pairs.weights, step.y / step.d)), total(grown * reach)
    return u, step, (excess, rate, off), xp.max(xp.abs(reach))


def approach(
    pairs: Pairs, u: Array, s: Array, k: Array, step: Step, reach: Array
) -> tuple[Array, Step]:
    """Let pairs that keep the others waiting step on alone until they are close to their roots.

    These are all that are not close, or the far ones among them if that is much of the pool.
    """
    xp, far = solver_namespace(u), reach > CLOSE
    if total(as_floats(far, u)) > u.shape[0] / 4:
        far = reach > FAR
    if is_numpy(far):
        far = far.nonzero()[0]  # for it takes twenty times as long by a mask
    some = pairs._replace(weights=None, start=pairs.start[far])
    v, part = u[far], Step(*(each[far] for each in step))
    largest = xp.max(reach)
    for _ in range(MOST if v.shape[0] else 0):
        v = v + (careful_step(some, v, s, k, part) if largest > FAR else part.du)
        part = pair_step(some, v, s, k)
        largest = xp.max(xp.abs(part.du + part.y * part.du))
        if largest <= CLOSE:
            break
    u = 1 * u  # a copy
    for of_all, of_some in zip((u, *step), (v, *part), strict=True):
        of_all[far] = of_some
    return u, step


def follow(pairs: Pairs, u: Array, step: Step, d_nu: Array, near: Array) -> tuple[Array, Array]:
    """Add the step and what follows a change of ν; bound what is left if that may be the end."""
    xp, move = solver_namespace(u), step.du + d_nu / step.d
    left = math.inf * pairs.a if near is False else what_is_left(pairs, step.y, move)
    return xp.minimum(u + move, pairs.most), left


class Settled(NamedTuple):
    """The last pass of pairs that have stepped alone, at one level, to their roots."""

    pairs: Pairs
    u: Array  # before the step
    level: Level
    step: Step
    sums: tuple[Array, Array, Array]  # as of `step_and_look`
    left: Array
    done: Array


def settle(pairs: Pairs, u: Array, level: Level) -> Settled:
    """Take steps of the pairs alone, as many as it takes to reach their roots."""
    first = _settling(pairs, u, level, 0 * level.a + math.inf)
    return repeat(MOST, _settle_pass, first, is_done)


def _settle_pass(state: Settled) -> Settled:
    pairs, u, level, step, _, before, _ = state
    return _settling(pairs, solver_namespace(u).minimum(u + step.du, pairs.most), level, before)


def _settling(pairs: Pairs, u: Array, level: Level, before: Array) -> Settled:
    u, step, sums, _ = step_and_look(pairs, u, level)
    left = what_is_left(pairs, step.y, step.du)
    left = (float(left) if isinstance(level.at, float) else left) + 0 * level.a
    return Settled(pairs, u, level, step, sums, left, at_rounding(left, before, epsilon(u)))


def is_done(state: State | Settled) -> Array:
    """Whether a loop may end."""
    return state.done


def finish(state: State, spread: Spread = WHOLE) -> tuple[Array, Array, Array]:
    """Return margins that meet the budget, ν, and the certificate."""
    pairs, budget, u, level, _, _ = state
    xp = solver_namespace(u)
    (excess,) = spread.sums(total(weighted(pairs.weights, xp.expm1(u))))
    excess = excess * pairs.gamma0 / budget
    log_mass = xp.log1p(xp.maximum(excess, 0 * excess - (1 - 1e-7)))
    margins, error = deliver(pairs, u, *side_of(level), log_mass)
    _, error = spread.extremes(-error, error)
    nu = level.a * sigmoids(numbers_namespace(level.at), level.at)[0]
    return margins, nu + 0 * log_mass, xp.log1p(2 * error)


def deliver(pairs: Pairs, u: Array, s: Array, k: Array, log_mass: Array) -> tuple[Array, Array]:
    """Return the margins, and what the certificate says of the pair that is worst off."""
    xp = solver_namespace(u)
    error = xp.max(weighted(pairs.weights, certify(pairs, u, s, k, log_mass)))
    return pairs.gamma0 * xp.exp(u - log_mass), error

"""The algebra of `gamma_loss._level`, which says what it is about, for blocks of lanes.

Two things are cheaper in another way here. A step needs the bend, and the one of the logarithms,
only where a pair is far from its root: so they are left out elsewhere. And what is left after a
pair and the level have moved, du + dν / D, is bounded by what each of them does, as
(du + dν / D)² <= 2 du² + 2 (dν / D)²: so that all is known after one pass.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gamma_loss.kernels.math import clip, expm1, log1p, sigmoid, sigmoids, sums2_tops4

CLOSE, NEAR = tl.constexpr(0.3), tl.constexpr(0.05)
TINY = tl.constexpr(1e-30)
MOST = tl.constexpr(96)  # passes
NEGLIGIBLE = tl.constexpr(-50.0)  # below this u, x is nothing beside the mean, and has no say


class Problem(NamedTuple):
    """The settings, and what is known of the whole pool."""

    gamma0: tl.tensor
    a: tl.tensor
    most: tl.tensor  # above every root, and its exponential is finite
    count: tl.tensor
    empty: tl.tensor  # whether nothing is inside, so that all count as equal gaps


class State(NamedTuple):
    """The level, and what else one pass hands to the next."""

    at: tl.tensor  # λ
    low: tl.tensor  # low <= λ <= high at the solution
    high: tl.tensor
    error: tl.tensor  # |log mean x| when the level last moved
    d_nu: tl.tensor  # which the pairs have yet to follow
    log_mass: tl.tensor  # of x once they have
    left: tl.tensor  # bound on what is left of |x - x*| / (1 + x*) then
    far: tl.tensor  # whether a pair may be far from its root
    done: tl.tensor


class Seen(NamedTuple):
    """What a pass over the pairs tells."""

    excess: tl.tensor  # Σ (y - γ0) after the step
    rate: tl.tensor  # Σ y / D
    reach: tl.tensor  # the largest |du| (1 + y)
    left: tl.tensor  # the largest du² (1 + y) x / (1 + x)
    reach_by_nu: tl.tensor  # the same of 1 / D
    left_by_nu: tl.tensor


@triton.jit
def first_level(gamma0, a, count, of_p, of_q, least, largest):
    """Return the level of Newton's step from equal margins, and the bracket that it is in."""
    far = log1p(a) + 50
    low, high = clip(least, -far, far), clip(largest, -far, far)
    p, q = sigmoids(gamma0 * (count - 1) + least)
    cap = tl.log(count) / a
    high = clip(_log(p + cap) - _log(q - cap), low, high)
    at = clip(_log(of_p) - _log(of_q), low, high)
    return at, low, high


@triton.jit
def side_of(at, a):
    """Return s and s a σ(s λ)."""
    s = tl.where(at <= 0, 1.0, -1.0).to(at.dtype)
    return s, s * a * sigmoid(-tl.abs(at))


@triton.jit
def first_guess(problem, gaps, at, s, k):
    """Return the closer to 0 of two u. The root is between it and 0."""
    start = problem.gamma0 - gaps
    stays = k - s * (problem.a * sigmoid(s * start))
    moves = log1p(tl.maximum((at - start) / problem.gamma0, -0.999999))
    return tl.where(tl.abs(moves) < tl.abs(stays), moves, stays)


@triton.jit
def pair_step(problem, gaps, u, s, k, far):
    """Return y - γ0, 1 / D and the step of every pair; a careful one where one may be far."""
    change = problem.gamma0 * expm1(u)
    y = change + problem.gamma0
    t = sigmoid(s * (change + (problem.gamma0 - gaps)))
    at = problem.a * t
    slope = 1 / (1 + y * (at - at * t))
    du = (k - u - s * at) * slope
    if far:
        du = careful(problem, gaps, u, s, k, y, at, du)
    return change, slope, du


@triton.jit
def careful(problem, gaps, u, s, k, y, at, du):
    """Go farther by the logarithms, but no farther than to the bend if the root is before it."""
    rest = tl.maximum(s * (k - u), TINY)
    fall = _log(at / rest) * (rest / (1 + y * rest))  # of z, by y
    short = tl.where(s > 0, fall, log1p(tl.maximum(fall, 0.0)))
    short = tl.where(fall > 0, short, float("-inf"))
    new = tl.minimum(u + s * tl.minimum(s * du, -short), problem.most)
    y = bend(gaps)
    at_bend = tl.log(y / problem.gamma0)
    below = at_bend + s * (problem.a * sigmoid(s * (y - gaps))) > k
    return tl.where(below, tl.minimum(new, at_bend), tl.maximum(new, at_bend)) - u


@triton.jit
def bend(gaps):
    """Return the y with ``y tanh((y - g) / 2) = 1``, to 1.6 %."""
    h = gaps + 1
    root = tl.sqrt(gaps * gaps + 8 + 2 * (tl.sqrt(h * h + 2) - h))
    return tl.maximum((gaps + root) * 0.5, 1.0)


@triton.jit
def look(problem, gaps, inside, u, s, k, far):
    """Take a step of the pairs; return u after it, 1 / D, and what it tells."""
    change, slope, du = pair_step(problem, gaps, u, s, k, far)
    new = tl.minimum(u + du, problem.most)
    y = change + problem.gamma0
    excess = tl.where(inside, change + y * du, 0.0)
    says = inside & (tl.maximum(u, new) > NEGLIGIBLE)
    y, of_slope, du = tl.where(says, y, 0.0), tl.where(says, slope, 0.0), tl.where(says, du, 0.0)
    reach, reach_by_nu, share = du + y * du, of_slope + y * of_slope, y / (problem.gamma0 + y)
    left, left_by_nu = du * reach * share, of_slope * reach_by_nu * share
    excess, rate, reach, left, reach_by_nu, left_by_nu = sums2_tops4(
        excess, y * of_slope, tl.abs(reach), left, reach_by_nu, left_by_nu
    )
    return new, slope, Seen(excess, rate, reach, left, reach_by_nu, left_by_nu)


@triton.jit
def settle(problem, gaps, inside, u, s, k, far, EPS: tl.constexpr):
    """Take as many steps of the pairs as it takes to reach their roots."""
    u, slope, seen = look(problem, gaps, inside, u, s, k, far)
    before, turn = 0 * seen.left + float("inf"), 1
    while ((seen.reach > CLOSE) | (at_rounding(seen.left, before, EPS) == 0)) & (turn < MOST):
        far = seen.reach > CLOSE
        before = tl.where(far, float("inf"), seen.left)
        u, slope, seen = look(problem, gaps, inside, u, s, k, far)
        turn += 1
    return u, slope, seen


@triton.jit
def both(one, other):
    """Return what two parts of a pool tell together."""
    return Seen(
        one.excess + other.excess,
        one.rate + other.rate,
        tl.maximum(one.reach, other.reach),
        tl.maximum(one.left, other.left),
        tl.maximum(one.reach_by_nu, other.reach_by_nu),
        tl.maximum(one.left_by_nu, other.left_by_nu),
    )


@triton.jit
def level_step(state, a, excess, rate, off, reach, EPS: tl.constexpr):
    """Return the next level, the change of ν, and whether it is Newton's, near the solution."""
    at, low, high, before = state.at, state.low, state.high, state.error
    proven = (reach <= CLOSE) & (off <= 0.5 * tl.abs(excess) + EPS)
    mass, log_mass = tl.maximum(1 + excess, TINY), _log_mass(excess)
    error = tl.abs(log_mass)
    low = tl.where(proven & (log_mass <= 0), at, low)
    high = tl.where(proven & (log_mass >= 0), at, high)

    p, q = sigmoids(at)
    missing = tl.where(error < NEAR, -excess, -log_mass * mass)
    rise = missing / (a * (rate + TINY))
    direct = rise / (p * q + TINY)
    rise = clip(rise, -0.999 * p, 0.999 * q)
    newton = log1p(rise / (p + TINY)) - log1p(-rise / (q + TINY))
    shorter = (2 * rate < mass) & (tl.abs(direct) < tl.abs(newton))
    newton = at + tl.where(shorter, direct, newton)
    inside = (low <= newton) & (newton <= high) & (error <= 0.75 * before)
    trusted = inside | (error <= 1e-4)
    new = tl.where(proven, tl.where(trusted, newton, 0.5 * (low + high)), at)

    new_p, new_q = sigmoids(new)
    share = -expm1(-tl.abs(new - at))
    d_nu = a * tl.where(new > at, new_p * q, -p * new_q) * share
    error = tl.where(proven, error, before)
    return new, low, high, error, d_nu, proven & trusted & (error < NEAR)


@triton.jit
def at_rounding(left, before, EPS: tl.constexpr):
    """Whether a step ended at rounding error: Newton's squares what is left, until it does not."""
    return (left <= EPS / 16) | ((left <= 16 * EPS) & (left > before / 4))


@triton.jit
def begin(problem, of_p, of_q, least, largest):
    """Return the first state."""
    T: tl.constexpr = problem.gamma0.dtype
    count, of_p, of_q = problem.count.to(T), of_p.to(T), of_q.to(T)
    at, low, high = first_level(problem.gamma0, problem.a, count, of_p, of_q, least, largest)
    zero = 0 * at
    infinity = zero + float("inf")
    return State(at, low, high, infinity, zero, zero, infinity, zero == 0, zero != 0)


@triton.jit
def advance(problem, state, seen, EPS: tl.constexpr):
    """Take a step of the level."""
    T: tl.constexpr = problem.gamma0.dtype
    budget = problem.count * problem.gamma0
    excess, rate = (seen.excess / budget).to(T), (seen.rate / budget).to(T)
    off = seen.left * (2 + excess)  # >= mean x du² (1 + y), as x <= (1 + x) x / (1 + x)
    at, low, high, error, d_nu, near = level_step(
        state, problem.a, excess, rate, off, seen.reach, EPS
    )
    far = seen.reach + tl.abs(d_nu) * seen.reach_by_nu > CLOSE
    left = 2 * (seen.left + d_nu * d_nu * seen.left_by_nu)
    left = tl.where(near & (far == 0), left, float("inf"))
    done = near & at_rounding(left, state.left, EPS)
    log_mass = _log_mass(excess + d_nu * rate)
    return State(at, low, high, error, d_nu, log_mass, left, far, done)


@triton.jit
def certify(problem, gaps, u, s, k, log_mass, EPS: tl.constexpr):
    """Bound ``|x - x(ν)| / (1 + x)`` for x = exp(u - log_mass), whose mean is 1."""
    start = problem.gamma0 - gaps
    change = problem.gamma0 * expm1(u)
    y = change + problem.gamma0
    t = sigmoid(s * (change + start))
    at, size = problem.a * t, tl.abs(u)
    slope = at - at * t
    d = 1 + y * slope
    # The exp and / of a GPU are off by more than an epsilon: by up to 4 and |z| / 2 of them.
    noise = size + 4 * at + 2 * slope * (y + (tl.abs(start) + problem.gamma0))
    f = tl.abs(u + s * at - k) + EPS * (noise + tl.abs(k))
    near = f / d
    off = near * (1.3 + (near + near * y) * d / CLOSE)
    off = tl.minimum(off + (4 * EPS * size + (tl.abs(log_mass) + 4 * EPS)), 80.0)
    return expm1(off) * (y / (y + problem.gamma0 * tl.exp(log_mass)))


@triton.jit
def _log_mass(excess):
    return log1p(tl.maximum(excess, -(1 - 1e-7)))


@triton.jit
def _log(value):
    return tl.log(tl.maximum(value, TINY))

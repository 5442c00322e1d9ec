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

CLOSE = tl.constexpr(0.3)
TINY = tl.constexpr(1e-30)
NEGLIGIBLE = tl.constexpr(-50.0)  # below this u, x is nothing beside the mean, and has no say


class Pairs(NamedTuple):
    """What the pairs of a block are, whatever the level."""

    gaps: tl.tensor
    inside: tl.tensor
    gamma0: tl.tensor
    a: tl.tensor
    most: tl.tensor  # above every root, and its exponential is finite


class Level(NamedTuple):
    """The level and what is known of it."""

    at: tl.tensor  # λ
    low: tl.tensor
    high: tl.tensor
    error: tl.tensor  # |log mean x| when the level last moved


class Seen(NamedTuple):
    """What a pass over the pairs tells."""

    mass: tl.tensor  # Σ y after the step
    rate: tl.tensor  # Σ y / D
    reach: tl.tensor  # the largest |du| (1 + y)
    left: tl.tensor  # the largest du² (1 + y) x / (1 + x)
    reach_by_nu: tl.tensor  # the same of 1 / D
    left_by_nu: tl.tensor


@triton.jit
def first_level(gamma0, a, count, of_p, of_q, least, largest):
    far = log1p(a) + 50
    low, high = clip(least, -far, far), clip(largest, -far, far)
    p, q = sigmoids(gamma0 * (count - 1) + least)
    cap = tl.log(count) / a
    high = clip(_log(p + cap) - _log(q - cap), low, high)
    at = clip(_log(of_p) - _log(of_q), low, high)
    return Level(at, low, high, 0 * at + float("inf"))


@triton.jit
def side_of(at, a):
    """Return s and s a σ(s λ)."""
    s = tl.where(at <= 0, 1.0, -1.0).to(at.dtype)
    return s, s * a * sigmoid(-tl.abs(at))


@triton.jit
def first_guess(pairs, at, s, k):
    start = pairs.gamma0 - pairs.gaps
    stays = k - s * (pairs.a * sigmoid(s * start))
    moves = log1p(tl.maximum((at - start) / pairs.gamma0, -0.999999))
    return tl.where(tl.abs(moves) < tl.abs(stays), moves, stays)


@triton.jit
def pair_step(pairs, u, s, k, far):
    """Return y, 1 / D and the step of every pair."""
    change = pairs.gamma0 * expm1(u)
    y = change + pairs.gamma0
    t = sigmoid(s * (change + (pairs.gamma0 - pairs.gaps)))
    at = pairs.a * t
    slope = 1 / (1 + y * (at - at * t))
    du = (k - u - s * at) * slope
    if far:
        du = _far_step(pairs, u, s, k, y, at, du)
    return y, slope, du


@triton.jit
def _far_step(pairs, u, s, k, y, at, du):
    """Go farther by the logarithms, but no farther than to the bend if the root is before it."""
    rest = tl.maximum(s * (k - u), TINY)
    dz_by_y = _log(at / rest) * rest / (1 + y * rest)
    short = tl.where(s > 0, dz_by_y, log1p(tl.maximum(dz_by_y, 0.0)))
    short = tl.where(dz_by_y > 0, short, float("-inf"))
    new = tl.minimum(u + s * tl.minimum(s * du, -short), pairs.most)
    y = bend(pairs.gaps)
    at_bend = tl.log(y / pairs.gamma0)
    below = at_bend + s * (pairs.a * sigmoid(s * (y - pairs.gaps))) > k
    return tl.where(below, tl.minimum(new, at_bend), tl.maximum(new, at_bend)) - u


@triton.jit
def bend(gaps):
    """Return the y with ``y tanh((y - g) / 2) = 1``, to 1.6 %."""
    h = gaps + 1
    root = tl.sqrt(gaps * gaps + 8 + 2 * (tl.sqrt(h * h + 2) - h))
    return tl.maximum((gaps + root) * 0.5, 1.0)


@triton.jit
def look(pairs, u, s, k, far):
    """Take a step of the pairs; return u after it, 1 / D, and what it tells."""
    y, slope, du = pair_step(pairs, u, s, k, far)
    new = tl.minimum(u + du, pairs.most)
    says = pairs.inside & (tl.maximum(u, new) > NEGLIGIBLE)
    y, of_slope, du = tl.where(says, y, 0.0), tl.where(says, slope, 0.0), tl.where(says, du, 0.0)
    reach, reach_by_nu, share = du + y * du, of_slope + y * of_slope, y / (pairs.gamma0 + y)
    left, left_by_nu = du * reach * share, of_slope * reach_by_nu * share
    mass, rate, reach, left, reach_by_nu, left_by_nu = sums2_tops4(
        y + y * du, y * of_slope, tl.abs(reach), left, reach_by_nu, left_by_nu
    )
    return new, slope, Seen(mass, rate, reach, left, reach_by_nu, left_by_nu)


@triton.jit
def both(one, other):
    """Return what two parts of a pool tell together."""
    return Seen(
        one.mass + other.mass,
        one.rate + other.rate,
        tl.maximum(one.reach, other.reach),
        tl.maximum(one.left, other.left),
        tl.maximum(one.reach_by_nu, other.reach_by_nu),
        tl.maximum(one.left_by_nu, other.left_by_nu),
    )


@triton.jit
def settle(pairs, u, s, k, far, EPS: tl.constexpr, MOST: tl.constexpr):
    """Take as many steps of the pairs as it takes to reach their roots."""
    u, slope, seen = look(pairs, u, s, k, far)
    before, turn = 0 * seen.left + float("inf"), 1
    while (settled(seen, before, EPS) == 0) & (turn < MOST):
        before = tl.where(seen.reach > CLOSE, float("inf"), seen.left)
        u, slope, seen = look(pairs, u, s, k, seen.reach > CLOSE)
        turn += 1
    return u, slope, seen


@triton.jit
def settled(seen, before, EPS: tl.constexpr):
    return (seen.reach <= CLOSE) & at_rounding(seen.left, before, EPS)


@triton.jit
def level_step(level, a, mass, rate, off, reach, EPS: tl.constexpr):
    """Return the next level, the change of ν, and whether it is Newton's, near the solution."""
    at, low, high, before = level
    proven = (reach <= CLOSE) & (off <= 0.5 * tl.abs(mass - 1) + EPS)
    log_mass = _log(mass)
    error = tl.abs(log_mass)
    low = tl.where(proven & (log_mass <= 0), at, low)
    high = tl.where(proven & (log_mass >= 0), at, high)

    p, q = sigmoids(at)
    rise = -log_mass * mass / (a * (rate + TINY))
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
    return Level(new, low, high, error), d_nu, proven & trusted & (error < 0.05)


@triton.jit
def at_rounding(left, before, EPS: tl.constexpr):
    """Whether a step ended at rounding error: Newton's squares what is left, until it does not."""
    return (left <= EPS / 16) | ((left <= 16 * EPS) & (left > before / 4))


@triton.jit
def certify(pairs, u, s, k, log_mass, EPS: tl.constexpr):
    """Bound ``|x - x(ν)| / (1 + x)`` for x = exp(u - log_mass), whose mean is 1."""
    gamma0, start = pairs.gamma0, pairs.gamma0 - pairs.gaps
    y = gamma0 * tl.exp(u)
    z = gamma0 * expm1(u) + start
    t = sigmoid(s * z)
    at = pairs.a * t
    slope = at - at * t
    size = tl.abs(u) + at * (4 + tl.abs(z)) + tl.abs(k)  # a GPU's exp and / are off by as much
    f = tl.abs(u + s * at - k) + EPS * (size + slope * (y + gamma0 + tl.abs(start)))
    d = 1 + y * slope
    off = tl.where(f * (1 + y) <= d * CLOSE, 1.3 * f / d, f) + tl.abs(log_mass)
    off = tl.minimum(off + 4 * EPS * (1 + tl.abs(u)), 80.0)
    x = tl.exp(u - log_mass)
    return x * expm1(off) / (1 + x)


@triton.jit
def _log(value):
    return tl.log(tl.maximum(value, TINY))

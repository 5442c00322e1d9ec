"""The margin problem, and the two steps that solve it for any setting, as algebra on arrays.

**The problem.** N gaps g share a mean margin γ0. Of the ratios ``x = γ / γ0`` (positive, mean 1),
with ``u = log x``, ``z = γ0 x - g`` and ``a = γ0 / τ``, the solution makes one number ν of all

    u_i + a σ(z_i) = ν.

Difficulty grows with ``κ = a γ0``. Everything follows from the function of one pair and its slope,

    f(u) = u + a σ(γ0 e^u - g) - ν,        D = f'(u) = 1 + a y σ(z) σ(-z) >= 1,    y = γ0 x.

**The pairs** (`pair_step`). f bends once: it is convex in u below ``log(y* / γ0)`` and concave
above, where ``y* tanh((y* - g) / 2) = 1`` has one root y* > max(g, 0), which depends on the gap
alone. On the convex side a Newton step lands above the root or on it, on the concave side below. So
kept on the side that the sign of f at the bend tells, Newton's iteration is monotone from its
second point on and converges from any start, for any a, γ0 and g. That is needed only where a pair
is far from its root. There log(a σ(z)) may be nearer to a line, and a step on it that falls short
of the root may yet go farther.

**The level that they share** (`level_step`). ``ν = a σ(λ)``; λ is what z is for a pair with x = 1,
and what all z tend to as κ grows. Once the pairs are so close that ``|du| (1 + y) <= 0.3``, each is
within ``du² (1 + y)`` of its root after the step. That bounds the mean of x at this level, and
proves on which side of λ the solution lies as soon as the mean is farther from 1. Then λ takes its
Newton step, ``dν = (1 - mean x) / mean(x / D)``, inside the bracket proven so far, and all pairs
follow by ``dν / D``. With the pairs' own steps this makes up Newton's for the whole problem.

σ(z) and σ(λ) enter as their smaller side, σ or 1 - σ, by a sign s that is 1 for λ <= 0, else -1:
``f = u + s a σ(s z) - k`` with ``k = s a σ(s λ)`` does not cancel. docs/theory.md has the proofs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from gamma_loss._arrays import (
    Array,
    Namespace,
    choose,
    clip,
    epsilon,
    numbers_namespace,
    sigmoid,
    sigmoids,
    signed,
    solver_namespace,
)

CLOSE = 0.3  # |du| (1 + y) up to which du² (1 + y) bounds the distance to the root
FAR = 1.0  # |du| (1 + y) from which a step has to be a careful one
NEAR = 0.05  # |log mean x| from which on a step may be the last
_TINY = 1e-30  # of which float32 still knows the reciprocal times 1e5


class Pairs(NamedTuple):
    """What the pairs of a pool are, whatever the level."""

    weights: Array | None  # 1 for a pair inside and 0 for one left out; None: all are inside
    start: Array  # γ0 - g: z where x = 1
    gamma0: Array
    a: Array
    most: Array  # above every root, and its exponential is finite


class Step(NamedTuple):
    """A step of the pairs, and what it was taken with."""

    change: Array  # y - γ0, which is accurate where x is close to 1
    y: Array
    d: Array
    du: Array


class Level(NamedTuple):
    """The level and what is known of it, in Python floats where values are free to read."""

    a: Array
    at: Array  # λ
    low: Array  # low <= λ <= high at the solution
    high: Array
    error: Array  # |log mean x| when the level last moved


def bend(xp: Namespace, gaps: Array) -> Array:
    """Return the y with ``y tanh((y - g) / 2) = 1``, to 1.6 %.

    Between it and the true bend D changes by less than 2e-4 of itself, as good as not bending.
    """
    h = gaps + 1
    y = (gaps + xp.sqrt(gaps * gaps + 8 + 2 * (xp.sqrt(h * h + 2) - h))) * 0.5
    return xp.maximum(y, xp.ones_like(y))


def first_level(
    gamma0: Array, a: Array, count: Array, of_p: Array, of_q: Array, least: Array, largest: Array
) -> Level:
    """Return the level of Newton's step from equal margins, inside the first bracket."""
    # ν lies in the range of a σ(γ0 - g), of which the extremes are given, and no x is above N.
    xp = numbers_namespace(a)
    far = xp.log1p(a) + 50  # beyond it a σ(λ) is 0 or a to well below rounding error
    low, high = clip(xp, least, -far, far), clip(xp, largest, -far, far)
    p, q = sigmoids(xp, gamma0 * (count - 1) + least)
    cap = xp.log(count) / a  # ν <= log N + a σ(γ0 N - g) for the largest g
    high = clip(xp, _log(xp, p + cap) - _log(xp, q - cap), low, high)
    at = clip(xp, _log(xp, of_p) - _log(xp, of_q), low, high)
    return Level(a, at, low, high, 0 * a + math.inf)


def side_of(level: Level) -> tuple[Array, Array]:
    """Return s and s a σ(s λ)."""
    xp = numbers_namespace(level.at)
    one = 0 * level.a + 1.0
    s = xp.where(level.at <= 0, one, -one)
    small = xp.exp(-abs(level.at))
    return s, s * level.a * (small / (1 + small))


def first_guess(pairs: Pairs, at: Array, s: Array, k: Array) -> Array:
    """Return the closer to 0 of two u, exact as κ → 0 and as κ → ∞.

    Where u leaves 0, z leaves γ0 - g towards λ and never passes it: so the root is between 0 and
    either, what u would be with z left where it is, and what moves z all the way.
    """
    xp = solver_namespace(pairs.start)
    stays = k - signed(s, pairs.a * sigmoid(signed(s, pairs.start)))
    ratio = (at - pairs.start) / pairs.gamma0
    moves = xp.log1p(xp.maximum(ratio, xp.full_like(ratio, -0.999999)))
    return xp.where(xp.abs(moves) < xp.abs(stays), moves, stays)


def pair_step(pairs: Pairs, u: Array, s: Array, k: Array) -> Step:
    """Take a Newton step of every pair."""
    change = pairs.gamma0 * solver_namespace(u).expm1(u)
    y = change + pairs.gamma0
    t = sigmoid(signed(s, change + pairs.start))
    at = pairs.a * t
    d = 1 + y * (at - at * t)
    return Step(change, y, d, (k - u - signed(s, at)) / d)


def careful_step(pairs: Pairs, u: Array, s: Array, k: Array, step: Step) -> Array:
    """Lengthen a step where the logarithm's is longer, and end it on the root's side of the bend.

    The same root: log(a σ(s z)) = log(s (k - u)). From where the first is larger, it changes on the
    way to the root by at most y a unit of u, or 1 a unit of z, and the second by at most what it
    does here: so this step falls short of the root.
    """
    xp, (change, y, _, du), gaps = solver_namespace(u), step, pairs.gamma0 - pairs.start
    zero = xp.zeros_like(u)
    at = pairs.a * sigmoid(signed(s, change + pairs.start))
    rest = xp.maximum(signed(s, k - u), zero + _TINY)
    fall = xp.log(xp.maximum(at / rest, zero + _TINY)) * (rest / (1 + y * rest))  # of z, by y
    short = choose(s > 0, lambda: fall, lambda: xp.log1p(xp.maximum(fall, zero)))
    is_larger = xp.maximum(xp.sign(fall), zero)
    du = du - signed(s, is_larger * xp.maximum(short + signed(s, du), zero))

    y = bend(xp, gaps)
    u_bend, at_bend = xp.log(y / pairs.gamma0), pairs.a * sigmoid(signed(s, y - gaps))
    side = xp.sign(u_bend + signed(s, at_bend) - k)  # 1 where the root is below the bend
    new = xp.minimum(u + du, pairs.most)
    return new - side * xp.maximum(side * (new - u_bend), zero) - u


def level_step(
    level: Level, excess: Array, rate: Array, off: Array, reach: Array, eps: float
) -> tuple[Level, Array, Array]:
    """Return the next level, the change of ν, and whether it is Newton's, near the solution.

    ``excess`` is mean x - 1 at the roots of the pairs, up to ``off`` if ``reach`` is small, and
    ``rate`` mean x / D.
    """
    xp = numbers_namespace(level.at)
    a, at, low, high, before = level
    proven = (reach <= CLOSE) & (off <= 0.5 * abs(excess) + eps)
    mass = xp.maximum(1 + excess, 0 * a + _TINY)
    log_mass = xp.log1p(xp.maximum(excess, 0 * a - (1 - 1e-7)))
    error = abs(log_mass)
    low = xp.where(proven & (log_mass <= 0), at, low)
    high = xp.where(proven & (log_mass >= 0), at, high)

    # Newton's step for log mean x far from the solution, and near it for mean x, with which the
    # pairs' steps make up the arrowhead's. A step in ν, turned into one in λ; or one in λ itself
    # where that is shorter and the pairs are steep, as their mean is nearer to a line in λ then.
    p, q = sigmoids(xp, at)
    missing = xp.where(error < NEAR, -excess, -log_mass * mass)
    rise = missing / (a * (rate + _TINY))
    direct = rise / (p * q + _TINY)
    rise = clip(xp, rise, -0.999 * p, 0.999 * q)
    newton = xp.log1p(rise / (p + _TINY)) - xp.log1p(-rise / (q + _TINY))
    shorter = (2 * rate < mass) & (abs(direct) < abs(newton))
    newton = at + xp.where(shorter, direct, newton)
    inside = (low <= newton) & (newton <= high) & (error <= 0.75 * before)
    trusted = inside | (error <= 1e-4)  # as there a bracket is true up to rounding only
    new = xp.where(proven, xp.where(trusted, newton, 0.5 * (low + high)), at)

    new_p, new_q = sigmoids(xp, new)
    share = -xp.expm1(-abs(new - at))
    d_nu = a * xp.where(new > at, new_p * q * share, -p * new_q * share)  # a (σ(new) - σ(at))
    error = xp.where(proven, error, before)
    return Level(a, new, low, high, error), d_nu, proven & trusted & (error < NEAR)


def what_is_left(pairs: Pairs, y: Array, move: Array) -> Array:
    """Bound |x - x*| / (1 + x*) after a Newton step, or return inf where that was too far."""
    xp, reach = solver_namespace(y), move + y * move
    share = y / (pairs.gamma0 + y)
    left = xp.max(move * reach * share)
    # An x below e^-50 has no say, unless a step makes it e^10 times as large.
    reach = reach * xp.clip(share * 1e22, CLOSE / 10, 1.0)
    return xp.where(xp.max(xp.abs(reach)) <= CLOSE, left, math.inf * pairs.a)


def at_rounding(left: Array, before: Array, eps: float) -> Array:
    """Whether a step ended at rounding error: Newton's squares what is left, until it does not."""
    return (left <= eps / 16) | ((left <= 16 * eps) & (left > before / 4))


def certify(pairs: Pairs, u: Array, s: Array, k: Array, log_mass: Array) -> Array:
    """Bound ``|x - x(ν)| / (1 + x)`` for x = exp(u - log_mass), whose mean is 1.

    x(ν), the roots at this level, are on one side of the solution all together, so that with
    bounds of at most B ``mean |x - x*| <= 2 mean |x - x(ν)| <= 2 B mean (1 + x) = 4 B``. Where
    ``r = |f| (1 + y) / D`` is at most 0.3, the root is within 1.3 |f| / D, and else within |f|.
    """
    xp, eps = solver_namespace(u), epsilon(u)
    y = pairs.gamma0 * xp.exp(u)
    t = sigmoid(signed(s, pairs.gamma0 * xp.expm1(u) + pairs.start))
    at, size = pairs.a * t, abs(u)
    slope = at - at * t
    d = 1 + y * slope
    noise = size + at + slope * (y + (abs(pairs.start) + pairs.gamma0))
    f = abs(u + signed(s, at) - k) + eps * (noise + abs(k))
    near = f / d
    off = near * (1.3 + (near + near * y) * d * (1 / CLOSE))
    off = off + (4 * eps * size + (abs(log_mass) + 4 * eps))
    off = xp.minimum(off, xp.full_like(u, 80.0))
    return xp.expm1(off) * (y / (y + pairs.gamma0 * xp.exp(log_mass)))


def _log(xp: Namespace, value: Array) -> Array:
    return xp.log(xp.maximum(value, 0 * value + _TINY))

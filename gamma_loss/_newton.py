"""The solvers of the margin problem, in array-API operations.

The problem (see `gamma_loss.margins.solve_margins`) asks for ratios ``x_i = γ_i / γ0`` of mean 1
and one number ν such that, with ``u = log x`` and ``a = γ0 / τ``::

    u_i + a σ(γ0 x_i - g_i) = ν   for every i.

Its Newton matrix is an arrowhead (a diagonal, bordered by the mean), so that a step is one pass
over the pool and a few sums. With ``s = σ(γ0 x - g)``, ``D = 1 + a γ0 x s (1 - s)``,
``r = u + a s - ν`` and ``w = x / D``::

    dν = (1 - mean x + mean(w r)) / mean w,      du = (dν - r) / D.

`newton` repeats that step, which is all that mild settings need, and every published one is mild.
`bracketed` keeps the step inside bounds that hold in exact arithmetic, and converges for any.

Both take ``inside``, 1 for a gap of the pool and 0 for one left out, and gamma0 and a as arrays of
shape (). The number of passes is fixed by the hyperparameters and the dtype, so a compiler sees
straight-line code; only for NumPy, where looking at a value is free, do `bracketed`'s passes end
early. `newton` also counts its operations: eager torch pays 2 µs for each, and 6 µs where a Python
number takes part.

What they know of the pool beyond single gaps goes through a `Whole`: sums and extremes, which a
pool that is spread over processes replaces by reductions.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from gamma_loss._arrays import Array, Namespace, dot_for, logistic_for, repeat, solver_namespace

# Where undamped Newton steps are safe: for a < 1.5 they first failed at κ e^a = 9.5 (16 million
# random pools), where a step overshoots the bend of the sigmoid and can cycle.
_MILD_A, _MILD_DIFFICULTY = 1.5, 8.5

_HALF = 0.5  # the share of its bracket that a step may use up
_FLAT = -40.0  # below it γ0 exp(u) adds nothing to z, so a Newton step is exact
_NARROW = 0.1  # how well the mass must be known for ν to move without a proven direction


# The largest pool that processes gather; of larger ones they reduce the sums (docs/benchmarks.md).
GATHER_LIMIT = 2**17


class Whole:
    """Sums and extremes over a pool that this process holds as a whole."""

    def sums(self, *parts: Array) -> tuple[Array, ...]:
        """Return the sums over the whole pool, given this process's."""
        return parts

    def extremes(self, least: Array, largest: Array) -> tuple[Array, ...]:
        """Return the minimum and maximum over the whole pool, given this process's."""
        return least, largest


_WHOLE = Whole()


def solve(
    gaps: Array, inside: Array, gamma0: float, tau: float, pool: Whole = _WHOLE
) -> tuple[Array, Array, Array]:
    """Return ``(γ, ν, residual)`` for a pool, the two last of shape ()."""
    xp = solver_namespace(gaps)
    if gamma0 == 0:  # nothing to share out, and no scale to measure x by
        return xp.zeros_like(gaps), gaps[0] * 0, gaps[0] * 0
    scalar = gaps[0]
    g0, a = xp.full_like(scalar, gamma0), xp.full_like(scalar, gamma0 / tau)
    passes = mild_passes(gamma0, tau, xp.finfo(gaps.dtype).bits >= 64)
    if passes:
        return newton(xp, gaps, inside, g0, a, passes, pool)
    return bracketed(xp, gaps, inside, g0, a, bracketed_passes(gamma0, tau), pool)


def mild_passes(gamma0: float, tau: float, double: bool) -> int:
    """How many passes `newton` takes, or 0 where it is not safe.

    They are as many as any of 20 million random pools needed to get within 1e-11 or 2e-6 of x.
    """
    a = gamma0 / tau
    kappa = a * gamma0
    if a >= _MILD_A or kappa * math.exp(a) >= _MILD_DIFFICULTY:
        return 0
    passes = 4 if a < 0.5 and kappa < 1.65 else 6
    return passes if double else passes - 1


def bracketed_passes(gamma0: float, tau: float) -> int:
    """Well more than any of a million random pools needed: 4, 11 and 21 for the three cases."""
    kappa = gamma0 / tau * gamma0
    if kappa < 1e-2:
        return 8
    return 16 if kappa < 10 else 28


def newton(
    xp: Namespace,
    gaps: Array,
    inside: Array,
    gamma0: Array,
    a: Array,
    passes: int,
    pool: Whole = _WHOLE,
) -> tuple[Array, Array, Array]:
    """Undamped arrowhead Newton from equal margins.

    With u = log γ and ν shifted alike, by log γ0. D is kept negated.
    """
    sigmoid, dot = logistic_for(gaps), dot_for(gaps)
    one, log_gamma0 = xp.ones_like(gamma0), xp.log(gamma0)
    h, u, nu = gamma0, log_gamma0, log_gamma0
    (count,) = pool.sums(dot(inside, inside))
    total = count * gamma0
    for _ in range(passes):
        p = sigmoid(h - gaps)
        s = a * p
        v = u + s
        d = h * (s * p - s) - one
        w = inside * h / d
        top, bottom = pool.sums(dot(w, v + d), dot(w, inside))
        nu = (top - total) / bottom
        u = u + (v - nu) / d
        h = xp.exp(u)
    (mass,) = pool.sums(dot(inside, h))
    scale = total / mass
    h = h * scale
    # 0, where an entry takes no part, is in the range of the others, as ν lies in that of v.
    v_minus_nu = (u + xp.log(scale) - nu + a * sigmoid(h - gaps)) * inside
    least, largest = pool.extremes(xp.min(v_minus_nu), xp.max(v_minus_nu))
    residual = (largest - least) / 2
    return h, nu - log_gamma0, residual


class BracketedState(NamedTuple):
    """What a pass of `bracketed` hands to the next."""

    gaps: Array
    weights: Array  # inside / n
    gamma0: Array
    a: Array
    cap: Array  # log n: no ratio exceeds the size of the pool
    at_start: tuple[Array, Array]  # σ and 1 - σ of γ0 - g
    u: Array
    u_low: Array  # u_low <= u_i(ν) <= u_high at the current ν
    u_high: Array
    low_seen: Array  # whether u_low comes from a visit, rather than from the closed form
    high_seen: Array
    level: Array  # λ, with ν = a σ(λ): a pair with γ0 - g = λ has the margin γ0
    at_level: tuple[Array, Array]  # σ and 1 - σ of λ
    level_low: Array  # level_low <= λ <= level_high at the solution
    level_high: Array
    stride: Array  # by how much λ last moved


def bracketed(
    xp: Namespace,
    gaps: Array,
    inside: Array,
    gamma0: Array,
    a: Array,
    passes: int,
    pool: Whole = _WHOLE,
) -> tuple[Array, Array, Array]:
    """Arrowhead Newton inside brackets, for any κ.

    ν is written as ``a σ(λ)``: ``r = u + a (σ(z) - σ(λ))`` then keeps its relative accuracy where
    a σ is large, and every pair has a closed-form bracket (see `_closed_form_bracket`).
    """
    state = bracketed_start(xp, gaps, inside, gamma0, a, pool)
    # The function itself where it will do: JAX finds its compiled loop by it.
    step = bracketed_pass if pool is _WHOLE else functools.partial(bracketed_pass, pool=pool)
    state = repeat(passes, step, state, settled)
    return bracketed_end(xp, inside, state, pool)


def bracketed_start(
    xp: Namespace, gaps: Array, inside: Array, gamma0: Array, a: Array, pool: Whole = _WHOLE
) -> BracketedState:
    """Brackets, and the Newton step from equal margins."""
    dot = dot_for(gaps)
    (count,) = pool.sums(dot(inside, inside))
    weights = inside / count
    cap = xp.log(count)
    low, high = _level_bracket(xp, gaps, inside, gamma0, a, cap, pool)
    at_start = p, q = _sigmoids(xp, gamma0 - gaps)
    d = a * gamma0 * p * q + 1
    of_p, of_q = pool.sums(dot(weights / d, p), dot(weights / d, q))
    level = _clip(xp, _log(xp, of_p) - _log(xp, of_q), low, high)
    at_level = _sigmoids(xp, level)
    r = a * _rise(xp, gamma0 - gaps - level, at_start, at_level)
    u_low, u_high = _closed_form_bracket(xp, gaps, gamma0, a, cap, at_start, level, at_level)
    u = _clip(xp, -r / d, u_low, u_high)
    seen = xp.zeros_like(u, dtype=xp.bool)
    stride = xp.full_like(level, float("inf"))
    return BracketedState(
        gaps, weights, gamma0, a, cap, at_start, u, u_low, u_high, seen, seen,
        level, at_level, low, high, stride,
    )  # fmt: skip


def bracketed_end(
    xp: Namespace, inside: Array, state: BracketedState, pool: Whole = _WHOLE
) -> tuple[Array, Array, Array]:
    """Return ``(γ, ν, residual)``, the budget met exactly."""
    gamma0, a = state.gamma0, state.a
    (mass,) = pool.sums(dot_for(state.u)(state.weights, xp.exp(state.u)))
    u = state.u - xp.log(mass)
    r, _ = _residuals(xp, state.gaps, gamma0, a, u, state.level, state.at_level)
    r = r * inside  # 0 lies in the range of r
    least, largest = pool.extremes(xp.min(r), xp.max(r))
    return gamma0 * xp.exp(u), a * state.at_level[0], (largest - least) / 2


def settled(old: BracketedState, new: BracketedState) -> Array:
    """Whether a pass moved nothing that the next one, which squares the error, could show.

    One such pass may have left ν in place for want of proof; after two in a row all is settled.
    """
    xp = solver_namespace(new.u)
    moved = xp.maximum(xp.max(xp.abs(new.u - old.u)), xp.abs(new.level - old.level) * new.a)
    bend = 1 + new.gamma0 * xp.exp(xp.max(new.u))
    return moved * moved * bend <= xp.finfo(new.u.dtype).eps / 16


def bracketed_pass(state: BracketedState, pool: Whole = _WHOLE) -> BracketedState:
    """Move ν, and every pair by a Newton step or half its bracket."""
    gaps, weights, gamma0, a, cap, at_start, u, u_low, u_high, low_seen, high_seen = state[:11]
    level, at_level, level_low, level_high, stride = state[11:]
    xp, dot = solver_namespace(gaps), dot_for(gaps)

    # Where the pairs stand at this level: r > 0 means that u_i is too large.
    r, (p, q) = _residuals(xp, gaps, gamma0, a, u, level, at_level)
    x = xp.exp(u)
    d = a * gamma0 * x * p * q + 1
    above = r > 0
    u_low, u_high = xp.where(above, u_low, u), xp.where(above, u, u_high)
    low_seen, high_seen = low_seen | ~above, high_seen | above

    # The slope of r is at least 1, and at least d / 2 as far as the logarithm of its sigmoid part
    # changes by less than log 2 (by at most 1 + γ0 x per unit of u): so the root of each pair is
    # within `off` of u. That bounds the mass at this level, hence says on which side of λ it is.
    size = xp.abs(r)
    near = 2 * size / d
    off = xp.where((gamma0 * x + 1) * near < 0.69, xp.minimum(size, near), size)
    least = dot(weights, xp.exp(xp.where(above, xp.maximum(u - off, u_low), u)))
    most = dot(weights, xp.exp(xp.where(above, u, xp.minimum(u + off, u_high))))

    # Where the sigmoid dominates, Newton in its logit instead: the same step with another r and d.
    rise, z_change = _logit_change(xp, p, q, -r / a)
    slope = a * (p + rise) * (q - rise)
    d_logit, r_logit = gamma0 * x * slope + 1, -slope * z_change
    steep = (d > 2) & (d_logit > 2)
    r, d = xp.where(steep, r_logit, r), xp.where(steep, d_logit, d)

    # The Newton step of the level, by at most half its bracket. Where the side of λ is not proven,
    # it has to be half the last one, or ν stays and only the pairs move: no going in circles.
    w = weights * x / d
    least, most, top, bottom = pool.sums(least, most, dot(w, r - d), xp.sum(w))
    too_high, too_low = least > 1, most < 1
    level_high = xp.where(too_high, level, level_high)
    level_low = xp.where(too_low, level, level_low)
    d_nu = (top + 1) / bottom
    reach = _HALF * (level_high - level_low)
    new = _clip(xp, level + _logit_change(xp, *at_level, d_nu / a)[1], level - reach, level + reach)
    length = xp.abs(new - level)
    proven = too_high | too_low
    moves = (new >= level_low) & (new <= level_high)
    moves = moves & (proven | ((most - least < _NARROW) & (length <= _HALF * stride)))
    new = xp.where(moves, new, level)
    stride = xp.where(moves, length, stride)
    at_new = _sigmoids(xp, new)
    d_nu = a * _rise(xp, new - level, at_new, at_level)

    # The brackets move with ν, by no more than ν does since u_i(ν) has a slope of at most 1.
    tight_low, tight_high = _closed_form_bracket(xp, gaps, gamma0, a, cap, at_start, new, at_new)
    none = xp.zeros_like(d_nu)
    u_low, u_high = u_low + xp.minimum(d_nu, none), u_high + xp.maximum(d_nu, none)
    low_seen, high_seen = low_seen & (u_low >= tight_low), high_seen & (u_high <= tight_high)
    u_low = xp.maximum(u_low, tight_low)
    u_high = xp.maximum(xp.minimum(u_high, tight_high), u_low)

    # The Newton step of the pairs. Where it would run through most of a bracket with visited ends
    # instead, halve that.
    step = (d_nu - r) / d
    halve = xp.where(above, low_seen, high_seen) & (xp.abs(step) > _HALF * (u_high - u_low))
    halve = halve & (xp.abs(d_nu) < 0.1 * size) & (u_high > _FLAT)
    middle = xp.maximum((u_low + u_high) / 2, xp.full_like(u, _FLAT))
    u = xp.where(halve, middle, _clip(xp, u + step, u_low, u_high))
    return BracketedState(
        gaps, weights, gamma0, a, cap, at_start, u, u_low, u_high, low_seen, high_seen,
        new, at_new, level_low, level_high, stride,
    )  # fmt: skip


def _residuals(
    xp: Namespace,
    gaps: Array,
    gamma0: Array,
    a: Array,
    u: Array,
    level: Array,
    at_level: tuple[Array, Array],
) -> tuple[Array, tuple[Array, Array]]:
    """``r = u + a (σ(z) - σ(level))``, and the `_sigmoids` of z = γ0 e^u - g."""
    z_minus_level = gamma0 * xp.expm1(u) + (gamma0 - gaps - level)
    at_z = _sigmoids(xp, level + z_minus_level)
    return u + a * _rise(xp, z_minus_level, at_z, at_level), at_z


def _closed_form_bracket(
    xp: Namespace,
    gaps: Array,
    gamma0: Array,
    a: Array,
    cap: Array,
    at_start: tuple[Array, Array],
    level: Array,
    at_level: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Bounds on each u_i at ν = a σ(level).

    Where u leaves 0, z leaves γ0 - g towards the level and never passes it. So u lies between 0
    and the value that it would take with z left where it is (exact as κ → 0), and between 0 and
    the value that moves z all the way (exact as κ → ∞).
    """
    z_minus_level = gamma0 - gaps - level
    left = -a * _rise(xp, z_minus_level, at_start, at_level)
    ratio = -z_minus_level / gamma0
    half = xp.full_like(ratio, 0.5)
    moved = xp.log1p(_clip(xp, ratio, -half, half))
    moved = xp.where(xp.abs(ratio) < half, moved, _log(xp, ratio + 1))
    bound = xp.where((ratio > -1) & (xp.abs(moved) < xp.abs(left)), moved, left)
    zero = xp.zeros_like(bound)
    return xp.minimum(bound, zero), xp.minimum(xp.maximum(bound, zero), cap)


def _level_bracket(
    xp: Namespace, gaps: Array, inside: Array, gamma0: Array, a: Array, cap: Array, pool: Whole
) -> tuple[Array, Array]:
    """Bounds on λ: ν lies in the range of a σ(γ0 - g), and no x exceeds the pool's size."""
    infinity = xp.full_like(gaps, float("inf"))
    least = xp.min(xp.where(inside > 0, gaps, infinity))
    largest = xp.max(xp.where(inside > 0, gaps, -infinity))
    least, largest = pool.extremes(least, largest)
    far = xp.log1p(a) + 50  # beyond it a σ(λ) is 0 or a to well below rounding error
    low, high = _clip(xp, gamma0 - largest, -far, far), _clip(xp, gamma0 - least, -far, far)
    # The pair with the largest gap has u <= log n, so ν <= log n + a σ(γ0 n - largest).
    p, q = _sigmoids(xp, gamma0 * xp.exp(cap) - largest)
    capped = _log(xp, p + cap / a) - _log(xp, q - cap / a)
    return low, xp.maximum(xp.minimum(high, capped), low)


def _sigmoids(xp: Namespace, z: Array) -> tuple[Array, Array]:
    """σ(z) and σ(-z), each with a small relative error."""
    e = xp.exp(-xp.abs(z))
    large = 1 / (e + 1)
    small = e * large
    positive = z >= 0
    return xp.where(positive, large, small), xp.where(positive, small, large)


def _rise(
    xp: Namespace, step: Array, end: tuple[Array, Array], start: tuple[Array, Array]
) -> Array:
    """σ(z + step) - σ(z) from the `_sigmoids` at both ends, without cancellation."""
    scale = xp.where(step > 0, -end[0] * start[1], end[1] * start[0])
    return scale * xp.expm1(-xp.abs(step))


def _logit_change(xp: Namespace, p: Array, q: Array, rise: Array) -> tuple[Array, Array]:
    """Return `rise`, cut to what σ(z) = p = 1 - q has left, and the change of z that makes it."""
    rise = _clip(xp, rise, -0.999 * p, 0.999 * q)
    tiny = xp.full_like(p, xp.finfo(p.dtype).smallest_normal)
    up, down = xp.log1p(rise / xp.maximum(p, tiny)), xp.log1p(-rise / xp.maximum(q, tiny))
    return rise, up - down


def _clip(xp: Namespace, values: Array, low: Array, high: Array) -> Array:
    return xp.minimum(xp.maximum(values, low), high)


def _log(xp: Namespace, values: Array) -> Array:
    """log, of the smallest normal number where a value is below it."""
    return xp.log(xp.maximum(values, xp.full_like(values, xp.finfo(values.dtype).smallest_normal)))

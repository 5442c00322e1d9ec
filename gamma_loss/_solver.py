"""The margin problem, and Newton's method for it at any setting.

**The problem.** N gaps g with weights w share a mean margin γ0. For the ratios ``x = γ / γ0``
(positive, weighted mean 1), with ``u = log x``, ``y = γ0 x``, ``z = y - g`` and ``a = γ0 / τ``, the
solution makes one number ν, the multiplier, of every pair's

    u_i + a σ(z_i) = ν.

Its difficulty grows with ``κ = a γ0``. Everything follows from one pair's residual and its slope,

    f(u) = u + a σ(γ0 e^u - g) - ν,        D = f'(u) = 1 + a y σ(z) σ(-z) >= 1.

**Mild settings** (`mild_passes`). Newton's method for the whole problem needs no safeguard. Its
matrix is an arrowhead (a diagonal with a border): `solve_mild` takes one pass and two sums a step.

**All others** alternate two Newton steps.

*The pairs* (`newton_step`) solve f = 0 at a fixed ν. f is convex in u below its inflection
``log(y* / γ0)`` and concave above, where ``y* tanh((y* - g) / 2) = 1`` (y* depends on g alone).
Kept on the root's side of the inflection, the iteration is monotone from its second point on and
converges from any start. Only a pair with ``|du| (1 + y) > 1`` needs that (`safeguarded_step`).

*The multiplier* (`dual_step`) is ``ν = a σ(λ)``. Once every ``|du| (1 + y) <= 0.03``, the predicted
mean of x tells on which side of λ the solution lies. Then λ takes its Newton step,
``dν = (1 - mean x) / mean(x / D)``, inside the bracket found so far, and the pairs follow by
``dν / D``. Near the solution both steps together are Newton's for the whole problem.

σ(z) and σ(λ) enter by their smaller side: with s = 1 for λ <= 0, else -1,
``f = u + s a σ(s z) - k`` with ``k = s a σ(s λ)`` does not cancel. docs/theory.md has the proofs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gamma_loss._backend import PYTHON_MATH, Array
from gamma_loss._comm import LOCAL, Comm

MAX_ITER = 96  # steps of the pairs at one ν, and of ν; random pools took at most 20 and 15
SCALED_STEP_CLOSE = 0.03  # |du| (1 + y) at which the predicted mean of x is right to 1.4e-3
SCALED_STEP_ROUNDED = 0.3  # the same where rounding stops the pairs before
SCALED_STEP_FAR = 1.0  # |du| (1 + y) above which a step needs the safeguard
LOG_MEAN_NEAR = 0.05  # |log mean x| below which ν takes Newton's step for the mean of x
LOG_MEAN_TRUSTED = 2e-3  # |log mean x| below which Newton's step may leave the bracket
MILD_A, MILD_DIFFICULTY = 1.5, 8.5  # docs/theory.md: undamped Newton first failed at κ e^a = 9.5
_TINY = 1e-30  # float32 still knows 1e5 times its reciprocal

Solution = tuple[Array, Array, Array]  # margins, ν, error bound


class Pairs(NamedTuple):
    """The constants of the pairs' equations."""

    gaps: Array
    gamma0: Array
    a: Array
    u_max: Array  # above every root


class Inner(NamedTuple):
    """A Newton step of the pairs at a fixed ν, from u."""

    u: Array
    y: Array
    d: Array
    du: Array
    largest: Array  # |du| (1 + y) of the pairs that stepped last
    before: Array  # the largest of the step before


class Dual(NamedTuple):
    """λ and its bracket; in Python floats on the host."""

    lam: Array
    low: Array
    high: Array
    log_mean: Array  # |log mean x| when λ last moved


class State(NamedTuple):
    """One step of ν and of all pairs."""

    u: Array
    dual: Dual
    error: Array  # of |x - x*| / (1 + x*), at most
    converged: Array


class Problem(NamedTuple):
    """A pool with all that is computed once."""

    pairs: Pairs
    weights: Array | None
    total: Array  # Σ w
    a: Array  # as `total`, in Python floats on the host
    comm: Comm


def solve(
    xp: Any, gaps: Array, weights: Array | None, gamma0: float, tau: float, comm: Comm = LOCAL
) -> Solution:
    """Return the margins of a pool, ν, and a bound on the mean of |x - x*|.

    An entry of weight 0 takes no part; ``weights=None`` stands for equal weights of finite gaps.
    """
    if gamma0 == 0:  # nothing to share, and no scale to measure x by
        margins = xp.zeros_like(gaps)
        zero = xp.number(0.0, gaps) if xp.can_read else 1 * margins[0]
        return margins, zero, zero
    passes = mild_passes(gamma0, tau, xp.eps(gaps) < 1e-10)
    run = xp.as_program(newton, (0, 5, 6)) if comm is LOCAL else newton
    numbers = gamma0, gamma0 / tau
    if xp.is_traced or (passes and not xp.is_host):  # a mild solve reads nothing from a device
        numbers = xp.number(gamma0, gaps), xp.number(gamma0 / tau, gaps)
    margins, nu, bound = run(xp, gaps, weights, *numbers, passes, comm)
    if isinstance(nu, float):
        nu, bound = xp.number(nu, margins), xp.number(bound, margins)
    return margins, nu, bound


def newton(
    xp: Any, gaps: Array, weights: Array | None, gamma0: Any, a: Any, passes: int,
    comm: Comm = LOCAL,
) -> Solution:  # fmt: skip
    """Return the solution by Newton's method: in a mild setting by so many passes, else 0."""
    if weights is not None:
        gaps, weights = fill(xp, gaps, weights, comm)
    if passes:
        return solve_mild(xp, gaps, weights, gamma0, a, passes, comm)
    with xp.ignore_fp_errors():
        problem, state = init(xp, gaps, weights, gamma0, a, comm)
        state = xp.repeat_until(
            lambda each: each.converged, lambda each: step(xp, problem, each), state, MAX_ITER
        )
        return terminate(xp, problem, state)


def fill(xp: Any, gaps: Array, weights: Array, comm: Comm) -> tuple[Array, Array]:
    """Give entries of weight 0 a gap that another has, so that they cost no pass.

    The largest weight becomes 1. If no entry counts, all do, as equal gaps.
    """
    valid = weights > 0
    most, high = comm.all_reduce_max(
        xp.max(weights), xp.max(xp.where(valid, gaps, xp.full_like(gaps, -math.inf)))
    )
    is_empty = most <= 0
    scale = xp.where(is_empty, 1 + 0 * most, most)
    weights = xp.where(is_empty, xp.ones_like(weights), weights / scale)
    return xp.where(valid, gaps, xp.where(is_empty, 0 * most, high)), weights


def mild_passes(gamma0: float, tau: float, is_double: bool) -> int:
    """Return how many passes `solve_mild` needs, or 0 where it is not safe.

    No random pool of 20 million needed more, nor any of those that a search climbed to.
    """
    a = gamma0 / tau
    kappa = a * gamma0
    if a >= MILD_A or kappa * math.exp(a) >= MILD_DIFFICULTY:
        return 0
    passes = 4 if a < 0.42 and kappa < 1.65 else 6
    return passes if is_double else passes - 1


def solve_mild(
    xp: Any, gaps: Array, weights: Array | None, gamma0: Any, a: Any, passes: int, comm: Comm
) -> Solution:
    """Take undamped Newton steps for the whole problem, from equal margins.

    With ``v = u + a σ(z)`` and ``w = x / D``: ``ν = (1 + mean(w (v - D))) / mean w`` and
    ``du = (ν - v) / D``. By Taylor's theorem a step leaves ``|v - ν| <= a (y + 0.385 y²) du² / 8``.
    Here y and g are halved, as ``σ(2 h) = (1 + tanh h) / 2``, and u is log(y / 2).
    """
    eps, (num, read) = xp.eps(gaps), _scalars(xp, xp.is_host)
    a, half = 0.5 * a, 0.5 * gamma0
    shift, y_max = num.log(half), half * num.exp(2 * a)
    curvature, steep = 0.5 * a * (y_max + 0.77 * y_max * y_max), a * y_max
    total, is_close = gaps.shape[0], 8 * eps / curvature
    if weights is not None:
        (total,) = map(read, comm.all_reduce_sum(xp.sum(weights)))
    at_most, one, h = xp.scalar(a, gaps), xp.scalar(1.0, gaps), gaps * xp.scalar(0.5, gaps)
    y, u, budget = xp.scalar(half, gaps), xp.scalar(shift, gaps), half * total
    may_end = xp.is_host and comm is LOCAL  # ranks take all passes, as none may end alone
    for _ in range(passes + 2 * may_end):
        t = xp.tanh(y - h)
        at = at_most * t
        d = one + y * (at_most - at * t)
        v = u + at
        w = y / d if weights is None else weights * (y / d)
        top, bottom = comm.all_reduce_sum(xp.dot(w, v - d), xp.sum(w))
        nu = (read(top) + budget) / read(bottom)
        du = (xp.scalar(nu, gaps) - v) / d
        u = u + du
        y = xp.exp(u)
        if may_end and xp.dot(du, du) <= is_close * gaps.shape[0]:  # sooner than the maximum
            largest = read(xp.max(xp.abs(du)))
            if largest * largest <= is_close:
                break
    else:
        (largest,) = map(read, comm.all_reduce_max(xp.max(xp.abs(du))))
    mass = xp.sum(y) if weights is None else xp.dot(weights, y)
    scale = budget / read(*comm.all_reduce_sum(mass))
    log_scale = num.log(scale)
    rho = curvature * largest * largest + steep * abs(log_scale) + (16 + abs(shift)) * eps
    # Residuals v in a range of 2 ρ bound mean |x - x*|: Proposition 7 of docs/theory.md.
    nu = nu + log_scale + (a - shift)
    return y * xp.scalar(2 * scale, gaps), nu, 2 * num.tanh(0.5 * rho)


def _scalars(xp: Any, can_read: bool | None = None) -> tuple[Any, Any]:
    """Return the functions of single numbers, and how to read one as a Python float if possible."""
    can_read = xp.can_read if can_read is None else can_read
    return (PYTHON_MATH, float) if can_read else (xp, _as_is)


def init(
    xp: Any, gaps: Array, weights: Array | None, gamma0: Any, a: Any, comm: Comm
) -> tuple[Problem, State]:
    """Take λ from Newton's step at equal margins, and the pairs in closed form."""
    num, read = _scalars(xp)
    g0, a_ = xp.scalar(gamma0, gaps), xp.scalar(a, gaps)
    least = 1.0 if weights is None else xp.min(xp.where(weights > 0, weights, 1 + 0 * weights))
    extremes = comm.all_reduce_max(xp.max(gaps), -xp.min(gaps), -least)
    high, low, least = (sign * read(each) for sign, each in zip((1, -1, -1), extremes, strict=True))
    sums = comm.all_reduce_sum(*equal_margin_sums(xp, gaps, weights, g0, a_))
    total, of_p, of_q = map(read, sums)
    dual, u_max, far = first_dual(num, gamma0, a, total, of_p, of_q, low, high, total / least)
    # Beyond these a gap changes nothing but overflows.
    top = gamma0 * num.exp(u_max) + far
    if not xp.can_read or low < -far or high > top:
        gaps = _clip(xp, gaps, xp.full_like(gaps, -1) * far, xp.full_like(gaps, 1) * top)
    pairs = Pairs(gaps, g0, a_, xp.number(u_max, gaps) if xp.can_read else u_max)
    u = first_guess(xp, pairs, dual.lam, *small_side(num, dual.lam, a))
    start = State(u, dual, dual.log_mean, dual.lam != dual.lam)
    return Problem(pairs, weights, total, a, comm), start


def equal_margin_sums(
    xp: Any, gaps: Array, weights: Array | None, gamma0: Array, a: Array
) -> tuple[Array, Array, Array]:
    """Return Σ w, and Σ w σ(z) / D and Σ w σ(-z) / D at equal margins."""
    e = xp.exp(xp.minimum(gaps - gamma0, xp.full_like(gaps, -math.log(_TINY))))  # exp(-z)
    p = 1 / (1 + e)
    q = e * p
    w = 1 / (1 + a * gamma0 * p * q)
    if weights is None:
        return gaps[0] * 0 + gaps.shape[0], xp.dot(w, p), xp.dot(w, q)
    return xp.sum(weights), xp.dot(weights * w, p), xp.dot(weights * w, q)


def first_dual(
    num: Any, gamma0: Array, a: Array, total: Array, of_p: Array, of_q: Array,
    low: Array, high: Array, most: Array,
) -> tuple[Dual, Array, Array]:  # fmt: skip
    """Return λ of Newton's step at equal margins with its bracket, u_max, and the largest |z|.

    Gaps are in [low, high], and no x is above ``most``.
    """
    # ν lies in the range of a σ(γ0 - g).
    far = num.log1p(a) + 50  # beyond it a σ(z) is 0 or a to well below rounding error
    lam_low, lam_high = (_clip(num, gamma0 - each, -far, far) for each in (high, low))
    p, q = _sigmoids(num, gamma0 * most - high)
    cap = num.log(most) / a
    lam_high = _clip(num, _log(num, p + cap) - _log(num, q - cap), lam_low, lam_high)
    lam = _clip(num, _log(num, of_p) - _log(num, of_q), lam_low, lam_high)
    limit = num.log1p(num.maximum((far + high) / gamma0, 0.0 * a))
    u_max = 1 + num.minimum(a, num.minimum(num.log(most), limit))
    return Dual(lam, lam_low, lam_high, 0 * lam + math.inf), u_max, far


def step(xp: Any, problem: Problem, state: State) -> State:
    """Bring the pairs close to their roots, and let ν take a step that they follow."""
    pairs = problem.pairs
    s, k = small_side(_scalars(xp)[0], state.dual.lam, problem.a)
    inner = newton_step(xp, pairs, state.u, s, k, math.inf)
    inner = xp.repeat_until(
        is_close, lambda each: inner_step(xp, pairs, each, s, k), inner, MAX_ITER
    )
    return multiplier_step(xp, problem, state, inner)


def multiplier_step(xp: Any, problem: Problem, state: State, inner: Inner) -> State:
    """Let ν take its step, and the pairs theirs and the change of ν."""
    pairs, weights, total, a, comm = problem
    num, read = _scalars(xp)
    u, y, d, du, *_ = inner
    w = y if weights is None else weights * y
    sums = comm.all_reduce_sum(xp.sum(w) + xp.dot(w, du), xp.sum(w / d))
    budget = total * read(pairs.gamma0)
    mean, rate = (read(each) / budget for each in sums)
    dual, d_nu = dual_step(num, a, state.dual, mean - 1, rate)
    move = du + xp.scalar(d_nu, u) / d

    eps, infinity = xp.eps(u), math.inf + 0 * mean
    error = infinity
    near = (mean - 1) * (mean - 1) <= 16 * eps
    if near is not False:
        error = xp.max(move * (move + y * move) * (y / (pairs.gamma0 + y)))
        (error,) = map(read, comm.all_reduce_max(error))
    rounded = (error <= eps / 16) | ((error <= 16 * eps) & (error > state.error / 4))
    return State(xp.minimum(u + move, pairs.u_max), dual, error, near & rounded)


def is_close(inner: Inner) -> Array:
    """Return whether the predicted mean of x tells the side of λ."""
    largest, before = inner.largest, inner.before
    stalled = (largest <= SCALED_STEP_ROUNDED) & (largest > 0.5 * before)
    return (largest <= SCALED_STEP_CLOSE) | stalled


def newton_step(xp: Any, pairs: Pairs, u: Array, s: Array, k: Array, before: Array) -> Inner:
    """Return Newton's step of every pair on f = 0, from u."""
    gaps, gamma0, a, _ = pairs
    y = gamma0 * xp.exp(u)
    t = 1 / (1 + xp.exp(_signed(s, gaps - y)))
    at = a * t
    d = 1 + y * (at - at * t)
    du = (k - _signed(s, at) - u) / d
    largest = xp.max(xp.abs(du + y * du))
    largest = float(largest) if xp.is_host else largest
    return Inner(u, y, d, du, largest, before + 0 * largest)


def inner_step(xp: Any, pairs: Pairs, inner: Inner, s: Array, k: Array) -> Inner:
    """Take the step, and return the next; only pairs that are not close step if they are few."""
    u, y, _, du, largest, _ = inner
    if xp.is_host and xp.library and u.shape[0] > 64:
        far = xp.nonzero(xp.abs(du + y * du) > SCALED_STEP_CLOSE)[0]
        if 4 * far.shape[0] < u.shape[0]:
            return refine_subset(xp, pairs, inner, s, k, far)
    if not xp.is_host or largest > SCALED_STEP_FAR:
        du = safeguarded_step(xp, pairs, u, y, du, s, k)
    return newton_step(xp, pairs, xp.minimum(u + du, pairs.u_max), s, k, largest)


def refine_subset(xp: Any, pairs: Pairs, inner: Inner, s: Array, k: Array, far: Array) -> Inner:
    """Iterate only the pairs that have not converged."""
    some = pairs._replace(gaps=pairs.gaps[far])
    part = Inner._make([*(each[far] for each in inner[:4]), *inner[4:]])
    part = xp.repeat_until(is_close, lambda each: inner_step(xp, some, each, s, k), part, MAX_ITER)
    arrays = [1 * inner.u, *inner[1:4]]  # the state still has u
    for array, new in zip(arrays, part[:4], strict=True):
        array[far] = new
    return Inner._make([*arrays, *part[4:]])


def safeguarded_step(
    xp: Any, pairs: Pairs, u: Array, y: Array, du: Array, s: Array, k: Array
) -> Array:
    """Where a step is far, take the longer of those on f and on log f; clip at the inflection."""
    gaps, gamma0, a, _ = pairs
    at = a * xp.sigmoid(_signed(s, y - gaps))
    rest = xp.maximum(_signed(s, k - u), _TINY + 0 * u)
    fall = _log(xp, at / rest) * (rest / (1 + y * rest))
    longer = xp.where(s + 0 * u > 0, fall, xp.log1p(xp.maximum(fall, 0 * u)))
    new = u + xp.where(fall > 0, _signed(s, xp.minimum(_signed(s, du), -longer)), du)
    y_bend = inflection(xp, gaps)
    u_bend = xp.log(y_bend / gamma0)
    is_below = u_bend + _signed(s, a * xp.sigmoid(_signed(s, y_bend - gaps))) > k
    new = xp.where(is_below, xp.minimum(new, u_bend), xp.maximum(new, u_bend))
    return xp.where(xp.abs(du + y * du) > SCALED_STEP_FAR, new - u, du)


def inflection(xp: Any, gaps: Array) -> Array:
    """Return the y with ``y tanh((y - g) / 2) = 1``, to 1.6 %.

    Between it and the true inflection D changes by less than 2e-4 of itself.
    """
    h = gaps + 1
    y = (gaps + xp.sqrt(gaps * gaps + 8 + 2 * (xp.sqrt(h * h + 2) - h))) * 0.5
    return xp.maximum(y, xp.ones_like(y))


def first_guess(xp: Any, pairs: Pairs, lam: Array, s: Array, k: Array) -> Array:
    """Return the nearer to 0 of two bounds on u: z stays at γ0 - g, or z moves fully to λ."""
    start = pairs.gamma0 - pairs.gaps
    stays = k - _signed(s, pairs.a * xp.sigmoid(_signed(s, start)))
    moves = xp.log(xp.maximum(1 + (lam - start) / pairs.gamma0, xp.full_like(start, 1e-6)))
    return xp.where(xp.abs(moves) < xp.abs(stays), moves, stays)


def small_side(xp: Any, lam: Array, a: Array) -> tuple[Array, Array]:
    """Return s and k = s a σ(s λ)."""
    one = 0 * lam + 1.0
    s, small = xp.where(lam <= 0, one, -one), xp.exp(-abs(lam))
    return s, s * a * (small / (1 + small))


def dual_step(xp: Any, a: Array, dual: Dual, excess: Array, rate: Array) -> tuple[Dual, Array]:
    """Return the next λ and the change of ν, for mean x - 1 and mean x / D."""
    lam, low, high, before = dual
    mean = xp.maximum(1 + excess, 0 * a + _TINY)
    log_mean = xp.log1p(xp.maximum(excess, 0 * a - (1 - 1e-7)))
    distance = abs(log_mean)
    low, high = xp.where(log_mean <= 0, lam, low), xp.where(log_mean >= 0, lam, high)
    # Newton's step in ν for log mean x, or near the solution for mean x, as a step in λ; or the
    # one in λ itself where it is shorter and the pairs are steep: their mean is nearer to a line
    # in λ then.
    p, q = _sigmoids(xp, lam)
    rise = xp.where(distance < LOG_MEAN_NEAR, -excess, -log_mean * mean) / (a * (rate + _TINY))
    direct = rise / (p * q + _TINY)
    rise = _clip(xp, rise, -0.999 * p, 0.999 * q)
    by = xp.log1p(rise / (p + _TINY)) - xp.log1p(-rise / (q + _TINY))
    by = xp.where((2 * rate < mean) & (abs(direct) < abs(by)), direct, by)
    is_inside = (low <= lam + by) & (lam + by <= high) & (distance <= 0.75 * before)
    is_trusted = is_inside | (distance <= LOG_MEAN_TRUSTED)
    new = xp.where(is_trusted, lam + by, 0.5 * (low + high))
    new_p, new_q = _sigmoids(xp, new)
    share = -xp.expm1(-abs(new - lam))
    d_nu = a * xp.where(new > lam, new_p * q * share, -p * new_q * share)  # a (σ(new) - σ(λ))
    return Dual(new, low, high, distance), d_nu


def terminate(xp: Any, problem: Problem, state: State) -> Solution:
    """Return margins that meet the budget, ν, and the error bound."""
    pairs, weights, total, a, comm = problem
    num, read = _scalars(xp)
    x = xp.exp(state.u)
    (mass,) = comm.all_reduce_sum(xp.sum(x) if weights is None else xp.dot(weights, x))
    mean = read(mass) / total
    s, k = small_side(num, state.dual.lam, a)
    off = root_distance(xp, pairs, state.u, s, k) + abs(num.log(mean))
    x = x / xp.scalar(mean, x)
    error = x * (off * xp.exp(off))  # >= x (e^off - 1)
    (error,) = comm.all_reduce_sum(xp.sum(error) if weights is None else xp.dot(weights, error))
    bound = 2 * read(error) / total
    nu = a * _sigmoids(num, state.dual.lam)[0] + 0 * mean
    return pairs.gamma0 * x, nu, num.minimum(bound, 0 * bound + 2)


def root_distance(xp: Any, pairs: Pairs, u: Array, s: Array, k: Array) -> Array:
    """Bound the distance of u from its root, rounding included.

    It is at most |f|, as D >= 1, and at most 1.3 |f| / D where |f| (1 + y) / D is at most 0.3.
    """
    eps = xp.eps(u)
    gaps, gamma0, a, _ = pairs
    y = gamma0 * xp.exp(u)
    t = 1 / (1 + xp.exp(_signed(s, gaps - y)))
    at, size = a * t, xp.abs(u)
    slope = at - at * t
    d = 1 + y * slope
    noise = size + at + slope * (2 * y + xp.abs(gaps)) + abs(k)
    near = (xp.abs(u + _signed(s, at) - k) + eps * noise) / d
    off = near * (1.3 + (near + near * y) * d * (1 / SCALED_STEP_ROUNDED)) + 4 * eps * (1 + size)
    return xp.minimum(off, xp.full_like(off, 80.0))


def _signed(sign: Array, value: Array) -> Array:
    """Return the value times 1 or -1, without a product where Python knows which."""
    if isinstance(sign, float):
        return value if sign > 0 else -value
    return sign * value


def _sigmoids(xp: Any, x: Array) -> tuple[Array, Array]:
    """Return σ(x) and σ(-x), each with a small relative error."""
    e = xp.exp(-abs(x))
    large = 1 / (1 + e)
    small = e * large
    return xp.where(x >= 0, large, small), xp.where(x >= 0, small, large)


def _clip(xp: Any, value: Array, low: Array, high: Array) -> Array:
    return xp.minimum(xp.maximum(value, low), high)


def _log(xp: Any, value: Array) -> Array:
    return xp.log(xp.maximum(value, 0 * value + _TINY))


def _as_is(value: Array) -> Array:
    return value

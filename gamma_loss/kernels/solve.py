"""One Triton program that solves one pool, held in registers: `gamma_loss._solver` for one block.

The names and the algebra are those of `gamma_loss._solver`. No branch at run time comes before a
reduction, as compilers have made wrong code of that: alternatives are selected lane by lane, and
what may take no step is a loop.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gamma_loss import _solver
from gamma_loss.kernels.math import clip, expm1, log1p, sigmoid, sigmoids, sums2

MAX_ITER = tl.constexpr(_solver.MAX_ITER)
SCALED_STEP_CLOSE = tl.constexpr(_solver.SCALED_STEP_CLOSE)
SCALED_STEP_ROUNDED = tl.constexpr(_solver.SCALED_STEP_ROUNDED)
SCALED_STEP_FAR = tl.constexpr(_solver.SCALED_STEP_FAR)
LOG_MEAN_NEAR = tl.constexpr(_solver.LOG_MEAN_NEAR)
LOG_MEAN_TRUSTED = tl.constexpr(_solver.LOG_MEAN_TRUSTED)
MILD_ROUNDING = tl.constexpr(16)  # machine epsilons of a mild residual
TINY = tl.constexpr(1e-30)


class Pairs(NamedTuple):
    """The pool, and the constants of its pairs' equations."""

    gaps: tl.tensor
    weights: tl.tensor  # 0 for an entry that takes no part; their sum is 1
    gamma0: tl.tensor
    a: tl.tensor
    u_max: tl.tensor  # above every root


class Dual(NamedTuple):
    """λ and its bracket."""

    lam: tl.tensor
    low: tl.tensor
    high: tl.tensor
    log_mean: tl.tensor  # |log mean x| when λ last moved


# Not specialized, so that the same variant takes pools of any size and alignment.
@triton.jit(do_not_specialize=["gaps", "weights", "margins", "numbers", "size"])
def solve_kernel(
    gaps, weights, margins, numbers, size,
    gamma0: tl.float64, a: tl.float64,  # rounded to the dtype of the gaps
    PASSES: tl.constexpr,  # of `solve_mild`; 0 for other settings
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the margins of a pool, and ν with the error bound. ``weights`` may be None."""
    T: tl.constexpr = gaps.dtype.element_ty
    EPS: tl.constexpr = 2.0**-52 if T == tl.float64 else 2.0**-23  # noqa: SIM300
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    i = tl.arange(0, BLOCK)
    given = tl.load(gaps + i, mask=i < size, other=float("nan"))
    w = (i < size).to(T) if weights is None else tl.load(weights + i, mask=i < size, other=0.0)
    # Where a gap is not finite the margin is NaN. This waits in memory, as registers are few.
    tl.store(margins + i, given - given, mask=i < size)
    pairs, low, high, least = fill(given, w, i < size, gamma0, a)
    if PASSES > 0:
        found, nu, bound = solve_mild(pairs, PASSES, EPS)
    else:
        pairs, u, dual = init(pairs, low, high, least)
        u, lam = iterate(pairs, u, dual, EPS)
        found, nu, bound = terminate(pairs, u, lam, EPS)
    tl.store(numbers, nu)
    tl.store(numbers + 1, bound)
    tl.store(margins + i, found + tl.load(margins + i, mask=i < size), mask=i < size)


@triton.jit
def fill(gaps, weights, is_entry, gamma0, a):
    """Give entries that take no part the gap of one that does, so that they cost no pass.

    Return also the extremes of the gaps, and the least positive weight.
    """
    infinity = float("inf")
    valid = (tl.abs(gaps) < infinity) & (weights > 0)
    high = tl.max(tl.where(valid, gaps, -infinity), 0)
    low = tl.min(tl.where(valid, gaps, infinity), 0)
    most = tl.max(tl.where(valid, weights, 0.0), 0)
    least = tl.min(tl.where(valid, weights, infinity), 0)
    empty = most == 0  # then all count, as equal gaps
    high, low = tl.where(empty, 0.0, high), tl.where(empty, 0.0, low)
    most, least = tl.where(empty, 1.0, most), tl.where(empty, 1.0, least)
    weights = tl.where(valid, weights / most, tl.where(empty, is_entry.to(gaps.dtype), 0.0))
    total = tl.sum(weights, 0)
    pairs = Pairs(tl.where(valid, gaps, high), weights / total, gamma0, a, a)
    return pairs, low, high, least / most / total


@triton.jit
def solve_mild(pairs, PASSES: tl.constexpr, EPS: tl.constexpr):
    """Take undamped Newton steps for the whole problem, from equal margins."""
    gaps, weights, gamma0, a, _ = pairs
    u, nu = tl.zeros_like(gaps), a
    for _ in range(PASSES):
        y = gamma0 * tl.exp(u)
        t = sigmoid(y - gaps)
        at = a * t
        v, slope = u + at, 1 / (1 + y * (at - at * t))
        w = weights * (y * slope)
        top, bottom = sums2(w * v - weights * y, w)
        nu = (top + gamma0) / bottom
        u = (u - v * slope) + nu * slope
    y = gamma0 * tl.exp(u)
    y *= gamma0 / tl.sum(weights * y, 0)
    v = u + a * sigmoid(y - gaps)
    rho = 0.5 * (tl.max(v, 0) - tl.min(v, 0)) + MILD_ROUNDING * EPS
    return y, nu, tl.minimum(rho, 2.0)


@triton.jit
def init(pairs, low, high, least_weight):
    """Take λ from Newton's step at equal margins, and the pairs in closed form."""
    gaps, weights, gamma0, a, _ = pairs
    p, q = sigmoids(gamma0 - gaps)
    w = weights / (1 + a * gamma0 * p * q)
    of_p, of_q = sums2(w * p, w * q)

    # ν lies in the range of a σ(γ0 - g), and no x is above Σ w / w_i.
    far = log1p(a) + 50  # beyond it a σ(λ) is 0 or a to well below rounding error
    most = 1 / least_weight
    lam_low, lam_high = clip(gamma0 - high, -far, far), clip(gamma0 - low, -far, far)
    p1, q1 = sigmoids(gamma0 * most - high)
    cap = tl.log(most) / a
    lam_high = clip(_log(p1 + cap) - _log(q1 - cap), lam_low, lam_high)
    lam = clip(_log(of_p) - _log(of_q), lam_low, lam_high)
    u_max = tl.minimum(tl.log(most), log1p(clip((far + high) / gamma0, 0.0, 1 / TINY)))
    u_max = tl.minimum(u_max, a) + 1
    # Beyond these a gap changes nothing but overflows.
    gaps = clip(gaps, -far, gamma0 * tl.exp(u_max) + far)
    pairs = Pairs(gaps, weights, gamma0, a, u_max)
    s, k = small_side(lam, a)
    return pairs, first_guess(pairs, lam, s, k), Dual(lam, lam_low, lam_high, 0 * a + float("inf"))


@triton.jit
def iterate(pairs, u, dual, EPS: tl.constexpr):
    """Bring the pairs close to their roots, let ν take a step that they follow, and so on."""
    infinity = 0 * pairs.a + float("inf")
    error, converged, turn = infinity, infinity < 0, 0
    while (converged == 0) & (turn < MAX_ITER):
        s, k = small_side(dual.lam, pairs.a)
        before, inner_turn = infinity, 0
        y, d, du, largest = newton_step(pairs, u, s, k)
        while (is_close(largest, before) == 0) & (inner_turn < MAX_ITER):
            u = tl.minimum(u + safeguarded_step(pairs, u, y, du, s, k), pairs.u_max)
            before = largest
            y, d, du, largest = newton_step(pairs, u, s, k)
            inner_turn += 1
        w = pairs.weights * y
        mass, of_d = sums2(w + w * du, w / d)
        excess = mass / pairs.gamma0 - 1
        dual, d_nu = dual_step(pairs.a, dual, excess, of_d / pairs.gamma0)
        move = du + d_nu / d
        u = tl.minimum(u + move, pairs.u_max)
        near, last = excess * excess <= 16 * EPS, error
        error = tl.max(move * (move + y * move) * (y / (pairs.gamma0 + y)), 0)
        error = tl.where(near, error, infinity)
        converged = (error <= EPS / 16) | ((error <= 16 * EPS) & (error > last / 4))
        turn += 1
    return u, dual.lam


@triton.jit
def is_close(largest, before):
    """Return whether the predicted mean of x tells the side of λ."""
    stalled = (largest <= SCALED_STEP_ROUNDED) & (largest > 0.5 * before)
    return (largest <= SCALED_STEP_CLOSE) | stalled


@triton.jit
def newton_step(pairs, u, s, k):
    """Return y, D and Newton's step of every pair on f = 0, and the largest |du| (1 + y)."""
    y = pairs.gamma0 * tl.exp(u)
    t = sigmoid(s * (y - pairs.gaps))
    at = pairs.a * t
    d = 1 + y * (at - at * t)
    du = (k - s * at - u) / d
    return y, d, du, tl.max(tl.abs(du + y * du), 0)


@triton.jit
def safeguarded_step(pairs, u, y, du, s, k):
    """Take the longer of the Newton steps on f and on log f; clip at the inflection."""
    gaps, gamma0, a = pairs.gaps, pairs.gamma0, pairs.a
    is_far = tl.abs(du + y * du) > SCALED_STEP_FAR
    at = a * sigmoid(s * (y - gaps))
    rest = tl.maximum(s * (k - u), TINY)
    fall = _log(at / rest) * (rest / (1 + y * rest))
    longer = tl.where(s > 0, fall, log1p(tl.maximum(fall, 0.0)))
    new = u + tl.where(fall > 0, s * tl.minimum(s * du, -longer), du)
    y = inflection(gaps)
    u_bend = tl.log(y / gamma0)
    is_below = u_bend + s * (a * sigmoid(s * (y - gaps))) > k
    new = tl.where(is_below, tl.minimum(new, u_bend), tl.maximum(new, u_bend))
    return tl.where(is_far, new - u, du)


@triton.jit
def inflection(gaps):
    """Return the y with ``y tanh((y - g) / 2) = 1``, to 1.6 %."""
    h = gaps + 1
    y = (gaps + tl.sqrt(gaps * gaps + 8 + 2 * (tl.sqrt(h * h + 2) - h))) * 0.5
    return tl.maximum(y, 1.0)


@triton.jit
def first_guess(pairs, lam, s, k):
    """Return the nearer to 0 of two bounds on u: z stays at γ0 - g, or z moves fully to λ."""
    start = pairs.gamma0 - pairs.gaps
    stays = k - s * (pairs.a * sigmoid(s * start))
    moves = tl.log(tl.maximum(1 + (lam - start) / pairs.gamma0, 1e-6))
    return tl.where(tl.abs(moves) < tl.abs(stays), moves, stays)


@triton.jit
def small_side(lam, a):
    """Return s and k = s a σ(s λ)."""
    s = tl.where(lam <= 0, 1.0, -1.0).to(lam.dtype)
    return s, s * a * sigmoid(-tl.abs(lam))


@triton.jit
def dual_step(a, dual, excess, rate):
    """Return the next λ and the change of ν, for mean x - 1 and mean x / D."""
    lam, low, high, before = dual
    mean, log_mean = tl.maximum(1 + excess, TINY), log1p(tl.maximum(excess, -(1 - 1e-7)))
    distance = tl.abs(log_mean)
    low, high = tl.where(log_mean <= 0, lam, low), tl.where(log_mean >= 0, lam, high)
    # Newton's step in ν for log mean x, or near the solution for mean x, as a step in λ; or the
    # one in λ itself where it is shorter and the pairs are steep.
    p, q = sigmoids(lam)
    rise = tl.where(distance < LOG_MEAN_NEAR, -excess, -log_mean * mean) / (a * (rate + TINY))
    direct = rise / (p * q + TINY)
    rise = clip(rise, -0.999 * p, 0.999 * q)
    by = log1p(rise / (p + TINY)) - log1p(-rise / (q + TINY))
    by = tl.where((2 * rate < mean) & (tl.abs(direct) < tl.abs(by)), direct, by)
    is_inside = (low <= lam + by) & (lam + by <= high) & (distance <= 0.75 * before)
    is_trusted = is_inside | (distance <= LOG_MEAN_TRUSTED)
    new = tl.where(is_trusted, lam + by, 0.5 * (low + high))
    new_p, new_q = sigmoids(new)
    share = -expm1(-tl.abs(new - lam))
    d_nu = a * tl.where(new > lam, new_p * q * share, -p * new_q * share)  # a (σ(new) - σ(λ))
    return Dual(new, low, high, distance), d_nu


@triton.jit
def terminate(pairs, u, lam, EPS: tl.constexpr):
    """Return margins that meet the budget, ν, and the error bound."""
    _, weights, gamma0, a, _ = pairs
    x = tl.exp(u)
    mean = tl.sum(weights * x, 0)
    s, k = small_side(lam, a)
    off = root_distance(pairs, u, s, k, EPS) + tl.abs(tl.log(mean))
    x /= mean
    bound = 2 * tl.sum(weights * x * (off * tl.exp(off)), 0)
    return gamma0 * x, a * sigmoid(lam), tl.minimum(bound, 2.0)


@triton.jit
def root_distance(pairs, u, s, k, EPS: tl.constexpr):
    """Bound the distance of u from its root, rounding included."""
    y = pairs.gamma0 * tl.exp(u)
    t = sigmoid(s * (y - pairs.gaps))
    at, size = pairs.a * t, tl.abs(u)
    slope = at - at * t
    d = 1 + y * slope
    # The exp and / of a GPU are off by more than an epsilon: by up to 4 and |z| / 2 of them.
    noise = size + 4 * at + 2 * slope * (y + tl.abs(pairs.gaps)) + tl.abs(k)
    near = (tl.abs(u + s * at - k) + EPS * noise) / d
    off = near * (1.3 + (near + near * y) * d * (1 / SCALED_STEP_ROUNDED)) + 4 * EPS * (1 + size)
    return tl.minimum(off, 80.0)


@triton.jit
def _log(value):
    return tl.log(tl.maximum(value, TINY))

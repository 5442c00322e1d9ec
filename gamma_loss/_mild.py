"""Undamped Newton for mild settings of the margin problem, which `gamma_loss._solver` states.

Newton's matrix of the whole problem is an arrowhead, a diagonal bordered by the mean, so that a
step takes one pass over the pairs and three sums. With f at the current ν and ``w = x / D``::

    dν = (1 - mean x + mean(w f)) / mean w,        du = (dν - f) / D.

Every published setting is mild.
"""

from __future__ import annotations

import math

from gamma_loss._arrays import Array, inner, sigmoid, solver_namespace, total
from gamma_loss._spread import WHOLE, Spread, count_of, weighted

# Where undamped Newton steps are safe: for a < 1.5 they first failed at κ e^a = 9.5 (16 million
# random pools), where a step overshoots the bend of the sigmoid and can cycle.
_MILD_A, _MILD_DIFFICULTY = 1.5, 8.5
_MILD_ROUNDING = 16  # machine epsilons by which a mild setting's certificate may be wrong


def mild_passes(gamma0: float, tau: float, double: bool) -> int:
    """How many passes `newton` takes, or 0 where it is not safe.

    They are as many as any of 20 million random pools needed to get within 1e-11 or 2e-6 of x. Of
    pools that were climbed to, 4 left up to 3e-14 of x where they are taken, 1.6e-13 at a = 0.5.
    """
    a = gamma0 / tau
    kappa = a * gamma0
    if a >= _MILD_A or kappa * math.exp(a) >= _MILD_DIFFICULTY:
        return 0
    passes = 4 if a < 0.42 and kappa < 1.65 else 6
    return passes if double else passes - 1


def newton(
    gaps: Array, weights: Array | None, gamma0: Array, a: Array, passes: int, spread: Spread = WHOLE
) -> tuple[Array, Array, Array]:
    """Undamped arrowhead Newton from equal margins.

    It counts its operations: here u is log γ, ν is larger by log γ0, and D is kept negated.
    """
    xp = solver_namespace(gaps)
    log_gamma0 = xp.log(gamma0)
    y, u, nu = gamma0, log_gamma0, log_gamma0
    (count,) = spread.sums(count_of(gaps, weights))
    budget = count * gamma0
    for _ in range(passes):
        p = sigmoid(y - gaps)
        at = a * p
        v = u + at
        d = y * (at * p - at) - 1
        w = weighted(weights, y / d)
        top, bottom = spread.sums(inner(w, v + d), total(w))
        nu = (top - budget) / bottom
        u = u + (v - nu) / d
        y = xp.exp(u)
    (mass,) = spread.sums(total(weighted(weights, y)))
    scale = budget / mass
    y = y * scale
    # 0, where an entry takes no part, is in the range of the others, as ν lies in that of v.
    f = weighted(weights, u + xp.log(scale) - nu + a * sigmoid(y - gaps))
    least, largest = spread.extremes(xp.min(f), xp.max(f))
    rounding = _MILD_ROUNDING * xp.finfo(gaps.dtype).eps
    return y, nu - log_gamma0, (largest - least) * 0.5 + rounding

"""Slow, plain and independent answers to check the library against.

Nothing here is shared with the package, and the margin problem is solved by bracketing alone, in
extended precision (`numpy.longdouble`: 80 bits on x86, plain float64 where there is nothing wider).
"""

import functools

import numpy as np

Real = np.longdouble


def softplus(x):
    x = np.asarray(x, dtype=Real)
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    x = np.asarray(x, dtype=Real)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def margins(reward_gaps, gamma0, tau):
    """The margins and ν, by bisection on every u = log(γ / γ0) inside regula falsi on ν.

    For a given ν each ``u + a σ(γ0 e^u - g) - ν`` increases in u and changes sign in [ν - a, ν];
    log mean e^u increases in ν and passes 0 in [0, a]. Every u increases in ν as well, so that what
    was found at two ν brackets it between them. Equal gaps are solved once. Where ν is beyond a / 2
    everything is measured from a instead, with σ(z) - 1 = -σ(-z), so that what is left of a σ keeps
    its digits.
    """
    gaps, index, counts = np.unique(
        np.asarray(reward_gaps, dtype=Real), return_inverse=True, return_counts=True
    )
    u, nu = _log_ratios(tuple(gaps), tuple(counts), Real(gamma0), Real(tau))
    return Real(gamma0) * np.exp(u)[index.reshape(-1)], nu


@functools.cache  # all implementations are held to the same pools
def _log_ratios(gaps, counts, gamma0, tau):
    """u of each distinct gap, and ν."""
    gaps, counts = np.array(gaps), np.array(counts)
    a = gamma0 / tau
    share = counts / Real(counts.sum())

    def log_ratios(offset, from_top, low, high):
        while True:
            u = (low + high) / 2
            if np.all((high - low < 1e-17) | (u <= low) | (u >= high)):
                return u
            z = gamma0 * np.exp(np.minimum(u, 100)) - gaps
            rising = u + (-a * sigmoid(-z) if from_top else a * sigmoid(z)) > offset
            low, high = np.where(rising, low, u), np.where(rising, u, high)

    def log_mass(u):
        return u.max() + np.log(share @ np.exp(u - u.max()))

    def visit(offset, from_top, low, high):
        u = log_ratios(offset, from_top, low, high)
        return offset, u, log_mass(u)

    from_top = visit(a / 2, False, np.full(gaps.shape, -a / 2), np.full(gaps.shape, a / 2))[2] < 0
    ends = (-a / 2, Real(0)) if from_top else (Real(0), a / 2)
    low, high = (
        visit(end, from_top, *(np.full(gaps.shape, end + shift) for shift in shifts))
        for end, shifts in zip(ends, [(0, a) if from_top else (-a, 0)] * 2, strict=True)
    )
    for i in range(400):
        # Illinois' variant has halved the value of an end that stays; bisect once in four.
        middle = high[0] - high[2] * (high[0] - low[0]) / (high[2] - low[2])
        if i % 4 == 3 or not low[0] < middle < high[0]:
            middle = (low[0] + high[0]) / 2
        new = visit(middle, from_top, low[1], high[1])
        if not low[0] < middle < high[0] or abs(new[2]) < 2e-17:
            break
        if new[2] > 0:
            low, high = (*low[:2], low[2] / 2), new
        else:
            low, high = new, (*high[:2], high[2] / 2)
    offset, u, _ = new
    return u, offset + (a if from_top else 0)


def condition(exact, nu, reward_gaps, gamma0, tau):
    """How far the solution moves when all numbers of the problem move: the worst x, over 1 + x.

    To first order, for a relative change of 1 in the worst direction of every gap, γ0, a, the
    budget and each term of a pair's equation, which is ``u - a σ(-z) = ν - a`` where ν is beyond
    a / 2, as in `margins`. Proposition 9 of docs/theory.md.
    """
    gaps, index, counts = np.unique(reward_gaps, return_index=True, return_counts=True)
    gaps, gamma0, exact = gaps.astype(Real), Real(gamma0), exact[index]
    a, x, share = gamma0 / Real(tau), exact / gamma0, counts / Real(counts.sum())
    z = exact - gaps
    slope = a * sigmoid(z) * sigmoid(-z)
    d = 1 + exact * slope
    u = np.log(np.maximum(x, np.finfo(Real).tiny))
    terms = np.abs(u) + a * sigmoid(-z if nu > a / 2 else z) + slope * (exact + np.abs(gaps))
    of_nu = (1 + share @ (x * terms / d)) / (share @ (x / d))
    return np.max(x / (1 + x) * (terms + of_nu) / d)


def promised(dtype, *problem):
    """What the library promises that |x - x*| / (1 + x*) never exceeds, of a `condition`'s problem.

    In float64 1e-13 and in float32 3e-6, or 16 machine epsilons times the condition, if more.
    """
    dtype = np.dtype(dtype)
    flat = {"float64": 1e-13, "float32": 3e-6}[dtype.name]
    return max(flat, 16 * np.finfo(dtype).eps * condition(*problem))


def error(margins, exact, nu, reward_gaps, gamma0, tau):
    """|x - x*| / (1 + x*) at its worst in a pool, over what is `promised`: broken above 1."""
    x, exact_x = np.asarray(margins, dtype=Real) / Real(gamma0), exact / Real(gamma0)
    off = np.max(np.abs(x - exact_x) / (1 + exact_x))
    return float(off / promised(margins.dtype, exact, nu, reward_gaps, gamma0, tau))


def objective(x, reward_gaps, gamma0, tau):
    """F of the margin problem as a function of x = N p = γ / γ0."""
    x, gaps = np.asarray(x, dtype=Real), np.asarray(reward_gaps, dtype=Real)
    entropy = np.where(x > 0, x * np.log(np.where(x > 0, x, 1)), 0)
    return np.mean(softplus(gamma0 * x - gaps)) + tau * np.mean(entropy)


def dpo(gaps):
    """Rafailov et al. 2023, eq. 7: -log σ of the reward gap."""
    return softplus(-np.asarray(gaps, dtype=Real))


def simpo(gaps, margin):
    """Meng et al. 2024, eq. 6: -log σ of the reward gap minus the target margin."""
    return dpo(np.asarray(gaps, dtype=Real) - margin)


def cdpo(gaps, epsilon, margin=0.0):
    """Mitchell 2023: (1 - ε) of the loss and ε of the loss with the labels swapped."""
    s = np.asarray(gaps, dtype=Real) - margin
    return (1 - epsilon) * dpo(s) + epsilon * dpo(-s)


def rdpo(gaps, epsilon, margin=0.0):
    """Chowdhury et al. 2024, eq. 12: the unbiased estimate of the loss under flips."""
    s = np.asarray(gaps, dtype=Real) - margin
    return ((1 - epsilon) * dpo(s) - epsilon * dpo(-s)) / (1 - 2 * Real(epsilon))

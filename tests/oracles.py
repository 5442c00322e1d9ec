"""Slow, plain and independent answers to check the library against.

Nothing here is shared with the package, and the margin problem is solved by bisection alone, in
extended precision (`numpy.longdouble`: 80 bits on x86, plain float64 where there is nothing wider).
"""

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
    """The margins and ν, by bisection on ν around bisections on every u = log(γ / γ0).

    For a given ν each ``u + a σ(γ0 e^u - g) - ν`` increases in u and changes sign in [ν - a, ν];
    the mean of e^u increases in ν and passes 1 in [0, a]. Equal gaps are solved once. Where ν is
    beyond a / 2 everything is measured from a instead, with σ(z) - 1 = -σ(-z), so that what is left
    of a σ keeps its digits.
    """
    gaps, index, counts = np.unique(
        np.asarray(reward_gaps, dtype=Real), return_inverse=True, return_counts=True
    )
    gamma0 = Real(gamma0)
    a = gamma0 / Real(tau)
    share = counts / Real(counts.sum())

    def log_ratios(offset, from_top):
        low, high = np.full(gaps.shape, offset - (0 if from_top else a)), None
        high = low + a
        for _ in range(_halvings(a)):
            u = (low + high) / 2
            z = gamma0 * np.exp(np.minimum(u, 100)) - gaps
            rising = u + (-a * sigmoid(-z) if from_top else a * sigmoid(z)) > offset
            low, high = np.where(rising, low, u), np.where(rising, u, high)
        return (low + high) / 2

    def mass_exceeds_one(offset, from_top):
        u = log_ratios(offset, from_top)
        return u.max() + np.log(share @ np.exp(u - u.max())) > 0

    from_top = not mass_exceeds_one(a / 2, False)
    low, high = (-a / 2, Real(0)) if from_top else (Real(0), a / 2)
    for _ in range(_halvings(a)):
        middle = (low + high) / 2
        if mass_exceeds_one(middle, from_top):
            high = middle
        else:
            low = middle
    offset = (low + high) / 2
    x = np.exp(log_ratios(offset, from_top))
    return gamma0 * x[index.reshape(-1)], offset + (a if from_top else 0)


def _halvings(width):
    """Enough to bring a bracket of this width below 1e-17."""
    return int(np.ceil(np.log2(float(width) + 1e-3))) + 57


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

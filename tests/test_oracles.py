"""The oracle itself, against solvers of other kinds."""

import mpmath
import numpy as np
import oracles
import pytest
from scipy import optimize


@pytest.mark.parametrize("seed", range(5))
def test_against_a_general_optimiser_on_the_simplex(seed):
    rng = np.random.default_rng(seed)
    gaps, gamma0, tau = rng.normal(size=5) * 2, rng.uniform(0.5, 3), rng.uniform(0.5, 5)

    def objective(logits):
        p = np.exp(logits - logits.max())
        return float(oracles.objective(5 * p / p.sum(), gaps, gamma0, tau))

    found = optimize.minimize(objective, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x
    p = np.exp(found - found.max())
    expected = gamma0 * 5 * p / p.sum()
    # BFGS with differences finds the minimiser to the square root of its rounding error.
    np.testing.assert_allclose(
        oracles.margins(gaps, gamma0, tau)[0].astype(float), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("gaps", "gamma0", "tau"),
    [
        ([0.5, -1.0], 4.0, 10.0),
        ([1e4, -1e4], 100.0, 1e-3),
        ([90.0, 110.0], 100.0, 1e-3),
        ([22.67784608, 3580.15056838], 82.10179909, 6.29615817),
        ([-30.0, 5.0], 1.0, 1e-3),
        ([3.0, 3.0], 1e-3, 1e3),
    ],
)
def test_two_pairs_against_forty_digits(gaps, gamma0, tau):
    # Two pairs share 2 γ0: one unknown t = log(x_1 / x_2), found by bisection in 40 digits.
    with mpmath.workdps(40):
        a = mpmath.mpf(gamma0) / mpmath.mpf(tau)
        g1, g2 = map(mpmath.mpf, gaps)

        def sigmoid(z):
            return 1 / (1 + mpmath.exp(-z))

        def ratios(t):
            return 2 / (1 + mpmath.exp(-t)), 2 / (1 + mpmath.exp(t))

        def imbalance(t):
            x1, x2 = ratios(t)
            return t + a * (sigmoid(gamma0 * x1 - g1) - sigmoid(gamma0 * x2 - g2))

        low, high = -a - 1, a + 1
        for _ in range(160):
            middle = (low + high) / 2
            low, high = (low, middle) if imbalance(middle) > 0 else (middle, high)
        expected = np.array([float(x) for x in ratios(low)])
    x = (oracles.margins(gaps, gamma0, tau)[0] / gamma0).astype(float)
    # bisected to 1e-17, on values of a few ulps of a
    tolerance = 1e-15 + 8 * np.finfo(oracles.Real).eps * (1 + gamma0 / tau)
    assert np.max(np.abs(x - expected) / (1 + expected)) <= tolerance

"""The oracle itself, against forty digits and its own answers to other numbers.

That no margins have a lower objective is in test_margins, of margins that agree with the oracle.
"""

import mpmath
import numpy as np
import oracles
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import gamma0s, pools, taus

TWO = [
    ([0.5, -1.0], 4.0, 10.0),
    ([1e4, -1e4], 100.0, 1e-3),
    ([90.0, 110.0], 100.0, 1e-3),
    ([-30.0, 5.0], 1.0, 1e-3),
    ([3.0, 3.0], 1e-3, 1e3),
]


def test_two_pairs_against_forty_digits():
    # Two pairs share 2 γ0: one unknown t = log(x_1 / x_2), found by bisection in 40 digits.
    for gaps, gamma0, tau in TWO:
        with mpmath.workdps(40):
            a = mpmath.mpf(gamma0) / mpmath.mpf(tau)
            g1, g2 = map(mpmath.mpf, gaps)
            low, high = -a - 1, a + 1
            for _ in range(160):
                t = (low + high) / 2
                x1, x2 = 2 / (1 + mpmath.exp(-t)), 2 / (1 + mpmath.exp(t))
                p1, p2 = (1 / (1 + mpmath.exp(g - gamma0 * x)) for g, x in ((g1, x1), (g2, x2)))
                low, high = (low, t) if t + a * (p1 - p2) > 0 else (t, high)
            expected = np.array([float(x1), float(x2)])
        x = (oracles.margins(gaps, gamma0, tau)[0] / gamma0).astype(float)
        # bisected to 1e-17, on values of a few ulps of a
        tolerance = 1e-15 + 8 * np.finfo(oracles.Real).eps * (1 + gamma0 / tau)
        assert np.max(np.abs(x - expected) / (1 + expected)) <= tolerance


@given(pools(max_size=12), gamma0s, taus, st.integers(0, 2**32 - 1))
def test_condition_bounds_what_a_change_of_the_numbers_does(gaps, gamma0, tau, seed):
    exact, nu = oracles.margins(gaps, gamma0, tau)
    condition = oracles.condition(exact, nu, gaps, gamma0, tau)
    size = min(1e-9, 1e-3 / condition)  # so small that the second order is a thousandth
    assume(condition * size > 1e-14)  # far above the oracle's own error
    signs = size * np.random.default_rng(seed).choice([-1.0, 1.0], gaps.size + 2)
    factors = 1 + signs.astype(oracles.Real)
    changed, _ = oracles.margins(gaps * factors[2:], gamma0 * factors[0], tau * factors[1])
    x, moved = exact / gamma0, np.abs(changed / factors[0] - exact) / gamma0
    assert np.max(moved / (1 + x)) <= 2.1 * size * condition  # τ and γ0 both change a


def test_condition_of_a_pool_that_is_ill_conditioned():
    """A rounding error of the large gaps alone moves another margin by a good share of it."""
    # Few pairs have nearly all of the mass, and hardly any of them can move.
    gaps = np.repeat([10_000.0, -1.6638433722704753, -1.294518389395866], [10, 73_563, 1])
    gamma0, tau, size = 1.3593585065766032, 0.0010027109377336572, 1e-9
    exact, nu = oracles.margins(gaps, gamma0, tau)
    condition = oracles.condition(exact, nu, gaps, gamma0, tau)
    assert condition >= 1e4
    changed, _ = oracles.margins(np.where(gaps == 1e4, 1e4 * (1 + size), gaps), gamma0, tau)
    moved = np.max(np.abs(changed - exact) / (gamma0 + exact))
    assert condition * size / 20 <= moved <= condition * size

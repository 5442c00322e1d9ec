"""What loss γ-PO is: each claim of docs/theory.md's section of that name, on random pools."""

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from gamma_loss import solve_margins

few = settings(max_examples=25)
seeds = st.integers(0, 2**32 - 1)
gamma0s = st.floats(0.1, 8.0)


def pool(seed, count=30):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.uniform(-3, 3), rng.uniform(0.2, 5), count)


def sigmoid(x):
    return oracles.sigmoid(x).astype(float)


@few
@given(seeds, gamma0s, st.floats(-2.0, 3.0).map(lambda power: 10.0**power))
def test_weights_are_linear_in_the_log_margins(seed, gamma0, tau):
    gaps = pool(seed)
    margins, nu, _ = solve_margins(gaps, gamma0=gamma0, tau=tau)
    a = gamma0 / tau
    # log x is rounded to some 1e-15 (1 + its size, at most a), and is divided by a.
    error = np.abs((nu - np.log(margins / gamma0)) / a - sigmoid(margins - gaps))
    assert error.max() <= 1e-13 * (1 + 1 / a)


def water_level(gaps, gamma0):
    """λ with mean max(0, g + λ) = γ0."""
    high = gamma0 - gaps.mean() + np.ptp(gaps) + 1
    return brentq(
        lambda level: np.maximum(0, gaps + level).mean() - gamma0, -gaps.max(), high, xtol=1e-14
    )


@few
@given(seeds, gamma0s, st.floats(0.0, 5.0))
def test_weak_and_strong_limits(seed, gamma0, power):
    """The logistic loss within a bound; and linear above a level, logistic below."""
    gaps, tau = pool(seed), gamma0 * 10.0**power
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
    error = np.abs(sigmoid(margins - gaps) - sigmoid(gamma0 - gaps)).max()
    assert error <= gamma0 * np.expm1(gamma0 / tau) / 4 + 1e-14
    expected, errors = np.maximum(sigmoid(water_level(gaps, gamma0)), sigmoid(-gaps)), []
    for tau in (1e-4, 1e-6):
        margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
        errors.append(np.abs(sigmoid(margins - gaps) - expected).max())
    # log x is of order 10, divided by a = γ0 / τ >= 1e5; pairs at the level converge slowest.
    assert errors[1] < 2e-3
    assert errors[1] <= errors[0] + 1e-9
    if gamma0 >= gaps.mean() - gaps.min() + 0.1:
        assert np.ptp(expected) == 0


@few
@given(seeds, st.floats(0.3, 5.0), st.booleans(), st.floats(0.1, 0.4))
def test_ratio_of_the_weights_of_flipped_pairs_to_first_order(seed, gamma0, centered, rate):
    rng = np.random.default_rng(seed)
    clean = rng.normal(rng.uniform(-1, 4), rng.uniform(0.5, 3), 400)
    flipped = rng.random(400) < rate
    gaps = np.where(flipped, -clean, clean)
    mean_margin = 0.0 if centered else gamma0
    base, sigmas = sigmoid(mean_margin - gaps), sigmoid(gamma0 - gaps)

    def effect(group):
        pull = base * (1 - base) * (sigmas - sigmas.mean())
        return pull[group].sum() / base[group].sum()

    def ratio(weights):
        return np.log(weights[flipped].mean() / weights[~flipped].mean())

    kappa = 1e-4
    margins = solve_margins(gaps, gamma0=gamma0, tau=gamma0**2 / kappa).margins
    change = (ratio(sigmoid(margins - gamma0 + mean_margin - gaps)) - ratio(base)) / kappa
    # The next order is κ (1 + 1 / γ0) times a number of order one.
    assert change == pytest.approx(effect(~flipped) - effect(flipped), abs=50 * kappa)


def test_margins_may_raise_the_weight_of_flipped_pairs():
    from docs import figures

    clean = figures.normal_gaps(3.0, 2.0, 4000)
    gaps = np.concatenate([clean, -clean[::4]])[::5]
    shifts = oracles.margins(gaps, 4.0, 10.0)[0] - 4.0
    weights = [sigmoid(-gaps), sigmoid(shifts - gaps)]
    before, after = (w[800:].mean() / w[:800].mean() for w in weights)
    assert after > 1.08 * before
    row = next(r for r in figures.suppression_of_flips().splitlines() if "m = 3" in r)
    shown = [float(part) for part in row.split("|")[2].split("→")]
    assert shown == pytest.approx([before, after], rel=0.02)

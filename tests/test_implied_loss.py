"""What loss γ-PO is: each claim of docs/theory.md's section of that name, on random pools."""

import importlib.util
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from gamma_loss import solve_margins

few = settings(max_examples=40)
seeds = st.integers(0, 2**32 - 1)
gamma0s = st.floats(0.1, 8.0)
taus = st.floats(-2.0, 3.0).map(lambda power: 10.0**power)
gaps_at = st.floats(-12.0, 12.0)


def pool(seed, count=30):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.uniform(-3, 3), rng.uniform(0.2, 5), count)


def sigmoid(x):
    return oracles.sigmoid(x).astype(float)


def loss(gap, gamma0, tau, nu):
    """L by numerical minimisation over the margin, with that margin."""

    def inside(log_x):
        x = np.exp(log_x)
        return float(oracles.softplus(gamma0 * x - gap)) + tau * (x * log_x - (1 + nu) * x)

    a = gamma0 / tau
    found = minimize_scalar(inside, bounds=(nu - a - 1e-3, nu + 1e-3), method="bounded",
                            options={"xatol": 1e-13})  # fmt: skip
    return found.fun, gamma0 * np.exp(found.x)


def x_at(gap, gamma0, tau, nu):
    """The root of the optimality condition for any gap, by bracketing."""
    a = gamma0 / tau
    return np.exp(
        brentq(
            lambda u: u + a * float(sigmoid(gamma0 * np.exp(u) - gap)) - nu,
            nu - a - 1e-6, nu + 1e-6, xtol=1e-15, rtol=1e-14,
        )
    )  # fmt: skip


@few
@given(seeds, gamma0s, taus)
def test_weights_are_linear_in_the_log_margins(seed, gamma0, tau):
    gaps = pool(seed)
    margins, nu, _ = solve_margins(gaps, gamma0=gamma0, tau=tau)
    a = gamma0 / tau
    # log x is rounded to some 1e-15 (1 + its size, at most a), and is divided by a.
    error = np.abs((nu - np.log(margins / gamma0)) / a - sigmoid(margins - gaps))
    assert error.max() <= 1e-13 * (1 + 1 / a)


@few
@given(seeds, gamma0s, st.floats(0.05, 50.0), gaps_at)
def test_the_loss_is_an_infimal_convolution(seed, gamma0, tau, gap):
    nu = float(oracles.margins(pool(seed), gamma0, tau)[1])
    value, margin = loss(gap, gamma0, tau, nu)
    x = x_at(gap, gamma0, tau, nu)
    # A minimum to float64's rounding is found to the root of that over its curvature in log x, at
    # least τ x; the search itself ends within some 1e-8 of its place.
    rounding = np.finfo(float).eps * (1 + abs(value))
    assert margin == pytest.approx(gamma0 * x, rel=1e-6 + 4 * np.sqrt(rounding / (tau * x)))
    step = 1e-3
    slope = (
        loss(gap + step, gamma0, tau, nu)[0] - loss(gap - step, gamma0, tau, nu)[0]
    ) / (2 * step)  # fmt: skip
    weight = float(sigmoid(gamma0 * x - gap))
    # Truncation step² / 6 times |L'''| < 1; rounding of values of order (1 + τ (1 + ν)) / step.
    assert abs(slope + weight) < 1e-6 + 1e-12 * (1 + abs(value))
    assert -1 < slope <= 1e-9


@few
@given(seeds, gamma0s, st.floats(0.05, 50.0), gaps_at)
def test_curvatures_add_like_resistances(seed, gamma0, tau, gap):
    nu = float(oracles.margins(pool(seed), gamma0, tau)[1])
    step = 1e-4
    low, here, high = (
        float(sigmoid(gamma0 * x_at(g, gamma0, tau, nu) - g))
        for g in (gap - step, gap, gap + step)
    )  # fmt: skip
    x = x_at(gap, gamma0, tau, nu)
    resistance = 1 / (here * (1 - here)) + gamma0**2 / tau * x
    # Rounding 1e-15 / step, truncation step² / 6 times a third derivative below 1.
    assert abs((low - high) / (2 * step) - 1 / resistance) < 1e-8


@few
@given(seeds, gamma0s, st.floats(0.05, 50.0))
def test_the_losses_add_up_to_the_minimum(seed, gamma0, tau):
    gaps = pool(seed, 12)
    margins, nu = oracles.margins(gaps, gamma0, tau)
    minimum = float(oracles.objective(margins / gamma0, gaps, gamma0, tau))
    total = np.mean([loss(g, gamma0, tau, float(nu))[0] for g in gaps]) + tau * (1 + float(nu))
    assert total == pytest.approx(minimum, abs=1e-9 * (1 + tau))


@few
@given(seeds, gamma0s, st.floats(0.0, 5.0))
def test_weak_limit_within_its_bound(seed, gamma0, power):
    gaps, tau = pool(seed), gamma0 * 10.0**power
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
    error = np.abs(sigmoid(margins - gaps) - sigmoid(gamma0 - gaps)).max()
    assert error <= gamma0 * np.expm1(gamma0 / tau) / 4 + 1e-14


def water_level(gaps, gamma0):
    """λ with mean max(0, g + λ) = γ0."""
    return brentq(
        lambda level: np.maximum(0, gaps + level).mean() - gamma0,
        -gaps.max(), gamma0 - gaps.mean() + np.ptp(gaps) + 1, xtol=1e-14,
    )  # fmt: skip


@few
@given(seeds, gamma0s)
def test_strong_limit_is_linear_above_a_level_and_logistic_below(seed, gamma0):
    gaps = pool(seed)
    level = water_level(gaps, gamma0)
    expected = np.maximum(sigmoid(level), sigmoid(-gaps))
    errors = []
    for tau in (1e-4, 1e-6):
        margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
        errors.append(np.abs(sigmoid(margins - gaps) - expected).max())
    # log x is of order 10, divided by a = γ0 / τ >= 1e5; pairs at the level converge slowest.
    assert errors[1] < 2e-3
    assert errors[1] <= errors[0] + 1e-9
    if gamma0 >= gaps.mean() - gaps.min() + 0.1:
        assert np.ptp(expected) == 0


# --- symmetry ---

CLOSED_FORMS = {
    "dpo": (lambda g: sigmoid(-g), lambda g: np.tanh(g / 2)),
    "cdpo": (lambda g: sigmoid(-g) - 0.2, lambda g: np.tanh(g / 2) / 0.6),
    "rdpo": (lambda g: sigmoid(-g) + 0.2 / 0.6, lambda g: 0.6 * np.tanh(g / 2)),
    "simpo": (lambda g: sigmoid(1.5 - g), lambda g: np.sinh(g) / (np.cosh(g) + np.exp(1.5))),
    "ropo": (
        lambda g: sigmoid(-g) + 14 * sigmoid(g) * sigmoid(-g),
        lambda g: np.tanh(g / 2) / (1 + 28 * sigmoid(g) * sigmoid(-g)),
    ),
    "sympo": (lambda g: sigmoid(g) * sigmoid(-g), lambda g: 0 * g),
    "holder": (
        lambda g: sigmoid(g) ** 0.5 * sigmoid(-g) ** 2, lambda g: np.tanh(0.75 * g)
    ),
    "holder 2": (lambda g: sigmoid(g) ** 2 * sigmoid(-g) ** 2, lambda g: 0 * g),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_asymmetry(name):
    weight, closed = CLOSED_FORMS[name]
    g = np.linspace(-6, 6, 49)
    there, here = weight(-g), weight(g)
    np.testing.assert_allclose((there - here) / (there + here), closed(g), atol=1e-12)


@few
@given(seeds, gamma0s, st.floats(0.05, 50.0), st.floats(0.1, 8.0))
def test_asymmetry_of_gamma_po(seed, gamma0, tau, gap):
    nu = float(oracles.margins(pool(seed), gamma0, tau)[1])
    x, x_other = (x_at(g, gamma0, tau, nu) for g in (gap, -gap))
    here, there = float(sigmoid(gamma0 * x - gap)), float(sigmoid(gamma0 * x_other + gap))
    closed = np.log(x / x_other) / (2 * nu - np.log(x * x_other))
    a = gamma0 / tau
    assert (there - here) / (there + here) == pytest.approx(closed, abs=1e-11 * (1 + 1 / a))
    assert there >= here  # not symmetric: the weight falls with the gap


@few
@given(st.floats(0.01, 0.49), st.floats(0.01, 12.0))
def test_flips_scale_a_symmetric_loss_and_no_other(rate, gap):
    def slope(weight):
        return -(1 - rate) * weight(gap) + rate * weight(-gap)

    sympo, dpo = CLOSED_FORMS["sympo"][0], CLOSED_FORMS["dpo"][0]
    assert slope(sympo) == pytest.approx(-(1 - 2 * rate) * sympo(gap), rel=1e-12)
    assert slope(dpo) > -(1 - 2 * rate) * dpo(gap) + 0.9 * rate * np.tanh(gap / 2)


# --- flipped pairs ---


@few
@given(seeds, st.floats(0.3, 5.0), st.booleans(), st.floats(0.1, 0.4))
def test_ratio_of_weights_to_first_order(seed, gamma0, centered, rate):
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
    spec = importlib.util.spec_from_file_location(
        "figures", Path(__file__).parents[1] / "docs" / "figures.py"
    )
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    clean = figures.normal_gaps(3.0, 2.0, 4000)
    gaps = np.concatenate([clean, -clean[::4]])
    shifts = oracles.margins(gaps[::5], 4.0, 10.0)[0] - 4.0
    weights = [sigmoid(-gaps[::5]), sigmoid(shifts - gaps[::5])]
    before, after = (w[800:].mean() / w[:800].mean() for w in weights)
    assert after > 1.08 * before
    row = next(r for r in figures.suppression_of_flips().splitlines() if "m = 3" in r)
    shown = [float(part) for part in row.split("|")[2].split("→")]
    assert shown == pytest.approx([before, after], rel=0.02)

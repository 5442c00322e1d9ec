"""The logistic loss that γ-PO amounts to, and settings for a wanted one."""

import math
import re
import sys
from statistics import NormalDist

import numpy as np
import oracles
import pytest
import strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gamma_loss import MatchedLoss, choose_settings, match_logistic, solve_margins

optimize = pytest.importorskip("scipy.optimize")
GAPS = np.random.default_rng(0).normal(1.0, 3.0, 200)


def normal_gaps(mean, deviation, count=4000):
    """Gaps at the middles of so many equal shares of a normal distribution."""
    places = (np.arange(count) + 0.5) / count
    return mean + deviation * np.array([NormalDist().inv_cdf(p) for p in places])


def weights(gaps, gamma0, tau, centered):
    margins = oracles.margins(gaps, gamma0, tau)[0]
    return oracles.sigmoid(margins - gaps - (gamma0 if centered else 0)).astype(float)


def test_normal_gaps_have_the_match_of_the_docs():
    for gamma0, tau, centered, *expected in (
        (4.0, 10.0, False, 1.01, 3.28, 0.73, 5e-4),
        (3.0, 3.0, False, 1.03, 2.02, 0.55, 2e-3),
        (4.0, 10.0, True, 1.01, -0.25, 0.94, 2e-4),
        (2.0, 0.5, False, 1.23, 0.39, 0.27, 2e-2),
    ):
        match = match_logistic(normal_gaps(1, 3), gamma0=gamma0, tau=tau, centered=centered)
        assert [round(value, 2) for value in match[:3]] == expected[:3]
        assert float(f"{match.unexplained:.0e}") == expected[3]
    match = match_logistic(normal_gaps(2, 6), gamma0=4.0, tau=0.1)  # far from a logistic loss
    assert round(match.unexplained, 2) == 0.23


def test_another_fit_finds_the_same():
    for gamma0, tau, centered in (
        (4.0, 10.0, False), (3.0, 3.0, True), (1.0, 0.2, False), (0.375, 10.0, True)
    ):  # fmt: skip
        target = weights(GAPS, gamma0, tau, centered)

        def errors(at, target=target):
            return at[0] * oracles.sigmoid(at[1] - at[2] * GAPS).astype(float) - target

        fits = [
            optimize.least_squares(errors, [1.0, d, b], xtol=1e-15, ftol=1e-15, gtol=1e-15)
            for d in (-1.0, 3.0) for b in (0.3, 1.0)
        ]  # fmt: skip
        fit = min(fits, key=lambda fit: fit.cost)
        match = match_logistic(GAPS, gamma0=gamma0, tau=tau, centered=centered)
        # A minimum to 1e-12 of its value is found to the square root of that, times its curvature.
        np.testing.assert_allclose(match[:3], fit.x, rtol=1e-4, atol=1e-5)
        found = np.mean(errors(match[:3]) ** 2) / target.var()
        assert match.unexplained == pytest.approx(found, rel=1e-6, abs=1e-15)
        assert match.unexplained <= 2 * fit.cost / len(GAPS) / target.var() * (1 + 1e-9)


NEARLY_LINEAR = normal_gaps(0.0, 0.1, 400), 2.0, 0.5  # a fit of log c, d and b stops at b = 0.43
EXPONENTIAL = 100 + 0.05 * np.random.default_rng(0).normal(size=512), 100.0, 10.0


@pytest.mark.parametrize(
    ("problem", "factor"), [(NEARLY_LINEAR, 0.2504), (EXPONENTIAL, 0.00199)], ids=["linear", "exp"]
)
def test_weights_that_hardly_determine_the_three_numbers(problem, factor):
    """By another method: a scan of d, with c solved for and b by a search in one variable."""
    gaps, gamma0, tau = problem
    target = weights(gaps, gamma0, tau, False)
    z = (gaps - gaps.mean()) / gaps.std()

    def left(d, log_b):
        shape = oracles.sigmoid(d - np.exp(log_b) * z).astype(float)
        shape /= shape.max()
        return np.sum((shape @ target / (shape @ shape) * shape - target) ** 2)

    def best(d):
        bounds = (-12.0, 1.0)
        found = optimize.minimize_scalar(
            lambda log_b: left(d, log_b), bounds=bounds, method="bounded", options={"xatol": 1e-12}
        )
        return found.fun, np.exp(found.x) / gaps.std()

    cost, b = min(map(best, np.arange(-22.0, 8.0, 0.5)))
    match = match_logistic(gaps, gamma0=gamma0, tau=tau)
    assert match.unexplained <= cost / len(gaps) / target.var() * (1 + 1e-6)
    assert match.beta_factor == pytest.approx(b, rel=0.1)
    assert match.beta_factor == pytest.approx(factor, rel=1e-3)


def test_settings_for_margins_need_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert choose_settings(GAPS, gamma0=2.0, margin_std=0.3)["tau"] > 0
    with pytest.raises(ImportError, match=r"need SciPy: pip install \"gamma-loss\[matching\]\""):
        match_logistic(GAPS, gamma0=2.0, tau=1.0)


def test_a_weak_setting_is_the_logistic_loss_itself():
    for centered, margin in ((False, 2.0), (True, 0.0)):
        match = match_logistic(GAPS, gamma0=2.0, tau=4e6, centered=centered)  # κ = 1e-6
        # Margins differ by at most κ, so the three numbers by a few times that.
        np.testing.assert_allclose(match[:3], [1.0, margin, 1.0], atol=1e-5)
        assert match.unexplained < 1e-10


def test_equal_gaps_are_simpo_itself():
    for gaps in ([0.0] * 5, [1.5], [0.1 + 0.2, 0.3]):
        for centered, margin in ((False, 2.0), (True, 0.0)):
            match = match_logistic(np.array(gaps), gamma0=2.0, tau=0.1, centered=centered)
            assert match == pytest.approx(MatchedLoss(1.0, margin, 1.0, 0.0))


@settings(max_examples=60)
@given(strategies.pools(), strategies.gamma0s, strategies.taus, st.booleans())
@example(np.array([-1e4, 1e4]), 50.0, 1.0, False)
@example(np.array([0.0, 1e-6, 2e-6]), 4.0, 1e-3, True)
@example(np.array([700.0, 710.0, 720.0]), 0.1, 10.0, False)
@example(np.array([-800.0, -1.0, 3.0]), 4.0, 10.0, True)
def test_any_pool_gives_finite_numbers(gaps, gamma0, tau, centered):
    match = match_logistic(gaps, gamma0=gamma0, tau=tau, centered=centered)
    assert all(map(math.isfinite, match))
    assert match.scale > 0
    assert 0 <= match.unexplained <= 1 + 1e-6


def test_every_library(library):
    gaps = np.append(GAPS, [np.nan, np.inf])  # which take no part
    expected, arrays = match_logistic(GAPS, gamma0=3.0, tau=3.0), library.array(gaps)
    if library.name == "torch":
        arrays.requires_grad_()
    found = match_logistic(arrays, gamma0=3.0, tau=3.0)
    assert found == pytest.approx(expected, rel=1e-9)
    assert {type(value) for value in found} == {float}
    chosen = choose_settings(library.array(gaps, "float32"), gamma0=2.0, margin_std=0.3)
    assert chosen["tau"] == pytest.approx(
        choose_settings(GAPS, gamma0=2.0, margin_std=0.3)["tau"], rel=1e-5
    )


# --- settings for a wanted effect ---


def test_chosen_settings_have_the_wanted_effect_and_no_weaker_ones_do():
    for wanted in (0.01, 0.25, 1.0):
        chosen = choose_settings(GAPS, gamma0=2.0, margin_std=wanted)
        assert chosen["gamma0"] == 2.0
        margins = oracles.margins(GAPS, chosen["gamma0"], chosen["tau"])[0]
        assert float(margins.std()) == pytest.approx(wanted, rel=1e-8)
    for wanted, centered in ((0.5, False), (0.9, True)):
        chosen = choose_settings(GAPS, gamma0=2.0, beta_factor=wanted, centered=centered)
        match = match_logistic(GAPS, **chosen, centered=centered)
        assert match.beta_factor == pytest.approx(wanted, rel=1e-6)
        weaker = match_logistic(GAPS, gamma0=2.0, tau=1.1 * chosen["tau"], centered=centered)
        assert weaker.beta_factor > wanted
    chosen = choose_settings(NEARLY_LINEAR[0], gamma0=2.0, beta_factor=0.3)  # a hard fit
    assert chosen["tau"] == pytest.approx(0.56, rel=0.05)


def test_gamma0_is_the_median_gap_unless_given():
    settings = choose_settings(GAPS, margin_std=0.2)
    assert settings["gamma0"] == np.median(GAPS)
    assert solve_margins(GAPS, **settings).margins.std() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="gamma0 must be given"):
        choose_settings(-np.abs(GAPS), margin_std=0.2)


IMPOSSIBLE = [
    (GAPS, {}, "one of the two"),
    (GAPS, {"margin_std": 50.0}, r"it is at most 1\..*choose a margin_std below 2\.88"),
    (GAPS, {"margin_std": 1.5, "gamma0": 0.5},
     r"no tau gives margin_std = 1\.5: .* raise gamma0: gamma0 = 1 gives 1\.48$"),
    (GAPS, {"beta_factor": 0.1, "gamma0": 1.0}, r"at least 0\.534\. .*gamma0 = 2 gives 0\.0761$"),
    (GAPS - 30, {"margin_std": 0.4, "gamma0": 4.0}, "far below gamma0; lower gamma0: gamma0 = 2"),
    (GAPS + 100, {"margin_std": 1.5, "gamma0": 4.0},
     "are far above gamma0; half of it and twice its value do no better"),  # than rounding
    (np.ones(3), {"margin_std": 0.4, "gamma0": 4.0}, "are all equal, and so are their margins"),
]  # fmt: skip


def test_what_cannot_be_had_is_said_with_what_can():
    for gaps, options, message in IMPOSSIBLE:
        with pytest.raises(ValueError, match=message):
            choose_settings(gaps, **options)
    with pytest.raises(ValueError, match="must hold a finite gap, got none"):
        match_logistic(np.array([np.nan, np.inf]), gamma0=1.0, tau=1.0)
    with pytest.raises(ValueError, match="no tau gives margin_std = 50") as caught:
        choose_settings(GAPS, gamma0=2.0, margin_std=50.0)  # and the largest there is
    said = float(re.search(r"it is at most ([\d.]+)\. ", str(caught.value))[1])
    assert said == pytest.approx(oracles.margins(GAPS, 2.0, 4e-6)[0].std(), rel=5e-3)

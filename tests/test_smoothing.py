"""Theorem 3.1, both ways."""

import math

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gamma_loss import label_smoothing_from_shift, shift_from_label_smoothing

EPS = np.finfo(np.float64).eps
KINDS, MATCHES = ("robust", "conservative"), ("value", "slope")
gaps = st.floats(-30, 30).filter(lambda m: abs(m) > 1e-6)
shifts = st.floats(-10, 10).filter(lambda d: d == 0 or abs(d) > 1e-9)


def epsilon_of(m, delta, **options):
    return label_smoothing_from_shift(np.array([m]), np.array([delta]), **options)[0]


def shift_of(m, epsilon, **options):
    return shift_from_label_smoothing(np.array([m]), np.array([epsilon]), **options)[0]


@given(gaps, shifts)
def test_exact_value_match_reproduces_the_loss(m, delta):
    target = oracles.dpo(m - delta)
    scale = 1 + abs(m) + abs(delta)
    conservative = epsilon_of(m, delta, kind="conservative")
    got = oracles.cdpo(m, conservative)
    # ε is rounded, and multiplies ℓ(m) - ℓ(-m) = -m
    assert abs(got - target) <= 16 * EPS * scale * (1 + abs(conservative))
    robust = epsilon_of(m, delta)
    assume(math.isfinite(robust))
    # rounding of ε moves k = ε / (1 - 2ε) by its derivative 1 / (1 - 2ε)²
    k_error = 16 * EPS * (1 + abs(robust)) / (1 - 2 * robust) ** 2
    assert abs(oracles.rdpo(m, robust) - target) <= scale * (16 * EPS + k_error)


@given(gaps, shifts)
def test_exact_slope_match_reproduces_the_slope(m, delta):
    target = -oracles.sigmoid(delta - m)
    conservative = epsilon_of(m, delta, kind="conservative", match="slope")
    slope = -(1 - conservative) * oracles.sigmoid(-m) + conservative * oracles.sigmoid(m)
    assert abs(slope - target) <= 16 * EPS
    robust = epsilon_of(m, delta, match="slope")
    assume(math.isfinite(robust))
    slope = -((1 - robust) * oracles.sigmoid(-m) + robust * oracles.sigmoid(m)) / (1 - 2 * robust)
    assert abs(slope - target) <= 16 * EPS * (1 + (1 + abs(robust)) / (1 - 2 * robust) ** 2)


@given(gaps, shifts)
def test_error_bounds_of_the_first_order(m, delta):
    first = epsilon_of(m, delta, order="first")
    epsilon = epsilon_of(m, delta)
    assert first == pytest.approx(float(-delta * oracles.sigmoid(-m) / m), rel=1e-13)
    k = -epsilon_of(m, delta, kind="conservative")
    slack = 16 * EPS * (1 + abs(delta / m))
    assert abs(k - first) <= delta**2 / (8 * abs(m)) + slack
    if abs(delta) <= abs(m) / 4:
        assert abs(epsilon - first) <= delta**2 / (8 * abs(m)) + 4 * (delta / m) ** 2 + slack


@given(gaps, shifts)
def test_first_order_is_the_derivative(m, delta):
    for kind in KINDS:
        for match in MATCHES:
            h = 1e-7 * min(1.0, abs(m))
            options = {"kind": kind, "match": match}
            exact = epsilon_of(m, h, **options) - epsilon_of(m, -h, **options)
            first = epsilon_of(m, h, order="first", **options) * 2
            # even powers cancel: what is left is of third order in h / m
            assert abs(exact - first) <= 1e-6 * abs(first) + 8 * EPS * h / abs(m)


@given(gaps, st.floats(1e-6, 0.2), st.booleans())
def test_signs(m, share, positive):
    delta = share * abs(m) * (1 if positive else -1)
    # value: a correctly ranked pair with a smaller margin is smoothed, with a larger sharpened
    assert np.sign(epsilon_of(m, delta)) == -np.sign(delta) * np.sign(m)
    assert np.sign(epsilon_of(m, delta, kind="conservative")) == np.sign(delta) * np.sign(m)
    # slope: whatever the gap
    slope = epsilon_of(m, delta, kind="conservative", match="slope")
    assert np.sign(slope) == -np.sign(delta)
    assert -1 < slope < 1


@given(gaps, shifts)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("match", MATCHES)
def test_round_trip_from_a_shift(kind, match, m, delta):
    epsilon = epsilon_of(m, delta, kind=kind, match=match)
    assume(math.isfinite(epsilon))
    back = shift_of(m, epsilon, kind=kind, match=match)
    # ε is rounded: how far δ moves with it is the inverse of dε/dδ, found by differences
    tight = epsilon_of(m, delta + 1e-4, kind=kind, match=match)
    steepness = abs(tight - epsilon) / 1e-4
    assume(steepness * 1e-6 > EPS * (1 + abs(epsilon)))
    # and so is what the inverse takes the logarithm of: e^δ in value, the odds of the slope
    p = float(oracles.sigmoid(delta - m))
    logarithm = np.exp(-delta) if match == "value" else 1 / (p * (1 - p))
    slack = (1 + abs(epsilon)) / steepness * (1 + abs(m)) + 1 + logarithm
    assert abs(back - delta) <= 64 * EPS * slack


@given(gaps, st.floats(-0.4, 0.4))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("match", MATCHES)
def test_the_inverse_is_nan_exactly_where_there_is_none(kind, match, m, epsilon):
    shift = shift_of(m, epsilon, kind=kind, match=match)
    k = -epsilon if kind == "conservative" else epsilon / (1 - 2 * epsilon)
    if match == "value":
        room = float(oracles.dpo(m)) - k * m  # the loss to be matched, which must be positive
        edge = 16 * EPS * (1 + abs(m))
    else:
        slope = float(oracles.sigmoid(-m)) + k  # must be in (0, 1)
        room, edge = min(slope, 1 - slope), 16 * EPS
    assume(abs(room) > edge)
    assert math.isfinite(shift) == (room > 0)


@pytest.mark.parametrize("m", [0.0, 1e-300, -1e-300, 1e-9, -1e-9])
def test_small_gaps(m):
    for delta in (-3.0, -1e-3, 0.0, 1e-3, 3.0):
        for kind in KINDS:
            assert math.isfinite(epsilon_of(m, delta, kind=kind, match="slope"))
        assert epsilon_of(m, delta) == pytest.approx(0.5 if delta else 0.0, abs=1e-5)
    assert epsilon_of(0.0, 0.0, kind="conservative") == 0
    assert epsilon_of(0.0, 0.0, order="first") == 0
    assert math.isnan(epsilon_of(0.0, 1.0, kind="conservative"))
    assert math.isnan(epsilon_of(0.0, 1.0, order="first"))


@pytest.mark.parametrize("delta", [-1e4, -800.0, 800.0, 1e4])
def test_large_shifts_do_not_overflow(delta):
    target = float((oracles.dpo(2.0) - oracles.dpo(2.0 - delta)) / 2)
    assert -epsilon_of(2.0, delta, kind="conservative") == pytest.approx(target, rel=1e-14)


@pytest.mark.parametrize("options", [{"kind": "x"}, {"match": "x"}, {"order": "x"}])
def test_unknown_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        epsilon_of(1.0, 1.0, **options)


def test_every_library(library):
    m, delta = np.array([2.0, -1.0, 0.5]), np.array([0.3, -0.2, 1.0])
    for kind in KINDS:
        for match in MATCHES:
            options = {"kind": kind, "match": match}
            expected = label_smoothing_from_shift(m, delta, **options)
            epsilon = label_smoothing_from_shift(library.array(m), library.array(delta), **options)
            np.testing.assert_allclose(library.numpy(epsilon), expected, rtol=1e-13)
            shift = shift_from_label_smoothing(library.array(m), epsilon, **options)
            np.testing.assert_allclose(library.numpy(shift), delta, rtol=1e-11)


def test_bad_input():
    with pytest.raises(TypeError, match="shift must be an array"):
        label_smoothing_from_shift(np.array([1.0]), "x")
    with pytest.raises(ValueError, match=r"epsilon must have the shape of reward_gaps, \(1,\)"):
        shift_from_label_smoothing(np.array([1.0]), np.array([0.1, 0.2]))

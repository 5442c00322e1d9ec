"""Theorem 3.1, both ways."""

import math
from itertools import product

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamma_loss import label_smoothing_from_shift, shift_from_label_smoothing

EPS = np.finfo(np.float64).eps
KINDS, MATCHES = ("robust", "conservative"), ("value", "slope")
COMBINATIONS = [{"kind": kind, "match": match} for kind, match in product(KINDS, MATCHES)]
gaps = st.floats(-30, 30).filter(lambda m: abs(m) > 1e-6)
shifts = st.floats(-10, 10).filter(lambda d: d == 0 or abs(d) > 1e-9)


def epsilon_of(m, delta, **options):
    return label_smoothing_from_shift(np.array([m]), np.array([delta]), **options)[0]


def shift_of(m, epsilon, **options):
    return shift_from_label_smoothing(np.array([m]), np.array([epsilon]), **options)[0]


@given(gaps, shifts)
def test_first_order_is_the_derivative(m, delta):
    first = epsilon_of(m, delta, order="first")
    assert first == pytest.approx(float(-delta * oracles.sigmoid(-m) / m), rel=1e-13)
    h = 1e-7 * min(1.0, abs(m))
    for options in COMBINATIONS:
        exact = epsilon_of(m, h, **options) - epsilon_of(m, -h, **options)
        first = epsilon_of(m, h, order="first", **options) * 2
        # even powers cancel: what is left is of third order in h / m
        assert abs(exact - first) <= 1e-6 * abs(first) + 8 * EPS * h / abs(m)


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


# --- against mpmath, in both dtypes, far beyond the gaps of any training ---

# Of half a unit in the last place each; an elementary function counts as a few.
ROUNDINGS = 16
LIMIT = 2e3  # of gaps and shifts: float64's exponentials overflow at 710, float32's at 89
numbers = st.one_of(
    st.just(0.0),
    st.floats(-40, 40),
    st.tuples(st.sampled_from([-1, 1]), st.floats(-9, math.log10(LIMIT))).map(
        lambda x: x[0] * 10 ** x[1]
    ),
)


def precise(*values):
    """Digits for the exponentials of these beside 1, and 300 bits more."""
    return mpmath.workprec(300 + int(3 * sum(map(abs, values))))


def exact_tilt(m, delta, match):
    """k of the module's docstring, and its change with the rounding of k, m and δ."""
    with precise(m, delta):
        m, delta = mpmath.mpf(m), mpmath.mpf(delta)
        p, shifted = 1 / (1 + mpmath.exp(m)), 1 / (1 + mpmath.exp(m - delta))
        if match == "slope":
            k, steep = shifted - p, shifted * (1 - shifted)
            return k, abs(k) + abs(delta) * steep + abs(m * (steep - p * (1 - p)))
        n = -mpmath.log1p(p * mpmath.expm1(delta))
        return n / m, (abs(n) + abs(delta) * shifted + abs(m * (shifted - p))) / abs(m)


def exact_shift(m, k, match):
    """δ or NaN, its change with the rounding of δ, m and k, and how near it is to the other."""
    with precise(m, k * m):
        p, t = 1 / (1 + mpmath.exp(m)), -k * m
        if match == "slope":
            room, moved, own = min(p + k, 1 - p - k), abs(k), p * (1 - p)
        else:
            room, moved, own = mpmath.log1p(mpmath.exp(-m)) + t, abs(t), p
        near = (moved + abs(m) * own) / abs(room) if room else mpmath.inf
        if room <= 0:
            return mpmath.nan, 0, near
        shifted = p + k if match == "slope" else -mpmath.expm1(-room)
        steep = shifted * (1 - shifted) if match == "slope" else shifted
        delta = m + mpmath.log(shifted / (1 - shifted))
        return delta, abs(delta) + moved / steep + abs(m * (1 - own / steep)), near


def tilt_of(epsilon, kind):
    with mpmath.workprec(300):
        epsilon = mpmath.mpf(float(epsilon))
        return -epsilon if kind == "conservative" else epsilon / (1 - 2 * epsilon)


def tiny(dtype):
    """Below it digits are lost to underflow, in the dtype or in these 300 bits."""
    return max(float(np.finfo(dtype).smallest_normal), 1e-80)


def check_smoothing(m, delta, epsilon, kind, match, dtype):
    """Compare ε of floats with the exact one."""
    rounding = ROUNDINGS / 2 * float(np.finfo(dtype).eps)
    k, moved = exact_tilt(m, delta, match)
    moved += tiny(dtype) * (1 / abs(m) if match == "value" else 1) / rounding
    expected, error = -k, rounding * moved
    if kind == "robust":
        rest = 1 + 2 * k
        if abs(rest) <= 4 * rounding * (moved + abs(k)):
            return  # as good as none
        expected = k / rest
        error = 2 * rounding * (moved / rest**2 + abs(expected))
    if abs(expected) < float(np.finfo(dtype).max) / 8:
        assert abs(float(epsilon) - expected) <= error


def check_shift(m, epsilon, delta, kind, match, dtype):
    """Compare δ of floats with the exact one."""
    rounding = ROUNDINGS / 2 * float(np.finfo(dtype).eps)
    k = tilt_of(epsilon, kind)
    if 0 < min(abs(k), abs(k * m)) < tiny(dtype):
        return
    expected, moved, near = exact_shift(mpmath.mpf(m), k, match)
    if near * rounding < 0.5:
        assert math.isfinite(delta) == mpmath.isfinite(expected)
        if math.isfinite(delta):
            error = rounding * moved / (1 - near * rounding)  # of all orders
            assert abs(float(delta) - expected) <= error + tiny(dtype)


def test_numbers_and_mixed_dtypes():
    m, expected = np.array([2.0], dtype=np.float32), shift_of(2.0, -0.25)
    for number in (-0.25, np.float32(-0.25), np.float64(-0.25)):
        shift = shift_from_label_smoothing(m, number)
        assert shift.dtype == np.float32
        assert shift[0] == pytest.approx(expected, rel=1e-6)
    wide = shift_from_label_smoothing(m, np.array([-0.25]))
    assert wide.dtype == np.float64
    assert wide[0] == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(m=numbers, delta=numbers)
def test_smoothing_is_exact(dtype, m, delta):
    m, delta = dtype(m), dtype(delta)
    for options in COMBINATIONS:
        if m != 0 or options["match"] == "slope":
            epsilon = epsilon_of(m, delta, **options)
            assert epsilon.dtype == dtype
            check_smoothing(float(m), float(delta), epsilon, **options, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(m=numbers, epsilon=st.floats(-2, 2) | numbers)
def test_shift_is_exact(dtype, m, epsilon):
    m, epsilon = dtype(m), dtype(epsilon)
    for options in COMBINATIONS:
        if options["kind"] == "robust" and epsilon == 0.5:
            continue
        if abs(tilt_of(epsilon, options["kind"]) * m) < LIMIT:
            shift = shift_of(m, epsilon, **options)
            assert shift.dtype == dtype
            check_shift(float(m), float(epsilon), shift, **options, dtype=dtype)


KNOWN = [  # m, ε, the kind, the match, δ
    (-30.0, 0.6, "conservative", "value", -18.000006144231136),
    (-100.0, 0.4, "conservative", "value", -40.0),
    (800.0, 0.0, "robust", "value", 0.0),
    (800.0, 0.0, "conservative", "slope", 0.0),
    (-800.0, -1.5, "conservative", "value", 1200.0),
    (800.0, -0.5, "conservative", "slope", 800.0),
    (800.0, 0.5, "conservative", "value", 1200.0),
    (2.0, 0.5, "robust", "value", math.nan),
    (2.0, 0.5, "robust", "slope", math.nan),
    (800.0, 0.5, "conservative", "slope", math.nan),
    (math.inf, 0.1, "robust", "value", math.nan),
    (2.0, math.nan, "conservative", "slope", math.nan),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_library_is_exact_and_gives_nan_where_there_is_no_shift(library, dtype):
    name, close = np.dtype(dtype).name, {"rtol": 1e-15 if dtype == np.float64 else 1e-6}
    m = np.array([-900.0, -30, -1e-3, 0.7, 100, 900]).repeat(8).astype(dtype)
    other = np.tile([-900.0, -100, -0.4, -1e-6, 0, 0.6, 1.5, 100], 6).astype(dtype)
    arrays = library.array(m, name), library.array(other, name)
    for options in COMBINATIONS:
        epsilon = library.numpy(label_smoothing_from_shift(*arrays, **options))
        shift = library.numpy(shift_from_label_smoothing(*arrays, **options))
        for i in range(m.size):
            numbers = float(m[i]), float(other[i])
            check_smoothing(*numbers, epsilon[i], **options, dtype=dtype)
            if abs(tilt_of(other[i], options["kind"]) * m[i]) < LIMIT:
                check_shift(*numbers, shift[i], **options, dtype=dtype)
    for *numbers, kind, match, delta in KNOWN:  # of the same shape, which JAX has compiled
        arrays = (library.array(np.full(48, each), name) for each in numbers)
        shift = library.numpy(shift_from_label_smoothing(*arrays, kind=kind, match=match))
        assert shift.dtype == dtype
        np.testing.assert_allclose(shift, np.full(48, delta), **close)  # ε is rounded as well


def test_what_is_not_finite_or_beyond_the_dtype_is_nan_without_a_warning():
    assert math.isnan(epsilon_of(5e-324, 1.0, kind="conservative"))
    for value, function in product((math.nan, math.inf, -math.inf), (epsilon_of, shift_of)):
        for options, one in product(COMBINATIONS, (1.0, value)):
            assert math.isnan(function(value, one, **options))
            assert math.isnan(function(one, value, **options))

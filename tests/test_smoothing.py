"""Theorem 3.1, both ways."""

import math
from itertools import product

import mpmath
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


# --- against mpmath, in both dtypes, far beyond the gaps of any training ---

# Of half a unit in the last place each; an elementary function counts as a few.
ROUNDINGS = 16
COMBINATIONS = pytest.mark.parametrize(
    ("kind", "match"), [(kind, match) for kind in KINDS for match in MATCHES]
)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
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


@DTYPES
@COMBINATIONS
@given(m=numbers, delta=numbers)
def test_smoothing_is_exact(kind, match, dtype, m, delta):
    m, delta = dtype(m), dtype(delta)
    assume(m != 0 or match == "slope")
    epsilon = epsilon_of(m, delta, kind=kind, match=match)
    assert epsilon.dtype == dtype
    check_smoothing(float(m), float(delta), epsilon, kind, match, dtype)


@DTYPES
@COMBINATIONS
@given(m=numbers, epsilon=st.floats(-2, 2) | numbers)
def test_shift_is_exact(kind, match, dtype, m, epsilon):
    m, epsilon = dtype(m), dtype(epsilon)
    assume((kind == "conservative" or epsilon != 0.5) and abs(tilt_of(epsilon, kind) * m) < LIMIT)
    shift = shift_of(m, epsilon, kind=kind, match=match)
    assert shift.dtype == dtype
    check_shift(float(m), float(epsilon), shift, kind, match, dtype)


@DTYPES
@COMBINATIONS
@given(m=numbers, delta=numbers)
def test_there_and_back(kind, match, dtype, m, delta):
    """As far as ε, rounded, still says what δ was: then it says so to the same accuracy."""
    m, delta = dtype(m), dtype(delta)
    epsilon = epsilon_of(m, delta, kind=kind, match=match)
    assume(math.isfinite(epsilon) and (kind == "conservative" or epsilon != 0.5))
    assume(abs(tilt_of(epsilon, kind) * m) < LIMIT)
    shift = shift_of(m, epsilon, kind=kind, match=match)
    check_shift(float(m), float(epsilon), shift, kind, match, dtype)
    if m == 0 and match == "value":
        return  # no smoothing changes the loss
    m, delta = float(m), float(delta)
    k, moved = exact_tilt(m, delta, match)
    rest = 1 if kind == "conservative" else 1 + 2 * k
    # the rounding of ε in units of k, and what that does to δ
    rounding = ROUNDINGS * float(np.finfo(dtype).eps)
    k_error = rounding * (moved + abs(k) + abs(k * rest)) + tiny(dtype)
    with precise(m, delta):
        shifted = 1 / (1 + mpmath.exp(mpmath.mpf(m) - delta))
        error = k_error * (abs(m) / shifted if match == "value" else 1 / shifted / (1 - shifted))
    if error < 0.25:  # so small that the first order tells
        assert abs(float(shift) - delta) <= 2 * error + tiny(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("m", "epsilon", "kind", "match", "delta"),
    [
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
    ],
)
def test_shifts_that_are_known(library, dtype, m, epsilon, kind, match, delta):
    name = np.dtype(dtype).name
    arrays = library.array([m], name), library.array([epsilon], name)
    shift = library.numpy(shift_from_label_smoothing(*arrays, kind=kind, match=match))
    assert shift.dtype == dtype
    # ε is rounded as well, here at most 1e3 of it
    np.testing.assert_allclose(shift, [delta], rtol=1e-15 if dtype == np.float64 else 1e-6)


@DTYPES
@COMBINATIONS
def test_exact_in_every_library(library, kind, match, dtype):
    m, other = (
        x.reshape(-1).astype(dtype)
        for x in np.meshgrid(
            [-900.0, -30, -1e-3, 0.7, 100, 900],
            [-900.0, -100, -0.4, -1e-6, 0, 0.6, 1.5, 100],
        )
    )
    name, options = np.dtype(dtype).name, {"kind": kind, "match": match}
    arrays = library.array(m, name), library.array(other, name)
    epsilon = library.numpy(label_smoothing_from_shift(*arrays, **options))
    shift = library.numpy(shift_from_label_smoothing(*arrays, **options))
    for i in range(m.size):
        check_smoothing(float(m[i]), float(other[i]), epsilon[i], kind, match, dtype)
        if abs(tilt_of(other[i], kind) * m[i]) < LIMIT:
            check_shift(float(m[i]), float(other[i]), shift[i], kind, match, dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_without_a_warning(value):
    for function in (epsilon_of, shift_of):
        for kind in KINDS:
            for match in MATCHES:
                for arguments in ((value, 1.0), (1.0, value), (value, value)):
                    assert math.isnan(function(*arguments, kind=kind, match=match))


def test_smoothing_beyond_the_range_of_the_dtype_is_nan():
    assert math.isnan(epsilon_of(5e-324, 1.0, kind="conservative"))


@pytest.mark.parametrize("name", ["kind", "match", "order"])
def test_unknown_options(name):
    for function in (epsilon_of, shift_of) if name != "order" else (epsilon_of,):
        with pytest.raises(ValueError, match=rf"{name} must be one of \('.*, got 'x'"):
            function(1.0, 1.0, **{name: "x"})
        for value, kind in [(3, "int"), (None, "NoneType"), (np.array(["robust", "x"]), "ndarray")]:
            with pytest.raises(TypeError, match=rf"{name} must be one of \('.*, got {kind}"):
                function(1.0, 1.0, **{name: value})


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


@pytest.mark.parametrize(
    ("function", "name"),
    [(label_smoothing_from_shift, "shift"), (shift_from_label_smoothing, "epsilon")],
)
def test_bad_input(function, name):
    one = np.array([1.0])
    for value, kind in [("x", "str"), (None, "NoneType"), ([0.1], "list")]:
        with pytest.raises(TypeError, match=f"{name} must be an array .*got {kind}"):
            function(one, value)
        with pytest.raises(TypeError, match=f"reward_gaps must be an array .*got {kind}"):
            function(value, one)
    with pytest.raises(TypeError, match=f"{name} must have a real floating dtype.*, got int64"):
        function(one, np.array([1]))
    with pytest.raises(ValueError, match=rf"{name} must have the shape of reward_gaps, \(1,\)"):
        function(one, np.array([0.1, 0.2]))


def test_numbers_and_mixed_dtypes():
    m = np.array([2.0, -1.0], dtype=np.float32)
    expected = shift_of(2.0, -0.25)
    for number in (-0.25, np.float32(-0.25), np.float64(-0.25)):
        shift = shift_from_label_smoothing(m, number)
        assert shift.dtype == np.float32
        assert shift[0] == pytest.approx(expected, rel=1e-6)
    wide = shift_from_label_smoothing(m, np.array([-0.25, -0.25]))
    assert wide.dtype == np.float64
    assert wide[0] == expected


@pytest.mark.parametrize("m", [0.3, 2.0, 9.0, -0.3, -2.0, -9.0])
@pytest.mark.parametrize("delta", [-0.1, -1.0, -8.0])
def test_only_the_conservative_slope_smooths_for_every_gap(m, delta):
    """The table of docs/theory.md, for margins below the mean."""
    epsilon = {k: epsilon_of(m, delta, kind=k[0], match=k[1]) for k in product(KINDS, MATCHES)}
    most = {"robust": 0.5, "conservative": math.inf}  # above which robust smoothing is none
    smooths = {k: bool(0 < value < most[k[0]]) for k, value in epsilon.items()}
    assert smooths == {
        ("robust", "value"): m > 0, ("robust", "slope"): False,
        ("conservative", "value"): m < 0, ("conservative", "slope"): True,
    }  # fmt: skip

"""What docs/theory.md says of the solver, claim by claim.

The roots and bends that the claims are about are found by bisection in extended precision.
"""

import math
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracles import Real, margins, sigmoid
from strategies import LIMIT, gamma0s, log_uniform, pools, taus

from gamma_loss import _level, _mild, _solver

EPS = float(np.finfo(np.float64).eps)
PASSES = 96
BENT = 2e-4  # what D changes by between the closed form of the bend and the bend
gap_arrays = st.lists(st.floats(-LIMIT, LIMIT), min_size=1, max_size=40).map(np.array)
some = settings(max_examples=60)


def bisect(is_above, low, high):
    """Where a condition becomes true, between two arrays."""
    low, high = np.asarray(low, dtype=Real), np.asarray(high, dtype=Real)
    for _ in range(90):  # 2e5 / 2^90 < 1e-21
        middle = (low + high) / 2
        above = is_above(middle)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def bends(gaps):
    gaps = np.asarray(gaps, dtype=Real)
    least = np.maximum(gaps, 0)
    return bisect(lambda y: y * np.tanh((y - gaps) / 2) > 1, least, least + 2)


class Problem(NamedTuple):
    """A pool, and a level that need not be the solution's."""

    gaps: np.ndarray
    gamma0: float
    a: float
    at: float

    def begin(self):
        return _solver.begin(self.gaps, None, np.float64(self.gamma0), np.float64(self.a))

    def pairs(self):
        return self.begin().pairs

    def bend(self):
        return np.log(_level.bend(np, self.gaps) / self.gamma0)

    def side(self):
        """s and s a σ(s λ)."""
        return _level.side_of(self.begin().level._replace(at=self.at))

    def step(self, u, careful=False):
        step = _level.pair_step(self.pairs(), u, *self.side())
        if not careful:
            return step
        return step._replace(du=_level.careful_step(self.pairs(), u, *self.side(), step))

    def z(self, u):
        return Real(self.gamma0) * np.exp(np.minimum(np.asarray(u, dtype=Real), 100)) - self.gaps

    def f(self, u):
        z, at = self.z(u), Real(self.at)
        rise = sigmoid(z) - sigmoid(at) if at <= 0 else sigmoid(-at) - sigmoid(-z)
        return u + Real(self.a) * rise

    def slope(self, u):
        """a σ'(z)."""
        return self.a * sigmoid(self.z(u)) * sigmoid(-self.z(u))

    def roots(self, at=None):
        problem = self if at is None else self._replace(at=at)
        ends = np.full(self.gaps.shape, self.a + 1)
        return bisect(lambda u: problem.f(u) > 0, -ends, ends)

    def solution(self):
        """x*."""
        gamma0 = Real(self.gamma0)
        return margins(self.gaps, gamma0, gamma0 / Real(self.a))[0] / gamma0

    def rounding(self, u):
        """How far from the root float64 may end: 8 epsilons of every term of f, over D."""
        z, slope = self.z(u), self.slope(u)
        s, y = (1 if self.at <= 0 else -1), z + self.gaps
        terms = np.abs(u) + self.a * (sigmoid(s * z) + sigmoid(-abs(Real(self.at))))
        terms = terms + slope * (y + self.gamma0 + np.abs(self.gaps))
        return 8 * EPS * (np.abs(u) + terms / (1 + y * slope)) + 1e-21


def log_mean(u):
    return np.log(np.mean(np.exp(u - u.max()))) + u.max()


@st.composite
def problems(draw, max_size=12):
    gaps, gamma0, tau = draw(pools(max_size=max_size)), draw(gamma0s), draw(taus)
    a = gamma0 / tau
    far = math.log1p(a) + 50
    at = draw(st.one_of(st.floats(-far, far), st.floats(-5, 5)))
    if draw(st.booleans()):
        at += gamma0 - draw(st.sampled_from(list(gaps)))
    return Problem(gaps, gamma0, a, float(np.clip(at, -far, far)))


# -- mild settings


@some
@given(pools(max_size=12), gamma0s, taus)
def test_a_mild_step_is_the_arrowheads_and_has_its_residual(gaps, gamma0, tau):
    assume(_mild.mild_passes(gamma0, tau, True))
    a = gamma0 / tau
    problem = Problem(gaps, gamma0, a, 0.0)
    f = a * sigmoid(problem.z(0 * gaps))  # at x = 1 and ν = 0
    d = 1 + gamma0 * problem.slope(0 * gaps)
    d_nu = np.mean(f / d) / np.mean(1 / d)
    x = np.exp((d_nu - f) / d)
    values, nu, residual = _mild.newton(gaps, None, np.float64(gamma0), np.float64(a), 1)
    rounding = 16 * EPS * (1 + a) * (1 + gamma0 + abs(math.log(gamma0)))
    np.testing.assert_allclose(values / gamma0, (x / np.mean(x)).astype(float), rtol=rounding)
    assert abs(nu - d_nu) <= rounding
    x = values / Real(gamma0)
    v = np.log(x) + a * sigmoid(problem.z(np.log(x)))
    assert 0 <= residual - (v.max() - v.min()) / 2 <= 32 * EPS


# -- the bend


@given(gap_arrays, st.integers(0, 99))
@example(np.array([-LIMIT, -5.0, 0.0, 3.0, 100.0, LIMIT]), 0)
def test_there_is_one_bend_above_the_gap_and_0(gaps, seed):
    y = bends(gaps)
    assert np.all(y > np.maximum(gaps, 0))
    other = y * np.exp(np.random.default_rng(seed).normal(size=(50, 1)) * 3)
    assert np.all((other * np.tanh((other - gaps) / 2) > 1) == (other > y))


@some
@given(st.floats(-LIMIT, LIMIT), gamma0s, taus, log_uniform(1e-3, 3), st.sampled_from([-1, 1]))
def test_f_is_convex_below_the_bend_and_concave_above_it(gap, gamma0, tau, offset, side):
    with mpmath.workdps(80):
        centre = mpmath.log(float(bends(gap))) - mpmath.log(gamma0) + side * mpmath.mpf(offset)

        def sigma(u):  # or σ - 1, which has the same second difference
            z = gamma0 * mpmath.exp(u) - gap
            return -1 / (1 + mpmath.exp(z)) if z > 0 else 1 / (1 + mpmath.exp(-z))

        h = mpmath.mpf(10) ** -15
        second = sigma(centre + h) - 2 * sigma(centre) + sigma(centre - h)
        assert mpmath.sign(second) == -side


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_closed_form_of_the_bend(dtype):
    @given(gap_arrays)
    @example(np.linspace(-12, 12, 2001))
    @example(np.sinh(np.linspace(-9.9, 9.9, 2001)))
    def check(gaps):
        gaps = gaps.astype(dtype)
        closed, y = _level.bend(np, gaps), bends(gaps)
        assert closed.dtype == dtype
        assert np.max(np.abs(closed / y - 1)) < 0.016
        # 1 - D / D* <= 1 - y σ'(z) / (y* σ'(z*)) for any a
        assert np.max(-np.expm1(log_bump(closed, gaps) - log_bump(y, gaps))) < BENT
        assert np.max(np.abs(np.log(closed / y)) * (1 + y)) < (0.04 if dtype == np.float64 else 1)

    check()


def log_bump(y, gaps):
    """Log of y σ'(z)."""
    size = np.abs(np.asarray(y, dtype=Real) - gaps)
    return np.log(np.asarray(y, dtype=Real)) - size - 2 * np.log1p(np.exp(-size))


@given(gap_arrays)
@example(np.linspace(-12, 12, 2001))
def test_the_bump_around_the_bend_is_narrow(gaps):
    y = bends(gaps)
    half = log_bump(y, gaps) - np.log(2)
    for sign, widths in ((-1, 3.1), (1, 2)):
        assert np.all(log_bump(y * np.exp(sign * widths / (1 + y)), gaps) < half)


# -- a step of the pairs


def starts(problem, seed):
    """Anything from far below all roots to the highest allowed, and the bend's neighbourhood."""
    rng, pairs, bend = np.random.default_rng(seed), problem.pairs(), problem.bend()
    anywhere = pairs.most - rng.uniform(size=bend.shape) ** 4 * (problem.a + 2)
    near = np.minimum(bend + 0.1 * rng.normal(size=anywhere.shape), pairs.most)
    return np.where(rng.uniform(size=near.shape) < 0.5, anywhere, near)


@given(problems(), st.integers(0, 2**32 - 1))
def test_careful_steps_converge_from_anywhere_without_turning(problem, seed):
    bend, roots = problem.bend(), problem.roots()
    below, slack = roots < bend, problem.rounding(roots) + 8 * EPS * np.abs(bend)
    u = starts(problem, seed)
    for n in range(PASSES):
        new = u + problem.step(u, True).du
        before, after = (np.where(below, 1, -1) * (point - roots) for point in (u, new))
        newton = problem.step(u).du
        room = slack + 2 * EPS * (np.abs(u) + np.abs(newton))
        # It ends between the root and the bend, or beyond the root by next to nothing,
        assert np.all(after <= np.abs(roots - bend) + room)
        if n > 0:  # if it starts on the root's side of the bend,
            assert np.all(after >= -1.01 * BENT * np.abs(before) - room)
        if n > 1:  # and from there on nearer each time.
            assert np.all(np.abs(after) <= np.abs(before) + room)
        u = new
    assert np.all(np.abs(u - roots) <= slack)


@given(problems(), st.integers(0, 2**32 - 1))
def test_far_pairs_come_close_by_themselves(problem, seed):
    u, pairs, (s, k) = starts(problem, seed), problem.pairs(), problem.side()
    given, step = u.copy(), _level.pair_step(pairs, u, s, k)
    reach = np.abs(step.du) * (1 + step.y)
    few = np.mean(reach > _level.CLOSE) <= 1 / 4
    far = reach > (_level.CLOSE if few else _level.FAR)
    closer, new = _solver.approach(pairs, u, s, k, step, reach)
    np.testing.assert_array_equal(u, given)
    np.testing.assert_array_equal(closer[~far], u[~far])
    for each, there in zip(new, _level.pair_step(pairs, closer, s, k), strict=True):
        np.testing.assert_array_equal(each, there)
    noise = problem.rounding(closer) * (1 + new.y)
    assert np.all((np.abs(new.du) * (1 + new.y) <= _level.CLOSE + noise)[far])


def test_a_few_far_pairs_take_no_pass_of_all(monkeypatch):
    gaps, sizes = np.random.default_rng(0).normal(8, 8 / 3, 5000), []
    step = _level.pair_step
    monkeypatch.setattr(
        _solver, "pair_step", lambda p, *rest: sizes.append(p.start.size) or step(p, *rest)
    )
    margins, _, _ = _solver.solve(gaps, None, 8.0, 0.05)
    assert np.ptp(margins) > 4
    assert sizes.count(5000) <= 5
    assert 2 <= sum(size < 50 for size in sizes) == len(sizes) - sizes.count(5000)


@given(problems(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_steps_converge_that_are_careful_where_plain_ones_are_long(problem, seed, share):
    # and sometimes elsewhere: always, never and in between
    pairs, roots = problem.pairs(), problem.roots()
    slack, u = problem.rounding(roots), starts(problem, seed)
    rng = np.random.default_rng(seed)
    for _ in range(PASSES):
        _, y, _, plain = problem.step(u)
        reach, careful = np.abs(plain) * (1 + y), problem.step(u, True).du
        is_careful = (reach > _level.FAR) | (rng.uniform(size=u.shape) < share)
        new = np.minimum(u + np.where(is_careful, careful, plain), pairs.most)
        before, after = np.abs(u - roots), np.abs(new - roots)
        crosses = ~is_careful & ((new - roots) * (u - roots) < 0)
        assert np.all((after <= 0.48 * before + slack + 2 * EPS * np.abs(u))[crosses])
        u = new
    assert np.all(after <= slack)


@given(problems(), st.integers(0, 2**32 - 1), log_uniform(1e-3, 2))
def test_no_two_steps_back_and_forth_are_short(problem, seed, reach):
    # To lead back and forth between u and v, the mean of D in between is D of both added up.
    u = starts(problem, seed).astype(Real)
    y = problem.z(u) + problem.gaps
    v = u + reach / (1 + y)
    rise = problem.a * (sigmoid(problem.z(v)) - sigmoid(problem.z(u)))
    fall = problem.a * (sigmoid(-problem.z(u)) - sigmoid(-problem.z(v)))
    mean = 1 + np.where(problem.z(u) > 0, fall, rise) / (v - u)
    ends = [1 + (problem.z(point) + problem.gaps) * problem.slope(point) for point in (u, v)]
    assert np.all(mean <= 0.94 * (ends[0] + ends[1]))


@given(problems(), log_uniform(1e-6, 30))
def test_the_step_of_the_logarithm_falls_short_of_the_root(problem, distance):
    roots, s = problem.roots(), 1 if problem.at <= 0 else -1
    u = np.minimum((roots + s * distance).astype(float), problem.pairs().most)
    newton, careful = problem.step(u).du, problem.step(u, True).du
    longer = s * (newton - careful) > 8 * EPS * (np.abs(u) + np.abs(newton))
    assert np.all((s * (u + careful - roots) >= -problem.rounding(roots))[longer])


@pytest.mark.parametrize(("gamma0", "at"), [(200.0, -20.0), (10.0, 20.0)])
def test_the_step_of_the_logarithm_goes_far(gamma0, at):
    # a σ(z), or a (1 - σ(z)), is too large by about e^10: ten of Newton's steps, of 1 in z
    problem = Problem(np.array([100.0, 120.0]), gamma0, 1e7, at)
    u, roots = np.log((problem.gaps + at / 4) / gamma0), problem.roots()
    near, far = (u + problem.step(u, far).du for far in (False, True))
    assert np.all(np.abs(problem.z(near) - problem.z(u)) < 1.1)
    assert np.all(np.abs(problem.z(far) - problem.z(roots)) < 1.1)


@given(problems(), log_uniform(1e-9, 0.5), st.sampled_from([-1, 1]))
@example(Problem(np.array([50.0]), 100.0, 1e5, -10.0), 0.33, 1)  # nearly the worst
def test_what_a_step_leaves(problem, reach, sign):
    roots, pairs = problem.roots(), problem.pairs()
    u = (roots + sign * reach / (1 + problem.z(roots) + problem.gaps)).astype(float)
    _, y, d, du = problem.step(u)
    new, f, slack = u.astype(Real) + du, np.abs(problem.f(u)), problem.rounding(roots) + 1e-18
    close = np.abs(du) * (1 + y) <= _level.CLOSE
    assert np.all(close | (reach > 0.2))
    assert np.all((np.abs(new - roots) <= 0.7 * du**2 * (1 + y) + slack)[close])
    assert np.all((np.abs(u - roots) <= 1.2 * f / d + slack)[close])
    assert np.all(np.abs(u - roots) <= f + slack)  # close or not
    for i, root in enumerate(np.exp(roots)):
        left = _level.what_is_left(pairs, y[i : i + 1], du[i : i + 1])
        assert (left < math.inf) == close[i] or root < 2e-22  # an x so small has no say
        assert abs(np.exp(new[i]) - root) / (1 + root) <= left + slack[i]
    if close.all():  # what the mean of x is predicted to be
        x = np.exp(u.astype(Real))
        change = np.exp(roots) - x * (1 + du.astype(Real))
        slack = slack * (1 + np.exp(roots))
        assert np.abs(np.mean(change)) <= 1.5 * np.mean(x * du**2 * (1 + y)) + np.mean(slack)


@given(problems())
def test_first_guess_has_the_root_between_it_and_0(problem):
    guess, roots = _level.first_guess(problem.pairs(), problem.at, *problem.side()), problem.roots()
    slack = problem.rounding(roots)
    assert np.all((guess * roots >= 0) | (np.abs(roots) <= slack))
    lowest = guess == np.log1p(-0.999999)
    assert np.all((np.abs(roots) <= np.abs(guess) * (1 + 8 * EPS) + slack) | lowest)


@given(problems())
def test_no_root_is_above_the_highest_u(problem):
    assert np.all(problem.roots() <= problem.pairs().most + 8 * EPS)


# -- the level


@given(problems(), st.floats(1e-3, 10))
def test_log_mean_x_rises_with_nu_but_no_faster(problem, by):
    lower, upper = problem.roots(), problem.roots(problem.at + by)
    slack = 1e-18 * (1 + problem.a)
    assert np.all(upper >= lower - slack)
    rise = problem.a * sigmoid_change(problem.at, problem.at + by)
    assert -slack <= log_mean(upper) - log_mean(lower) <= rise + slack
    # and the slope, which has a relative error of h² (1 + y)² and of rounding over the rise
    h = 1e-5 / (1 + problem.gamma0 + np.abs(problem.gaps).max())
    ends = problem.at - h, problem.at + h
    gain = log_mean(problem.roots(ends[1])) - log_mean(problem.roots(ends[0]))
    rise = problem.a * sigmoid_change(*ends)
    x, y = np.exp(lower - lower.max()), problem.z(lower) + problem.gaps
    slope = np.sum(x / (1 + y * problem.slope(lower))) / np.sum(x)
    assert 0 < slope <= 1
    assert abs(gain - slope * rise) <= 1e-6 * slope * rise + 4 * slack


def sigmoid_change(at, to):
    """σ(to) - σ(at), with a small relative error."""
    with mpmath.workdps(100):
        change = 1 / (1 + mpmath.exp(-mpmath.mpf(to))) - 1 / (1 + mpmath.exp(-mpmath.mpf(at)))
        return Real(mpmath.nstr(change, 25))


@some
@given(pools(max_size=12), gamma0s, taus)
def test_the_level_of_the_solution_is_in_every_bracket(gaps, gamma0, tau):
    problem = Problem(gaps, gamma0, gamma0 / tau, 0.0)
    state, seen = problem.begin(), set()
    for _ in range(PASSES):
        for at, sign in ((state.level.low, -1), (state.level.high, 1)):
            if (at, sign) not in seen:
                roots = problem.roots(at)
                slack = problem._replace(at=at).rounding(roots) * np.exp(roots - log_mean(roots))
                assert sign * log_mean(roots) >= -np.mean(slack) - 16 * EPS
                seen.add((at, sign))
        if state.done:
            break
        state = _solver.advance(state)
    assert state.done


@given(problems())
def test_the_first_level_is_newtons_from_equal_margins(problem):
    level, start = problem.begin().level, problem.z(np.zeros_like(problem.gaps))
    w = 1 / (1 + problem.gamma0 * problem.slope(np.zeros_like(problem.gaps)))
    p, q = (np.sum(w * sigmoid(sign * start)) for sign in (1, -1))
    far = np.log1p(Real(problem.a)) + 50
    expected = np.clip(np.log(p) - np.log(q), level.low, level.high)
    slack = 16 * EPS * (problem.gamma0 + np.abs(problem.gaps).max() + far)  # of z
    assert abs(level.at - expected) <= slack
    assert -far - slack <= level.low <= level.at <= level.high <= far + slack


@st.composite
def level_steps(draw):
    """Arguments of `level_step`, likely or not."""
    a = draw(log_uniform(1e-6, 1e5))
    low, at, high = sorted(draw(st.floats(-60, 60)) for _ in range(3))
    before = draw(st.one_of(st.just(math.inf), log_uniform(1e-12, 10)))
    off_one = draw(st.sampled_from([-1, 1])) * draw(log_uniform(1e-17, 10))
    excess = math.expm1(off_one)
    rate = (1 + excess) * draw(log_uniform(1e-8, 1))
    off = draw(st.one_of(st.just(0.0), log_uniform(1e-20, 1)))
    reach = draw(st.one_of(st.just(0.0), log_uniform(1e-9, 1)))
    return _level.Level(a, at, low, high, before), excess, rate, off, reach, EPS


@settings(max_examples=400)
@given(level_steps())
def test_a_step_of_the_level(arguments):
    level, excess, rate, off, reach, _ = arguments
    new, d_nu, near = _level.level_step(*arguments)
    exact = level.a * sigmoid_change(level.at, new.at)
    assert abs(d_nu - exact) <= 16 * EPS * abs(exact) + 1e-60 * level.a
    if reach > 0.3 or off > 0.5 * abs(excess) + EPS:  # the side is not proven: it waits
        assert new == level
        assert d_nu == 0
        assert not near
        return
    log_mass = math.log1p(excess)
    assert new.low == (level.at if log_mass <= 0 else level.low)
    assert new.high == (level.at if log_mass >= 0 else level.high)
    assert new.error == pytest.approx(abs(log_mass), rel=1e-14)
    assert not near or new.error < _level.NEAR
    if new.error > 1e-4:
        assert new.low <= new.at <= new.high
        if new.error > 0.75 * level.error:
            assert new.at == (new.low + new.high) / 2
    rise = (-excess if new.error < _level.NEAR else -log_mass * (1 + excess)) / rate  # of ν
    room = float(level.a * sigmoid(level.at) * sigmoid(-level.at))
    newton = new.at != (new.low + new.high) / 2
    if newton and abs(rise) < 1e-4 * room:
        assert abs(d_nu - rise) <= 1e-3 * abs(rise) + 4 * EPS * room * abs(level.at)


@given(level_steps())
def test_numbers_and_arrays_give_the_same_level(arguments):
    level, *others, eps = arguments
    as_arrays = _level.Level(*(np.array([value]) for value in level))
    expected, d_nu, near = _level.level_step(*arguments)
    of_arrays = _level.level_step(as_arrays, *(np.array([v]) for v in others), eps)
    np.testing.assert_allclose(np.ravel(of_arrays[0]), expected, rtol=1e-13, atol=1e-13)
    slope = level.a * float(sigmoid(expected.at) * sigmoid(-expected.at))
    np.testing.assert_allclose(of_arrays[1], d_nu, rtol=1e-12, atol=1e-11 * slope)
    assert of_arrays[2].tolist() == [near]
    for number, array in zip(_level.side_of(level), _level.side_of(as_arrays), strict=True):
        np.testing.assert_allclose(array, number, rtol=1e-14)
    sums = level.a * 10, level.a, 7.0, abs(level.low), abs(level.high), level.low, level.high
    expected = _level.first_level(*sums)
    of_arrays = _level.first_level(*(np.array([value]) for value in sums))
    np.testing.assert_allclose(np.ravel(of_arrays), expected, rtol=1e-13, atol=1e-13)


# -- the end


def test_steps_end_at_rounding_error():
    left, before, steps = 0.01, math.inf, 0
    while not _level.at_rounding(left, before, EPS):  # squared each time, it goes all the way
        left, before, steps = left * left, left, steps + 1
    assert (left, steps) == (pytest.approx(1e-32), 4)
    assert _level.at_rounding(8 * EPS, 16 * EPS, EPS)  # it has stopped falling
    assert not _level.at_rounding(8 * EPS, 64 * EPS, EPS)  # it may still fall
    assert not _level.at_rounding(32 * EPS, 32 * EPS, EPS)  # that is no rounding error
    assert not _level.at_rounding(math.inf, math.inf, EPS)
    assert not _level.at_rounding(math.nan, 1.0, EPS)


@some
@given(problems())
def test_the_roots_of_a_level_are_on_one_side_of_the_solution(problem):
    roots = problem.roots()
    assume(log_mean(roots) < 50)
    x, exact = np.exp(roots), problem.solution()
    distance = np.mean(np.abs(x - exact))
    assert abs(distance - abs(np.mean(x) - 1)) <= 1e-15 * (1 + distance)


@given(problems(), log_uniform(1e-16, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_certificate(problem, size, seed, solved):
    state = problem.begin()
    at = _solver.iterate(state).level.at if solved else problem.at
    problem, level = problem._replace(at=at), state.level._replace(at=at)
    roots = problem.roots()
    assume(abs(log_mean(roots)) < 15)
    x_star = problem.solution()
    u = roots + np.random.default_rng(seed).normal(size=roots.size) * size
    u = np.minimum(u, problem.pairs().most).astype(float)
    log_mass = np.log(np.mean(np.exp(u)))
    x = np.exp(u.astype(Real) - log_mass)
    bounds = _level.certify(state.pairs, u, *problem.side(), log_mass)
    assert np.all(np.abs(x - np.exp(roots)) <= np.max(bounds) * (1 + x))
    values, _, residual = _solver.finish(state._replace(u=u, level=level))
    assert residual == pytest.approx(np.log1p(2 * np.max(bounds)))
    error = np.mean(np.abs(values / Real(problem.gamma0) - x_star))
    assert error <= 2 * np.expm1(Real(residual))

"""What the solver says of itself, claim by claim (docs/theory.md has the proofs).

The roots and inflections that the claims are about are found by bisection in extended precision.
The internals that are called here are the solver's steps and its problem.
"""

import functools
import math
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracles import Real, margins, sigmoid
from strategies import LIMIT, gamma0s, log_uniform, pools, taus

from gamma_loss import _solver
from gamma_loss._backend import PYTHON_MATH, get_backend
from gamma_loss._comm import LOCAL

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value)")
EPS = float(np.finfo(np.float64).eps)
XP = get_backend(np.zeros(1))
BENT = 2e-4  # what D changes by between the closed form of the inflection and the inflection
seeds = st.integers(0, 2**32 - 1)
some = settings(max_examples=60)


def bisect(is_above, low, high):
    """Where a condition becomes true, between two arrays."""
    low, high = np.asarray(low, dtype=Real), np.asarray(high, dtype=Real)
    for _ in range(90):  # 2e5 / 2^90 < 1e-21
        middle = (low + high) / 2
        above = is_above(middle)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def inflections(gaps):
    gaps = np.asarray(gaps, dtype=Real)
    least = np.maximum(gaps, 0)
    return bisect(lambda y: y * np.tanh((y - gaps) / 2) > 1, least, least + 2)


def log_mean(u, weights=None):
    return np.log(np.average(np.exp(u - u.max()), weights=weights)) + u.max()


class Problem(NamedTuple):
    """A pool, and a λ that need not be the solution's."""

    gaps: np.ndarray
    gamma0: float
    a: float
    lam: float

    def init(self, weights=None):
        return _solver.init(XP, self.gaps, weights, self.gamma0, self.a, LOCAL)

    def pairs(self):
        return pairs_of(self.gaps.tobytes(), self.gamma0, self.a)

    def side(self):
        """s and s a σ(s λ)."""
        return _solver.small_side(PYTHON_MATH, self.lam, self.a)

    def step(self, u):
        return _solver.newton_step(XP, self.pairs(), u, *self.side(), math.inf)

    def safe(self, u):
        step = self.step(u)
        return _solver.safeguarded_step(XP, self.pairs(), u, step.y, step.du, *self.side())

    def z(self, u):
        return Real(self.gamma0) * np.exp(np.minimum(np.asarray(u, dtype=Real), 100)) - self.gaps

    def f(self, u):
        z, lam = self.z(u), Real(self.lam)
        rise = sigmoid(z) - sigmoid(lam) if lam <= 0 else sigmoid(-lam) - sigmoid(-z)
        return u + Real(self.a) * rise

    def roots(self):
        ends = np.full(self.gaps.shape, self.a + 1)
        return bisect(lambda u: self.f(u) > 0, -ends, ends)

    def solution(self):
        """x*."""
        gamma0 = Real(self.gamma0)
        return margins(self.gaps, gamma0, gamma0 / Real(self.a))[0] / gamma0

    def rounding(self, u):
        """How far from the root float64 may end: 8 epsilons of every term of f, over D."""
        z, s = self.z(u), 1 if self.lam <= 0 else -1
        slope, y = self.a * sigmoid(z) * sigmoid(-z), z + self.gaps
        terms = np.abs(u) + self.a * (sigmoid(s * z) + sigmoid(-abs(Real(self.lam))))
        terms = terms + slope * (y + self.gamma0 + np.abs(self.gaps))
        return 8 * EPS * (np.abs(u) + terms / (1 + y * slope)) + 1e-21


@functools.lru_cache(maxsize=8)
def pairs_of(gaps, gamma0, a):
    return Problem(np.frombuffer(gaps), gamma0, a, 0.0).init()[0].pairs


@st.composite
def problems(draw):
    """Pools, with any λ in the first bracket."""
    gaps, gamma0, tau = draw(pools(max_size=12)), draw(gamma0s), draw(taus)
    problem = Problem(gaps, gamma0, gamma0 / tau, 0.0)
    dual = problem.init()[1].dual
    lam = draw(st.one_of(st.floats(-60, 60), st.floats(-5, 5)))
    if draw(st.booleans()):
        lam += gamma0 - draw(st.sampled_from(list(gaps)))
    return problem._replace(lam=float(np.clip(lam, dual.low, dual.high)))


# -- mild settings


@some
@given(pools(max_size=12), gamma0s, taus)
# One pair far from the others moves most, and the mean of x hardly.
@example(np.array([9.0] + 200 * [-3.0]), 2.0, 4.0)
@example(np.array([-2.0] + 200 * [5.0]), 3.0, 3.0)
def test_the_error_bound_of_a_mild_solve_holds_before_its_end(gaps, gamma0, tau):
    assume(_solver.mild_passes(gamma0, tau, True))
    a = gamma0 / tau
    exact = Problem(gaps, gamma0, a, 0.0).solution()
    for passes in (-1, 0):  # two more than these are taken on a CPU
        values, _, bound = _solver.solve_mild(XP, gaps, None, gamma0, a, passes, LOCAL)
        x = values / Real(gamma0)
        v = np.log(x) + a * sigmoid(values - gaps)
        assert 2 * np.tanh((v.max() - v.min()) / 4) <= bound
        assert np.mean(np.abs(x - exact)) <= bound


def test_the_number_of_mild_passes():
    settings = (4.0, 10.0), (0.375, 10.0), (1.7, 4.0), (3.0, 3.0), (4.0, 0.1)
    assert [_solver.mild_passes(*each, True) for each in settings] == [4, 4, 6, 6, 0]
    assert [_solver.mild_passes(*each, False) for each in settings] == [3, 3, 5, 5, 0]


# -- the inflection


def log_bump(y, gaps):
    """Log of y σ'(z)."""
    size = np.abs(np.asarray(y, dtype=Real) - gaps)
    return np.log(np.asarray(y, dtype=Real)) - size - 2 * np.log1p(np.exp(-size))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(gaps=st.lists(st.floats(-LIMIT, LIMIT), min_size=1, max_size=40).map(np.array))
@example(gaps=np.linspace(-12, 12, 2001))
@example(gaps=np.sinh(np.linspace(-9.9, 9.9, 2001)))
def test_closed_form_of_the_inflection(dtype, gaps):
    gaps = gaps.astype(dtype)
    closed, y = _solver.inflection(get_backend(gaps), gaps), inflections(gaps)
    assert closed.dtype == dtype
    assert np.max(np.abs(closed / y - 1)) < 0.016
    # 1 - D / D* <= 1 - y σ'(z) / (y* σ'(z*)) for any a
    assert np.max(-np.expm1(log_bump(closed, gaps) - log_bump(y, gaps))) < BENT
    assert np.max(np.abs(np.log(closed / y)) * (1 + y)) < (0.04 if dtype == np.float64 else 1)


# -- a step of the pairs


@given(problems(), seeds)
def test_safeguarded_steps_converge_from_anywhere_without_turning(problem, seed):
    pairs, roots, rng = problem.pairs(), problem.roots(), np.random.default_rng(seed)
    inflection = np.log(_solver.inflection(XP, pairs.gaps) / pairs.gamma0)
    below, slack = roots < inflection, problem.rounding(roots) + 8 * EPS * np.abs(inflection)
    # From far below all roots up to the highest allowed, or near the inflection.
    anywhere = pairs.u_max - rng.uniform(size=roots.shape) ** 4 * (problem.a + 2)
    near = np.minimum(inflection + 0.1 * rng.normal(size=roots.shape), pairs.u_max)
    u = np.where(rng.uniform(size=roots.shape) < 0.5, anywhere, near)
    for n in range(_solver.MAX_ITER):
        new = np.minimum(u + problem.safe(u), pairs.u_max)
        before, after = (np.where(below, 1, -1) * (point - roots) for point in (u, new))
        room = slack + 2 * EPS * (np.abs(u) + np.abs(problem.step(u).du))
        # It ends between the root and the inflection, or beyond the root by next to nothing,
        assert np.all(after <= np.abs(roots - inflection) + room)
        if n > 0:  # if it starts on the root's side of the inflection,
            assert np.all(after >= -1.01 * BENT * np.abs(before) - room)
        if n > 1:  # and from there on nearer each time.
            assert np.all(np.abs(after) <= np.abs(before) + room)
        u = new
    assert np.all(np.abs(u - roots) <= slack)


@pytest.mark.parametrize(("gamma0", "lam"), [(200.0, -20.0), (10.0, 20.0)])
def test_the_step_of_the_logarithm_goes_far(gamma0, lam):
    # a σ(z), or a (1 - σ(z)), is too large by about e^10: ten of Newton's steps, of 1 in z
    problem = Problem(np.array([100.0, 120.0]), gamma0, 1e7, lam)
    u, roots = np.log((problem.gaps + lam / 4) / gamma0), problem.roots()
    assert np.all(np.abs(problem.z(u + problem.step(u).du) - problem.z(u)) < 1.1)
    assert np.all(np.abs(problem.z(u + problem.safe(u)) - problem.z(roots)) < 1.1)


@given(problems(), log_uniform(1e-9, 0.5), st.sampled_from([-1, 1]))
@example(Problem(np.array([50.0]), 100.0, 1e5, -10.0), 0.33, 1)  # nearly the worst
def test_what_a_close_step_leaves(problem, distance, sign):
    roots = problem.roots()
    u = (roots + sign * distance / (1 + problem.z(roots) + problem.gaps)).astype(float)
    step = problem.step(u)
    du, slack = step.du, problem.rounding(roots) + 1e-18
    new, f = u.astype(Real) + du, np.abs(problem.f(u))
    close = np.abs(du) * (1 + step.y) <= _solver.SCALED_STEP_CLOSE
    assert np.all(close | (distance > 0.02))
    assert np.all((np.abs(new - roots) <= 0.7 * du**2 * (1 + step.y) + slack)[close])
    assert np.all((np.abs(u - roots) <= 1.2 * f / step.d + slack)[close])
    assert np.all(np.abs(u - roots) <= f + slack)  # close or not
    if close.all():  # the mean of x that is predicted tells the side beyond LOG_MEAN_TRUSTED
        x = np.exp(u.astype(Real))
        wrong = np.abs(np.mean(np.exp(roots) - x * (1 + du.astype(Real))))
        assert wrong <= 1.4e-3 * np.mean(x) + np.mean(slack * (1 + np.exp(roots)))


@given(problems(), log_uniform(1e-17, 5), seeds)
def test_root_distance_bounds_the_distance(problem, size, seed):
    pairs, roots = problem.pairs(), problem.roots()
    u = roots + np.random.default_rng(seed).normal(size=roots.size) * size
    u = np.minimum(u, pairs.u_max).astype(float)
    bound = _solver.root_distance(XP, pairs, u, *problem.side())
    assert np.all((np.abs(u - roots) <= bound) | (bound == 80))


@given(problems())
def test_the_root_is_between_0_and_the_first_guess_and_below_the_highest_u(problem):
    guess = _solver.first_guess(XP, problem.pairs(), problem.lam, *problem.side())
    roots = problem.roots()
    slack = problem.rounding(roots)
    assert np.all((guess * roots >= 0) | (np.abs(roots) <= slack))
    lowest = guess == np.log(1e-6)
    assert np.all((np.abs(roots) <= np.abs(guess) * (1 + 8 * EPS) + slack) | lowest)
    assert np.all(roots <= problem.pairs().u_max + 8 * EPS)


# -- the multiplier


def sigmoid_change(start, end):
    """σ(end) - σ(start), with a small relative error."""
    with mpmath.workdps(100):
        low, high = (1 / (1 + mpmath.exp(-mpmath.mpf(each))) for each in (start, end))
        return Real(mpmath.nstr(high - low, 25))


@some
@given(pools(max_size=12), gamma0s, taus, seeds, st.booleans())
def test_the_solution_is_in_every_bracket(gaps, gamma0, tau, seed, weighted):
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(size=gaps.size) * 4) if weighted else None
    problem, seen = Problem(gaps, gamma0, gamma0 / tau, 0.0), set()
    parts, state = problem.init(weights)
    for _ in range(30):
        for end in {(state.dual.low, -1), (state.dual.high, 1)} - seen:
            at = problem._replace(lam=end[0])
            roots = at.roots()
            mean = log_mean(roots, weights)
            slack = at.rounding(roots) * np.exp(roots - mean)
            assert end[1] * mean >= -np.average(slack, weights=weights) - 16 * EPS
            seen.add(end)
        if state.converged:
            break
        state = _solver.step(XP, parts, state)
    assert state.converged


@settings(max_examples=400)
@given(
    log_uniform(1e-6, 1e5),
    st.lists(st.floats(-60, 60), min_size=3, max_size=3).map(sorted),
    st.just(math.inf) | log_uniform(1e-12, 10),
    log_uniform(1e-17, 10),
    st.sampled_from([-1, 1]),
    log_uniform(1e-8, 1),
)
def test_a_step_of_the_multiplier(a, bracket, before, size, sign, share):
    low, lam, high = bracket
    dual, excess = _solver.Dual(lam, low, high, before), math.expm1(sign * size)
    rate, log_mass = (1 + excess) * share, math.log1p(excess)
    new, d_nu = _solver.dual_step(PYTHON_MATH, a, dual, excess, rate)
    exact = a * sigmoid_change(lam, new.lam)
    assert abs(d_nu - exact) <= 16 * EPS * abs(exact) + 1e-60 * a
    assert new.low == (lam if log_mass <= 0 else low)
    assert new.high == (lam if log_mass >= 0 else high)
    assert new.log_mean == pytest.approx(abs(log_mass), rel=1e-14)
    middle = (new.low + new.high) / 2
    if new.log_mean > _solver.LOG_MEAN_TRUSTED:
        assert new.low <= new.lam <= new.high
        if new.log_mean > 0.75 * before:
            assert new.lam == middle
    near = new.log_mean < _solver.LOG_MEAN_NEAR
    rise = (-excess if near else -log_mass * (1 + excess)) / rate  # of ν
    room = float(a * sigmoid(lam) * sigmoid(-lam))
    if new.lam != middle and abs(rise) < 1e-4 * room:
        assert abs(d_nu - rise) <= 1e-3 * abs(rise) + 4 * EPS * room * abs(lam)


# -- the end


@given(problems(), log_uniform(1e-16, 3), seeds, st.booleans())
def test_the_error_bound_holds_of_any_state(problem, size, seed, weighted):
    roots, rng = problem.roots(), np.random.default_rng(seed)
    assume(abs(log_mean(roots)) < 15)
    counts = rng.integers(1, 4, roots.size) if weighted else np.ones(roots.size, int)
    parts, state = problem.init(counts.astype(float) if weighted else None)
    u = np.minimum(roots + rng.normal(size=roots.size) * size, parts.pairs.u_max).astype(float)
    state = state._replace(u=u, dual=state.dual._replace(lam=problem.lam))
    values, _, bound = _solver.terminate(XP, parts, state)
    whole = problem._replace(gaps=np.repeat(problem.gaps, counts))
    x = np.repeat(values, counts) / Real(problem.gamma0)
    assert abs(np.mean(x) - 1) <= 8 * EPS
    assert np.mean(np.abs(x - whole.solution())) <= bound <= 2

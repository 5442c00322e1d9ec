"""The margin problem: every implementation against the oracle, and what a pool is made of."""

import json
import math
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import CORNERS, HARD, MILD, pools, problems

from gamma_loss import _solver, solve_margins
from gamma_loss._backend import get_backend

ROOT = Path(__file__).parents[1]
WORST = (ROOT / "benchmarks/results/worst_case_cpu.jsonl").read_text()  # by benchmarks.worst_case
PUBLISHED = json.loads((ROOT / "tests/data/published_margins.json").read_text())["cases"]


def error(margins, gaps, gamma0, tau):
    """The largest error in units of what is promised."""
    return oracles.error(margins, *oracles.margins(gaps, gamma0, tau), gaps, gamma0, tau)


def check(solver, gaps, gamma0, tau):
    """Accuracy, error bound, budget, order and range of a solution."""
    problem = gaps, gamma0, tau
    margins, multiplier, bound = solver(gaps, gamma0=gamma0, tau=tau)
    exact, nu = oracles.margins(*problem)
    a, eps = gamma0 / tau, np.finfo(gaps.dtype).eps
    assert margins.dtype == gaps.dtype, problem
    assert oracles.error(margins, exact, nu, *problem) <= 1, problem
    # How far the oracle's own a is off matters where a is beyond what any dtype tells.
    assert np.mean(np.abs(margins - exact)) / gamma0 <= bound + a * 2e-19, problem
    # The rounding of u, some 10 epsilons for each unit of it, and u is at most log N.
    assert bound <= min(64 * eps * (2 + min(a, np.log(gaps.size))), 2), problem
    # ν is no sharper than the gaps: a change of them by rounding changes it by as much.
    slack = 1e-13 if eps < 1e-10 else 8 * eps * (1 + np.max(np.abs(gaps)))
    assert abs(multiplier - nu) <= slack * (1 + a), problem
    x = np.asarray(margins, float) / gamma0
    slack = 64 * eps * (1 + a + np.log(gaps.size))
    assert abs(x.mean() - 1) <= slack, problem
    assert np.all(np.diff(x[np.argsort(gaps, kind="stable")]) >= -slack * (1 + x.max())), problem
    with np.errstate(over="ignore"):
        assert np.all(x <= np.exp(a) * (1 + slack)), problem
        assert np.all(x >= np.exp(-a) * (1 - slack) - np.finfo(gaps.dtype).tiny), problem


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_accuracy_and_error_bound_over_the_domain(solver, dtype):
    for problem in solver.some(problems(dtype)):
        check(solver, *problem)


PLAIN = (4.0, 10.0), (4.0, 0.1), (100.0, 1e-3)
NAMED = {
    "corners": CORNERS,
    "equal gaps": [([g] * n, *each) for g, n in ((0.3, 1), (-7.0, 9)) for each in PLAIN],
    "where tau keeps every margin at gamma0": [([1e4, -3.0, 0.0], g, 1e9) for g in (1e-3, 9.0)],
    "around mild settings": [  # the last one is wrong by 0.4 where it is taken for mild
        ([9.0, -3.0, 0.5], 1.4999, 1.0),
        ([9.0, -3.0, 0.5], 1.5001, 1.0),
        ([21.0, -28.0, 2.7, -28.0, -20.0], 5.0, 7.0),
        ([21.2416, -28.8368, 2.6856, -28.2292, -20.853], 13.951123, 15.741992),
    ],
}


@pytest.mark.parametrize("named", NAMED)
def test_accuracy_at_the_edges(solver, named):
    for gaps, gamma0, tau in solver.some(NAMED[named], 4 if solver.name == "triton" else 1):
        for dtype in ("float64", "float32"):
            check(solver, np.asarray(gaps, dtype), gamma0, tau)


RANGE = [
    (gaps, gamma0, gamma0 / a)
    for gamma0 in (1e-14, 1.0, 1e12)
    for a in (1e-30, 0.5, 1.4, 2.0, 1e9)
    for gaps in ([1.0, -2.0, 0.5, 9.0], [1e4, -1e4, 3.0])  # which both dtypes have
]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of what Triton's interpreter drops
def test_accuracy_over_the_range_of_settings(solver):
    for gaps, gamma0, tau in solver.some(RANGE, 4 if solver.name == "triton" else 1):
        exact, _ = oracles.margins(gaps, gamma0, tau)
        slack = gamma0 / tau * float(np.finfo(np.longdouble).eps)
        for dtype, most in (("float64", 1e-13), ("float32", 3e-6)):
            margins, _, bound = solver(np.array(gaps, dtype), gamma0=gamma0, tau=tau)
            off = np.abs(margins - exact)
            assert np.max(off / (gamma0 + exact)) <= most + slack
            assert np.mean(off / gamma0) <= float(bound) + slack


def test_accuracy_in_the_worst_pools_that_were_found(solver):
    """The worst 80 by NumPy and torch, and by each other the worst dozen of its own."""
    takes_all = solver.name in ("numpy", "torch")
    found = [
        (np.repeat(np.asarray(pool["values"], pool["dtype"]), pool["counts"]), pool["gamma0"],
         pool["tau"])
        for pool in sorted(map(json.loads, WORST.splitlines()), key=lambda pool: -pool["found"])
        if takes_all or pool["solver"] == solver.name
    ]  # fmt: skip
    for gaps, gamma0, tau in solver.some(found, 1)[: 80 if takes_all else 12]:
        margins, _, bound = solver(gaps, gamma0=gamma0, tau=tau)
        exact, nu = oracles.margins(gaps, gamma0, tau)
        assert oracles.error(margins, exact, nu, gaps, gamma0, tau) <= 1, (gaps, gamma0, tau)
        assert np.mean(np.abs(margins - exact)) / gamma0 <= bound, (gaps, gamma0, tau)


def test_margins_are_those_of_the_published_implementation():
    for case in PUBLISHED:
        gaps, context = np.array(case["reward_gaps"]), np.array(case["context"])
        gamma0, tau = case["gamma0"], case["tau"]
        margins = solve_margins(gaps, context=context, gamma0=gamma0, tau=tau).margins
        np.testing.assert_allclose(margins, case["published_margins"], 0, 2e-6 * gamma0)


AT_SIZE = [  # few distinct gaps, many times over: what sums in float32 get wrong
    ([54.4243, 9991.3], [65_530, 6], 51.3952, 1.42196),
    ([1.7, 9.0], [60_000, 5_536], 3.0, 3.0),
    ([0.3], [65_536], 4.0, 10.0),
    ([0.3], [65_536], 4.0, 0.1),
    ([1.0, -3.0, 9991.3], [40_000, 25_000, 6], 3.0, 0.5),
    # for which four passes were too few
    ([-9600.0, 31.323, 8.4696, 6.185479], [32450, 1, 1, 1], 3.29975, 6.6),
]


@pytest.mark.parametrize("solver", ["numpy", "torch", "compile", "jax"], indirect=True)
def test_accuracy_of_large_pools(solver):
    for dtype in ("float32", "float64")[: 1 if solver.name in ("jax", "compile") else 2]:
        pools = [(np.repeat(np.asarray(each, dtype), n), *rest) for each, n, *rest in AT_SIZE]
        for problem in solver.some(pools, 1):
            check(solver, *problem)


@pytest.mark.parametrize(("gamma0", "tau"), [(4.0, 10.0), (100.0, 1e-3)])
def test_accuracy_of_a_million_gaps(gamma0, tau):
    gaps = np.repeat(np.clip(np.random.default_rng(9).normal(size=50) * 200, -1e4, 1e4), 20_000)
    check(solve_margins, np.random.default_rng(8).permutation(gaps), gamma0, tau)


HUGE = [
    ("float32", [1e38, 0.0, 1.0, -2.0], {"gamma0": 0.05, "tau": 0.001}),
    ("float32", [3e38, -3e38, 3e38, 1.0, -2.0], HARD),
    ("float64", [1e300, 0.0, 1.0, -2.0], {"gamma0": 0.05, "tau": 0.001}),
    ("float64", [1.7e308, -1.7e308, 1.7e308, 1.0, -2.0], HARD),
    ("float64", [1.7e308, -1.7e308, 1.0, -2.0], MILD),
]


def test_huge_gaps_are_as_those_where_nothing_changes_any_more(solver):
    for dtype, gaps, setting in HUGE:
        margins = solver(np.array(gaps, dtype), **setting).margins
        assert error(margins, np.clip(gaps, -1e4, 1e4), *setting.values()) <= 1


@given(pools(min_size=2, max_size=12), st.floats(0.01, 30), st.floats(0.05, 50), st.integers(0, 99))
def test_no_other_margins_have_a_lower_objective(gaps, gamma0, tau, seed):
    x = solve_margins(gaps, gamma0=gamma0, tau=tau).margins / gamma0
    lowest = oracles.objective(x, gaps, gamma0, tau)
    rng = np.random.default_rng(seed)
    for size in (1e-3, 0.1, 3.0):
        other = x * np.exp(size * rng.normal(size=gaps.size))
        other *= gaps.size / other.sum()
        # F is about |g| + γ in size, which sets its rounding error.
        slack = 1e-15 * (1 + np.abs(gaps).max() + gamma0 * gaps.size + tau)
        assert oracles.objective(other, gaps, gamma0, tau) >= lowest - slack


# -- what a pool is made of


@pytest.mark.parametrize("kind", ["context", "masks", "weights", "all"])
def test_masks_contexts_and_weights_choose_the_pool(solver, kind):
    """A weight is a repetition; a masked entry, or one of weight 0, is as if absent."""
    junk = [0.0, 1e4, -7.0, math.nan, math.inf]
    for seed, (gaps, gamma0, tau) in enumerate(solver.some(problems("float64"))[:24]):
        rng, arrays, settings = np.random.default_rng(seed), {}, {"gamma0": gamma0, "tau": tau}
        gaps, others = gaps.copy(), rng.choice(gaps, 3) + 1
        counts = np.ones(gaps.size, int)
        if kind in ("masks", "all"):
            gaps = np.concatenate([gaps, junk])
            counts = np.concatenate([counts, [0] * 5])
            arrays["mask"] = counts > 0
        if kind in ("weights", "all"):
            counts = counts * rng.integers(0, 4, gaps.size)
            counts[0] = 2
            gaps[1:][counts[1:] == 0] = rng.choice(junk)
            arrays["weights"] = counts * (1 if kind == "all" else 10.0 ** rng.integers(-30, 30))
            arrays["weights"] = arrays["weights"].astype(float)
            arrays["weights"][~arrays.get("mask", counts == counts)] = 5  # a mask goes before it
        whole = np.repeat(gaps, counts)
        if kind in ("context", "all"):
            arrays["context"] = others
            if kind == "all":
                arrays["context"] = np.concatenate([others, junk])
                arrays["context_mask"] = np.arange(8) < 3
            whole = np.concatenate([whole, others])
        solution, problem = solver(gaps, **settings, **arrays), (whole, gamma0, tau)
        exact, nu = oracles.margins(*problem)
        margins = np.repeat(solution.margins, counts)
        off = np.abs(margins - exact[: margins.size])
        assert np.max(off / (gamma0 + exact[: margins.size])) <= oracles.promised(
            "float64", exact, nu, *problem
        ), (problem, arrays)
        assert np.all(solution.margins[counts == 0] == gamma0), (problem, arrays)
        assert abs(solution.multiplier - nu) <= 1e-13 * (1 + gamma0 / tau)
        assert off.mean() / gamma0 * margins.size / whole.size <= solution.error_bound


def test_weights_far_apart(solver):
    """The lightest pair's x may be as large as Σw / w."""
    gaps, counts = np.array([1e4, 0.0, 0.5]), np.array([1, 100_000, 3])
    for gamma0, tau in ((1.0, 2.5e-3), (4.0, 0.1), (4.0, 10.0)):
        margins = solver(gaps, weights=counts / 7, gamma0=gamma0, tau=tau).margins
        assert error(np.repeat(margins, counts), np.repeat(gaps, counts), gamma0, tau) <= 1


@pytest.mark.parametrize("setting", [MILD, HARD, {"gamma0": 0.0, "tau": 1.0}], ids=str)
def test_gaps_that_are_not_finite_and_empty_pools(solver, setting):
    gaps, context = np.array([-2.0, 0.5, np.nan, 3.0, -np.inf]), np.array([1.0, np.inf, -1.0])
    expected = solve_margins(gaps[[0, 1, 3]], context=context[[0, 2]], **setting)
    for arrays in ({}, {"weights": np.ones(5)}):
        solution = solver(gaps, context=context, **arrays, **setting)
        np.testing.assert_allclose(solution.margins[[0, 1, 3]], expected.margins, rtol=1e-13)
        assert np.isnan(solution.margins[[2, 4]]).all()
    none, gamma0 = np.zeros(5, dtype=bool), setting["gamma0"]
    empty = solver(gaps, context=context, mask=none, context_mask=none[:3], **setting)
    assert (empty.margins == gamma0).all()
    a = gamma0 / setting["tau"]
    assert empty.multiplier == pytest.approx(a / (1 + math.exp(-gamma0)))  # of equal gaps 0
    assert 0 <= empty.error_bound <= 1e-12
    lost = solver(np.array([np.nan, np.inf]), **setting)
    assert np.isnan(lost.margins).all()
    assert np.isfinite(lost.multiplier)


# -- what it costs, counted in steps


@pytest.fixture
def steps(monkeypatch):
    """How many pairs each step of the solver has."""
    sizes, step = [], _solver.newton_step

    def counted(xp, pairs, *rest):
        sizes.append(pairs.gaps.shape[0])
        return step(xp, pairs, *rest)

    monkeypatch.setattr(_solver, "newton_step", counted)
    return sizes


@pytest.mark.parametrize("solver", ["numpy", "auto", "torch"], indirect=True)
def test_entries_that_take_no_part_cost_no_step(solver, steps):
    def count(gaps, **arrays):
        steps.clear()
        solver(np.array(gaps), gamma0=1.0, tau=0.001, **arrays)
        return len(steps)

    few, kept = count([-60.0, -61.0]), np.array([True, True, False])
    assert 1 <= few <= 40
    assert count([-60.0, -61.0, np.nan]) <= few
    assert count([-60.0, -61.0, 50.0], mask=kept) <= few
    assert count([-60.0, -61.0, 50.0], weights=kept * 1.0) <= few
    eight = -60 + np.linspace(-1, 1, 8)
    assert count(eight, context=np.zeros(2048), context_mask=np.zeros(2048, bool)) <= count(eight)


def test_a_hard_pool_takes_few_steps_and_few_of_them_are_of_all_pairs(steps):
    gaps = np.random.default_rng(0).normal(8, 8 / 3, 5000)
    found = solve_margins(gaps, gamma0=8.0, tau=0.05).margins
    assert np.ptp(found) > 4
    assert steps.count(5000) <= 8
    assert 2 <= sum(size < 1250 for size in steps) == len(steps) - steps.count(5000)
    steps.clear()
    for problem in problems("float64"):
        solve_margins(problem[0], gamma0=problem[1], tau=problem[2])
    assert len(steps) <= 14 * len(problems("float64"))


def test_a_mild_pool_takes_few_passes(monkeypatch):
    """Each takes one exponential, or its like, of the whole pool."""
    backend, calls = get_backend(np.zeros(1)), []
    for name in ("exp", "tanh"):
        function = getattr(backend, name)
        counted = lambda x, *rest, f=function, n=name: calls.append(n) or f(x, *rest)  # noqa: E731
        monkeypatch.setattr(backend, name, counted, raising=False)
    further = {"gamma0": 3.0, "tau": 3.0}
    cases = ("float64", MILD, 5), ("float64", further, 7), ("float32", further, 5)
    for dtype, setting, most in cases:
        calls.clear()
        solve_margins(np.random.default_rng(0).normal(1, 3, 300).astype(dtype), **setting)
        assert 2 <= max(map(calls.count, ("exp", "tanh"))) <= most, (dtype, setting)


@pytest.mark.parametrize("setting", [MILD, HARD, {"gamma0": 1.0, "tau": 0.001}])
def test_a_device_is_read_every_few_steps(torch, steps, monkeypatch, setting):
    """And not once all steps are taken: a tensor on the CPU that says it is on such a device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from gamma_loss import _backend

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, arguments=(), more=None):
            self.count += operator is torch.ops.aten._local_scalar_dense.default
            return operator(*arguments, **(more or {}))

    gaps = torch.tensor(np.random.default_rng(0).normal(size=64) * 5)
    monkeypatch.setattr(_backend, "_torch_kind", lambda *_: _backend._TorchDevice)
    with Reads() as reads:
        margins = solve_margins(gaps, **setting).margins.numpy()
    assert error(margins, gaps.numpy(), *setting.values()) <= 1
    assert len(steps) <= 60
    assert reads.count <= 20 + len(steps)

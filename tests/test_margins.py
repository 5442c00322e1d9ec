"""The margin problem: accuracy against the oracle, the claims of the theory, every library."""

import json
import math
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import CORNERS, HARD, MILD, gamma0s, pools, taus

from gamma_loss import PUBLISHED_SETTINGS, GapQueue, _solver, solve_margins

# What benchmarks.worst_case has found.
WORST = Path(__file__).parents[1] / "benchmarks" / "results" / "worst_case_cpu.jsonl"
PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_margins.json").read_text())


def error(margins, gaps, gamma0, tau):
    """The largest error in units of what is promised."""
    return oracles.error(margins, *oracles.margins(gaps, gamma0, tau), gaps, gamma0, tau)


def test_float64_accuracy_and_certificate_over_the_domain(solver):
    @solver.settings(200)
    @given(pools(), gamma0s, taus)
    def check(gaps, gamma0, tau):
        margins, multiplier, bound = solver(gaps, gamma0=gamma0, tau=tau)
        assert margins.dtype == np.float64
        expected, nu = oracles.margins(gaps, gamma0, tau)
        assert oracles.error(margins, expected, nu, gaps, gamma0, tau) <= 1
        assert np.mean(np.abs(margins - expected)) / gamma0 <= bound
        # The rounding of u, some 10 epsilons for each unit of it, and u is at most log N.
        assert bound <= 64 * np.finfo(np.float64).eps * (2 + np.log(gaps.size))
        assert abs(multiplier - nu) <= 1e-13 * (1 + gamma0 / tau)

    check()


def test_float32_accuracy_over_the_domain(solver):
    @solver.settings(200)
    @given(pools(), gamma0s, taus)
    def check(gaps, gamma0, tau):
        gaps = gaps.astype(np.float32)
        solution = solver(gaps, gamma0=gamma0, tau=tau)
        assert solution.margins.dtype == np.float32
        expected, nu = oracles.margins(gaps, gamma0, tau)
        assert oracles.error(solution.margins, expected, nu, gaps, gamma0, tau) <= 1
        assert np.mean(np.abs(solution.margins - expected)) / gamma0 <= solution.error_bound

    check()


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_float32_accuracy_in_the_published_settings(solver, name):
    @solver.settings(50)
    @given(gaps=pools())
    def check(gaps):
        gamma0, tau = PUBLISHED_SETTINGS[name]["gamma0"], PUBLISHED_SETTINGS[name]["tau"]
        gaps = gaps.astype(np.float32)
        solution = solver(gaps, gamma0=gamma0, tau=tau)
        assert error(solution.margins, gaps, gamma0, tau) <= 1

    check()


def test_the_worst_pools_that_were_found(solver):
    """NumPy and torch take those of every implementation, others their own: they compile."""
    for pool in map(json.loads, WORST.read_text("utf-8").splitlines()):
        if solver.name not in ("numpy", "torch", pool["solver"]):
            continue
        gaps = np.repeat(np.asarray(pool["values"], pool["dtype"]), pool["counts"])
        solution = solver(gaps, gamma0=pool["gamma0"], tau=pool["tau"])
        problem = gaps, pool["gamma0"], pool["tau"]
        exact, nu = oracles.margins(*problem)
        assert oracles.error(solution.margins, exact, nu, *problem) <= 1, pool
        mean = np.mean(np.abs(solution.margins - exact)) / pool["gamma0"]
        assert mean <= solution.error_bound, pool


def test_a_pool_for_which_four_passes_were_too_few(solver):
    gaps = np.repeat(
        [-9600.0, 31.323, 8.4696, 6.185479], [200 if solver.name == "triton" else 32450, 1, 1, 1]
    )
    margins = solver(gaps, gamma0=3.29975, tau=6.6).margins
    assert error(margins, gaps, 3.29975, 6.6) <= 1


@pytest.mark.parametrize(("gaps", "gamma0", "tau"), CORNERS)
def test_corners_of_the_domain(solver, gaps, gamma0, tau):
    for dtype in (np.float64, np.float32):
        gaps = np.asarray(gaps, dtype=dtype)
        assert error(solver(gaps, gamma0=gamma0, tau=tau).margins, gaps, gamma0, tau) <= 1


@pytest.mark.parametrize(("gamma0", "tau"), [(4.0, 10.0), (100.0, 1e-3), (3.0, 0.05), (50.0, 40.0)])
@pytest.mark.parametrize("scale", [2.0, 1e4])
def test_a_large_pool(gamma0, tau, scale):
    # 64 distinct gaps, 1024 of each: large for the solver, small for the oracle.
    distinct = np.clip(np.random.default_rng(7).normal(size=64) * scale, -1e4, 1e4)
    gaps = np.random.default_rng(8).permutation(np.repeat(distinct, 1024))
    for pool in (gaps, gaps.astype(np.float32)):
        margins = solve_margins(pool, gamma0=gamma0, tau=tau).margins
        assert error(margins, pool, gamma0, tau) <= 1


@pytest.mark.parametrize(("gamma0", "tau"), [(4.0, 10.0), (100.0, 1e-3)])
def test_a_million_gaps(gamma0, tau):
    distinct = np.clip(np.random.default_rng(9).normal(size=50) * 200, -1e4, 1e4)
    gaps = np.repeat(distinct, 20_000)
    solution = solve_margins(gaps, gamma0=gamma0, tau=tau)
    assert error(solution.margins, gaps, gamma0, tau) <= 1
    assert solution.error_bound <= 1e-9


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: case["name"])
def test_parity_with_the_published_implementation(solver, case):
    pool = np.array(case["reward_gaps"] + case["context"])
    margins = solver(pool, gamma0=case["gamma0"], tau=case["tau"]).margins
    margins = margins[: len(case["reward_gaps"])]
    bound = 2e-6 * case["gamma0"]
    assert np.max(np.abs(margins - case["published_margins"])) <= bound
    shifts = margins - case["gamma0"]
    assert np.max(np.abs(shifts - case["published_margin_shifts"])) <= bound


def rounding(gamma0, tau, size=1):
    """A bound on the rounding error of one x: a few ulps of u, which is as large as a."""
    return 64 * np.finfo(np.float64).eps * (1 + gamma0 / tau + math.log(size))


def test_order_budget_and_bounds(solver):
    @solver.settings()
    @given(pools(min_size=2), gamma0s, taus)
    def check(gaps, gamma0, tau):
        margins, multiplier, _ = solver(gaps, gamma0=gamma0, tau=tau)
        slack, a = rounding(gamma0, tau, gaps.size), gamma0 / tau
        x = margins / gamma0
        assert abs(x.mean() - 1) <= slack
        ordered = x[np.argsort(gaps, kind="stable")]
        assert np.all(np.diff(ordered) >= -slack * (1 + ordered[1:]))
        with np.errstate(over="ignore"):
            assert np.all(x >= np.exp(-a) * (1 - slack))
            assert np.all(x <= np.exp(a) * (1 + slack))
        assert -slack <= multiplier <= a + slack * (1 + a)

    check()


def test_permuting_the_pool_permutes_the_margins(solver):
    @solver.settings()
    @given(pools(min_size=2), gamma0s, taus, st.randoms(use_true_random=False))
    def check(gaps, gamma0, tau, random):
        order = list(range(gaps.size))
        random.shuffle(order)
        x = solver(gaps, gamma0=gamma0, tau=tau).margins / gamma0
        permuted = solver(gaps[order], gamma0=gamma0, tau=tau).margins / gamma0
        assert np.max(np.abs(permuted - x[order]) / (1 + x)) <= rounding(gamma0, tau, gaps.size)

    check()


def test_equal_gaps_and_one_gap_give_gamma0(solver):
    @solver.settings()
    @given(st.floats(-1e4, 1e4), st.integers(1, 30), gamma0s, taus)
    def check(gap, size, gamma0, tau):
        margins = solver(np.full(size, gap), gamma0=gamma0, tau=tau).margins
        np.testing.assert_allclose(margins, gamma0, rtol=rounding(gamma0, tau, size))

    check()


def test_large_tau_gives_gamma0(solver):
    @solver.settings()
    @given(pools(), gamma0s)
    def check(gaps, gamma0):
        # |log x| <= a, so |x - 1| <= e^a - 1
        tau = 1e9
        margins = solver(gaps, gamma0=gamma0, tau=tau).margins
        np.testing.assert_allclose(margins, gamma0, rtol=math.expm1(gamma0 / tau) + 1e-15)

    check()


def test_gamma0_of_zero_gives_no_margins(library):
    solution = solve_margins(library.array([-1.0, 2.0]), gamma0=0.0, tau=1.0)
    assert library.numpy(solution.margins).tolist() == [0.0, 0.0]
    assert float(solution.multiplier) == float(solution.error_bound) == 0.0


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


def test_context_joins_the_pool(solver):
    @solver.settings()
    @given(pools(min_size=2), pools(min_size=2), gamma0s, taus)
    @example(np.array([1.0]), np.array([-1.0, 3.0]), 100.0, 1e-3)
    def check(gaps, context, gamma0, tau):
        together = solver(np.concatenate([gaps, context]), gamma0=gamma0, tau=tau)
        split = solver(gaps, gamma0=gamma0, tau=tau, context=context)
        if solver.name == "jax":  # padded otherwise, so added up in another order
            rtol = rounding(gamma0, tau, gaps.size + context.size)
            np.testing.assert_allclose(split.margins, together.margins[: gaps.size], rtol=rtol)
            return
        np.testing.assert_array_equal(split.margins, together.margins[: gaps.size])
        assert split.multiplier == together.multiplier

    check()


def test_masked_entries_are_as_if_absent(solver):
    @solver.settings()
    @given(pools(min_size=2), pools(min_size=2), gamma0s, taus, st.randoms(use_true_random=False))
    def check(gaps, context, gamma0, tau, random):
        junk = [0.0, 1e4, -7.0, math.nan, math.inf]
        mixed = [(gap, True) for gap in gaps] + [(random.choice(junk), False) for _ in range(5)]
        random.shuffle(mixed)
        mask = np.array([kept for _, kept in mixed])
        values = np.array([gap for gap, _ in mixed])
        plain = solver(values[mask], gamma0=gamma0, tau=tau, context=context)
        masked = solver(
            values,
            gamma0=gamma0,
            tau=tau,
            context=np.concatenate([context, [5.0, math.nan, 3.0]]),
            context_mask=np.arange(context.size + 3) < context.size,
            mask=mask,
        )
        x, expected = masked.margins / gamma0, plain.margins / gamma0
        tolerance = rounding(gamma0, tau, gaps.size + context.size)
        assert np.max(np.abs(x[mask] - expected) / (1 + expected)) <= tolerance
        assert np.all(masked.margins[~mask] == gamma0)

    check()


@pytest.mark.parametrize("setting", [MILD, HARD], ids=["mild", "hard"])
def test_gaps_that_are_not_finite_and_empty_pools(solver, setting):
    gaps, context = np.array([-2.0, 0.5, np.nan, 3.0, -np.inf]), np.array([1.0, np.inf, -1.0])
    expected = solve_margins(gaps[[0, 1, 3]], context=context[[0, 2]], **setting)
    solution = solver(gaps, context=context, **setting)
    np.testing.assert_allclose(solution.margins[[0, 1, 3]], expected.margins, rtol=1e-13)
    assert np.isnan(solution.margins[[2, 4]]).all()
    none = np.zeros(5, dtype=bool)
    empty = solver(gaps, context=context, mask=none, context_mask=none[:3], **setting)
    assert (empty.margins == setting["gamma0"]).all()
    assert np.isfinite(empty.multiplier)
    assert 0 <= empty.error_bound <= 1e-12


HUGE = [
    ("float32", [1e38, 0.0, 1.0, -2.0], {"gamma0": 0.05, "tau": 0.001}),
    ("float32", [3e38, -3e38, 3e38, 1.0, -2.0], HARD),
    ("float64", [1e300, 0.0, 1.0, -2.0], {"gamma0": 0.05, "tau": 0.001}),
    ("float64", [1.7e308, -1.7e308, 1.7e308, 1.0, -2.0], HARD),
    ("float64", [1.7e308, -1.7e308, 1.0, -2.0], MILD),
]


@pytest.mark.parametrize(("dtype", "gaps", "setting"), HUGE)
def test_huge_gaps_are_as_those_where_nothing_changes_any_more(solver, dtype, gaps, setting):
    margins = solver(np.array(gaps, dtype), **setting).margins
    clipped = np.clip(gaps, -1e4, 1e4)
    assert error(margins, clipped, setting["gamma0"], setting["tau"]) <= 1


AT_SIZE = [  # few distinct gaps, many times over: what sums in float32 get wrong
    ([54.4243, 9991.3], [65_530, 6], 51.3952, 1.42196),
    ([1.7, 9.0], [60_000, 5_536], 3.0, 3.0),
    ([0.3], [65_536], 4.0, 10.0),
    ([0.3], [65_536], 4.0, 0.1),
    ([1.0, -3.0, 9991.3], [40_000, 25_000, 6], 3.0, 0.5),
]


@pytest.mark.parametrize("solver", ["numpy", "torch", "compile", "jax"], indirect=True)
@pytest.mark.parametrize(("values", "counts", "gamma0", "tau"), AT_SIZE)
def test_float32_and_its_error_bound_at_size(solver, values, counts, gamma0, tau):
    gaps = np.repeat(np.asarray(values, dtype=np.float32), counts)
    solution = solver(gaps, gamma0=gamma0, tau=tau)
    exact, nu = oracles.margins(gaps, gamma0, tau)
    assert oracles.error(solution.margins, exact, nu, gaps, gamma0, tau) <= 1
    assert np.mean(np.abs(solution.margins - exact)) / gamma0 <= solution.error_bound


# -- weights


def test_whole_weights_are_repeated_pairs(solver):
    @solver.settings(50)
    @given(pools(min_size=2, max_size=12), gamma0s, taus, st.integers(0, 2**32 - 1))
    @example(np.array([1.0, -2.0, 0.5, 9.0]), 4.0, 10.0, 0)
    @example(np.array([1.0, -2.0, 0.5, 9.0]), 4.0, 0.1, 0)
    def check(gaps, gamma0, tau, seed):
        counts = np.random.default_rng(seed).integers(0, 4, gaps.size)
        counts[0] = 1
        settings = {"gamma0": gamma0, "tau": tau}
        weighted = solver(gaps, weights=counts.astype(float), **settings)
        whole = np.repeat(gaps, counts)
        exact, nu = oracles.margins(whole, gamma0, tau)
        margins = np.repeat(weighted.margins, counts)
        assert oracles.error(margins, exact, nu, whole, gamma0, tau) <= 1
        assert np.mean(np.abs(margins - exact)) / gamma0 <= weighted.error_bound
        assert np.all(weighted.margins[counts == 0] == gamma0)
        # A common factor changes nothing but rounding.
        for factor in (1e-30, 1 / 3, 1e30):
            scaled = np.repeat(solver(gaps, weights=factor * counts, **settings).margins, counts)
            assert oracles.error(scaled, exact, nu, whole, gamma0, tau) <= 1

    check()


def test_weights_far_apart(solver):
    """The lightest pair's x may be as large as Σw / w."""
    gaps, counts = np.array([1e4, 0.0, 0.5]), np.array([1, 100_000, 3])
    whole = np.repeat(gaps, counts)
    for gamma0, tau in ((1.0, 2.5e-3), (4.0, 0.1), (4.0, 10.0)):
        margins = solver(gaps, weights=counts / 7, gamma0=gamma0, tau=tau).margins
        assert error(np.repeat(margins, counts), whole, gamma0, tau) <= 1


def test_weights_join_masks_and_contexts(solver):
    gaps, context = np.array([1.0, np.nan, -2.0, 0.5]), np.array([3.0, -1.0])
    mask, weights = np.array([True, True, False, True]), np.array([2.0, 1.0, 5.0, 1.0])
    for setting in (MILD, HARD):
        margins = solver(gaps, mask=mask, weights=weights, context=context, **setting).margins
        whole = np.array([1.0, 1.0, 0.5, *context])
        expected = oracles.margins(whole, *setting.values())[0][1:3]
        np.testing.assert_allclose(margins[[0, 3]], expected.astype(float), rtol=1e-13)
        assert np.isnan(margins[1])
        assert margins[2] == setting["gamma0"]


# -- entries that take no part


@pytest.fixture
def steps(monkeypatch):
    """How many pairs each step of the solver has."""
    sizes, step = [], _solver.newton_step

    def counted(xp, pairs, *rest):
        sizes.append(pairs.gaps.shape[0])
        return step(xp, pairs, *rest)

    monkeypatch.setattr(_solver, "newton_step", counted)
    return sizes


@pytest.mark.parametrize("solver", ["numpy", "auto", "torch", "jax"], indirect=True)
def test_entries_that_take_no_part_cost_no_step(solver, steps, monkeypatch):
    if solver.name == "jax":  # to run the loop in Python, without the program that is kept
        jax = pytest.importorskip("jax")
        monkeypatch.setattr(jax, "jit", lambda function, **_: function)
        solve = _solver._solve
        monkeypatch.setattr(_solver, "_solve", lambda *arguments: solve(*arguments))
        monkeypatch.setattr(jax.lax, "while_loop", while_loop)

    def count(gaps, **arrays):
        steps.clear()
        solver(np.array(gaps), gamma0=1.0, tau=0.001, **arrays)
        return len(steps)

    few, queue = count([-60.0, -61.0]), GapQueue(2048).context()
    assert 1 <= few <= 40
    assert count([-60.0, -61.0, np.nan]) <= few
    assert count([-60.0, -61.0, np.inf]) <= few
    assert count([-60.0, -61.0, 50.0], mask=np.array([True, True, False])) <= few
    assert count([-60.0, -61.0, 50.0], weights=np.array([1.0, 1.0, 0.0])) <= few
    eight = -60 + np.linspace(-1, 1, 8)
    few = count(eight)
    assert count(eight, context=np.asarray(queue.gaps, float), context_mask=queue.mask) <= few


def while_loop(cond, body, state):
    while cond(state):
        state = body(state)
    return state


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


@pytest.mark.parametrize(("gamma0", "tau"), [(4.0, 10.0), (3.0, 3.0), (4.0, 0.1), (100.0, 1e-3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_gives_the_same_answer(library, dtype, gamma0, tau):
    gaps = np.random.default_rng(3).normal(size=33) * 4
    context = np.random.default_rng(4).normal(size=7) * 40
    mask = np.arange(33) % 5 != 0
    expected = solve_margins(
        gaps.astype(dtype), gamma0=gamma0, tau=tau, context=context.astype(dtype), mask=mask
    )
    solution = solve_margins(
        library.array(gaps, dtype),
        gamma0=gamma0,
        tau=tau,
        context=library.array(context, dtype),
        mask=library.array(mask, "bool"),
    )
    assert library.numpy(solution.margins).dtype == dtype
    tolerance = 2e-13 if dtype == "float64" else 6e-6  # twice what each may be off
    np.testing.assert_allclose(
        library.numpy(solution.margins), expected.margins, rtol=tolerance, atol=tolerance * gamma0
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_upcast(dtype, torch, jax):
    for gaps in (
        torch.tensor([-1.0, 2.0], dtype=getattr(torch, dtype)),
        jax.numpy.asarray([-1.0, 2.0], dtype=dtype),
    ):
        margins = solve_margins(gaps, gamma0=1.0, tau=1.0).margins
        assert str(margins.dtype).endswith("float32")
        expected, _ = oracles.margins(np.array([-1.0, 2.0]), 1.0, 1.0)
        np.testing.assert_allclose(np.asarray(margins), expected.astype(float), rtol=1e-5)

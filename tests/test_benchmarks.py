"""The benchmarks' arithmetic and their peer, without any timing."""

import itertools
import json
import random
import sys
import warnings
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import oracles
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")

from benchmarks import _harness as harness  # noqa: E402
from benchmarks import (  # noqa: E402
    accuracy,
    distributed,
    gpu,
    loss_overhead,
    published,
    sequence_logps,
    solver,
    worst_case,
)
from gamma_loss import _mild, solve_margins  # noqa: E402

HERE = Path(published.__file__).parent


def gaps(size, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=size) * 2)


# --- the harness ---


def test_quantiles_are_in_microseconds():
    times = [i * 1e-6 for i in range(11)]  # 0, 1, ..., 10 microseconds
    assert harness.quantiles(times) == {"0.1": 1.0, "0.5": 5.0, "0.9": 9.0}


def test_ratio_is_of_medians_and_above_one_for_the_faster():
    assert harness.times_as_fast([1.0, 2.0, 900.0], peer=[6.0, 0.0, 7.0]) == 3.0


def test_turns_come_in_any_order_and_are_as_many_for_each():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = harness.in_turns(calls, seconds=0.0, device="cpu", least=40)
    assert {name: len(t["wall"]) for name, t in times.items()} == {"a": 40, "b": 40}
    assert sorted(called[:2]) == ["a", "b"]  # finds out how long a block should be
    length = harness.BLOCK + 1  # of so quick a call, with the one that is not timed
    blocks = [called[i : i + length] for i in range(2, len(called), length)]
    assert all(len(set(block)) == 1 for block in blocks)
    turns = [blocks[i][0] + blocks[i + 1][0] for i in range(0, len(blocks), 2)]
    assert set(turns) == {"ab", "ba"}
    assert min(turns.count("ab"), turns.count("ba")) >= 10  # of 40


def test_budget_hands_on_what_an_item_leaves(monkeypatch):
    now = 100.0
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    budget = harness.Budget(12.0, [2.0, 1.0, 1.0])
    assert budget.share() == 6.0
    now += 2.0
    assert budget.share() == 5.0
    now += 20.0
    assert budget.share() == 0.0


def test_a_call_that_fails_is_left_out_with_its_reason():
    calls, skipped = {"one": lambda: 1, "fails": lambda: 1 / 0}, {}
    assert harness.warm_up(calls, "cpu", skipped) == {"one": 1}
    assert list(calls) == ["one"]
    assert skipped == {"fails": "ZeroDivisionError: division by zero"}


def test_an_implementation_that_cannot_run_is_left_out(monkeypatch):
    def solve(gaps, *, impl, **_):
        if impl == "compile":
            raise RuntimeError("no compiler\nand more")
        if impl == "triton":
            warnings.warn("no triton: eager instead", stacklevel=1)

    monkeypatch.setattr(harness, "solve_margins", solve)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = SimpleNamespace(device="cpu", left_out={})
    assert harness.implementations(args, interpret=True) == ["eager"]
    assert args.left_out["compile"] == "RuntimeError: no compiler"
    assert args.left_out["triton"] == "no triton: eager instead"
    harness.implementations(args)
    assert "interpreter is not timed" in args.left_out["triton"]


def test_counts_kernels_and_their_time_from_a_profile(monkeypatch):
    def event(name, microseconds, device=torch.autograd.DeviceType.CUDA, annotation=False):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(
            name=name, device_type=device, is_user_annotation=annotation, time_range=elapsed
        )

    events = [
        event("solve_kernel", 40.0),
        event("solve_kernel", 44.0),
        event("Memcpy DtoH (Device -> Pageable)", 6.0),
        event("Torch-Compiled Region", 500.0, annotation=True),
        event("cudaLaunchKernel", 300.0, device=torch.autograd.DeviceType.CPU),
    ]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    counted = harness.launches(lambda: None, calls=2)
    assert counted == {"kernels": 1.0, "copies": 0.5, "device_microseconds": 45.0}
    events.clear()
    assert harness.launches(lambda: None) == {}


def test_fresh_compile_takes_a_code_object_of_its_own_each_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    offset = 10

    def add(x, y=2):
        return x + y + offset

    copies = [harness.fresh_compile(add) for _ in range(2)]
    assert [copy(1) for copy in copies] == [13, 13]
    assert len({id(function.__code__) for function in (add, *copies)}) == 3


def test_results_are_json_even_if_not_finite(tmp_path):
    out = tmp_path / "result.json"
    harness.write(out, {"γ": [1.0, float("nan")], "nested": {"x": float("inf")}, "n": 3})
    assert json.loads(out.read_text("utf-8")) == {"γ": [1.0, None], "nested": {"x": None}, "n": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "results.txt"], "--out must name a .json file, got results.txt"),
        (["--out", "{tmp}"], "Is a directory"),
        (["--out", "{tmp}/file/new.json"], "can't write results"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0"),
        (["--seconds", "nan"], "--seconds must be positive"),
        (["--seconds", "soon"], "invalid float value: 'soon'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_end_in_one_line_before_anything_runs(
    monkeypatch, capsys, tmp_path, arguments, message
):
    (tmp_path / "file").touch()
    if arguments[-1] == "{tmp}":
        (tmp_path := tmp_path / "folder.json").mkdir()
    arguments = [each.format(tmp=tmp_path) for each in arguments]
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/solver.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        harness.run("Doc", 1.0, {"results": harness.Section(pytest.fail, pytest.fail, (), list)})
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks.solver: ")
    assert message in line


def test_a_run_measures_every_case_writes_and_shows(monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "results.json"
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/solver.py", "--out", str(out)])

    def measure(args, seconds, case):
        args.left_out[case] = "why"
        args.later.append(lambda: found[case].update(later=1))
        found[case] = {"case": case, "seconds": seconds}
        yield found[case]

    found = {}
    part = harness.Section(
        lambda args: ["a", "b"], measure, ["case"], lambda rs: [[r["case"]] for r in rs], share=3.0
    )
    none = harness.Section(lambda args: [], measure, ["case"], list)
    harness.run("Doc", 40.0, {"part": part, "none": none}, pi=3)
    record = json.loads(out.read_text("utf-8"))
    assert [row["case"] for row in record["part"]] == ["a", "b"]
    assert [row["seconds"] for row in record["part"]] == pytest.approx([20, 40], rel=0.1)
    assert all(row["later"] for row in record["part"])
    assert record["none"] == []
    assert record["pi"] == 3
    assert record["left_out"] == {"a": "why", "b": "why"}
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-4:] == ["part", "case", "a", "b"]
    assert printed.err == ""  # no bar where there is no terminal


def test_table_aligns_and_shows_what_is_missing(capsys):
    harness.table(["name", "µs"], [["a", 1234.4], ["long name", None], ["b", 0.1234]])
    assert capsys.readouterr().out.splitlines() == [
        "name       µs",
        "a          1234",
        "long name  -",
        "b          0.123",
    ]


def test_records_the_machine_and_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/accuracy.py", "--quick"])
    machine = harness.machine("cpu")
    assert machine["command"] == "python -m benchmarks.accuracy --quick"
    assert machine["versions"]["torch"] == torch.__version__


# --- the published routine ---


@pytest.fixture
def pools(monkeypatch):
    """The pools that the published solver is given."""
    seen, solve = [], published.published_margins

    def spy(pool, gamma0, tau):
        seen.append(pool)
        return solve(pool, gamma0, tau)

    monkeypatch.setattr(published, "published_margins", spy)
    return seen


@pytest.mark.parametrize(
    ("pairs", "queued", "sampled"), [(4, 0, 0), (4, 8, 8), (16, 2048, 240), (256, 2048, 0)]
)
def test_pool_is_a_sample_of_the_queue_and_the_batch(pools, pairs, queued, sampled):
    earlier = gaps(queued, seed=1).tolist()
    queue = deque(earlier, maxlen=published.QUEUE_SIZE)
    batch = gaps(pairs)
    margins = published.published_routine(batch, 4.0, 10.0, queue, random.Random(0))
    (pool,) = pools
    assert pool.shape == (sampled + pairs,)
    assert pool[sampled:].tolist() == batch.tolist()
    drawn = pool[:sampled].tolist()
    assert set(drawn) <= set(earlier)
    assert len(set(drawn)) == sampled  # drawn without replacement
    assert torch.equal(margins, published.published_margins(pool, 4.0, 10.0)[sampled:])


def test_queue_remembers_the_batch_and_forgets_the_oldest(pools):
    queue = deque([float(i) for i in range(2048)], maxlen=published.QUEUE_SIZE)
    batch = gaps(16)
    published.published_routine(batch, 4.0, 10.0, queue, random.Random(0))
    assert list(queue) == [float(i) for i in range(16, 2048)] + batch.tolist()


def test_sample_depends_on_the_generator_alone(pools):
    for seed in (0, 0, 1):
        queue = deque(gaps(2048, seed=1).tolist(), maxlen=published.QUEUE_SIZE)
        published.published_routine(gaps(16), 4.0, 10.0, queue, random.Random(seed))
    first, again, other = pools
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_copies_the_batch_to_the_host_twice(monkeypatch):
    copies, tolist = [], torch.Tensor.tolist

    def counted(tensor):
        copies.append(tensor.shape[0])
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    queue = deque([0.0] * 100, maxlen=published.QUEUE_SIZE)
    published.published_routine(gaps(16), 4.0, 10.0, queue, random.Random(0))
    assert copies == [16, 16]


def test_refuses_a_batch_that_is_larger_than_the_pool():
    with pytest.raises(ValueError, match="at most 256 pairs, got 257"):
        published.published_routine(gaps(257), 4.0, 10.0, deque(), random.Random(0))


# --- the benchmarks ---


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 1e7])
def test_accuracy_stays_in_the_domain_and_at_its_kappa(kappa):
    chosen = accuracy.settings(kappa, 4)
    assert len(set(chosen)) == len(chosen) == (1 if kappa == 1e7 else 4)
    for gamma0, tau in chosen:
        assert 1e-3 <= gamma0 <= 100
        assert 1e-3 <= tau <= 1e3
        assert gamma0**2 / tau == pytest.approx(kappa)


def test_accuracy_finds_an_error_that_is_there():
    problems = [
        {"kappa": 1.0, "errors": [1.0, 3.0]},
        {"kappa": 1.0, "errors": [2.0, float("nan")]},
        {"kappa": 9.0, "errors": [0.0]},
    ]
    assert accuracy.summary(problems, lambda problem: problem["kappa"]) == {
        1.0: {"median": 2.5, "worst": float("inf")},
        9.0: {"median": 0.0, "worst": 0.0},
    }


@pytest.fixture
def by_numpy(monkeypatch):
    """NumPy's solver, with no other one made, and a clock that tells a second later each time."""
    monkeypatch.setattr(harness, "implementations", lambda args, interpret: [])
    clock = SimpleNamespace(process_time=itertools.count().__next__, time_ns=lambda: 1)
    monkeypatch.setattr(worst_case, "time", clock)
    return worst_case.solvers(SimpleNamespace(device="cpu", left_out={}))["numpy"]


def planted(solve):
    """A solver that is wrong where a gap is next to γ0, more so the larger κ is."""

    def wrong(gaps, gamma0, tau):
        margins, residual = solve(gaps, gamma0, tau)
        near = np.abs(gaps - gamma0).min() <= 1e-3
        return margins * (1 + near * 1e-9 * gamma0**2 / tau), residual

    return wrong


def test_worst_case_climbs_to_a_planted_error(by_numpy):
    solve = planted(by_numpy)
    worst, looked = worst_case.search(solve, by_numpy, "float64", 60, 64, [], seed=0)
    assert 50 < looked <= 60
    for goal, least in {"error": 1e4, "certificate": 1e3, "disagreement": 5e3}.items():
        found, pool = worst[goal]
        assert found >= least, goal
        assert worst_case.figures(solve, by_numpy, "float64", pool)[goal] == found
        assert worst_case.reproduce("numpy", "float64", pool)[goal] <= least * 1e-3
    start = worst["error"][1]
    assert worst_case.search(solve, by_numpy, "float64", 0, 64, [start], 0)[1] == 1


def test_worst_case_counts_a_failure_as_infinitely_wrong(by_numpy):
    pool = worst_case.Pool([1.0], [3], 4.0, 10.0)
    for fails in (lambda *_: 1 / 0, lambda gaps, *_: (gaps * np.nan, 0.0)):
        found = worst_case.figures(fails, by_numpy, "float32", pool)
        assert set(found.values()) == {np.inf}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_worst_case_stays_in_the_domain_and_at_the_edges_between_solvers(dtype):
    rng, edges = np.random.default_rng(0), set()
    pool = worst_case.drawn(rng, dtype, 500)
    for _ in range(3000):
        pool = worst_case.changed(rng, dtype, 500, pool)
        assert 1 <= len(pool.values) == len(pool.counts) <= worst_case.DISTINCT
        assert 1 <= sum(pool.counts) <= 500
        assert min(pool.counts) >= 1
        assert np.abs(pool.values).max() <= 1e4
        assert 1e-3 <= pool.gamma0 <= 100
        assert 1e-3 <= pool.tau <= 1e3
        assert pool.values == np.asarray(pool.values, dtype).tolist()
        switched = worst_case.switched(rng, pool)
        sides = [
            _mild.mild_passes(pool.gamma0, switched.tau * (1 + t), True) for t in (-1e-6, 1e-6)
        ]
        edges.add(tuple(sides))
    assert {(0, 6), (6, 4)} <= edges


def test_worst_case_keeps_pools_and_goes_on_where_it_was(monkeypatch, capsys, tmp_path, by_numpy):
    out = tmp_path / "worst.json"
    ways = {"numpy": planted(by_numpy), "streaming": by_numpy}
    monkeypatch.setattr(worst_case, "solvers", lambda args: ways)

    def run(seconds):
        monkeypatch.setattr(
            sys, "argv", ["x/worst_case.py", "--out", str(out), "--seconds", seconds]
        )
        worst_case.main()
        lines = out.with_suffix(".jsonl").read_text().splitlines()
        return json.loads(out.read_text("utf-8"))["results"], list(map(json.loads, lines))

    rows, kept = run("30")
    assert [(row["solver"], row["dtype"]) for row in rows] == [
        ("numpy", "float64"), ("numpy", "float32"), ("streaming", "float64"),
    ]  # fmt: skip
    assert rows[0]["error"] == kept[0]["found"]
    assert "reproduce('numpy', 'float64', Pool(values=[" in capsys.readouterr().out
    out.write_text(json.dumps({"results": rows[:2]}))  # as if interrupted in the last one
    again, more = run("30")
    assert again[:2] == rows[:2]
    assert more[: len(kept)] == kept
    assert {each["solver"] for each in more[len(kept) :]} <= {"streaming"}
    longer, _ = run("90")
    assert longer[0]["error"] >= rows[0]["error"]
    assert longer[0]["pools"] > rows[0]["pools"]
    share = 90 / 2 / 2  # of an implementation, of a dtype
    assert share <= longer[0]["seconds"] <= share + 5  # those that it had before count


@pytest.mark.parametrize("name", harness.HARD)
def test_hard_settings_are_hard_and_their_margins_differ(name):
    setting = harness.HARD[name]
    pool = harness.pool(setting, 256)
    margins = solve_margins(pool, **setting).margins
    assert margins.std() >= setting["gamma0"] / 10
    assert solver.passes(pool, **setting)[1] > 0


def test_mild_passes_are_fixed():
    assert solver.passes(harness.pool(harness.MILD[harness.LLAMA], 256), 4.0, 10.0) == (4, 0)


def test_counts_passes_and_moves_and_leaves_the_solver_as_it_was(monkeypatch):
    class Level(NamedTuple):
        at: float

    moves = iter([1.0, 1.0, 2.0])
    step = lambda level: (Level(next(moves)),)  # noqa: E731
    monkeypatch.setattr(solver._solver, "level_step", step)

    def solve(gaps, **_):
        level = Level(0.0)
        for _ in range(3):
            (level,) = solver._solver.level_step(level)

    monkeypatch.setattr(solver, "solve_margins", solve)
    assert solver.passes(np.zeros(3), 4.0, 0.1) == (3, 2)
    assert solver._solver.level_step is step


def test_chunks_count_their_readings():
    chunks = solver.Chunks(np.arange(5.0), size=2)
    assert [list(chunk) for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert chunks.readings == 1


def test_queue_and_deque_hold_the_same_after_a_step():
    batch = gaps(5).float()
    calls = distributed.queue_calls(batch)
    context = calls["GapQueue"]()
    assert torch.equal(context.gaps, calls["deque"]())
    assert context.mask.all()
    assert torch.equal(context.gaps[-5:], batch)
    assert calls["deque, sample"]().shape == (published.POOL_SIZE,)


def test_dpo_is_the_plain_loss():
    logps = np.random.default_rng(0).normal(size=(4, 9)) * 15 - 100
    chosen, rejected, ref_chosen, ref_rejected = logps
    difference = (chosen - ref_chosen) - (rejected - ref_rejected)
    expected = float(oracles.dpo(loss_overhead.BETA * difference).mean())
    assert float(loss_overhead.dpo(*torch.tensor(logps))) == pytest.approx(expected, rel=1e-12)


def test_parts_of_the_loss_add_up(monkeypatch):
    row = {"microseconds": {"0.5": 1.0}}
    monkeypatch.setattr(
        harness, "compare", lambda args, calls, seconds: (dict.fromkeys(calls, row), {})
    )
    (result,) = loss_overhead.measure_parts(None, 1.0)
    assert sum(result["parts"].values()) == pytest.approx(result["whole"])


def test_all_ways_score_the_responses_alike():
    logits = torch.randn(3, 6, 11, requires_grad=True)
    labels, mask = torch.randint(11, (3, 6)), torch.arange(6).expand(3, 6) >= 3
    ways = sequence_logps.scores(compiled=False, skipped={})
    x = logits.detach().double().numpy()
    x -= np.log(np.exp(x).sum(2, keepdims=True))
    expected = [sum(x[i, t - 1, labels[i, t]] for t in (3, 4, 5)) for i in range(3)]
    for score in ways.values():
        logps = score(logits, labels, mask)
        assert logps.tolist() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    case = (logits, labels, mask)
    assert max(sequence_logps.errors(logps, gradient, case).values()) < 1e-5
    found = sequence_logps.errors(logps + 0.5, gradient.double() * 0.75, case)
    assert found == {"nats": pytest.approx(0.5, 1e-4), "gradient": pytest.approx(0.25, 1e-4)}


def test_peak_memory_is_of_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.ones(10_000).neg().sum()  # two of 40 kB at once
        return torch.ones(20_000)

    peak = sequence_logps.peak_memory(call, "cpu")
    assert 80_000 <= peak < 90_000


def test_gpu_run_says_so_where_there_is_no_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out-dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_gpu_run_fails_if_a_step_fails_and_takes_at_most_eight_minutes(monkeypatch, tmp_path):
    given, outcomes = [], {"accuracy": "exit status 1"}

    def run(name, args, seconds):
        given.append(seconds)
        return outcomes.get(name, "passed")

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out-dir", str(tmp_path)])
    assert gpu.main() == 1
    outcomes.clear()
    assert gpu.main() == 0
    assert len(given) == 2 * len(gpu.STEPS)
    assert all(0 < seconds <= 480 for seconds in given)
    assert set(gpu.STEPS) - {"gpu_tests"} <= {path.stem for path in HERE.glob("*.py")}

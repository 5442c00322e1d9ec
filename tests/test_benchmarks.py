"""The benchmarks' arithmetic and their peers, without any timing. CI runs each with --quick."""

import itertools
import json
import math
import re
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import oracles
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")

from benchmarks import _harness as harness  # noqa: E402
from benchmarks import accuracy, distributed, gpu, logps, loss, published, worst_case  # noqa: E402
from gamma_loss import _solver, solve_margins  # noqa: E402


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a program with arguments; returns its exit code and what it printed."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["/x/benchmarks/solver.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(main())
        return stopped.value.code, capsys.readouterr()

    return run


def test_calls_come_in_any_order_hot_after_the_same_and_cold_after_a_training_step(monkeypatch):
    now, log = itertools.count(step=2.0).__next__, []  # each reading of the clock takes 2 s
    clock = SimpleNamespace(
        process_time=lambda: log.append("clock") or now(), perf_counter=lambda: 0.0
    )
    monkeypatch.setattr(harness, "time", clock)
    monkeypatch.setattr(harness, "training_step", lambda device: lambda: log.append("step"))
    calls = {name: lambda name=name: log.append(name) or (now() and now()) for name in "ab"}
    times = harness.in_turns(calls, seconds=0.0, device="cpu", least=40)
    # Two readings by each call, and not what the clock takes.
    assert times == {name: dict.fromkeys(harness.STATES, [4.0] * 40) for name in "ab"}
    before, first, name, last = np.reshape(log[2000:], (-1, 4)).T
    assert {*first, *last} == {"clock"}
    turns = np.char.add(before, name).reshape(-1, 4)
    assert np.all(np.sort(turns) == ["aa", "bb", "stepa", "stepb"])
    assert len(np.unique(turns, axis=0)) > 10  # of 24 orders


def test_times_are_quantiles_in_microseconds_and_speed_compares_medians():
    assert harness.quantiles(np.arange(11) * 1e-6) == pytest.approx([1.0, 5.0, 9.0])
    rows = {"a": {"hot": [1.0, 2.0, 900.0]}, "b": {"hot": [0.0, 6.0, 7.0]}}
    assert harness.speed(rows, "a", "b") == 3.0  # above 1 for the faster


def test_what_cannot_run_is_left_out_with_its_reason_and_the_rest_agrees(monkeypatch):
    def solve(*arguments, impl="auto", **setting):
        if impl == "compile":
            raise RuntimeError("no compiler\nand more")
        if impl == "triton":
            warnings.warn("Triton can't be used on cpu", RuntimeWarning, stacklevel=1)
        return solve_margins(*arguments, impl=impl, **setting)

    monkeypatch.setattr(harness, "solve_margins", solve)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = SimpleNamespace(device="cpu", quick=False, left_out={})
    ways = harness.ways(args, interpret=True)
    assert {"eager", "auto", "numpy"} == set(ways) - {"jax"}
    assert args.left_out["compile"] == "RuntimeError: no compiler"
    assert "Triton can't be used" in args.left_out["triton"]
    harness.ways(args)
    assert "interpreter is not timed" in args.left_out["triton"]
    gaps = harness.pool(harness.LLAMA, 32)
    exact = oracles.margins(gaps, 4.0, 10.0)[0]
    for array, way in ways.values():
        margins = np.asarray(way(array(gaps), gamma0=4.0, tau=10.0)[0].tolist())
        np.testing.assert_allclose(margins, exact.astype(float), rtol=1e-13)
    calls, skipped = {"one": lambda: 1, "fails": lambda: 1 / 0}, {}
    assert harness.warm_up(calls, "cpu", skipped) == {"one": 1}
    assert list(calls) == ["one"]
    assert skipped == {"fails": "ZeroDivisionError: division by zero"}


def test_wrong_arguments_end_in_one_line_before_anything_runs(start, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = harness.Section(pytest.fail, pytest.fail, (), list)
    for arguments, message in [
        (["--out", "results.txt"], "--out must name a .json file, got results.txt"),
        (["--out", f"{__file__}/new.json"], "can't write results"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0"),
        (["--device", "cuda"], "torch finds no CUDA device"),
    ]:
        code, printed = start(lambda: harness.run("Doc", 1.0, {"all": section}), *arguments)
        assert code == 2
        assert re.fullmatch(f"python -m benchmarks.solver: .*{message}.*\n", printed.err)


def test_a_run_measures_every_case_within_its_time_and_writes_five_digits(start, tmp_path):
    out, found = tmp_path / "new" / "results.json", {}

    def measure(args, seconds, case):
        args.left_out[case] = "why"
        args.later.append(lambda: found[case].update(later=1.23456789))
        found[case] = {"case": case, "seconds": seconds, "none": math.nan}
        yield found[case]

    sections = {"part": harness.Section(lambda args: "ab", measure, ["case"], lambda rows: [])}
    start(lambda: harness.run("Doc", 40.0, sections), "--out", out)
    record = json.loads(out.read_text("utf-8"))
    seconds = [row.pop("seconds") for row in record["part"]]
    assert seconds == pytest.approx([20, 40], rel=0.1)
    assert record["part"] == [{"case": case, "later": 1.2346, "none": None} for case in "ab"]
    assert record["left_out"] == {"a": "why", "b": "why"}
    assert record["command"] == f"python -m benchmarks.solver --out {out}"
    assert record["versions"]["torch"] == torch.__version__


def test_accuracy_stays_in_the_domain_at_its_kappa_and_finds_an_error(monkeypatch):
    for kappa in (1e-3, 1.0, 1e7):
        chosen = accuracy.settings(kappa, 4)
        assert len(set(chosen)) == len(chosen) == (1 if kappa == 1e7 else 4)
        for gamma0, tau in chosen:
            assert 1e-3 <= gamma0 <= 100
            assert 1e-3 <= tau <= 1e3
            assert gamma0**2 / tau == pytest.approx(kappa)
    monkeypatch.setattr(accuracy, "PUBLISHED", {})
    ways = {
        name: harness.Way(np.asarray, lambda *a, f=f, **k: (f * solve_margins(*a, **k).margins,))
        for name, f in {"numpy": 1.0, "wrong": 1.5, "lost": np.nan}.items()
    }
    (row,) = accuracy.measure(SimpleNamespace(left_out={}), 1.0, 1.0, "float64", ways, 1)
    assert row["errors"]["numpy"][1] < 1e-13
    assert 0.2 < row["errors"]["wrong"][0] <= row["errors"]["wrong"][1] < 0.5
    assert row["errors"]["lost"] == [np.inf, np.inf]


@pytest.fixture
def by_numpy(monkeypatch):
    """NumPy's solver, with no other one made, and a clock that tells a second later each time."""
    monkeypatch.setattr(harness, "ways", lambda *_, **__: {"eager": harness.Way(None, None)})
    clock = SimpleNamespace(process_time=itertools.count().__next__, time_ns=lambda: 1)
    monkeypatch.setattr(worst_case, "time", clock)
    return worst_case.solvers(None)["numpy"]


def planted(solve):
    """A solver that is wrong where a gap is next to γ0, more so the larger κ is."""

    def wrong(gaps, gamma0, tau):
        margins, bound = solve(gaps, gamma0, tau)
        near = np.abs(gaps - gamma0).min() <= 1e-3
        return margins * (1 + near * 1e-9 * gamma0**2 / tau), bound

    return wrong


def test_worst_case_climbs_to_a_planted_error_and_to_failures(by_numpy):
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
    pool = worst_case.Pool([1.0], [3], 4.0, 10.0)
    for fails in (lambda *_: 1 / 0, lambda gaps, *_: (gaps * np.nan, 0.0)):
        found = worst_case.figures(fails, by_numpy, "float32", pool)
        assert set(found.values()) == {np.inf}


def test_worst_case_stays_in_the_domain_and_at_the_edges_between_solvers():
    rng, edges = np.random.default_rng(0), set()
    pool = worst_case.drawn(rng, "float32", 500)
    for _ in range(1000):
        pool = worst_case.changed(rng, "float32", 500, pool)
        assert min(pool.counts) >= 1 <= sum(pool.counts) <= 500
        assert np.abs(pool.values).max() <= 1e4
        assert 1e-3 <= pool.gamma0 <= 100
        assert 1e-3 <= pool.tau <= 1e3
        assert pool.values == np.asarray(pool.values, "float32").tolist()
        tau = worst_case.switched(rng, pool).tau
        sides = (_solver.mild_passes(pool.gamma0, tau * (1 + t), True) for t in (-1e-6, 1e-6))
        edges.add(tuple(sides))
    assert {(0, 6), (6, 4)} <= edges


def test_worst_case_keeps_pools_and_goes_on_where_it_was(start, monkeypatch, tmp_path, by_numpy):
    out = tmp_path / "worst.json"
    ways = {"numpy": planted(by_numpy), "streaming": by_numpy}
    monkeypatch.setattr(worst_case, "solvers", lambda args: ways)

    def run(seconds):
        start(worst_case.main, "--out", out, "--seconds", seconds)
        lines = out.with_suffix(".jsonl").read_text().splitlines()
        return json.loads(out.read_text("utf-8"))["results"], list(map(json.loads, lines))

    rows, kept = run(30)
    assert [row["solver"] for row in rows] == ["numpy", "numpy", "streaming"]  # 64, 32, 64 bits
    assert rows[0]["error"] == pytest.approx(kept[0]["found"], rel=1e-4)
    out.write_text(json.dumps({"results": rows[:2]}))  # as if interrupted in the last one
    longer, more = run(60)
    assert more[: len(kept)] == kept
    assert longer[0]["error"] >= rows[0]["error"] * (1 - 1e-4)
    assert longer[0]["pools"] > rows[0]["pools"]
    assert 15 <= longer[0]["seconds"] <= 20  # a quarter of all, with those that it had before


def test_the_deques_do_what_the_queue_does():
    batch = torch.randn(5)
    calls = distributed.queue_calls(batch)
    gaps, mask = calls["GapQueue"]()
    assert mask.all()
    assert torch.equal(gaps, calls["deque"]())
    assert torch.equal(gaps[-5:], batch)
    assert calls["deque, sample"]().shape == (published.POOL_SIZE,)


def test_the_peers_compute_what_they_are_named_for():
    four = np.random.default_rng(0).normal(size=(4, 9)) * 15 - 100
    gaps = loss.BETA * ((four[0] - four[2]) - (four[1] - four[3]))
    expected = float(oracles.dpo(gaps).mean())
    assert float(loss.dpo(*torch.tensor(four))) == pytest.approx(expected, rel=1e-12)
    logits = torch.randn(3, 6, 11)
    labels, mask = torch.randint(11, (3, 6)), torch.arange(6).expand(3, 6) >= 3
    x = logits.double().numpy()
    x -= np.log(np.exp(x).sum(2, keepdims=True))
    expected = [sum(x[i, t - 1, labels[i, t]] for t in (3, 4, 5)) for i in range(3)]
    for score in logps.scores({}).values():
        assert score(logits, labels, mask).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_step_in_chunks_is_a_step_with_all_logits():
    leaves = [torch.randn(6, 5, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)]
    labels = torch.arange(30).view(6, 5) % 16
    whole, chunked = (logps.step(*leaves, labels, chunk) for chunk in (None, 4))
    torch.testing.assert_close(chunked, whole)
    both = (torch.autograd.grad(each, leaves) for each in (chunked, whole))
    torch.testing.assert_close(*both)


def test_python_calls_are_those_of_the_package_and_memory_is_what_is_held_at_once():
    gaps = np.array([-1.0, 2.0])
    count = loss.python_calls(lambda: [solve_margins(gaps, gamma0=1.0, tau=1.0), json.dumps({})])
    assert 5 < count < 90
    assert loss.python_calls(lambda: json.dumps({})) == 0

    def call():
        for _ in range(3):
            torch.ones(10_000).neg().sum()  # two of 40 kB at once
        return torch.ones(20_000)

    peak = logps.peak_memory(call, "cpu")
    assert 80_000 <= peak < 90_000


def test_a_gpu_run_fails_if_a_step_fails(start, monkeypatch, tmp_path):
    outcomes = dict.fromkeys(gpu.STEPS, "passed")
    monkeypatch.setattr(gpu, "run", lambda name, *_: outcomes[name])
    rehearsal = gpu.main, "--device", "cpu", "--out-dir", tmp_path
    assert start(*rehearsal)[0] == 0
    outcomes["accuracy"] = "exit status 1"
    assert start(*rehearsal)[0] == 1

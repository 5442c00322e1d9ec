"""The benchmarks' arithmetic and their peer, without any timing."""

import json
import random
import sys
import warnings
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

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
)


def gaps(size, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=size) * 2)


# --- the harness ---


def test_quantiles_are_in_microseconds():
    times = [i * 1e-6 for i in range(11)]  # 0, 1, ..., 10 microseconds
    assert harness.quantiles(times) == {"0.1": 1.0, "0.5": 5.0, "0.9": 9.0}


def test_ratio_is_of_medians_and_above_one_for_the_faster():
    assert harness.times_as_fast([1.0, 2.0, 900.0], peer=[6.0, 0.0, 7.0]) == 3.0


def test_turns_alternate_in_blocks_and_are_as_many_for_each():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = harness.in_turns(calls, seconds=0.0, device="cpu", least=3)
    assert {name: len(t["wall"]) for name, t in times.items()} == {"a": 3, "b": 3}
    assert order[:2] == ["a", "b"]  # finds out how long a block should be
    blocks = "".join(order[2:]).replace("ab", "a b").replace("ba", "b a").split()
    assert [block[0] for block in blocks] == ["a", "b"] * 3
    assert all(1 <= len(block) <= harness.BLOCK for block in blocks)


def test_budget_hands_on_what_an_item_leaves(monkeypatch):
    now = 100.0
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    budget = harness.Budget(12.0, items=3)
    assert budget.share() == 4.0
    now += 2.0
    assert budget.share() == 5.0
    now += 20.0
    assert budget.share() == budget.left() == 0.0


def test_a_call_that_fails_is_left_out_with_its_reason(capsys):
    calls, skipped = {"one": lambda: 1, "fails": lambda: 1 / 0}, {}
    assert harness.warm_up(calls, "cpu", skipped) == {"one": 1}
    assert list(calls) == ["one"]
    assert skipped == {"fails": "ZeroDivisionError: division by zero"}
    assert "division by zero" in capsys.readouterr().out


def test_an_implementation_that_cannot_run_is_left_out(monkeypatch):
    def solve(gaps, *, impl, **_):
        if impl == "compile":
            raise RuntimeError("no compiler\nand more")
        if impl == "triton":
            warnings.warn("no triton: eager instead", stacklevel=1)

    monkeypatch.setattr(harness, "solve_margins", solve)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    usable, skipped = harness.implementations("cpu", interpret=True)
    assert usable == ["eager", "auto"]
    assert skipped["compile"] == "RuntimeError: no compiler"
    assert skipped["triton"] == "no triton: eager instead"
    _, skipped = harness.implementations("cpu")
    assert "interpreter is not timed" in skipped["triton"]


def test_counts_operators_but_not_what_they_dispatch():
    x = torch.ones(4)
    assert harness.launches(lambda: (x + x).sum(), "cpu") == {"operators": 2}
    assert harness.launches(lambda: torch.nn.functional.linear(x, x), "cpu") == {"operators": 1}


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
    counted = harness.launches(lambda: None, "cuda", calls=2)
    assert counted == {"kernels": 1.0, "copies": 0.5, "device_microseconds": 45.0}
    events.clear()
    assert harness.launches(lambda: None, "cuda") == {}


def test_fresh_compile_takes_a_code_object_of_its_own_each_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    offset = 10

    def add(x, y=2):
        return x + y + offset

    copies = [harness.fresh_compile(add) for _ in range(2)]
    assert [copy(1) for copy in copies] == [13, 13]
    assert len({id(function.__code__) for function in (add, *copies)}) == 3


def test_results_are_json_even_if_not_finite(tmp_path):
    out = tmp_path / "new" / "result.json"
    harness.write(out, {"γ": [1.0, float("nan")], "nested": {"x": float("inf")}, "n": 3})
    assert json.loads(out.read_text("utf-8")) == {"γ": [1.0, None], "nested": {"x": None}, "n": 3}


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


def test_switch_is_the_pool_from_which_on_reduce_stays_ahead():
    def result(pool, ratio):
        ways = {"reduce_times_as_fast_wall": ratio, "reduce_times_as_fast_cpu": 0.5}
        return {"setting": "mild", "ranks": 2, "pool": pool, "ways": ways}

    found = [result(2, 1.5), result(8, 0.9), result(32, 1.0), result(128, 2.0)]
    switch = {row["ranks"]: row for row in distributed.switches(found)}
    assert switch[2] == {"setting": "mild", "ranks": 2, "wall": 32, "cpu": None}


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


@pytest.mark.parametrize(("device", "millions"), [("cuda", 100), ("cpu", 10)])
def test_models_have_about_the_size_that_is_claimed(device, millions):
    with torch.device("meta"):
        model = loss_overhead.Transformer(loss_overhead.SHAPES[device])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.1)


def test_model_is_causal_and_scores_the_tokens_that_it_sees():
    torch.manual_seed(0)
    shape = loss_overhead.Shape(width=64, layers=1, vocabulary=5, pairs=1, tokens=3)
    model = loss_overhead.Transformer(shape)
    endings = torch.tensor([[1, a, b] for a in range(5) for b in range(5)])
    with torch.no_grad():
        assert float(model(endings).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_gpu_run_says_so_where_there_is_no_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out-dir", str(tmp_path / "none")])
    assert gpu.main() == 1
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
    assert sum(gpu.STEPS.values()) <= gpu.SECONDS <= 480

"""The noise study: its noise, its fairness, its memory, its statistics and its report."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("matplotlib", "scipy", "sklearn", "tqdm", "yaml"):
    pytest.importorskip(needed)

import yaml  # noqa: E402
from scipy import stats  # noqa: E402

from benchmarks.baselines import METHODS  # noqa: E402
from benchmarks.noise_study import __main__ as command  # noqa: E402
from benchmarks.noise_study import outcomes, plan, report, tables, tasks, train  # noqa: E402
from gamma_loss import PUBLISHED_SETTINGS  # noqa: E402

TINY = plan.Study(
    size="quick", seeds=2, configurations=2, tasks=("digits",), noises=(("uniform", 0.4),),
    calls=(), ablation_noises=(), kappas=(10.0,), redrawn=False, cost_seconds=0.1,
    methods=("dpo", "gamma-dpo", "simpo", "gamma-simpo"),
)  # fmt: skip
COST = {
    "machine": "a machine",
    "parameters": 1,
    "microseconds": {m: dict.fromkeys(("0.1", "0.5", "0.9"), 10.0) for m in METHODS},
}
DIFFERENCE = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 9


# --- the noise ---


@pytest.mark.parametrize("kind", ["uniform", "ambiguous"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_flips_have_the_right_rate(kind, rate):
    flipped = tasks.flips(DIFFERENCE, kind, rate, seed=1).double().mean().item()
    spread = math.sqrt(rate * (1 - rate) / len(DIFFERENCE))  # at most: it is largest if uniform
    assert abs(flipped - rate) <= 5 * spread


def test_ambiguous_flips_follow_the_annotators_model():
    flipped = tasks.flips(DIFFERENCE, "ambiguous", 0.2, seed=1).double()
    shares = [flipped[(low <= DIFFERENCE) & (low + 1 > DIFFERENCE)].mean() for low in range(9)]
    assert all(a > b - 0.03 for a, b in itertools.pairwise(shares))
    assert shares[0] > 0.4
    assert shares[-1] < 0.08
    # logit of the probability is -difference / s, so twice as far is twice the logit.
    logit = [math.log(p / (1 - p)) for p in (shares[1], shares[3])]
    assert logit[1] / logit[0] == pytest.approx(3.5 / 1.5, rel=0.35)


def test_uniform_flips_do_not():
    flipped = tasks.flips(DIFFERENCE, "uniform", 0.2, seed=1)
    easy, hard = flipped[DIFFERENCE > 4.5], flipped[DIFFERENCE <= 4.5]
    spread = math.sqrt(0.2 * 0.8 * (1 / len(easy) + 1 / len(hard)))
    assert abs(easy.double().mean() - hard.double().mean()) < 5 * spread


@pytest.mark.parametrize("kind", ["uniform", "ambiguous"])
def test_flips_at_a_lower_rate_are_among_those_at_a_higher(kind):
    few, many = (tasks.flips(DIFFERENCE, kind, rate, seed=1) for rate in (0.1, 0.3))
    assert not (few & ~many).any()
    assert not torch.equal(few, tasks.flips(DIFFERENCE, kind, 0.1, seed=2))


def test_flips_of_a_call_are_those_of_whole_micro_batches():
    flipped = tasks.flips(DIFFERENCE, "call", 0.2, seed=1)
    assert torch.equal(flipped[::2], flipped[1::2])
    spread = math.sqrt(0.2 * 0.8 / (len(flipped) / 2))
    assert abs(flipped.double().mean() - 0.2) < 5 * spread
    # ... and of nothing larger: neighbours agree as often as independent draws do.
    agree = (flipped[::2][1:] == flipped[::2][:-1]).double().mean()
    assert abs(agree - (0.2**2 + 0.8**2)) < 5 * spread
    assert len(tasks.flips(DIFFERENCE[:7], "call", 0.5, seed=1)) == 7


# --- the tasks ---


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_tables(name):
    task = tasks.load(name, "quick", 0, "cpu")
    again = tasks.table_task(name, tasks.SIZES["quick"][name], 0, "cpu")
    for split, copy in ((task.train, again.train), (task.test, again.test)):
        assert torch.equal(split.inputs, copy.inputs)
        assert (split.difference > 0).all()
        assert len(split) == tasks.SIZES["quick"][name]["pairs"]
    items = {split: {tuple(row) for row in getattr(task, split).inputs.flatten(0, 1).tolist()}
             for split in ("train", "validation", "test")}  # fmt: skip
    assert not items["train"] & items["test"]
    assert not items["train"] & items["validation"]
    assert not items["validation"] & items["test"]


def test_the_byte_model_scores_as_in_the_example():
    task = tasks.load("bytes", "quick", 0, "cpu")
    job = tasks.example()
    tokens = task.test.inputs[:8]
    in_response = torch.arange(tokens.shape[-1]) >= tokens.shape[-1] - job.RESPONSE_BYTES
    pairs = job.Pairs(tokens, in_response.expand(tokens.shape), torch.zeros(8, dtype=torch.bool))
    expected = torch.stack(job.all_response_logps(task.reference, pairs), 1)
    # Two orders of summing 24 float32 terms of about 6.
    torch.testing.assert_close(task.test.reference[:8], expected, atol=1e-3, rtol=1e-5)
    assert (task.test.difference >= 1).all()


# --- one run ---


def a_spec(method="dpo", **more):
    spec = plan.spec(TINY, "trace", "digits", method, "uniform", 0.4, 0)
    return {**spec, "settings": plan.configurations(method, "digits", 2)[0], **more}


def test_a_run_repeats_itself():
    first, second = (train.run(a_spec("beta-dpo"))["result"] for _ in range(2))
    assert first == second
    assert len(first["test"]) == tasks.CHECKPOINTS


def test_flips_of_a_call_are_drawn_at_every_call(monkeypatch):
    """As labels: with all log-ratios positive where labels are right, signs tell the flips."""
    task = tasks.load("digits", "quick", 0, "cpu")
    seen = []

    def better_is_better(model, inputs):
        scores = torch.tensor([1.0, 0.0]).expand(len(inputs), 2)
        return scores + 0 * task.logps(model, inputs)

    def watch(spec):
        return lambda logps: seen.append(logps.d.detach() < 0) or logps.d.mean()

    changed = task._replace(logps=better_is_better)
    monkeypatch.setattr(train, "load", lambda *arguments: changed)
    monkeypatch.setattr(train, "make_loss", watch)
    result = train.run({**a_spec("simpo"), "stage": "search", "kind": "call"})["result"]
    assert result["test"] == [1.0] * tasks.CHECKPOINTS  # test labels are clean
    assert all(torch.equal(flips[::2], flips[1::2]) for flips in seen)
    assert len({tuple(flips.tolist()) for flips in seen}) > 1
    assert 0.2 < torch.cat(seen).double().mean() < 0.6


@pytest.mark.parametrize("name", ["gamma-dpo", "matched-dpo"])
def test_pairs_are_kept_for_the_figures_only(name):
    result = train.run(a_spec(name))["result"]
    steps = [result["step"][i] for i in (0, tasks.CHECKPOINTS // 2, -1)]
    assert train.ends_and_middle(result["step"]) == steps
    assert len(result["pairs"]) == (3 if name in train.FIGURED else 0)
    other = train.run(a_spec(name, kind="ambiguous"))["result"]
    assert len(other["pairs"]) == (name in train.FIGURED)  # the last alone
    assert train.ends_and_middle([1, 2]) == [1, 2]


def test_a_run_that_diverges_says_so(monkeypatch):
    monkeypatch.setattr(train, "make_loss", lambda spec: lambda logps: logps.d.mean() * math.nan)
    result = train.run(a_spec())["result"]
    assert result["diverged"]
    assert result["test"] == []
    assert plan.score(result, "noisy", "last", "test") == 0.5


def test_pair_weights_are_those_of_dpo():
    # With a learning rate of 0 nothing moves: all gaps are 0 and all weights 1/2.
    spec = a_spec()
    spec["settings"] = {**spec["settings"], "lr": 0.0}
    result = train.run(spec)["result"]
    assert result["weights"] == [[0.5, 0.5]] * tasks.CHECKPOINTS
    assert result["test"] == [0.5] * tasks.CHECKPOINTS
    assert result["auc_loss"] == [0.5] * tasks.CHECKPOINTS


def test_area_under_the_curve():
    generator = np.random.default_rng(0)
    score = generator.integers(0, 5, 40).astype(float)  # with ties
    positive = generator.random(40) < 0.3
    differences = score[positive][:, None] - score[~positive]
    expected = ((differences > 0) + 0.5 * (differences == 0)).mean()
    found = train.auc(torch.tensor(score), torch.tensor(positive))
    assert found == pytest.approx(expected, abs=1e-5)  # is rounded to as much
    assert train.auc(torch.tensor(score), torch.zeros(40, dtype=torch.bool)) is None


# --- fairness ---


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_method_has_the_same_budget(task):
    searches = {m: plan.search(plan.Study(), task, m, "uniform", 0.2, 3) for m in METHODS}
    assert {len(specs) for specs in searches.values()} == {plan.CONFIGURATIONS}
    rates = {tuple(s["settings"]["lr"] for s in specs) for specs in searches.values()}
    assert len(rates) == 1
    low, high = plan.LEARNING_RATE[task]
    assert all(low <= lr <= high for lr in next(iter(rates)))
    for method, specs in searches.items():
        length = plan.RESPONSE_LENGTH[task] if METHODS[method].averaged else 1
        betas = [s["settings"]["beta"] / length for s in specs]
        expected = [s["settings"]["beta"] for s in searches["dpo"]]
        assert betas == pytest.approx(expected, rel=1e-3)  # four digits are kept
        assert {s["seed"] for s in specs} == {3}
        assert all(set(METHODS[method].settings) < s["settings"].keys() for s in specs)


def test_matched_losses_share_the_configurations():
    for base in ("dpo", "simpo"):
        names = (f"gamma-{base}", f"matched-{base}", f"matched-{base}-once")
        first, *others = (plan.configurations(name, "digits", 12) for name in names)
        assert others == [first, first]


def test_the_language_model_has_one_setting():
    (ours,) = plan.configurations("gamma-simpo", "reviews", plan.LANGUAGE.configurations)
    (matched,) = plan.configurations("matched-simpo", "reviews", plan.LANGUAGE.configurations)
    (base,) = plan.configurations("simpo", "reviews", plan.LANGUAGE.configurations)
    assert ours == matched == {"lr": 1e-4, "beta": 2.4, "gamma0": 1.0, "tau": 0.1}
    assert base == {"lr": 1e-4, "beta": 2.4, "margin": 1.0}
    (summed,) = plan.configurations("gamma-dpo", "reviews", plan.LANGUAGE.configurations)
    assert summed == ours | {"beta": 0.1}


def test_a_schedule_ends_with_the_training():
    for size in ("quick", "full", "large"):
        study = plan.Study(size=size)
        spec = plan.search(study, "bytes", "plc-dpo", "uniform", 0.2, 0)[0]
        assert train.make_loss(spec).steps == tasks.SIZES[size]["bytes"]["steps"]


def test_settings_drawn_anew():
    study = plan.Study()
    tried = [
        [s["settings"] for s in plan.search(study, "digits", m, "uniform", 0.2, seed, "redrawn")]
        for seed, m in itertools.product((0, 1), ("gamma-dpo", "matched-dpo", "dpo"))
    ]
    assert tried[0] == tried[1]  # γ-PO's and the matched loss's
    assert tried[0] != tried[3]  # another seed's
    assert [(s["lr"], s["beta"]) for s in tried[0]] == [(s["lr"], s["beta"]) for s in tried[2]]
    shared = [s["settings"] for s in plan.search(study, "digits", "dpo", "uniform", 0.2, 0)]
    assert not any(s in shared for s in tried[2])
    few = TINY._replace(redrawn=True)
    planned = [s for block in plan.blocks(few, {}) for s in block]
    anew = [s for s in planned if s.get("stage") == "redrawn"]
    assert len(anew) == len(plan.CORE) * 2 * 2  # for each of two seeds two configurations
    assert plan.expected(few)["digits"] - plan.expected(TINY)["digits"] == len(anew)


def test_the_published_noise_is_run_beside():
    study = TINY._replace(calls=plan.CALLS)
    planned = [s for block in plan.blocks(study, {}) for s in block]
    calls = [s for s in planned if s.get("kind") == "call"]
    assert {(s["stage"], s["rate"]) for s in calls} == {("search", 0.2), ("search", 0.4)}
    assert plan.expected(study)["digits"] - plan.expected(TINY)["digits"] == len(calls)
    records = {}
    for s in calls:  # which gains one point for γ-DPO at the lower rate, and loses it at the other
        ours = (s["method"] == "gamma-dpo") * (0.01 if s["rate"] == 0.2 else -0.01)
        test = 0.5 + s["seed"] / 100 + ours
        records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[test])
    results = outcomes.Results(study, records)
    rows = tables.by_noise(results, plan.CALLS).splitlines()
    assert "| γ-DPO − DPO; labels: 20% of calls flipped | +1.00 |" in rows
    assert "| γ-DPO − DPO; labels: 40% of calls flipped | −1.00 |" in rows


def test_kappa_alone_is_swept():
    study = TINY._replace(seeds=1, kappas=(0.01, 1.0, 1e4))
    records = {}
    for base in ("dpo", "simpo"):
        first, second = plan.search(study, "digits", base, "uniform", 0.4, 0)
        for s, noisy in ((first, 0.6), (second, 0.7)):
            records[plan.key(s)] = a_record(s, noisy=[noisy], clean=[0.0], test=[0.0])
    specs = list(plan.over_kappa(study, records, "digits"))
    assert len(specs) == 3 * 6 + 1
    assert len({plan.key(s) for s in specs}) == len(specs)
    chosen = plan.search(study, "digits", "dpo", "uniform", 0.4, 0)[1]["settings"]
    for s in specs:
        settings = s["settings"]
        assert (settings["lr"], settings["beta"]) == (chosen["lr"], chosen["beta"])
        if s["method"] == "simpo":
            assert settings["margin"] == plan.KAPPA_GAMMA0
        else:
            assert settings["gamma0"] == plan.KAPPA_GAMMA0
    kappas = {round(16 / s["settings"]["tau"], 6) for s in specs if s["method"] == "matched-dpo"}
    assert kappas == {0.01, 1.0, 1e4}
    assert list(plan.over_kappa(study, {}, "digits")) == []


def test_no_run_of_the_results_file_is_lost():
    """What was run stays part of the plan, so that it is not run again."""
    path = Path(command.ROOT) / "benchmarks" / "results" / "noise_study.jsonl"
    records = command.read(path)
    assert len(records) > 20_000
    planned = {plan.key(s) for block in plan.blocks(plan.Study(), records) for s in block}
    assert records.keys() <= planned


def a_record(spec, **result):
    return {**spec, "result": {"diverged": False, **result}, "seconds": 1.0}


def test_choice_of_settings_and_of_checkpoints():
    cell = ("digits", "dpo", "uniform", 0.4)
    specs = plan.search(TINY, *cell, 0)
    results = [
        {"noisy": [0.5, 0.9, 0.4], "clean": [0.6, 0.6, 0.9], "test": [0.1, 0.2, 0.3]},
        {"noisy": [0.5, 0.6, 0.7], "clean": [0.7, 0.8, 0.6], "test": [0.4, 0.5, 0.6]},
    ]
    records = {plan.key(s): a_record(s, **r) for s, r in zip(specs, results, strict=True)}
    ways = [(labels, which) for labels in ("noisy", "clean") for which in ("last", "best")]
    chosen = {how: plan.choose(TINY, records, *cell, 0, *how)["settings"] for how in ways}
    first, second = (s["settings"] for s in specs)
    assert chosen == {
        ("noisy", "last"): second, ("noisy", "best"): first,
        ("clean", "last"): first, ("clean", "best"): first,
    }  # fmt: skip
    assert plan.score(results[0] | {"diverged": False}, "noisy", "best", "test") == 0.2
    assert plan.score(results[1] | {"diverged": False}, "clean", "best", "test") == 0.5
    (again,) = plan.traces(TINY._replace(seeds=1), records, "digits")
    assert again["settings"] == second
    assert plan.choose(TINY, records, *cell, 1) is None  # another seed has its own search
    del records[plan.key(specs[0])]
    assert plan.choose(TINY, records, *cell, 0) is None
    assert list(plan.traces(TINY, records, "digits")) == []


def test_choice_for_all_seeds():
    cell = ("digits", "dpo", "uniform", 0.4)
    last = {
        0: (0.9, 0.8),
        1: (0.4, 0.6),
    }  # by seed, of two settings: the second is better on average
    records = {
        plan.key(s): a_record(s, noisy=[0.99, score], clean=[0.0, 0.0], test=[0.0, score / 2])
        for seed, scores in last.items()
        for s, score in zip(plan.search(TINY, *cell, seed), scores, strict=True)
    }
    assert [plan.choose(TINY, records, *cell, s)["result"]["noisy"][-1] for s in (0, 1)] == [
        0.9, 0.6,
    ]  # fmt: skip
    runs = plan.choose_for_all(TINY, records, *cell)
    assert [(run["seed"], run["result"]["noisy"][-1]) for run in runs] == [(0, 0.8), (1, 0.6)]
    results = outcomes.Results(TINY, records)
    assert results.accuracy(*cell, shared=True) == {0: 40.0, 1: 30.0}
    assert results.accuracy(*cell) == {0: 45.0, 1: 30.0}
    records.popitem()
    assert plan.choose_for_all(TINY, records, *cell) is None
    assert outcomes.Results(TINY, records).accuracy(*cell, shared=True) == {}


def test_gains_count_cells_won_and_lost():
    """γ-DPO is ahead of DPO by 10 to 12 points in one noise, and behind by 20 to 22 in another."""
    study = TINY._replace(
        seeds=3, configurations=1, noises=(("uniform", 0.0), ("uniform", 0.2), ("uniform", 0.4))
    )
    records = {}
    for seed in range(3):
        for rate, gain in ((0.0, 0), (0.2, 10 + seed), (0.4, -20 - seed)):
            for method, test in (("dpo", 50), ("gamma-dpo", 50 + gain)):
                (s,) = plan.search(study, "digits", method, "uniform", rate, seed)
                records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[test / 100])
    rows = tables.gains(outcomes.Results(study, records)).splitlines()
    # The seeds' means over the two noisy cells are all -5.
    expected = [f"| γ-DPO − DPO | {way} | −5.0 ± 0.0; 1, 1 of 2 |" for way in outcomes.WAYS]
    assert [row for row in rows if row.startswith("| γ-DPO − DPO |")] == expected


def test_weights_that_margins_change_are_compared_at_the_same_gaps():
    """By hand: with γ0 = 1 for all the weights are σ(-g), with these margins σ(±1 - g)."""
    study = TINY._replace(seeds=1, configurations=1)
    (s,) = plan.search(study, "digits", "gamma-dpo", "uniform", 0.4, 0)
    s["settings"] = {**s["settings"], "gamma0": 1.0}
    trace = {**s, "stage": "trace"}
    gaps, flipped, margins = [-2.0, 3.0], [1, 0], [0.0, 2.0]
    record = a_record(s, noisy=[0.5], clean=[0.5], test=[0.5])
    results = outcomes.Results(study, {
        plan.key(trace): a_record(trace, pairs=[[gaps, flipped, margins, gaps]])
    })  # fmt: skip
    results.chosen = lambda *cell, seed: record if cell[1] == "gamma-dpo" else None

    def weight(x):
        return 1 / (1 + math.exp(-x))

    before, after = weight(2) / weight(-3), weight(1) / weight(-2)
    assert f"| γ-DPO | {before:.2f} → {after:.2f} |" in tables.suppression(results)


def test_settings_of_the_grid_are_compared_by_seed():
    study = TINY._replace(configurations=1, ablation_noises=(("uniform", 0.4),), ablation_seeds=2)
    records = {}
    for seed, (s,) in enumerate(
        plan.search(study, "digits", "gamma-dpo", "uniform", 0.4, seed) for seed in (0, 1)
    ):
        records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[0.5])
        for change in plan.GRID:
            # A smaller tau is better by 4 and 2 points; one field by 10 more.
            gain = (0.04, 0.02)[seed] * (change["tau"] == 0.1)
            gain += 0.1 * (change == {"gamma0": 2.0, "tau": 3.0})
            spec = {**s, "stage": "ablation", "change": change}
            records[plan.key(spec)] = a_record(spec, noisy=[0.5], clean=[0.5], test=[0.5 + gain])
    table = tables.grid(outcomes.Results(study, records))
    half = stats.t.ppf(0.975, 1) * math.sqrt(2) / math.sqrt(2)
    (row,) = [line for line in table.splitlines() if line.startswith("| γ-DPO, digits")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == [f"+3.0 ± {half:.1f}", "+0.0 ± 0.0"]
    assert cells[4] == "+2.0 ± 0.0"  # the mean over five gamma0
    assert cells[-1] == "+10.0 ± 0.0 at 2, 3"


def test_the_study_on_a_gpu_is_the_smaller():
    full, large = (sum(plan.expected(s).values()) for s in (plan.Study(), plan.LARGE))
    assert large < full / 10
    assert plan.LARGE.size == "large"


# --- the results file ---


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole tiny study of four methods, in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "cost", lambda spec: COST)
        path = tmp_path_factory.mktemp("study") / "results.jsonl"
        assert command.carry_out(TINY, path, workers=1, hours=1.0)
    return path


def comparable(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def test_what_a_kill_leaves_is_completed_to_the_same_file(done, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "cost", lambda spec: COST)
    path = tmp_path / "results.jsonl"
    real, calls = train.run, []

    def killed(spec):
        if len(calls) == 15:
            raise KeyboardInterrupt
        calls.append(spec)
        return real(spec)

    monkeypatch.setattr(command, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        command.carry_out(TINY, path, workers=1, hours=1.0)
    assert len(comparable(path)) == 15
    with path.open("a") as file:
        file.write('{"stage": "search", "half')
    assert len(command.read(path)) == 15
    calls.clear()
    monkeypatch.setattr(command, "run", lambda spec: calls.append(spec) or real(spec))
    assert command.carry_out(TINY, path, workers=1, hours=1.0)
    assert comparable(path) == comparable(done)
    assert len(calls) == len(comparable(done)) - 15
    calls.clear()
    assert command.carry_out(TINY, path, workers=1, hours=1.0)
    assert calls == []


def test_stops_in_time_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    assert not command.carry_out(TINY, path, workers=1, hours=0.0)
    assert len(comparable(path)) == 1


def test_workers():
    spec = {"stage": "loop", "gamma0": 0.5, "tau": 1.0, "scale": 1.0, "seed": 0}
    with command.crew(2) as do:
        (record,) = do([spec])
    assert record["result"] == train.run(spec)["result"]
    assert record["result"]["error"] < 1e-5  # a setting where the loop converges


def test_estimate_of_the_time_left():
    study = TINY._replace(tasks=("digits", "bytes"))
    total = plan.expected(study)["digits"]
    # For each of two seeds two configurations and a trace; at one κ two families of three
    # methods, and SimPO.
    assert total == 4 * 2 * (2 + 1) + 2 * (2 * 3 + 1)
    estimate = command.Estimate(study, {})
    assert estimate.runs() == 2 * total
    for _ in range(10):
        estimate.add({"stage": "search", "task": "digits", "seconds": 36.0})
    assert estimate.hours(workers=2) == f"{(total - 10) * 0.01 / 2:.2f} h and bytes"


# --- the statistics ---


def test_interval_and_paired_test():
    ours, theirs = [3.0, 4.5, 5.0, 4.0], [2.5, 4.0, 5.5, 3.0]
    centre, half, p = outcomes.paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs)
    assert (centre, p) == pytest.approx((0.375, expected.pvalue))
    low, high = expected.confidence_interval()
    assert half == pytest.approx((high - low) / 2)
    assert outcomes.paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0})[0] == 0.5  # the seed that both have
    assert outcomes.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})[2] == 1.0


def test_equivalence_and_the_smallest_effect_that_would_be_seen():
    gains = [0.4, -0.1, 0.3, 0.2, 0.5]
    found = outcomes.compare(gains)
    high = stats.ttest_1samp(gains, 1.0, alternative="less").pvalue
    low = stats.ttest_1samp(gains, -1.0, alternative="greater").pvalue
    assert found.equivalence_p == pytest.approx(max(high, low))
    assert found.p == pytest.approx(stats.ttest_1samp(gains, 0.0).pvalue)
    # Of studies with this spread and an effect of that size, four in five are significant.
    rng = np.random.default_rng(0)
    studies = rng.normal(found.detectable, np.std(gains, ddof=1), (20_000, 5))
    seen = stats.ttest_1samp(studies, 0.0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=5 * math.sqrt(0.8 * 0.2 / 20_000))
    far = outcomes.compare([1.4, 0.9, 1.3, 1.1, 1.2])
    assert far.equivalence_p > 0.5
    assert outcomes.compare([0.5] * 5).equivalence_p == 0.0
    assert outcomes.compare([1.5] * 5).equivalence_p == 1.0
    few = outcomes.compare([0.2, 0.2, 0.2])  # equal steps of accuracy, by chance
    assert few.mean == pytest.approx(0.2)
    assert math.isnan(few.p)
    assert math.isnan(few.equivalence_p)


def test_gains_at_equal_settings():
    """Settings k of both methods are paired, in each seed, over the noisy cells."""
    study = TINY._replace(seeds=5, noises=(("uniform", 0.0), ("uniform", 0.2), ("uniform", 0.4)))
    records = {}
    for seed, (_, rate), method in itertools.product(range(5), study.noises, ("dpo", "gamma-dpo")):
        for k, s in enumerate(plan.search(study, "digits", method, "uniform", rate, seed)):
            # By hand: γ-DPO's gain is 10 k + 2 seed points at 20 %, twice that at 40 %.
            gain = (0.1 * k + 0.02 * seed) * rate / 0.2 * (method == "gamma-dpo")
            test = 0.5 + gain if rate else 0.1
            records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[test])
    results = outcomes.Results(study, records)
    first, second = results.at_equal_settings("digits", "gamma-dpo", "dpo")
    assert first == pytest.approx({seed: 3.0 * seed for seed in range(5)})
    assert second == pytest.approx({seed: 15 + 3.0 * seed for seed in range(5)})
    everything = tables.pooled(results, "digits", "gamma-dpo", "dpo")
    assert everything == pytest.approx([7.5, 10.5, 13.5, 16.5, 19.5])
    kappas = results.kappas("gamma-dpo")
    above = tables.pooled(results, "digits", "gamma-dpo", "dpo", (max(kappas), math.inf))
    assert above == pytest.approx(
        list((first, second)[kappas.index(max(kappas))].values())
    )  # fmt: skip
    for seed, (_, rate), m in itertools.product(range(5), study.noises[1:], ("dpo", "gamma-dpo")):
        for s in plan.search(study, "digits", m, "uniform", rate, seed, "redrawn"):
            # A gain of one point for each unit of log κ, so that which κ counts shows.
            gain = math.log(s["settings"].get("gamma0", 1) ** 2 / s["settings"].get("tau", 1)) / 100
            records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[0.5 + gain])
    anew = tables.pooled(results, "digits", "gamma-dpo", "dpo", (1.0, math.inf), "redrawn")
    strong = [
        [math.log(kappa) for kappa in results.kappas("gamma-dpo", seed + 1) if kappa >= 1]
        for seed in range(5)
    ]
    assert anew == pytest.approx([np.mean(gains) for gains in strong if gains])
    row = next(r for r in tables.verdict(results).splitlines() if "DPO, equal settings |" in r)
    assert row.startswith("| γ-DPO − DPO, equal settings | +13.50 ± ")
    assert row.endswith(": better |")
    lost = plan.search(study, "digits", "dpo", "uniform", 0.4, 4)[0]
    fewer = {key: record for key, record in records.items() if key != plan.key(lost)}
    row = "| γ-DPO − DPO, equal settings | +12.00: not tested, 4 seeds only |"
    assert row in tables.verdict(outcomes.Results(study, fewer))
    assert "matched" not in tables.verdict(results)  # which was not run


def test_gains_over_kappa():
    study = TINY._replace(seeds=2, kappas=(1.0, 100.0))
    records = {}
    for seed, base in itertools.product(range(2), ("dpo", "simpo")):
        for s in plan.search(study, "digits", base, "uniform", 0.4, seed):
            records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[0.5])
    for s in list(plan.over_kappa(study, records, "digits")):
        strong = s["settings"].get("tau") == 0.16
        test = 0.5 + (0.04 if s["method"] == "gamma-dpo" and strong else 0.0)
        records[plan.key(s)] = a_record(s, noisy=[0.5], clean=[0.5], test=[test])
    table = tables.over_kappa(outcomes.Results(study, records))
    assert "| γ-DPO − matched DPO, digits | +0.00 ± 0.00 | +4.00 ± 0.00 |" in table
    assert "| γ-SimPO − matched SimPO, once, digits | +0.00 ± 0.00 | +0.00 ± 0.00 |" in table


def test_settings_that_were_chosen_are_named():
    study = TINY._replace(noises=(("uniform", 0.4),))
    records = {}
    for seed, (method, best) in itertools.product(
        range(2), {"gamma-dpo": 1, "dpo": 0, "gamma-simpo": 0, "simpo": 1}.items()
    ):
        for k, s in enumerate(plan.search(study, "digits", method, "uniform", 0.4, seed)):
            noisy = 0.6 + 0.1 * (k == best)
            records[plan.key(s)] = a_record(s, noisy=[noisy], clean=[0.5], test=[0.5])
    results = outcomes.Results(study, records)
    kappas = [f"{kappa:.2g}" for kappa in results.kappas("gamma-dpo")]
    table = tables.choices(results)
    assert f"| γ-DPO, digits | 2 (κ = {kappas[1]}); 1 |" in table
    assert f"| γ-SimPO, digits | 1 (κ = {kappas[0]}); 2 |" in table


def test_the_reference_is_measured():
    spec = {"stage": "reference", "size": "quick", "device": "cpu", "task": "digits", "seed": 0}
    found = train.run(spec)["result"]["ranking"]
    logps = tasks.load("digits", "quick", 0, "cpu").test.reference.numpy()
    better, worse = logps[:, 0] > logps[:, 1], logps[:, 0] < logps[:, 1]
    assert found == pytest.approx(0.5 + 0.5 * (better.mean() - worse.mean()), abs=1e-4)


def test_holm():
    # By hand: 4 * 0.01, 3 * 0.02, 2 * 0.04 and, never below an earlier one, 1 * 0.05.
    adjusted = outcomes.holm([0.04, 0.01, math.nan, 0.05, 0.02])
    assert adjusted == pytest.approx([0.08, 0.04, math.nan, 0.08, 0.06], nan_ok=True)


# --- the report ---


def test_report_from_the_file_alone(done, tmp_path):
    records = command.read(done)
    study = TINY._replace(methods=plan.Study().methods)
    report.write(study, records, tmp_path)
    page = (tmp_path / "reproduction_tables.md").read_text()
    own, _ = page.split("## Real annotators")  # what follows is of other studies
    assert "a machine" in own
    assert "**Not run yet:** DPO, fixed margin, cDPO" in own
    assert "not complete" not in own
    runs = outcomes.Results(TINY, records).accuracy("digits", "gamma-dpo", "uniform", 0.4)
    centre, half = np.mean(list(runs.values())), outcomes.interval(runs.values())[1]
    assert f"| γ-DPO | {centre:.1f} ± {half:.1f} |" in own
    assert "| SimPO | " in own
    assert "| AMaPO | " not in own
    for name in report.FIGURES:
        picture = (tmp_path / f"reproduction_{name}.svg").read_text()
        assert picture.startswith("<svg")
        assert "currentColor" in picture  # so that it is legible in the dark
        assert "#000000" not in picture
    report.write(study, records, tmp_path)
    assert (tmp_path / "reproduction_tables.md").read_text() == page
    records.pop(plan.key(plan.search(TINY, "digits", "dpo", "uniform", 0.4, 1)[0]))
    results = outcomes.Results(TINY, records)
    assert "**The study is not complete:** 1 cells" in tables.status(results)
    assert results.accuracy("digits", "dpo", "uniform", 0.4) == {}  # and no mean of the other seed
    assert "| DPO |" not in tables.accuracies(results)
    (tmp_path / "reproduction_tables.md").write_text(page.replace("<!-- /tests -->", ""))
    with pytest.raises(ValueError, match="marks of 'tests' once, has them 0 times"):
        report.write(TINY, records, tmp_path)


def test_the_pages_are_what_the_results_file_says():
    pages = {name: (report.DOCS / name).read_text(encoding="utf-8") for name in report.TASKS}
    for study, makers_by_page in report.PAGES.items():
        records = command.read(command.results_file(study))
        results = outcomes.Results(plan.STUDIES[study], records)
        for name, makers in makers_by_page.items():
            for table, make in makers.items():
                filled = f"<!-- {table} -->\n\n{make(results)}\n\n<!-- /{table} -->"
                assert filled in pages[name], table
    for figure in report.FIGURES:
        assert f'picture("reproduction_{figure}.svg"' in "".join(pages.values())


def test_command_line(tmp_path, monkeypatch, capsys, done):
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(train, "cost", lambda spec: COST)
    results = tmp_path / "results.jsonl"
    results.write_bytes(done.read_bytes())
    places = ["--quick", "--results", str(results), "--docs", str(tmp_path)]
    assert command.main(places) == 0
    assert "Complete" in capsys.readouterr().out
    assert (tmp_path / "reproduction.md").is_file()
    results.unlink()
    assert command.main(["run", *places, "--hours", "0"]) == 3
    assert "Stopped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*places, "--workers", "0"])


# --- the authors' settings ---


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_published_settings(name):
    folder = Path(__file__).parents[1] / "docs" / "examples" / "published"
    settings = yaml.safe_load((folder / f"{name}.yaml").read_text())
    assert {k: settings[k] for k in ("beta", "gamma0", "tau")} == PUBLISHED_SETTINGS[name]
    assert 6e-7 <= settings["learning_rate"] <= 1e-6

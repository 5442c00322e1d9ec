"""The noise study: its noise, its fairness, its memory, its statistics and its report."""

import csv
import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

from scipy import stats  # noqa: E402

from benchmarks.baselines import METHODS  # noqa: E402
from benchmarks.noise_study import __main__ as command  # noqa: E402
from benchmarks.noise_study import outcomes, plan, report, tasks, train  # noqa: E402

FLIPS = ("uniform", 0.4)
TINY = plan.Study(
    size="quick", seeds=2, configurations=2, tasks=("digits",), noises=(FLIPS,), calls=(),
    ablation_noises=(), kappas=(10.0,), redrawn=False,
    methods=("dpo", "gamma-dpo", "simpo", "gamma-simpo"),
)  # fmt: skip
DIFFERENCE = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 9


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_flips_have_the_right_rate(rate):
    spread = math.sqrt(rate * (1 - rate) / len(DIFFERENCE))  # at most: it is largest if uniform
    for kind in ("uniform", "ambiguous"):
        flipped = tasks.flips(DIFFERENCE, kind, rate, seed=1)
        assert abs(flipped.double().mean() - rate) <= 5 * spread
        assert not (flipped & ~tasks.flips(DIFFERENCE, kind, rate + 0.05, seed=1)).any()


def test_ambiguous_flips_follow_the_annotators_model():
    def shares(kind):
        flipped = tasks.flips(DIFFERENCE, kind, 0.2, seed=1).double()
        return [flipped[low.floor() == DIFFERENCE.floor()].mean() for low in torch.arange(9.0)]

    # logit of the probability is -difference / s, so twice as far is twice the logit.
    one, three = (math.log(p / (1 - p)) for p in shares("ambiguous")[1:4:2])
    assert three / one == pytest.approx(3.5 / 1.5, rel=0.35)
    spread = math.sqrt(0.2 * 0.8 / (len(DIFFERENCE) / 9))
    assert all(abs(share - 0.2) < 5 * spread for share in shares("uniform"))


def test_flips_of_a_call_are_those_of_whole_micro_batches():
    flipped = tasks.flips(DIFFERENCE, "call", 0.2, seed=1)
    assert torch.equal(flipped[::2], flipped[1::2])
    spread = math.sqrt(0.2 * 0.8 / (len(flipped) / 2))
    assert abs(flipped.double().mean() - 0.2) < 5 * spread
    # ... and of nothing larger: neighbours agree as often as independent draws do.
    agree = (flipped[::2][1:] == flipped[::2][:-1]).double().mean()
    assert abs(agree - (0.2**2 + 0.8**2)) < 5 * spread


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_tables(name):
    task = tasks.load(name, "quick", 0, "cpu")
    again = tasks.table_task(name, tasks.SIZES["quick"][name], 0, "cpu")
    splits = task.train, task.validation, task.test
    items = [{tuple(row) for row in split.inputs.flatten(0, 1).tolist()} for split in splits]
    assert not any(a & b for a, b in itertools.combinations(items, 2))
    for split, copy in zip(splits, (again.train, again.validation, again.test), strict=True):
        assert torch.equal(split.inputs, copy.inputs)
        assert (split.difference > 0).all()


def test_the_byte_model_scores_as_in_the_example():
    task, job = tasks.load("bytes", "quick", 0, "cpu"), tasks.example()
    tokens = task.test.inputs[:8]
    in_response = torch.arange(tokens.shape[-1]) >= tokens.shape[-1] - job.RESPONSE_BYTES
    pairs = job.Pairs(tokens, in_response.expand(tokens.shape), torch.zeros(8, dtype=torch.bool))
    expected = torch.stack(job.all_response_logps(task.reference, pairs), 1)
    # Two orders of summing 24 float32 terms of about 6.
    torch.testing.assert_close(task.test.reference[:8], expected, atol=1e-3, rtol=1e-5)
    assert (task.test.difference >= 1).all()


def a_spec(method="dpo", stage="trace", **more):
    first, _ = plan.search(TINY, "digits", method, FLIPS, 0, stage)
    return {**first, **more}


def a_record(spec, test=0.5, noisy=0.5, clean=0.5, **more):
    result = {"diverged": False, "test": [test], "noisy": [noisy], "clean": [clean], **more}
    return plan.key(spec), {**spec, "seconds": 1.0, "result": {"ranking": [0.5], **result}}


def records_of(study, *methods):
    cells = itertools.product(methods, range(study.seeds))
    return dict(a_record(s) for m, i in cells for s in plan.search(study, "digits", m, FLIPS, i))


def test_a_run_repeats_itself_and_keeps_pairs_for_the_figures_only():
    specs = a_spec("beta-dpo"), a_spec("gamma-dpo"), a_spec("gamma-dpo", kind="ambiguous")
    first, *others = (train.run(spec)["result"] for spec in specs)
    with command.crew(2) as do:  # in another process
        assert first == next(do(specs[:1]))["result"]
    assert [len(result["pairs"]) for result in (first, *others)] == [0, 3, 1]


def test_flips_of_a_call_are_drawn_at_every_call(monkeypatch):
    """As labels: with all log-ratios positive where labels are right, signs tell the flips."""
    task, seen, right = tasks.load("digits", "quick", 0, "cpu"), [], torch.tensor([1.0, 0.0])
    changed = task._replace(logps=lambda *where: right + 0 * task.logps(*where))
    watch = lambda logps: seen.append(logps.d.detach() < 0) or logps.d.mean()  # noqa: E731
    monkeypatch.setattr(tasks, "load", lambda *_: changed)
    monkeypatch.setattr(train, "make_loss", lambda spec: watch)
    result = train.run(a_spec("simpo", "search", kind="call"))["result"]
    assert result["test"] == [1.0] * tasks.CHECKPOINTS  # test labels are clean
    assert all(torch.equal(flips[::2], flips[1::2]) for flips in seen)
    assert len({tuple(flips.tolist()) for flips in seen}) > 1
    assert 0.2 < torch.cat(seen).double().mean() < 0.6


def test_pair_weights_are_those_of_dpo(monkeypatch):
    # With a learning rate of 0 nothing moves: all gaps are 0 and all weights 1/2.
    spec = a_spec()
    result = train.run({**spec, "settings": {**spec["settings"], "lr": 0.0}})["result"]
    assert result["weights"] == [[0.5, 0.5]] * tasks.CHECKPOINTS
    assert result["test"] == result["auc_loss"] == [0.5] * tasks.CHECKPOINTS
    start = {k: spec[k] for k in ("size", "device", "task", "seed")} | {"stage": "reference"}
    assert train.run(start)["result"]["ranking"] == result["ranking"][0]
    monkeypatch.setattr(train, "make_loss", lambda spec: lambda logps: logps.d.mean() * math.nan)
    result = train.run(spec)["result"]
    assert result["diverged"]
    assert plan.score(result, "noisy", "last", "test") == 0.5


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_method_has_the_same_budget(task):
    searches = {m: plan.search(plan.Study(), task, m, ("uniform", 0.2), 3) for m in METHODS}
    assert {len(specs) for specs in searches.values()} == {plan.CONFIGURATIONS}
    (rates,) = {tuple(s["settings"]["lr"] for s in specs) for specs in searches.values()}
    assert plan.LEARNING_RATE[task][0] <= min(rates) <= max(rates) <= plan.LEARNING_RATE[task][1]
    for method, specs in searches.items():
        length = plan.RESPONSE_LENGTH[task] if METHODS[method].averaged else 1
        betas = [s["settings"]["beta"] / length for s in specs]
        expected = [s["settings"]["beta"] for s in searches["dpo"]]
        assert betas == pytest.approx(expected, rel=1e-3)  # four digits are kept
        assert all(set(METHODS[method].settings) < s["settings"].keys() for s in specs)
    for ours in report.FAMILIES:  # what is compared at equal settings has them
        first, *others = (
            plan.configurations(m, task, 12) for m in (ours, *report.rivals(ours)[1:])
        )
        assert others == [first] * 3
        margins = [s["margin"] for s in plan.configurations("simpo", task, 12)]
        assert margins == [s["gamma0"] for s in first]


def test_a_schedule_ends_with_the_training():
    for size in ("quick", "full", "large"):
        spec = plan.search(plan.Study(size=size), "bytes", "plc-dpo", FLIPS, 0)[0]
        assert train.make_loss(spec).steps == tasks.SIZES[size]["bytes"]["steps"]


def test_kappa_alone_is_swept():
    study = TINY._replace(kappas=(0.01, 1.0, 100.0))
    records = records_of(study, "dpo", "simpo")
    specs = plan.over_kappa(study, records, "digits")
    assert len(specs) == 2 * (3 * 6 + 1)
    chosen = plan.search(study, "digits", "dpo", FLIPS, 0)[0]["settings"]
    for s in specs:
        settings, tau = s["settings"], s["settings"].get("tau")
        assert (settings["lr"], settings["beta"]) == (chosen["lr"], chosen["beta"])
        assert settings["margin" if s["method"] == "simpo" else "gamma0"] == plan.KAPPA_GAMMA0
        records |= [a_record(s, test=0.54 if (s["method"], tau) == ("gamma-dpo", 0.16) else 0.5)]
    rows = report.over_kappa("tasks", outcomes.Results(study, records))
    found = {(row["compared"], row["κ"]): row["difference"] for row in rows}
    assert found["γ-DPO − matched DPO", 100.0] == pytest.approx(4.0)
    assert found["γ-DPO − matched DPO", 1.0] == found["γ-SimPO − matched SimPO, once", 100.0] == 0


def test_choice_of_settings_and_of_checkpoints():
    where = ("digits", "dpo", FLIPS, 0)
    first, second = specs = plan.search(TINY, *where)
    curves = [
        {"noisy": [0.5, 0.9, 0.4], "clean": [0.6, 0.6, 0.9], "test": [0.1, 0.2, 0.3]},
        {"noisy": [0.5, 0.6, 0.7], "clean": [0.7, 0.8, 0.6], "test": [0.4, 0.5, 0.6]},
    ]
    records = dict(a_record(s) for s in specs)
    for s, curve in zip(specs, curves, strict=True):
        records[plan.key(s)]["result"] |= curve
    ways = itertools.product(("noisy", "clean"), ("last", "best"))
    chosen = [plan.choose(TINY, records, *where, labels=a, checkpoint=b) for a, b in ways]
    assert [r["settings"] for r in chosen] == [s["settings"] for s in (second, *[first] * 3)]
    assert plan.score(curves[0] | {"diverged": False}, "noisy", "best", "test") == 0.2
    assert plan.traces(TINY, records, "digits")[0]["settings"] == second["settings"]
    del records[plan.key(first)]
    assert plan.choose(TINY, records, *where) is None


def test_choice_for_all_seeds():
    noisy = (0.9, 0.8), (0.4, 0.6)  # by seed, of two settings: the second is better on average
    records = {}
    for seed, scores in enumerate(noisy):
        specs = plan.search(TINY, "digits", "dpo", FLIPS, seed)
        records |= [a_record(s, noisy=x, test=x / 2) for s, x in zip(specs, scores, strict=True)]
    results = outcomes.Results(TINY, records)
    assert results.accuracy("digits", "dpo", FLIPS, way="shared") == {0: 40.0, 1: 30.0}
    assert results.accuracy("digits", "dpo", FLIPS) == {0: 45.0, 1: 30.0}
    records.popitem()
    assert outcomes.Results(TINY, records).chosen("digits", "dpo", FLIPS, way="shared") == []


RAW = command.packed(command.RESULTS / command.FILES["tasks"])
needs_raw = pytest.mark.skipif(not RAW.exists(), reason="an sdist has no raw runs")


@needs_raw
@pytest.mark.parametrize("study", plan.STUDIES)
def test_no_run_of_the_results_file_is_lost(study):
    """What was run stays part of the plan, so that it is not run again."""
    records = command.read(command.RESULTS / command.FILES[study])
    kept = {key for key, run in records.items() if run["stage"] not in ("cost", "loop")}
    assert len(kept) > {"tasks": 36_000, "raters": 13_000, "language": 100}[study]
    assert kept <= {plan.key(s) for b in plan.blocks(plan.STUDIES[study], records) for s in b}


def test_what_a_kill_leaves_is_completed_to_the_same_file(tmp_path, monkeypatch):
    def comparable(path):
        return [record | {"seconds": 0} for record in command.read(path).values()]

    path, done, real, calls = tmp_path / "results.jsonl", tmp_path / "whole.jsonl", train.run, []
    assert command.carry_out(TINY, done, workers=1, hours=1.0)

    def killed(spec):
        if len(calls) == 15:
            raise KeyboardInterrupt
        calls.append(spec)
        return real(spec)

    monkeypatch.setattr(command, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        command.carry_out(TINY, path, workers=1, hours=1.0)
    with path.open("a") as file:
        file.write('{"stage": "search", "half')
    assert len(command.read(path)) == 15
    calls.clear()
    monkeypatch.setattr(command, "run", lambda spec: calls.append(spec) or real(spec))
    assert command.carry_out(TINY, path, workers=1, hours=1.0)
    assert comparable(path) == comparable(done)
    assert len(calls) == len(comparable(done)) - 15
    command.pack(path)
    assert not path.exists()
    assert comparable(path) == comparable(done)
    path.write_text('{"stage": "new"}\n')  # since the last packing
    command.pack(path)
    assert len(command.read(path)) == len(comparable(done)) + 1


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "QUICK", TINY)
    places = ["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)]
    codes = command.main(["run", *places, "--hours", "0"]), command.main(places)
    said = capsys.readouterr().out
    assert (codes, "Stopped" in said, "Complete" in said) == ((3, 0), True, True)
    with pytest.raises(SystemExit):
        command.main([*places, "--workers", "0"])


def test_intervals_and_tests_are_corrected_for_seeds_that_share_their_items():
    gains = [0.4, -0.1, 0.3, 0.2, 0.5]
    found = outcomes.tested(gains)
    plain = stats.ttest_1samp(gains, 0.0)
    assert found.mean == pytest.approx(np.mean(gains))
    assert found.half == pytest.approx(plain.confidence_interval().high - np.mean(gains))
    # Nadeau and Bengio: 1/J + n2/n1 in the place of 1/J, a quarter tested on and 60 % learned from.
    assert found.corrected / found.half == pytest.approx(math.sqrt((1 / 5 + 25 / 60) / (1 / 5)))
    assert found.p == pytest.approx(2 * stats.t.sf(plain.statistic / 1.75594, 4), rel=1e-4)
    high = stats.ttest_1samp(gains, 1.0, alternative="less").statistic / 1.75594
    assert found.equivalence_p == pytest.approx(stats.t.cdf(high, 4), rel=1e-4)
    assert math.isnan(outcomes.tested([0.2, 0.2, 0.2]).p)  # equal steps, by chance
    assert outcomes.tested([1.5] * 5).equivalence_p == 1.0
    # Of studies with this standard error and an effect of that size, four in five are significant.
    where = outcomes.detectable(found, tests=4), found.error * math.sqrt(5)
    studies = np.random.default_rng(0).normal(*where, (20_000, 5))
    seen = stats.ttest_1samp(studies, 0.0, axis=1).pvalue < 0.05 / 4
    assert seen.mean() == pytest.approx(0.8, abs=5 * math.sqrt(0.8 * 0.2 / 20_000))


def test_verdicts():
    # By hand: 4 * 0.01, 3 * 0.02, 2 * 0.04 and, never below an earlier one, 1 * 0.05.
    adjusted = outcomes.holm([0.04, 0.01, math.nan, 0.05, 0.02])
    assert adjusted == pytest.approx([0.08, 0.04, math.nan, 0.08, 0.06], nan_ok=True)
    noise = np.array([-2, -1, 0, 1, 2])
    sure, unsure = (outcomes.tested(1.5 + scale * noise) for scale in (0.1, 1.0))
    same, few = outcomes.tested(0.01 * noise), outcomes.tested([0.1, 0.2])
    words = outcomes.verdicts([sure, unsure, same, few])
    assert words == ["better", "open", "equivalent", "not tested"]


def test_gains_at_equal_settings():
    """Settings k of both methods are paired, in each seed, over the noisy cells."""
    study = TINY._replace(seeds=5, noises=(("uniform", 0.0), ("uniform", 0.2), FLIPS))
    records = {}
    for seed, noise, method in itertools.product(range(5), study.noises, ("dpo", "gamma-dpo")):
        for k, s in enumerate(plan.search(study, "digits", method, noise, seed)):
            # By hand: γ-DPO's gain is 10 k + 2 seed points at 20 %, twice that at 40 %.
            gain = (0.1 * k + 0.02 * seed) * noise[1] / 0.2 * (method == "gamma-dpo")
            records |= [a_record(s, test=0.5 + gain if noise[1] else 0.1)]
    results = outcomes.Results(study, records)
    gains = results.gains("digits", "gamma-dpo", "dpo", results.noisy)
    for seed, pairs in gains.items():
        assert [gain for _, gain in pairs] == pytest.approx([3.0 * seed, 15 + 3.0 * seed])
    strongest = max(range(2), key=lambda k: gains[0][k][0])
    above = outcomes.within(gains, gains[0][strongest][0], math.inf)
    assert above[1] == pytest.approx(3.0 + 15 * strongest)
    row = report.by_task("tasks", results)[0]
    assert (row["compared"], row["difference"]) == ("γ-DPO − DPO", pytest.approx(13.5))
    assert report.verdict({"tasks": results})[0]["seeds"] == 5
    records.pop(plan.key(plan.search(study, "digits", "dpo", FLIPS, 4)[0]))
    assert 4 not in outcomes.Results(study, records).gains("digits", "gamma-dpo", "dpo", [FLIPS])


def test_weights_that_margins_change_are_compared_at_the_same_gaps():
    study = TINY._replace(seeds=1, configurations=1)
    records = records_of(study, "gamma-dpo")
    (s,) = plan.traces(study, records, "digits")
    gamma0 = s["settings"]["gamma0"]
    columns = [[-2.0, 3.0], [1, 0], [gamma0 - 1, gamma0 + 1], [0, 0]]
    records |= [a_record(s, weights=[[0.4, 0.2]], pairs=[columns])]
    (row,) = report.pairs("tasks", outcomes.Results(study, records))
    assert row["weight of flipped / clean"] == pytest.approx(2.0)
    # With γ0 for all the weights are σ(-g), with these margins σ(±1 - g).
    equal, exact = (row[f"at the last gaps, {words} margins"] for words in ("equal", "exact"))
    assert equal == pytest.approx((1 + math.exp(3)) / (1 + math.exp(-2)))
    assert exact == pytest.approx((1 + math.exp(2)) / (1 + math.exp(-1)))


def test_changes_are_compared_with_the_chosen_settings_by_seed():
    study = TINY._replace(configurations=1, ablation_noises=(FLIPS,), ablation_seeds=2)
    records = records_of(study, "gamma-dpo")
    for s in plan.ablations(study, records, "digits"):
        gain = (0.04, 0.02)[s["seed"]] * (s["change"].get("tau") == 0.1)
        records |= [a_record(s, test=0.5 + gain)]
    rows = report.ablations("tasks", outcomes.Results(study, records))
    found = {row["change"]: row["difference"] for row in rows if row["seeds"]}
    assert found["gamma0 = 2.0, tau = 0.1"] == pytest.approx(3.0)
    assert found["gamma0 = 2.0, tau = 3.0"] == found["queue_size = 0"] == 0


@needs_raw
def test_the_pages_are_what_the_results_files_say(tmp_path):
    records = {name: command.read(command.RESULTS / file) for name, file in command.FILES.items()}
    studies = {name: outcomes.Results(plan.STUDIES[name], r) for name, r in records.items()}
    report.write(studies, tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(written) == len(report.TABLES) + 1
    for path in written:
        assert (tmp_path / path).read_text("utf-8") == (report.DOCS / path).read_text("utf-8"), path
    lines = (tmp_path / "study" / "equal_settings_by_labels.csv").read_text("utf-8").splitlines()
    rows = [row for row in csv.DictReader(lines) if row["study"] == "raters"]
    cells = [row for row in rows if "once" not in row["compared"]]
    matched = ["equivalent" in row["verdict"] for row in cells if "matched" in row["compared"]]
    assert (len(cells), len(matched), sum(matched)) == (96, 48, 7)
    assert {row["verdict"] for row in cells} == {"equivalent", "open"}
    page = tmp_path / "reproduction.md"
    page.write_text(page.read_text("utf-8").replace("<!-- /verdict -->", ""), "utf-8")
    with pytest.raises(ValueError, match="must have the marks"):
        report.write({}, tmp_path)

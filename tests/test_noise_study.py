"""The noise study: its noise, its fairness, its memory, its statistics and its report."""

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


def test_flips_have_their_rate_and_follow_their_model():
    count = len(DIFFERENCE)
    for rate in (0.0, 0.1, 0.4):
        spread = math.sqrt(rate * (1 - rate) / count)  # at most: it is largest if uniform
        for kind in ("uniform", "ambiguous"):
            flipped = tasks.flips(DIFFERENCE, kind, rate, seed=1)
            assert abs(flipped.double().mean() - rate) <= 5 * spread
            assert not (flipped & ~tasks.flips(DIFFERENCE, kind, rate + 0.05, seed=1)).any()

    def shares(kind):
        flipped = tasks.flips(DIFFERENCE, kind, 0.2, seed=1).double()
        return [flipped[low.floor() == DIFFERENCE.floor()].mean() for low in torch.arange(9.0)]

    # logit of the probability is -difference / s, so twice as far is twice the logit.
    one, three = (math.log(p / (1 - p)) for p in shares("ambiguous")[1:4:2])
    assert three / one == pytest.approx(3.5 / 1.5, rel=0.35)
    spread = math.sqrt(0.2 * 0.8 / (count / 9))
    assert all(abs(share - 0.2) < 5 * spread for share in shares("uniform"))
    # Those of a call are of whole micro-batches, and of nothing larger.
    flipped = tasks.flips(DIFFERENCE, "call", 0.2, seed=1)
    assert torch.equal(flipped[::2], flipped[1::2])
    spread = math.sqrt(0.2 * 0.8 / (count / 2))
    assert abs(flipped.double().mean() - 0.2) < 5 * spread
    agree = (flipped[::2][1:] == flipped[::2][:-1]).double().mean()
    assert abs(agree - (0.2**2 + 0.8**2)) < 5 * spread


def test_the_splits_of_a_table_share_no_item_and_repeat_themselves():
    for name in ("digits", "diabetes"):
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


def test_a_run_repeats_itself_and_pair_weights_are_those_of_dpo(monkeypatch):
    specs = a_spec("beta-dpo"), a_spec("gamma-dpo"), a_spec("gamma-dpo", kind="ambiguous")
    first, *others = (train.run(spec)["result"] for spec in specs)
    assert first == train.run(specs[0])["result"]
    assert [len(result["pairs"]) for result in (first, *others)] == [0, 3, 1]  # for figures
    steps = train.make_loss(a_spec("plc-dpo", "search")).steps  # of a schedule
    assert steps == tasks.SIZES["quick"]["digits"]["steps"]
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


def test_choice_of_settings_and_of_checkpoints_by_seed_and_for_all():
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


def test_what_a_kill_leaves_is_completed_to_the_same_file(tmp_path, monkeypatch, capsys):
    def comparable(path):
        return [record | {"seconds": 0} for record in command.read(path).values()]

    def killed(spec):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(spec)
        return real(spec)

    study = TINY._replace(seeds=1)
    monkeypatch.setattr(command, "QUICK", study)
    whole, real, calls = tmp_path / "whole.jsonl", train.run, []
    assert command.carry_out(study, whole, workers=1, hours=1.0)
    path = tmp_path / command.FILES["tasks"]
    places = ["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)]
    assert command.main(["run", *places, "--hours", "0"]) == 3
    assert f"Stopped: {path}.bz2" in capsys.readouterr().out
    assert len(command.read(path)) == 1
    monkeypatch.setattr(command, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", *places])
    with path.open("a") as file:
        file.write('{"stage": "search", "half')
    assert len(command.read(path)) == 6
    monkeypatch.setattr(command, "run", lambda spec: calls.append(spec) or real(spec))
    assert command.main(places) == 0
    assert "Complete" in capsys.readouterr().out
    assert not path.exists()  # packed
    assert comparable(path) == comparable(whole)
    assert len(calls) == len(comparable(whole)) - 1
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


RAW = command.packed(command.RESULTS / command.FILES["tasks"])


@pytest.mark.skipif(not RAW.exists(), reason="an sdist has no raw runs")
def test_the_pages_are_what_the_results_files_say_and_no_run_is_lost(tmp_path):
    records = {name: command.read(command.RESULTS / file) for name, file in command.FILES.items()}
    for name, least in {"tasks": 36_000, "raters": 13_000, "language": 100}.items():
        # What was run stays part of the plan, so that it is not run again.
        runs = records[name].items()
        kept = {key for key, run in runs if run["stage"] not in ("cost", "loop")}
        assert len(kept) > least
        planned = plan.blocks(plan.STUDIES[name], records[name])
        assert kept <= {plan.key(spec) for block in planned for spec in block}
    report.write(
        {name: outcomes.Results(plan.STUDIES[name], r) for name, r in records.items()}, tmp_path
    )
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(written) == len(report.TABLES) + 1
    for path in written:
        assert (tmp_path / path).read_text("utf-8") == (report.DOCS / path).read_text("utf-8"), path
    page = tmp_path / "reproduction.md"
    page.write_text(page.read_text("utf-8").replace("<!-- /verdict -->", ""), "utf-8")
    with pytest.raises(ValueError, match="must have the marks"):
        report.write({}, tmp_path)

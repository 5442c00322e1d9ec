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
    ablation_noises=(), kappas=(10.0,), redrawn=False, methods=("dpo", "gamma-dpo"),
)  # fmt: skip


def test_flips_have_their_rate_and_follow_their_model():
    count = 20_000
    difference = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 9
    split = tasks.Split(difference, difference, difference, difference)

    def flips(kind, rate):
        return tasks.wrong_labels(split, kind, rate, seed=1).double()

    def has_rate(flipped, rate):
        return abs(flipped.mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / len(flipped))

    for rate, kind in itertools.product((0.0, 0.1, 0.4), ("uniform", "ambiguous")):
        assert has_rate(flips(kind, rate), rate)
        assert (flips(kind, rate) <= flips(kind, rate + 0.05)).all()
    parts = [difference.floor() == low for low in range(9)]
    assert all(has_rate(flips("uniform", 0.2)[part], 0.2) for part in parts)
    # logit of the probability is -difference / s, so twice as far is twice the logit.
    shares = [flips("ambiguous", 0.2)[parts[low]].mean() for low in (1, 3)]
    one, three = (math.log(p / (1 - p)) for p in shares)
    assert three / one == pytest.approx(3.5 / 1.5, rel=0.35)
    # Those of a call are of whole micro-batches, and of nothing larger.
    first, second = flips("call", 0.2).view(-1, 2).T
    assert torch.equal(first, second)
    assert has_rate(first, 0.2)
    # Five standard errors of a share of 0.2 among 10,000.
    assert abs((first[1:] == first[:-1]).double().mean() - (0.2**2 + 0.8**2)) < 0.02


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_the_splits_of_a_table_share_no_item_and_repeat_themselves(name):
    task, again = (tasks.table_task(name, tasks.SIZES["quick"][name], 0) for _ in range(2))
    splits = task.train, task.validation, task.test
    items = [{tuple(row) for row in split.inputs.flatten(0, 1).tolist()} for split in splits]
    assert not any(a & b for a, b in itertools.combinations(items, 2))
    for split, copy in zip(splits, (again.train, again.validation, again.test), strict=True):
        assert torch.equal(split.inputs, copy.inputs)
        assert (split.difference > 0).all()


def test_the_byte_model_scores_as_in_the_example():
    task, job = tasks.load("bytes", "quick", 0), tasks.example()
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


def a_record(spec, **curves):
    result = {name: [0.5] for name in ("test", "noisy", "clean", "ranking")} | curves
    return plan.key(spec), {**spec, "seconds": 1.0, "result": {"diverged": False, **result}}


def replace_loss(monkeypatch, name, loss):
    changed = METHODS[name]._replace(loss=lambda logps, **settings: loss(logps), raw=True)
    monkeypatch.setitem(METHODS, name, changed)


def test_flips_of_a_call_are_drawn_at_every_call(monkeypatch):
    """As labels: with all log-ratios positive where labels are right, signs tell the flips."""
    task, seen, right = tasks.load("digits", "quick", 0), [], torch.tensor([1.0, 0.0])
    changed = task._replace(logps=lambda *where: right + 0 * task.logps(*where))
    monkeypatch.setattr(tasks, "load", lambda *_: changed)
    watch = lambda logps: seen.append(logps.d.detach() < 0) or logps.d.mean()  # noqa: E731
    replace_loss(monkeypatch, "simpo", watch)
    result = train.run(a_spec("simpo", "search", kind="call"))["result"]
    assert result["test"] == [1.0] * tasks.CHECKPOINTS  # test labels are clean
    assert all(torch.equal(flips[::2], flips[1::2]) for flips in seen)
    assert len({tuple(flips.tolist()) for flips in seen}) > 1
    assert 0.2 < torch.cat(seen).double().mean() < 0.6


def test_a_run_repeats_itself_and_pair_weights_are_those_of_dpo(monkeypatch):
    specs = a_spec("beta-dpo"), a_spec("gamma-dpo")
    random, exact = (train.run(spec)["result"] for spec in specs)
    assert random == train.run(specs[0])["result"]
    same = train.run({**specs[1], "stage": "ablation", "change": {}})["result"]
    assert same["test"] == exact["test"]
    _, settings = train.method_of(a_spec("plc-dpo", "search"))
    assert settings["steps"] == tasks.SIZES["quick"]["digits"]["steps"]  # of a schedule
    # With a learning rate of 0 nothing moves: all gaps are 0 and all weights 1/2.
    spec = a_spec()
    result = train.run({**spec, "settings": {**spec["settings"], "lr": 0.0}})["result"]
    assert result["weights"] == [[0.5, 0.5]] * tasks.CHECKPOINTS
    assert result["test"] == result["auc_loss"] == [0.5] * tasks.CHECKPOINTS
    replace_loss(monkeypatch, "dpo", lambda logps: logps.d.mean() * math.nan)
    result = train.run(spec)["result"]
    assert result["diverged"]
    assert plan.score(result, "noisy", "last", "test") == 0.5


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_method_has_the_same_budget(task):
    tried = {m: plan.configurations(m, task, plan.CONFIGURATIONS) for m in METHODS}
    assert {len(settings) for settings in tried.values()} == {plan.CONFIGURATIONS}
    (rates,) = {tuple(s["lr"] for s in settings) for settings in tried.values()}
    assert plan.LEARNING_RATE[task][0] <= min(rates) <= max(rates) <= plan.LEARNING_RATE[task][1]
    for method, settings in tried.items():
        length = plan.RESPONSE_LENGTH[task] if METHODS[method].averaged else 1
        betas = [s["beta"] / length for s in settings]
        assert betas == pytest.approx([s["beta"] for s in tried["dpo"]], rel=1e-3)  # four digits
        assert all(set(METHODS[method].settings) < s.keys() for s in settings)
    for ours in plan.FAMILIES:  # what is compared at equal settings has them
        assert all(tried[theirs] == tried[ours] for theirs in plan.rivals(ours)[1:])
    assert [s["margin"] for s in tried["simpo"]] == [s["gamma0"] for s in tried["gamma-simpo"]]


def test_choice_of_settings_and_of_checkpoints_by_seed_and_for_all():
    where = ("digits", "dpo", FLIPS, 0)
    first, second = specs = plan.search(TINY, *where)
    curves = [
        {"noisy": [0.5, 0.9, 0.4], "clean": [0.6, 0.6, 0.9], "test": [0.1, 0.2, 0.3]},
        {"noisy": [0.5, 0.6, 0.7], "clean": [0.7, 0.8, 0.6], "test": [0.4, 0.5, 0.6]},
    ]
    records = dict(a_record(s, **curve) for s, curve in zip(specs, curves, strict=True))
    runs, ways = plan.Runs(TINY, records), itertools.product(("noisy", "clean"), ("last", "best"))
    chosen = [runs.choose(*where, labels=a, checkpoint=b) for a, b in ways]
    assert [r["settings"] for r in chosen] == [s["settings"] for s in (second, *[first] * 3)]
    assert plan.score(curves[0] | {"diverged": False}, "noisy", "best", "test") == 0.2
    traced = [spec for block in runs.blocks() for spec in block if spec["stage"] == "trace"]
    assert traced[0]["settings"] == second["settings"]
    records = {}  # by seed, of two settings: the second is better on average
    for seed, scores in enumerate([(0.9, 0.8), (0.4, 0.6)]):
        specs = plan.search(TINY, "digits", "dpo", FLIPS, seed)
        both = zip(specs, scores, strict=True)
        records |= [a_record(s, noisy=[x], test=[x / 2]) for s, x in both]
    runs = plan.Runs(TINY, records)
    assert runs.accuracy("digits", "dpo", FLIPS, way="shared") == {0: 40.0, 1: 30.0}
    assert runs.accuracy("digits", "dpo", FLIPS) == {0: 45.0, 1: 30.0}
    records.popitem()
    assert plan.Runs(TINY, records).chosen("digits", "dpo", FLIPS, way="shared") == []


def test_what_a_kill_leaves_is_completed_to_the_same_file(tmp_path, monkeypatch):
    calls, study = [], TINY._replace(seeds=1, configurations=1)

    def killed_once(spec):
        calls.append(spec)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return train.run(spec)

    def comparable(path):
        return [record | {"seconds": 0} for record in command.read(path).values()]

    whole, path = tmp_path / "whole.jsonl", tmp_path / command.FILES["tasks"]
    assert command.carry_out(study, whole, workers=1, hours=1.0)
    monkeypatch.setattr(command, "quick", lambda _: study)
    monkeypatch.setattr(command, "run", killed_once)
    places = ["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)]
    assert command.main([*places, "--hours", "0"]) == 3
    assert len(command.read(path)) == 1
    with pytest.raises(KeyboardInterrupt):
        command.main(places)
    with path.open("a") as file:
        file.write('{"stage": "search", "half')
    assert len(command.read(path)) == 6
    assert command.main(places) == 0
    assert not path.exists()  # packed
    assert comparable(path) == comparable(whole)
    assert len(calls) == len(comparable(whole)) + 1  # the one that was killed


def test_intervals_and_tests_are_corrected_for_seeds_that_share_their_items():
    gains = [0.4, -0.1, 0.3, 0.2, 0.5]
    found, plain = outcomes.tested(gains), stats.ttest_1samp(gains, 0.0)
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
            records |= [a_record(s, test=[0.5 + gain if noise[1] else 0.1])]
    runs, both = plan.Runs(study, records), ("digits", "gamma-dpo", "dpo")
    gains = outcomes.gains(runs, *both, runs.noisy)
    for seed, pairs in gains.items():
        assert [gain for _, gain in pairs] == pytest.approx([3.0 * seed, 15 + 3.0 * seed])
    strongest = max(range(2), key=lambda k: gains[0][k][0])
    above = outcomes.within(gains, gains[0][strongest][0], math.inf)
    assert above[1] == pytest.approx(3.0 + 15 * strongest)
    row = report.by_task(runs)[0]
    assert (row["compared"], row["difference"]) == ("γ-DPO − DPO", pytest.approx(13.5))
    records.pop(plan.key(plan.search(study, "digits", "dpo", FLIPS, 4)[0]))
    assert 4 not in outcomes.gains(plan.Runs(study, records), *both, [FLIPS])


RAW = command.packed(command.RESULTS / command.FILES["tasks"])


@pytest.mark.skipif(not RAW.exists(), reason="an sdist has no raw runs")
def test_the_pages_are_what_the_results_files_say_and_no_run_is_lost(tmp_path):
    studies = {}
    for name, least in {"tasks": 36_000, "raters": 13_000, "language": 100}.items():
        records = command.read(command.RESULTS / command.FILES[name])
        runs = studies[name] = plan.Runs(plan.STUDIES[name], records)
        # What was run stays part of the plan, so that it is not run again.
        kept = {k for k, run in records.items() if run["stage"] not in ("cost", "loop")}
        assert len(kept) > least
        assert kept <= {plan.key(spec) for block in runs.blocks() for spec in block}
    report.write(studies, tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(written) == len(report.TABLES) + 1
    for path in written:
        assert (tmp_path / path).read_text("utf-8") == (report.DOCS / path).read_text("utf-8"), path

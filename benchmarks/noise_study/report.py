"""Writes the study's numbers: CSV files in docs/study/, and the verdict into its page.

A table is a function of a study's `Runs` that returns rows, one dict a line.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from benchmarks.baselines import METHODS
from benchmarks.noise_study import outcomes, plan
from benchmarks.noise_study.outcomes import gains, last, less, mean, mean_by_seed, tested, within
from benchmarks.noise_study.plan import FAMILIES, Runs, rivals

DOCS = Path(__file__).parents[2] / "docs"
EVERY, STRONG = (0.0, math.inf), (1.0, math.inf)  # where γ-PO is not all but its base
RANGES = (0.0, 0.1), (1.0, 10.0), (10.0, 100.0)  # of κ, that hold a configuration
TUNED: dict[str, dict[str, str]] = {
    "tuned once for all seeds": {"way": "shared"},
    "tuned by each seed": {"way": "last"},
    "tuned by each seed, configurations drawn anew": {"stage": "redrawn"},
}
WORDS = {"rater": "one rater's", "as often": "uniform, as often as the rater"}
Row = dict[str, Any]
Judged = tuple[Row, Iterable[float]]  # a row, and differences over seeds that are tested


def label(ours: str, theirs: str) -> str:
    return f"{METHODS[ours].label} − {METHODS[theirs].label}"


def labels(noise: plan.Noise) -> str:
    kind, rate = noise
    return WORDS.get(kind, f"{rate:.0%} {kind}" if rate else "clean")


def judged(rows: Iterable[Judged]) -> list[Row]:
    """Add what tests say of each row's differences, corrected for all of these rows."""
    known = [(row, found) for row, values in rows if (found := tested(values)).seeds]
    words = outcomes.verdicts([found for _, found in known])
    count = sum(not math.isnan(found.p) for _, found in known)
    return [
        {**row, "seeds": found.seeds, "difference": found.mean, "half width": found.half,
         "corrected": found.corrected, "p": found.p, "p of equivalence": found.equivalence_p,
         "would have been seen": outcomes.detectable(found, count), "verdict": word}
        for (row, found), word in zip(known, words, strict=True)
    ]  # fmt: skip


def verdict(studies: dict[str, Runs]) -> list[Row]:
    """Return the main tests: by seed the mean over tasks, kinds of labels and configurations."""
    arms, flips = plan.PEOPLE.noises, plan.NOISES[1:]
    where = "three tasks, flips, κ ≥ 1", "four domains, people's labels"
    planned = [("tasks", m, n, STRONG, flips, where[0]) for m in FAMILIES for n in rivals(m)[:3]]
    planned += [("raters", m, n, EVERY, arms, where[1]) for m in FAMILIES for n in rivals(m)[:2]]
    planned += [("language", "gamma-dpo", "dpo", EVERY, (arm,), f"language model, {labels(arm)} "
                 "labels") for arm in arms[:2]]  # fmt: skip
    rows = []
    for name, ours, theirs, bounds, noises, words in planned:
        if results := studies.get(name):
            known = [noise for noise in noises if noise in results.noises]
            found = [gains(results, t, ours, theirs, known) for t in results.study.tasks]
            found = [each for each in found if each]
            runs = [run for each in found for run in zip(*each.values(), strict=True)]
            single = [mean(gain for _, gain in run) for run in runs if run[0][0] >= bounds[0]]
            ends = " to ".join(signed(f(single), 1) for f in (min, max)) if single[1:] else "–"
            words = words.replace("three", "two") if theirs.endswith("once") else words
            row = {"compared": label(ours, theirs), "where": words, "single settings": ends}
            rows.append((row, mean_by_seed([within(each, *bounds) for each in found]).values()))
    return judged(rows)


def equal(results: Runs, cells: dict[str, Any], peers: int = 4) -> list[Judged]:
    """Return gains at equal settings for cells of noises, range of κ, stage and test pairs."""
    return [
        ({"task": task, "compared": label(ours, theirs), "settings": words},
         within(gains(results, task, ours, theirs, noises, stage, of), *bounds).values())
        for ours, task in itertools.product(FAMILIES, results.study.tasks)
        for theirs in rivals(ours)[:peers]
        for words, (noises, bounds, stage, of) in cells.items()
    ]  # fmt: skip


def by_task(results: Runs) -> list[Row]:
    noisy = results.noisy
    cells = {"equal": (noisy, EVERY, "search", "test"),
             "equal, κ ≥ 1": (noisy, STRONG, "search", "test"),
             "equal, κ ≥ 1, drawn anew by seed": (noisy, STRONG, "redrawn", "test")}  # fmt: skip
    rows = equal(results, cells, peers=3)
    for ours, task, how in itertools.product(FAMILIES, results.study.tasks, TUNED):
        both = ours, FAMILIES[ours]
        cell = [[results.accuracy(task, m, n, **TUNED[how]) for n in noisy] for m in both]
        row = {"task": task, "compared": label(*both), "settings": how}
        rows.append((row, less(*map(mean_by_seed, cell))))
    return judged(rows)


def by_kappa(results: Runs) -> list[Row]:
    cells = {f"{b[0]:g} ≤ κ < {b[1]:g}": (results.noisy, b, "search", "test") for b in RANGES}
    return judged(equal(results, cells))


def by_labels(results: Runs) -> list[Row]:
    tests = {"test": "", "clear": "; rated more than 1 apart"}
    rated = plan.RATERS[0] in results.noises
    cells = {labels(noise) + tests[of]: ([noise], EVERY, "search", of)
             for noise in (*results.noises, *results.study.calls)
             for of in tests if rated or of == "test"}  # fmt: skip
    return judged(equal(results, cells, peers=3))


def configurations(results: Runs) -> list[Row]:
    """Return each configuration of γ-PO with its gains, mean over all wrong labels."""
    rows = []
    for ours, task in itertools.product(FAMILIES, results.study.tasks):
        against = [gains(results, task, ours, theirs, results.noisy) for theirs in rivals(ours)]
        tried = plan.configurations(ours, task, results.study.configurations)
        for k, settings in enumerate(tried):
            row = {"task": task, "method": METHODS[ours].label, "setting": k + 1}
            row |= {**settings, "κ": outcomes.kappa(settings)}
            for words, found in zip(("base", "matched", "once", "loop"), against, strict=True):
                at = tested(pairs[k][1] for pairs in found.values())
                row |= {f"less {words}": at.mean, f"± {words}": at.corrected}
            rows.append(row)
    return rows


def over_kappa(results: Runs) -> list[Row]:
    """Return γ-PO less its matched losses where κ alone changes, mean over kinds of labels."""
    runs: dict[Any, dict[int, list[float]]] = {}
    for task in results.study.tasks:
        for spec in results.over_kappa(task):
            if run := results.records.get(plan.key(spec)):
                where = task, spec["method"], spec["settings"].get("tau")
                runs.setdefault(where, {}).setdefault(spec["seed"], []).append(last(run))
    means = {k: {s: mean(v) for s, v in seeds.items()} for k, seeds in runs.items()}
    rows = []
    for task, ours, strength in itertools.product(results.study.tasks, FAMILIES, plan.KAPPAS):
        for theirs in rivals(ours)[1:3]:
            both = (means.get((task, m, plan.TAU_OF[strength]), {}) for m in (ours, theirs))
            row = {"task": task, "compared": label(ours, theirs), "κ": strength}
            rows.append((row, less(*both)))
    return judged(rows)


def accuracy(results: Runs) -> list[Row]:
    """Return accuracies of chosen runs in per cent, and differences to the base, DPO or SimPO."""
    study, rows, known = results.study, [], {}
    for task, m, way in itertools.product(study.tasks, study.methods, outcomes.WAYS):
        base = "dpo" if METHODS[m].relative else "simpo"  # which comes first
        group = []
        for noise in results.noises:
            where = task, m, noise
            found = known[(*where, way)] = results.accuracy(*where, way=way)
            row = {"task": task, "method": METHODS[m].label, "labels": labels(noise), "chosen": way}
            row["accuracy"] = mean(found.values())
            row["ranking"] = mean(results.accuracy(*where, way=way, of="ranking").values())
            if way != "shared":
                clean = results.accuracy(*where, way=way, labels="clean")
                row["chosen on clean labels"] = mean(clean.values())
            elif found:
                tried = plan.configurations(m, task, study.configurations)
                row["setting"] = 1 + tried.index(results.chosen(*where, way=way)[0]["settings"])
            group.append((row, less(found, known[task, base, noise, way])))
        rows += judged(group)  # for all kinds of labels
    return [{k: v for k, v in row.items() if k != "would have been seen"} for row in rows]


def pairs(results: Runs) -> list[Row]:
    """Return weights of flipped over clean pairs, and areas under ROC curves of telling them."""
    rows = []
    noises = [noise for noise in results.noises if noise[1] in plan.TRACED_RATES]
    for task, m, noise in itertools.product(results.study.tasks, results.study.methods, noises):
        runs = results.repeated("trace", task, m, noise).values()
        ends = [{k: v[-1] for k, v in r.items() if isinstance(v, list) and v} for r in runs]
        ratios = [w[0] / w[1] for end in ends if all(w := end.get("weights", [0]))]
        row = {"task": task, "method": METHODS[m].label, "labels": labels(noise)}
        row["weight of flipped / clean"] = mean(ratios)
        for of in ("loss", "margin", "smoothing"):
            row[f"AUC by {of}"] = mean(end[k] for end in ends if end.get(k := f"auc_{of}"))
        if m in FAMILIES and ends and "pairs" in ends[0]:  # of seed 0, at its last gaps
            gamma0 = results.chosen(task, m, noise)[0]["settings"]["gamma0"]
            gaps, flipped, margins, _ = map(np.array, ends[0]["pairs"])
            for words, margin in (("equal", gamma0), ("exact", margins)):
                weight = expit(margin - gamma0 * METHODS[m].relative - gaps)
                ratio = weight[flipped == 1].mean() / weight[flipped == 0].mean()
                row[f"at the last gaps, {words} margins"] = float(ratio)
        rows += [row] * bool(ratios)
    return rows


def ablations(results: Runs) -> list[Row]:
    """Return one change at a time, and the grid of γ0 and τ, less the chosen settings."""
    study, rows = results.study, []
    for task, m, noise in itertools.product(study.tasks, FAMILIES, study.ablation_noises):
        chosen: outcomes.BySeed = {}
        for change in study.changes:
            again = results.repeated("ablation", task, m, noise, change=change)
            found = {seed: last({"result": result}) for seed, result in again.items()}
            chosen = chosen or found  # the first change is none
            gain = tested(less(found, chosen))
            words = ", ".join(f"{k} = {v}" for k, v in change.items()) or "as chosen"
            row = {"task": task, "method": METHODS[m].label, "labels": labels(noise)}
            row |= {"change": words, "seeds": gain.seeds, "accuracy": mean(found.values())}
            rows.append({**row, "difference": gain.mean, "corrected": gain.corrected})
    return rows


def language(results: Runs) -> list[Row]:
    """Return what each method did to the language model, mean over the seeds that all have."""
    cells: dict[Any, dict[int, Any]] = {}
    for run in results.records.values():
        if run["stage"] == "search":
            where = METHODS[run["method"]].label, labels((run["kind"], run["rate"]))
            cells.setdefault(where, {})[run["seed"]] = run["result"] | {"accuracy": last(run)}
    common = set.intersection(*map(set, cells.values()))
    kept = ("accuracy", "sentiment", "divergence", "spread")
    return [
        {"method": m, "labels": words, "seeds": len(common),
         **{k: mean(runs[s][k] for s in common if k in runs[s]) for k in kept}}
        for (m, words), runs in cells.items()
    ]  # fmt: skip


def status(results: Runs) -> list[Row]:
    """Return how many runs there are, their hours, and what references rank right in per cent."""
    groups: dict[Any, list[Any]] = {}
    for run in results.records.values():
        groups.setdefault((run.get("task", ""), run["stage"]), []).append(run)
    return [
        {"task": task, "stage": stage, "runs": len(runs),
         "hours": sum(run["seconds"] for run in runs) / 3600,
         "accuracy": mean(100 * r["result"]["ranking"] for r in runs if stage == "reference")}
        for (task, stage), runs in groups.items()
    ]  # fmt: skip


PEOPLE, ALL = ("tasks", "raters"), ("tasks", "raters", "language")
TABLES: dict[str, tuple[Callable[[Runs], list[Row]], tuple[str, ...]]] = {  # of which studies
    "equal_settings_by_task": (by_task, PEOPLE),
    "equal_settings_by_kappa": (by_kappa, PEOPLE),
    "equal_settings_by_labels": (by_labels, ALL),
    "configurations": (configurations, PEOPLE),
    "kappa": (over_kappa, PEOPLE),
    "accuracy": (accuracy, PEOPLE),
    "training_pairs": (pairs, ("tasks",)),
    "ablations": (ablations, ("tasks",)),
    "language_model": (language, ("language",)),
    "runs": (status, ALL),
}


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def verdict_table(studies: dict[str, Runs]) -> str:
    head = ["compared", "where", "difference", "corrected interval", "single settings", "verdict"]
    lines = [head, ["---"] * len(head)]
    for row in verdict(studies):
        ends = (signed(row["difference"] + sign * row["corrected"]) for sign in (-1, 1))
        row |= {"difference": signed(row["difference"]), "corrected interval": " to ".join(ends)}
        lines.append([row[name] for name in head])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> Any:
    return f"{value:.4g}".replace("nan", "") if isinstance(value, float) else value


def write(studies: dict[str, Runs], docs: Path) -> None:
    (docs / "study").mkdir(parents=True, exist_ok=True)
    for table, (make, names) in TABLES.items():
        rows = [
            ({"study": name} if len(names) > 1 else {}) | row
            for name in names if name in studies for row in make(studies[name])
        ]  # fmt: skip
        with (docs / "study" / f"{table}.csv").open("w", encoding="utf-8") as file:
            columns = dict.fromkeys(column for row in rows for column in row)
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: shown(v) for k, v in row.items()} for row in rows)
    page = docs / "reproduction.md"
    text = (page if page.exists() else DOCS / page.name).read_text("utf-8")
    before, mark, rest = text.partition("<!-- verdict -->\n")
    _, end, after = rest.partition("<!-- /verdict -->")
    if not end:
        raise ValueError(f"{page} must have the marks <!-- verdict --> and <!-- /verdict -->")
    page.write_text(f"{before}{mark}\n{verdict_table(studies)}\n\n{end}{after}", "utf-8")

"""Tables of the study's two pages, each a function of the results that returns Markdown."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.special import expit

from benchmarks.baselines import METHODS
from benchmarks.noise_study import plan
from benchmarks.noise_study.outcomes import (
    FAMILIES,
    FEWEST,
    LEVEL,
    OURS,
    WAYS,
    Comparison,
    Results,
    accuracy_of,
    compare,
    compared,
    holm,
    interval,
    mean_by_seed,
    over_noises,
    paired,
    pairings,
)
from benchmarks.noise_study.tasks import RATER_KINDS

DEFAULT = (4.0, 10.0)  # gamma0 and tau of the TRL trainers
STAGES = ("reference", "search", "trace", "ablation", "kappa", "redrawn")
EMPTY = "Not run yet."
RANGES = ((0.0, 0.1), (0.1, 1.0), (1.0, 10.0), (10.0, 100.0), (100.0, 1e5))  # of κ


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    known = [row for row in rows if any(cell != "–" for cell in row[1:])]
    if not known:
        return EMPTY
    lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *known]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_method(results: Results, columns: dict[str, Callable[[str], str]]) -> str:
    """Return a row for each method that was run, of what each column's function says of it."""
    rows = [
        [method.label, *(cell(name) for cell in columns.values())]
        for name, method in results.methods().items()
    ]
    return markdown([f"method, {seeds(results.study.seeds)}", *columns], rows)


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def pair(centre: float, half: float, sign: bool = False, digits: int = 1) -> str:
    text = number(centre, digits, sign)
    return text if math.isnan(half) else f"{text} ± {number(half, digits)}"


def noise_name(noise: tuple[str, float]) -> str:
    kind, rate = noise
    if kind in RATER_KINDS:
        return {"rater": "one rater", "as often": "uniform, as often"}[kind]
    words = {"uniform": "", "ambiguous": " ambiguous", "call": " of calls flipped"}
    return f"{rate:.0%}{words[kind]}"


def seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def label(names: tuple[str, str]) -> str:
    return " − ".join(METHODS[name].label for name in names)


def status(results: Results) -> str:
    study, lines, missing = results.study, [], 0
    methods = results.methods()
    for task in study.tasks:
        counts = []
        for stage in STAGES:
            ofs = [r for r in results.of_stage(stage) if r["task"] == task]
            counts.append(f"{len(ofs)} ({sum(r['seconds'] for r in ofs) / 3600:.2f} h)")
        cells = list(itertools.product(methods, results.noises()))
        full = sum(len(results.runs(task, m, *n)) == study.seeds for m, n in cells)
        missing += len(cells) - full
        lines.append([task, *counts, f"{full} of {len(cells)}"])
    text = markdown(["task", *(f"{s} runs (computing)" for s in STAGES), "cells complete"], lines)
    machines = {r["result"]["machine"] for r in results.of_stage("cost")}
    if machines:
        text += f"\n\nMachine: {', '.join(machines)}; one thread a worker."
    absent = [METHODS[name].label for name in study.methods if name not in methods]
    if absent:
        text += f"\n\n**Not run yet:** {', '.join(absent)}."
    if study.kappas and not results.of_stage("kappa"):
        text += "\n\n**Not run yet:** γ-PO and its matched losses over κ at fixed settings."
    drawn = {run["task"] for run in results.of_stage("redrawn")}
    if lacking := [task for task in study.tasks if study.redrawn and task not in drawn]:
        text += "\n\n**Not run yet:** configurations drawn anew for each seed, on "
        text += f"{', '.join(lacking)}."
    if missing:
        text += (
            f"\n\n**The study is not complete:** {missing} cells (task, method, noise) have "
            f"fewer than {study.seeds} seeds or none. They are dashes below, or left out."
        )
    return text


def verdict(results: Results) -> str:
    """Return γ-PO against what it is to be held against, with tests of difference and equality."""
    rows: list[tuple[str, list[Comparison | None]]] = []
    equal = (
        ("equal settings", 0.0, "search"),
        ("equal settings, κ ≥ 1", 1.0, "search"),
        ("equal settings drawn anew, κ ≥ 1", 1.0, "redrawn"),
    )
    tuned = (
        ("tuned once for all seeds", WAYS["shared"]),
        ("tuned by each seed", WAYS["last"]),
        ("tuned by each seed, drawn anew", {"stage": "redrawn"}),
    )
    tasks = results.study.tasks
    for ours, base in FAMILIES.items():
        for theirs, (words, least, stage) in itertools.product((f"matched-{base}", base), equal):
            within = (least, math.inf)
            gains = [pooled(results, task, ours, theirs, within, stage) for task in tasks]
            name = f"{label((ours, theirs))}, {words}"
            if any(gains):
                rows.append((name, [compare(g) if g else None for g in gains]))
        for words, how in tuned:
            found = []
            for task in tasks:
                _, means = over_noises(results, task, (ours, base), **how)
                first, second = means[ours], means[base]
                gain = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
                found.append(compare(gain) if gain else None)
            if any(found):
                rows.append((f"{label((ours, base))}, {words}", found))
    return judged(results, rows)


def arms(results: Results) -> str:
    """Return γ-PO against matched and base losses where people's labels, or as many, are wrong."""
    return by_noise(results, results.noises(), ("test", "clear"))


def by_noise(
    results: Results, noises: Iterable[tuple[str, float]], tested: Sequence[str] = ("test",)
) -> str:
    """Return γ-PO against matched and base losses at equal settings, for each noise by itself."""
    rows: list[tuple[str, list[Comparison | None]]] = []
    for (ours, base), noise in itertools.product(FAMILIES.items(), noises):
        for theirs, of in itertools.product((f"matched-{base}", base), tested):
            more = {"noises": [noise], "of": of}
            gains = [pooled(results, task, ours, theirs, **more) for task in results.study.tasks]
            words = {"test": "; all pairs", "clear": "; pairs rated more than 1 apart"}[of]
            labels = noise_name(noise) if noise[1] else "clean"
            name = f"{label((ours, theirs))}; labels: {labels}{words if tested[1:] else ''}"
            rows.append((name, [compare(g) if g else None for g in gains]))
    return judged(results, rows)


def judged(results: Results, rows: list[tuple[str, list[Comparison | None]]]) -> str:
    """Return comparisons with what their tests say, after Holm's correction over all of them."""
    cells = [cell for _, found in rows for cell in found if cell]
    different = dict(zip(map(id, cells), holm([c.p for c in cells]), strict=True))
    equivalent = dict(zip(map(id, cells), holm([c.equivalence_p for c in cells]), strict=True))

    def shown(cell: Comparison | None) -> str:
        if cell is None:
            return "–"
        if math.isnan(cell.p):
            few = "" if cell.seeds == count else f": not tested, {seeds(cell.seeds)} only"
            return number(cell.mean, 2, True) + few
        words = ["equivalent"] * (equivalent[id(cell)] < LEVEL)
        if different[id(cell)] < LEVEL:
            words.append("better" if cell.mean > 0 else "worse")
        words = words or ["open"]
        if cell.seeds < count:
            words.append(f"{seeds(cell.seeds)} only")
        text = f"{number(cell.mean, 2, True)} ± {number(cell.half, 2)}"
        return f"{text} ({number(cell.detectable, 2)}): {', '.join(words)}"

    count, tasks = results.study.seeds, results.study.tasks
    columns = [i for i in range(len(tasks)) if any(found[i] for _, found in rows)]
    few = " (too few to test)" if count < FEWEST else ""
    return markdown(
        [f"difference, {seeds(count)}{few}", *(tasks[i] for i in columns)],
        [[name, *(shown(found[i]) for i in columns)] for name, found in rows],
    )


def pooled(
    results: Results, task: str, ours: str, theirs: str,
    within: tuple[float, float] = (0, math.inf), stage: str = "search", **more: Any,
) -> list[float]:  # fmt: skip
    """Return by seed the mean gain at equal settings over the configurations with κ in a range."""
    gains = results.at_equal_settings(task, ours, theirs, stage, **more)
    means = []
    for seed in range(results.study.seeds):
        kappas = results.kappas(ours, seed + 1 if stage == "redrawn" else 0)
        kept = [
            gain.get(seed)
            for gain, kappa in zip(gains, kappas, strict=True)
            if within[0] <= kappa < within[1]
        ]
        known = [gain for gain in kept if gain is not None]
        if known and len(known) == len(kept):
            means.append(float(np.mean(known)))
    return means


def by_kappa(results: Results) -> str:
    """Return gains at equal settings, separated by the strength of the configurations."""
    rows = []
    for (ours, base), task in itertools.product(FAMILIES.items(), results.study.tasks):
        for theirs in (f"matched-{base}", base):
            if theirs not in results.methods():
                continue
            row = [f"{label((ours, theirs))}, {task}"]
            for within in (*used(results), (0.0, math.inf)):
                gains = pooled(results, task, ours, theirs, within)
                row.append(pair(*interval(gains), sign=True, digits=2))
            rows.append(row)
    kappas = results.kappas(next(iter(FAMILIES)))
    head = [
        f"{number_of_kappa(low)} ≤ κ < {number_of_kappa(high)} "
        f"({sum(low <= k < high for k in kappas)})"
        for low, high in used(results)
    ]
    return markdown([f"difference, {seeds(results.study.seeds)}", *head, "all"], rows)


def number_of_kappa(kappa: float) -> str:
    return f"{kappa:g}"


def used(results: Results) -> list[tuple[float, float]]:
    """Return the ranges of κ that hold a configuration."""
    kappas = results.kappas(next(iter(FAMILIES)))
    return [(low, high) for low, high in RANGES if any(low <= k < high for k in kappas)]


def over_kappa(results: Results) -> str:
    """Return γ-PO − its matched losses where κ alone changes."""
    if not results.of_stage("kappa"):
        return EMPTY
    runs = {plan.key(run): run for run in results.of_stage("kappa")}
    rows = []
    for task, (ours, *matched) in itertools.product(
        results.study.tasks, plan.KAPPA_METHODS.values()
    ):
        planned = list(plan.over_kappa(results.study, results.records, task))
        for theirs in matched:
            row = [f"{label((ours, theirs))}, {task}"]
            for kappa in results.study.kappas:
                tau = float(f"{plan.KAPPA_GAMMA0**2 / kappa:.6g}")
                points: dict[str, dict[int, list[float]]] = {ours: {}, theirs: {}}
                for spec in planned:
                    run = runs.get(plan.key(spec))
                    if run and spec["settings"].get("tau") == tau and spec["method"] in points:
                        value = 100 * plan.score(run["result"], "noisy", "last", "test")
                        points[spec["method"]].setdefault(spec["seed"], []).append(value)
                means = [{s: float(np.mean(v)) for s, v in p.items()} for p in points.values()]
                complete = all(len(mean) == results.study.seeds for mean in means)
                gain = paired(*means)[:2] if complete else (math.nan, math.nan)
                row.append(pair(*gain, sign=True, digits=2))
            rows.append(row)
    head = [f"κ = {kappa:g}" for kappa in results.study.kappas]
    return markdown([f"difference, {seeds(results.study.seeds)}", *head], rows)


def choices(results: Results) -> str:
    """Return which configuration is chosen for all seeds, with the κ of γ-PO's."""
    noises, rows = results.noisy(), []

    def chosen(task: str, method: str, noise: tuple[str, float]) -> tuple[int, dict] | None:
        runs = plan.choose_for_all(results.study, results.records, task, method, *noise)
        if not runs:
            return None
        tried = plan.configurations(method, task, results.study.configurations)
        return tried.index(runs[0]["settings"]) + 1, runs[0]["settings"]

    for (ours, base), task in itertools.product(FAMILIES.items(), results.study.tasks):
        row = [f"{METHODS[ours].label}, {task}"]
        for noise in noises:
            mine, other = chosen(task, ours, noise), chosen(task, base, noise)
            if not mine or not other:
                row.append("–")
                continue
            kappa = mine[1]["gamma0"] ** 2 / mine[1]["tau"]
            row.append(f"{mine[0]} (κ = {kappa:.2g}); {other[0]}")
        rows.append(row)
    head = f"number of the setting, {seeds(results.study.seeds)}"
    return markdown([head, *map(noise_name, noises)], rows)


def configurations(results: Results) -> str:
    """Return the settings that γ-PO and its bases share."""
    rows = []
    study = results.study
    columns = [
        (task, plan.configurations("gamma-dpo", task, study.configurations)) for task in study.tasks
    ]
    for k in range(study.configurations):
        first = columns[0][1][k]
        cells = [f"{tried[k]['lr']:.2g}, {tried[k]['beta']:.2g}" for _, tried in columns]
        kappa = first["gamma0"] ** 2 / first["tau"]
        rows.append(
            [str(k + 1), *cells, f"{first['gamma0']:.2g}", f"{first['tau']:.2g}", f"{kappa:.2g}"]
        )
    head = [f"learning rate, β: {task}" for task in study.tasks]
    return markdown(["setting", *head, "γ0 (SimPO's margin)", "τ", "κ"], rows)


def language(results: Results) -> str:
    """Return what each method did to the language model, mean over the seeds that all have."""
    cells = {
        f"{method.label}, {noise_name(noise)}": {
            run["seed"]: run["result"] | {"accuracy": accuracy_of(run)}
            for run in results.of_stage("search")
            if run["method"] == name and (run["kind"], run["rate"]) == noise
        }
        for (name, method), noise in itertools.product(results.methods().items(), results.noises())
    }
    if not cells:
        return EMPTY
    common = set.intersection(*map(set, cells.values()))
    columns = {"accuracy": 1, "sentiment": 3, "divergence": 2, "spread": 2}
    rows = [
        [name, *(number(mean_of(runs[s].get(k) for s in common), d) for k, d in columns.items())]
        for name, runs in cells.items()
    ]
    head = [f"method, labels, {seeds(len(common))}", "accuracy on clean pairs, %",
            "sentiment, −1 to 1", "KL to the reference, nats",
            "spread of margins / γ0"]  # fmt: skip
    return markdown(head, rows)


def references(results: Results) -> str:
    """Return what the policy ranks right before any training, in per cent."""
    runs = results.of_stage("reference")
    if not runs:
        return EMPTY
    cells = []
    for task in results.study.tasks:
        values = [100 * run["result"]["ranking"] for run in runs if run["task"] == task]
        cells.append(pair(*interval(values)))
    count = len({run["seed"] for run in runs})
    return markdown(
        [f"without training, {seeds(count)}", *results.study.tasks],
        [["by the policy's log-probability", *cells],
         ["by the reward relative to the reference", *["50.0"] * len(cells)]],
    )  # fmt: skip


def gains(results: Results) -> str:
    """Return the mean gain of each γ method over the noisy cells, and how many it won and lost."""
    tasks, rows = results.study.tasks, []
    for names in pairings(results.methods()):
        if names[0] not in OURS:
            continue
        for way, how in WAYS.items():
            row = [label(names), way]
            for task in tasks:
                found = compared(results, task, names, **how).items()
                cells = [f for noise, f in found if noise[1] > 0 and not math.isnan(f[2])]
                better = sum(gain > 0 and p < LEVEL for gain, _, p in cells)
                worse = sum(gain < 0 and p < LEVEL for gain, _, p in cells)
                _, means = over_noises(results, task, names, **how)
                mean = pair(*paired(means[names[0]], means[names[1]])[:2], sign=True)
                row.append(f"{mean}; {better}, {worse} of {len(cells)}" if cells else "–")
            rows.append(row)
    return markdown([f"difference, {seeds(results.study.seeds)}", "chosen", *tasks], rows)


def overall(results: Results, of: str) -> str:
    """Mean accuracy over the noisy cells, by task, of the methods that have them all."""
    columns: dict[str, Callable[[str], str]] = {}
    for task, (way, how) in itertools.product(results.study.tasks, WAYS.items()):
        complete = [
            method
            for method in results.methods()
            if all(results.accuracy(task, method, *n, of=of, **how) for n in results.noisy())
        ]
        count, means = over_noises(results, task, complete, of=of, **how)
        columns[f"{task}, {way} ({count})"] = lambda m, means=means: pair(
            *interval(means.get(m, {}).values())
        )
    return by_method(results, columns)


def accuracies(results: Results) -> str:
    def table(task: str, **how: Any) -> str:
        def cell(m: str, noise: tuple[str, float]) -> str:
            return pair(*interval(results.accuracy(task, m, *noise, **how).values()))

        columns = {noise_name(n): partial(cell, noise=n) for n in results.noises()}
        return by_method(results, columns)

    return folded(results, table)


def differences(results: Results) -> str:
    def table(task: str, **how: Any) -> str:
        rows = []
        for names in pairings(results.methods()):
            found = compared(results, task, names, **how).values()
            cells = [pair(*f[:2], sign=True) + ("*" if f[2] < LEVEL else "") for f in found]
            rows.append([label(names), *cells])
        head = f"difference, {seeds(results.study.seeds)}"
        return markdown([head, *map(noise_name, results.noises())], rows)

    return folded(results, table)


def folded(results: Results, table: Callable[..., str]) -> str:
    """Return a table for each task and way of choosing, to be unfolded by the reader."""
    fold = '<details markdown="1"><summary>{}, {}</summary>\n\n{}\n\n</details>'
    tables = {
        (task, way): table(task, **how)
        for task, (way, how) in itertools.product(results.study.tasks, WAYS.items())
    }
    return "\n\n".join(fold.format(*key, text) for key, text in tables.items() if text != EMPTY)


def selection(results: Results) -> str:
    """Return what choosing on clean validation labels would have gained, over the noisy cells."""

    def cell(m: str, task: str, checkpoint: str) -> str:
        gains = []
        for noise in results.noisy():
            clean, noisy = (
                results.accuracy(task, m, *noise, labels=labels, checkpoint=checkpoint)
                for labels in ("clean", "noisy")
            )
            if clean and noisy:
                gains.append(np.mean(list(clean.values())) - np.mean(list(noisy.values())))
        return number(float(np.mean(gains)) if gains else None, 1, True)

    ways = itertools.product(results.study.tasks, ("last", "best"))
    columns = {f"{t}, {c}": partial(cell, task=t, checkpoint=c) for t, c in ways}
    return by_method(results, columns)


def watched(results: Results) -> dict[str, tuple[str, tuple[str, float]]]:
    """Return the cells, task and noise, whose runs were done again and watched, by their name."""
    noises = [noise for noise in results.noises() if noise[1] in plan.TRACED_RATES]
    cells = itertools.product(results.study.tasks, noises)
    return {f"{task}, {noise_name(noise)}": (task, noise) for task, noise in cells}


def last(values: Sequence[Any]) -> Any:
    return values[-1] if values else None


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def weights(results: Results) -> str:
    """Return the ratio of weights in training, and where γ-PO's is above its base's."""

    @functools.cache
    def ratio(m: str, task: str, noise: tuple[str, float]) -> float | None:
        runs = results.repeated("trace", task, m, *noise).values()
        pairs = [last(run["weights"]) for run in runs]
        return mean_of(w[0] / w[1] for w in pairs if w and w[0] and w[1])

    cells = watched(results)
    columns = {name: lambda m, c=c: number(ratio(m, *c), 2) for name, c in cells.items()}
    text = by_method(results, columns)
    for ours, base in FAMILIES.items():
        both = [(ratio(ours, *c), ratio(base, *c)) for c in cells.values()]
        known = [(first, second) for first, second in both if first and second]
        above = sum(first > second for first, second in known)
        text += f"\n\n{label((ours, base))}: higher in {above} of {len(known)} cells."
    return text


def suppression(results: Results) -> str:
    """Return how much the margins change the ratio of weights at the gaps that training saw."""
    cells, rows, changes = watched(results), [], []
    for m in FAMILIES:
        row = [METHODS[m].label]
        for task, noise in cells.values():
            run = traced(results, task, m, noise)
            if not run:
                row.append("–")
                continue
            gamma0 = results.chosen(task, m, *noise, seed=0)["settings"]["gamma0"]
            gaps, flipped, margins, _ = map(np.array, run["pairs"][-1])
            centre = gamma0 if METHODS[m].relative else 0.0
            ratios = []
            for shift in (gamma0 - centre, margins - centre):
                weight = expit(shift - gaps)
                ratios.append(weight[flipped == 1].mean() / weight[flipped == 0].mean())
            row.append(" → ".join(number(ratio, 2) for ratio in ratios))
            changes.append(ratios[1] / ratios[0] - 1)
        rows.append(row)
    same = sum(abs(change) < 0.01 for change in changes)
    lower, higher = (sum(s * change >= 0.01 for change in changes) for s in (-1, 1))
    return (
        f"{markdown([f'method, {seeds(1)}', *cells], rows)}\n\nChanged by less than 1 % in {same} "
        f"of {len(changes)} cells, lower by more in {lower}, higher by more in {higher}."
    )


def traced(results: Results, task: str, method: str, noise: tuple[str, float]) -> Any:
    run = results.repeated("trace", task, method, *noise).get(0)
    return run if run and run["pairs"] else None


def detection(results: Results) -> str:
    names = {"auc_loss": "loss", "auc_margin": "margin", "auc_smoothing": "implied smoothing"}
    cells, rows = watched(results), []
    for (m, method), (name, words) in itertools.product(results.methods().items(), names.items()):
        if name != "auc_loss" and m not in OURS:
            continue
        row = [f"{method.label}: {words}"]
        for task, noise in cells.values():
            runs = results.repeated("trace", task, m, *noise).values()
            row.append(number(mean_of(last(run[name]) for run in runs), 3))
        rows.append(row)
    return markdown([f"ranking, {seeds(results.study.seeds)}", *cells], rows)


def costs(results: Results) -> str:
    records = sorted(results.of_stage("cost"), key=lambda r: r["result"]["parameters"])
    if not records:
        return "Not measured yet."
    times = [r["result"]["microseconds"] for r in records]
    head = [
        "method",
        *(f"{r['task']} ({r['result']['parameters']:,} parameters)" for r in records),
    ]
    rows = [
        [method.label, *(
            f"{t[m]['0.5'] / 1000:.2f} ms, {t[m]['0.5'] / t['dpo']['0.5']:.2f}" if m in t else "–"
            for t in times
        )]
        for m, method in results.methods().items()
    ]  # fmt: skip
    return markdown(head, rows)


def loops(results: Results) -> str:
    rows = []
    for record in results.of_stage("loop"):
        gamma0, tau, result = record["gamma0"], record["tau"], record["result"]
        both = [
            [number(100 * r["top_tenth"]), number(r["negative"], 2), number(r["largest"], 2)]
            for r in (result["exact"], result["loop"])
        ]
        rows.append([
            f"{gamma0:g}, {tau:g}, {gamma0**2 / tau:.3g}", number(result["error"], 4),
            number(result["one_step_more"], 4), number(100 * result["out_of_order"]),
            *(f"{exact}; {loop}" for exact, loop in zip(*both, strict=True)),
        ])  # fmt: skip
    head = ["γ0, τ, κ", "largest error / γ0", "moved by one more step / γ0",
            "% of pairs of gaps out of order", "% of the budget in the top tenth: exact; loop",
            "mean margin of negative gaps / γ0: exact; loop",
            "largest / γ0: exact; loop"]  # fmt: skip
    return markdown(head, rows)


def change_name(change: dict[str, Any]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in change.items()) or "as chosen: accuracy"


def ablations(results: Results) -> str:
    study = results.study
    columns = list(itertools.product(study.tasks, plan.ABLATION_METHODS, study.ablation_noises))
    changes = [c for name in study.changes if name != "grid" for c in plan.CHANGES[name]]
    rows = []
    for change in changes:
        row = [change_name(change)]
        for task, method, noise in columns:
            values = results.ablation(task, method, noise, change)
            base = results.ablation(task, method, noise, {})
            gain = interval(values.values()) if not change else paired(values, base)[:2]
            row.append(pair(*gain, sign=bool(change)))
        rows.append(row)
    head = [f"{t}, {METHODS[m].label}, {noise_name(n)}" for t, m, n in columns]
    return markdown([f"change, {seeds(study.ablation_seeds)}", *head], rows)


def grid(results: Results) -> str:
    """Compare settings on their mean over flip rates, and each tau on that over gamma0 as well."""
    study, rows = results.study, []
    for m, task in itertools.product(plan.ABLATION_METHODS, study.tasks):
        fields = {
            (change["gamma0"], change["tau"]): mean_by_seed(
                [results.ablation(task, m, noise, change) for noise in study.ablation_noises]
            )
            for change in plan.GRID
        }
        taus = [mean_by_seed([fields[g, tau] for g in plan.GAMMA0S]) for tau in plan.TAUS]
        gains = [paired(mean, taus[-1])[:2] for mean in taus[:-1]]
        best = max(fields, key=lambda field: interval(fields[field].values())[0])
        gains.append(paired(fields[best], fields[DEFAULT])[:2])
        cells = [pair(*gain, sign=True) for gain in gains]
        if fields[best]:
            cells[-1] += " at {:g}, {:g}".format(*best)
        rows.append([f"{METHODS[m].label}, {task}", *cells])
    head = [f"τ = {tau:g}" for tau in plan.TAUS[:-1]]
    head = [seeds(study.ablation_seeds), *head]
    return markdown([*head, "best field − field {:g}, {:g}".format(*DEFAULT)], rows)

"""Tables and figures of docs/reproduction.md, from the results file alone."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from benchmarks.baselines import METHODS
from benchmarks.noise_study import plan
from benchmarks.noise_study.plan import Records, Study

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
OURS = ("gamma-dpo", "gamma-dpo-published", "gamma-simpo", "gamma-simpo-published")
SHOWN = ("dpo", "simpo", *OURS)
LEVEL = 0.05
DEFAULT = (4.0, 10.0)  # gamma0 and tau of the TRL trainers
WAYS = {  # how settings and checkpoint are chosen: for each seed by itself, or for all seeds
    "last": {"checkpoint": "last"},
    "best": {"checkpoint": "best"},
    "shared": {"checkpoint": "last", "shared": True},
}


def write(study: Study, records: Records, docs: Path) -> None:
    """Rewrite the page's tables, each between its two marks, and draw the figures."""
    results = Results(study, records)
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / PAGE.name
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    tables: dict[str, Callable[[], str]] = {
        "status": lambda: status(results),
        "verdict": lambda: verdict(results),
        "mean": lambda: overall(results, "test"),
        "ranking": lambda: overall(results, "ranking"),
        "accuracy": lambda: accuracies(results),
        "tests": lambda: differences(results),
        "selection": lambda: selection(results),
        "weights": lambda: weights(results),
        "suppression": lambda: suppression(results),
        "detection": lambda: detection(results),
        "cost": lambda: costs(results),
        "loop": lambda: loops(results),
        "ablation": lambda: ablations(results),
        "grid": lambda: grid(results),
    }
    for name, table in tables.items():
        marks = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        filled = f"{marks[0]}\n{table()}\n\n{marks[1]}"
        text, count = re.subn(pattern, lambda _, filled=filled: filled, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} must have the marks of {name!r} once, has them {count} times")
    page.write_text(text, encoding="utf-8")
    for draw in (draw_accuracy, draw_rewards, draw_margins, draw_weights, draw_roc, draw_grid):
        draw(results, docs / f"reproduction_{draw.__name__.removeprefix('draw_')}.png")


class Results:
    """Looks up the runs that were chosen in a cell."""

    def __init__(self, study: Study, records: Records) -> None:
        self.study, self.records = study, records
        self._chosen: dict[Any, Any] = {}

    def chosen(self, *cell: Any, seed: int, labels: str = "noisy", checkpoint: str = "last") -> Any:
        how = (*cell, seed, labels, checkpoint)
        if how not in self._chosen:
            self._chosen[how] = plan.choose(self.study, self.records, *how)
        return self._chosen[how]

    def runs(self, *cell: Any, labels: str = "noisy", checkpoint: str = "last") -> dict[int, Any]:
        """Return the results of the chosen runs by seed."""
        runs = {
            seed: self.chosen(*cell, seed=seed, labels=labels, checkpoint=checkpoint)
            for seed in range(self.study.seeds)
        }
        return {seed: run["result"] for seed, run in runs.items() if run}

    def shared(self, *cell: Any, checkpoint: str = "last") -> dict[int, Any]:
        """Return by seed the results of the one setting that is chosen for all of them."""
        runs = plan.choose_for_all(self.study, self.records, *cell, checkpoint=checkpoint) or []
        return {run["seed"]: run["result"] for run in runs}

    def repeated(self, stage: str, *cell: Any, **more: Any) -> dict[int, Any]:
        """Return the results of another stage with the chosen settings, by seed."""
        results = {}
        for seed in range(self.study.seeds):
            if chosen := self.chosen(*cell, seed=seed):
                spec = plan.spec(self.study, stage, *cell, seed)
                run = self.records.get(plan.key({**spec, "settings": chosen["settings"], **more}))
                if run:
                    results[seed] = run["result"]
        return results

    def accuracy(
        self, *cell: Any, labels: str = "noisy", checkpoint: str = "last", of: str = "test",
        shared: bool = False,
    ) -> dict[int, float]:  # fmt: skip
        """Return percentages by seed."""
        if shared:
            runs = self.shared(*cell, checkpoint=checkpoint)
        else:
            runs = self.runs(*cell, labels=labels, checkpoint=checkpoint)
        return {s: 100 * plan.score(r, labels, checkpoint, of) for s, r in runs.items()}

    def noises(self) -> list[tuple[str, float]]:
        return sorted(self.study.noises, key=lambda noise: (noise[0] == "ambiguous", noise[1]))

    def ablation(self, task: str, method: str, noise: tuple[str, float], change: dict) -> dict:
        runs = self.repeated("ablation", task, method, *noise, change=change)
        return {s: 100 * plan.score(r, "noisy", "last", "test") for s, r in runs.items()}

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        return [record for record in self.records.values() if record["stage"] == stage]


# --- statistics ---


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t-interval (NaN for fewer than two)."""
    values = list(values)
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float]:
    """Return the mean difference, its half width and the p of a paired t-test, over seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    gains = [ours[seed] - theirs[seed] for seed in seeds]
    centre, half = interval(gains)
    if len(gains) < 2:
        return centre, half, math.nan
    if half == 0:  # alike in every seed
        return centre, half, 1.0 if centre == 0 else 0.0
    t = centre / half * stats.t.ppf(0.975, len(gains) - 1)
    return centre, half, float(2 * stats.t.sf(abs(t), len(gains) - 1))


def mean_by_seed(runs: Sequence[dict[int, float]]) -> dict[int, float]:
    """Return the mean over runs of each seed that all of them have."""
    seeds = set.intersection(*map(set, runs)) if runs else set()
    return {seed: float(np.mean([run[seed] for run in runs])) for seed in sorted(seeds)}


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method; NaN stays out."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted


def pairings() -> list[tuple[str, str]]:
    """Return what is compared: all with DPO, or with SimPO where the reward has no reference."""
    baselines = {False: "dpo", True: "simpo"}
    peers = [(name, baselines[method.averaged]) for name, method in METHODS.items()]
    loops = [(name, f"{name}-published") for name in ("gamma-dpo", "gamma-simpo")]
    return [(ours, theirs) for ours, theirs in peers + loops if ours != theirs]


def compared(
    results: Results, task: str, names: tuple[str, str], **how: Any
) -> dict[tuple[str, float], tuple[float, float, float]]:
    """Compare two methods in every noise: (gain, half width, p adjusted for the noises)."""
    found = {}
    for noise in results.noises():
        ours, theirs = (results.accuracy(task, name, *noise, **how) for name in names)
        found[noise] = paired(ours, theirs)
    adjusted = holm([p for *_, p in found.values()])
    return {noise: (*f[:2], p) for (noise, f), p in zip(found.items(), adjusted, strict=True)}


def over_noises(
    results: Results, task: str, methods: Iterable[str], **how: Any
) -> tuple[int, dict[str, dict[int, float]]]:
    """Return how many noisy cells all the methods have, and by method and seed its mean over them.

    A method's seeds are those that it has in each of these cells.
    """
    table = {
        noise: {m: results.accuracy(task, m, *noise, **how) for m in methods}
        for noise in results.noises()
        if noise[1] > 0
    }
    cells = [cell for cell in table.values() if all(cell.values())]
    return len(cells), {m: mean_by_seed([cell[m] for cell in cells]) for m in methods}


# --- tables ---


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def pair(centre: float, half: float, sign: bool = False) -> str:
    text = number(centre, 1, sign)
    return text if math.isnan(half) else f"{text} ± {number(half)}"


def noise_name(noise: tuple[str, float]) -> str:
    kind, rate = noise
    return f"{rate:.0%}" + (" ambiguous" if kind == "ambiguous" else "")


def status(results: Results) -> str:
    study, lines, missing = results.study, [], 0
    stages = ("search", "trace", "ablation")
    for task in study.tasks:
        counts = []
        for stage in stages:
            ofs = [r for r in results.of_stage(stage) if r["task"] == task]
            counts.append(f"{len(ofs)} ({sum(r['seconds'] for r in ofs) / 3600:.2f} h)")
        cells = list(itertools.product(METHODS, results.noises()))
        full = sum(len(results.runs(task, m, *n)) == study.seeds for m, n in cells)
        missing += len(cells) - full
        lines.append([task, *counts, f"{full} of {len(cells)}"])
    text = markdown(["task", *(f"{s} runs (computing)" for s in stages), "cells complete"], lines)
    machines = {r["result"]["machine"] for r in results.of_stage("cost")}
    text += f"\n\nMachine: {', '.join(machines) or 'not recorded yet'}; one thread a worker."
    if missing:
        text += (
            f"\n\n**The study is not complete:** {missing} cells (task, method, noise) have "
            f"fewer than {study.seeds} seeds or none. Everything below is from what there is; a "
            "dash is what is missing."
        )
    return text


def verdict(results: Results) -> str:
    """Return the mean gain of each γ method over the noisy cells, and how many it won and lost."""
    tasks, rows = results.study.tasks, []
    for names in pairings():
        if names[0] not in OURS:
            continue
        for way, how in WAYS.items():
            row = [" − ".join(METHODS[name].label for name in names), way]
            for task in tasks:
                found = compared(results, task, names, **how).items()
                cells = [f for noise, f in found if noise[1] > 0 and not math.isnan(f[2])]
                better = sum(gain > 0 and p < LEVEL for gain, _, p in cells)
                worse = sum(gain < 0 and p < LEVEL for gain, _, p in cells)
                _, means = over_noises(results, task, names, **how)
                mean = pair(*paired(means[names[0]], means[names[1]])[:2], sign=True)
                row.append(f"{mean}; {better}, {worse} of {len(cells)}" if cells else "–")
            rows.append(row)
    return markdown(["difference", "chosen", *tasks], rows)


def overall(results: Results, of: str) -> str:
    """Mean accuracy over the noisy cells that all methods have, by task."""
    head, columns = ["method"], []
    for task, (way, how) in itertools.product(results.study.tasks, WAYS.items()):
        count, means = over_noises(results, task, METHODS, of=of, **how)
        head.append(f"{task}, {way} ({count})")
        columns.append(means)
    rows = [
        [method.label, *(pair(*interval(means[m].values())) for means in columns)]
        for m, method in METHODS.items()
    ]
    return markdown(head, rows)


def accuracies(results: Results) -> str:
    def table(task: str, **how: Any) -> str:
        rows = [
            [method.label, *(
                pair(*interval(results.accuracy(task, m, *noise, **how).values()))
                for noise in results.noises()
            )]
            for m, method in METHODS.items()
        ]  # fmt: skip
        return markdown(["method", *map(noise_name, results.noises())], rows)

    return folded(results, table)


def differences(results: Results) -> str:
    def table(task: str, **how: Any) -> str:
        rows = []
        for names in pairings():
            found = compared(results, task, names, **how).values()
            cells = [pair(*f[:2], sign=True) + ("*" if f[2] < LEVEL else "") for f in found]
            rows.append([" − ".join(METHODS[name].label for name in names), *cells])
        return markdown(["difference", *map(noise_name, results.noises())], rows)

    return folded(results, table)


def folded(results: Results, table: Callable[..., str]) -> str:
    """Return a table for each task and way of choosing, to be unfolded by the reader."""
    fold = '<details markdown="1"><summary>{}, {}</summary>\n\n{}\n\n</details>'
    return "\n\n".join(
        fold.format(task, way, table(task, **how))
        for task, (way, how) in itertools.product(results.study.tasks, WAYS.items())
    )


def selection(results: Results) -> str:
    """Return what choosing on clean validation labels would have gained, over the noisy cells."""
    rows = []
    for m, method in METHODS.items():
        row = [method.label]
        for task, checkpoint in itertools.product(results.study.tasks, ("last", "best")):
            gains = []
            for noise in results.noises():
                clean, noisy = (
                    results.accuracy(task, m, *noise, labels=labels, checkpoint=checkpoint)
                    for labels in ("clean", "noisy")
                )
                if clean and noisy and noise[1] > 0:
                    gains.append(np.mean(list(clean.values())) - np.mean(list(noisy.values())))
            row.append(number(float(np.mean(gains)) if gains else None, 1, True))
        rows.append(row)
    columns = itertools.product(results.study.tasks, ("last", "best"))
    return markdown(["method", *(", ".join(column) for column in columns)], rows)


def columns_of(results: Results, rates: Sequence[float]) -> list[tuple[str, tuple[str, float]]]:
    noises = [noise for noise in results.noises() if noise[1] in rates]
    return list(itertools.product(results.study.tasks, noises))


def last(values: Sequence[Any]) -> Any:
    return values[-1] if values else None


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def weights(results: Results) -> str:
    columns = columns_of(results, (0.2, 0.4))
    rows = []
    for m, method in METHODS.items():
        row = [method.label]
        for task, noise in columns:
            runs = results.repeated("trace", task, m, *noise).values()
            last_pairs = [last(run["weights"]) for run in runs]
            row.append(number(mean_of(w[0] / w[1] for w in last_pairs if w and w[0] and w[1]), 2))
        rows.append(row)
    return markdown(["method", *(f"{task}, {noise_name(noise)}" for task, noise in columns)], rows)


def suppression(results: Results) -> str:
    """Return how much the margins change the ratio of weights at the gaps that training saw."""
    columns, rows = columns_of(results, (0.2, 0.4)), []
    for m in plan.ABLATION_METHODS:
        row = [METHODS[m].label]
        for task, noise in columns:
            run = traced(results, task, m, noise)
            if not run:
                row.append("–")
                continue
            gamma0 = results.chosen(task, m, *noise, seed=0)["settings"]["gamma0"]
            gaps, flipped, margins, _ = map(np.array, run["pairs"][-1])
            centre = 0.0 if METHODS[m].averaged else gamma0
            ratios = []
            for shift in (gamma0 - centre, margins - centre):
                weight = expit(shift - gaps)
                ratios.append(weight[flipped == 1].mean() / weight[flipped == 0].mean())
            row.append(" → ".join(number(ratio, 2) for ratio in ratios))
        rows.append(row)
    return markdown(["method", *(f"{task}, {noise_name(noise)}" for task, noise in columns)], rows)


def detection(results: Results) -> str:
    columns = columns_of(results, (0.2, 0.4))
    rows = []
    for m, method in METHODS.items():
        names = {"auc_loss": "loss", "auc_margin": "margin", "auc_smoothing": "implied smoothing"}
        for name, label in names.items():
            if name != "auc_loss" and m not in OURS:
                continue
            row = [f"{method.label}: {label}"]
            for task, noise in columns:
                runs = results.repeated("trace", task, m, *noise).values()
                row.append(number(mean_of(last(run[name]) for run in runs), 3))
            rows.append(row)
    head = ["ranking", *(f"{task}, {noise_name(noise)}" for task, noise in columns)]
    return markdown(head, rows)


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
            f"{t[m]['0.5'] / 1000:.2f} ms, {t[m]['0.5'] / t['dpo']['0.5']:.2f}" for t in times
        )]
        for m, method in METHODS.items()
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
    return markdown(head, rows) if rows else "Not run yet."


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
    return markdown(["change", *head], rows)


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
    return markdown(["", *head, "best field − field {:g}, {:g}".format(*DEFAULT)], rows)


# --- figures ---

STYLE = {
    "dpo": ("#777777", "-"), "gamma-dpo": ("#0072b2", "-"), "gamma-dpo-published": ("#0072b2", ":"),
    "simpo": ("#222222", "-"), "gamma-simpo": ("#d55e00", "-"),
    "gamma-simpo-published": ("#d55e00", ":"), "margin-dpo": ("#999999", "--"),
    "cdpo": ("#009e73", "--"), "rdpo": ("#009e73", ":"), "ipo": ("#cc79a7", "-"),
    "beta-dpo": ("#e69f00", "-"), "dr-dpo": ("#56b4e9", "-"), "ropo": ("#8b4513", "-"),
    "alpha-dpo": ("#e69f00", "--"), "amapo": ("#cc79a7", "--"),
}  # fmt: skip


@contextmanager
def figure(path: Path, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1 + 3.7 * columns, 0.6 + 3.2 * rows)
    drawing, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    yield axes
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def legend(ax: Any, **options: Any) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=7, **options)


def draw_accuracy(results: Results, path: Path) -> None:
    """Accuracy against flip rate: the paper's Figure 4."""
    tasks = results.study.tasks
    groups = [(kind, averaged) for kind in ("uniform", "ambiguous") for averaged in (False, True)]
    with figure(path, len(tasks), len(groups), sharey="row") as axes:
        for (row, task), (column, (kind, averaged)) in itertools.product(
            enumerate(tasks), enumerate(groups)
        ):
            ax = axes[row, column]
            # Without flips there is nothing that could be uniform or not.
            noises = [n for n in results.noises() if n[0] == kind or n[1] == 0]
            for m, method in METHODS.items():
                points = [(n[1], *interval(results.accuracy(task, m, *n).values())) for n in noises]
                points = sorted(p for p in points if not math.isnan(p[1]))
                if method.averaged == averaged and points:
                    x, y, half = map(np.array, zip(*points, strict=True))
                    colour, line = STYLE[m]
                    ours = m in OURS
                    ax.plot(100 * x, y, line, color=colour, lw=2.2 if ours else 1.1, marker="o",
                            ms=3, label=method.label, zorder=3 if ours else 2)  # fmt: skip
                    if m in ("dpo", "simpo", "gamma-dpo", "gamma-simpo"):
                        ax.fill_between(100 * x, y - half, y + half, color=colour, alpha=0.12, lw=0)
            ax.set(title=f"{task}, {kind} flips", xlabel="labels flipped (%)")
            ax.grid(alpha=0.25)
            if row == 0:
                legend(ax)
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy (%)")


def traced(results: Results, task: str, method: str, noise: tuple[str, float]) -> Any:
    run = results.repeated("trace", task, method, *noise).get(0)
    return run if run and run["pairs"] else None


def figure_noise(results: Results) -> tuple[str, float]:
    return max(n for n in results.study.noises if n[0] == "uniform")


def draw_rewards(results: Results, path: Path) -> None:
    """Distribution of reward gaps on clean test pairs: the paper's Figure 2."""
    tasks, noise = results.study.tasks, figure_noise(results)
    with figure(path, 2, len(tasks)) as axes:
        for (row, averaged), (column, task) in itertools.product(
            enumerate((False, True)), enumerate(tasks)
        ):
            ax = axes[row, column]
            for m in SHOWN:
                run = traced(results, task, m, noise)
                if METHODS[m].averaged == averaged and run:
                    gaps = np.array(run["test_gaps"])
                    gaps = gaps / np.abs(gaps).mean()  # beta is each method's own
                    colour, line = STYLE[m]
                    ax.hist(gaps, np.linspace(-3, 4, 36), density=True, histtype="step", ls=line,
                            color=colour, lw=1.6, label=METHODS[m].label)  # fmt: skip
            ax.axvline(0, color="#bbbbbb", lw=0.8)
            ax.set(title=f"{task}, {noise_name(noise)} flipped", yticks=[],
                   xlabel="reward gap of a test pair / its mean size")  # fmt: skip
            legend(ax)


def draw_margins(results: Results, path: Path) -> None:
    """Margins against gaps over training: the paper's Figure 5."""
    noise = figure_noise(results)
    methods = ("gamma-dpo", "gamma-simpo")
    cells = list(itertools.product(methods, results.study.tasks))
    with figure(path, len(cells), 3) as axes:
        for row, (m, task) in enumerate(cells):
            run = traced(results, task, m, noise)
            if not run:
                continue
            count = len(run["pairs"])
            for column, i in enumerate((0, count // 2, count - 1)):
                ax = axes[row, column]
                gaps, flipped, margins, _ = map(np.array, run["pairs"][i])
                for value, colour, label in ((0, "#0072b2", "clean"), (1, "#d55e00", "flipped")):
                    which = flipped == value
                    ax.scatter(gaps[which], margins[which], s=6, c=colour, alpha=0.5, lw=0,
                               label=label)  # fmt: skip
                ax.set(title=f"{METHODS[m].label}, {task}, step {run['step'][i]}",
                       xlabel="reward gap", ylabel="margin $γ_i$")  # fmt: skip
                legend(ax)


def draw_weights(results: Results, path: Path) -> None:
    """Pair weight of flipped over that of clean pairs, over training."""
    tasks, noise = results.study.tasks, figure_noise(results)
    with figure(path, 2, len(tasks)) as axes:
        for (row, averaged), (column, task) in itertools.product(
            enumerate((False, True)), enumerate(tasks)
        ):
            ax = axes[row, column]
            for m, method in METHODS.items():
                runs = [
                    r for r in results.repeated("trace", task, m, *noise).values()
                    if r["weights"] and not r["diverged"] and all(all(w) for w in r["weights"])
                ]  # fmt: skip
                if method.averaged != averaged or not runs:
                    continue
                ratios = np.mean([[w[0] / w[1] for w in r["weights"]] for r in runs], 0)
                colour, line = STYLE[m]
                ax.plot(runs[0]["step"], ratios, line, color=colour, label=method.label,
                        lw=2.2 if m in OURS else 1.1)  # fmt: skip
            ax.axhline(1, color="#bbbbbb", lw=0.8)
            ax.set(title=f"{task}, {noise_name(noise)} flipped", xlabel="training step",
                   ylabel="weight, flipped / clean")  # fmt: skip
            if column == 0:
                legend(ax)


def draw_roc(results: Results, path: Path) -> None:
    """Finding flipped pairs by what training saw of them in its last part."""
    tasks, noise = results.study.tasks, figure_noise(results)
    with figure(path, 1, len(tasks)) as axes:
        for ax, task in zip(axes[0], tasks, strict=True):
            for m in ("dpo", "gamma-dpo", "simpo", "gamma-simpo"):
                run = traced(results, task, m, noise)
                if not run:
                    continue
                gaps, flipped, *rest = map(np.array, run["pairs"][-1])
                scores = {"loss": -gaps}
                if rest:
                    scores |= {"margin": -rest[0], "implied smoothing": rest[1]}
                for (name, value), line in zip(scores.items(), ("-", "--", ":"), strict=False):
                    order = np.argsort(-value, kind="stable")
                    hits = flipped[order] == 1
                    ax.plot(np.cumsum(~hits) / max(1, (~hits).sum()), np.cumsum(hits) / hits.sum(),
                            line, color=STYLE[m][0], lw=1.4,
                            label=f"{METHODS[m].label}: {name}")  # fmt: skip
            ax.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8)
            ax.set(title=f"{task}, {noise_name(noise)} flipped", xlabel="clean pairs taken for it",
                   ylabel="flipped pairs found")  # fmt: skip
            legend(ax, loc="lower right")


def draw_grid(results: Results, path: Path) -> None:
    """Accuracy over γ0 and τ; the labels in the fields are κ."""
    study = results.study
    noise = (*study.ablation_noises, figure_noise(results))[0]
    with figure(path, len(plan.ABLATION_METHODS), len(study.tasks)) as axes:
        for (row, m), (column, task) in itertools.product(
            enumerate(plan.ABLATION_METHODS), enumerate(study.tasks)
        ):
            ax = axes[row, column]
            values = [
                interval(results.ablation(task, m, noise, change).values())[0]
                for change in plan.GRID
            ]
            shape = len(plan.GAMMA0S), len(plan.TAUS)
            image = np.reshape(values, shape)
            ax.set_title(f"{METHODS[m].label}, {task}, {noise_name(noise)}")
            if np.isnan(image).all():
                continue
            shown = ax.imshow(image, origin="lower", aspect="auto", cmap="viridis")
            ax.figure.colorbar(shown, ax=ax, label="test accuracy (%)")
            for i, j in np.ndindex(*shape):
                kappa = plan.GAMMA0S[i] ** 2 / plan.TAUS[j]
                light = image[i, j] > (np.nanmin(image) + np.nanmax(image)) / 2
                ax.text(j, i, f"{kappa:.2g}" if kappa < 10 else f"{kappa:.0f}", ha="center",
                        va="center", fontsize=7, color="black" if light else "white")  # fmt: skip
            ax.set(xticks=range(shape[1]), xticklabels=[f"{t:g}" for t in plan.TAUS], xlabel="τ",
                   yticks=range(shape[0]), yticklabels=[f"{g:g}" for g in plan.GAMMA0S],
                   ylabel="γ0")  # fmt: skip

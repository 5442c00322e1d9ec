"""Figures of the study's two pages: SVG in the page's own text colour, at the width of the page."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines import METHODS
from benchmarks.noise_study import plan
from benchmarks.noise_study.outcomes import BOUND, FAMILIES, OURS, Results, interval
from benchmarks.noise_study.tables import noise_name, traced
from benchmarks.noise_study.train import FIGURE_NOISE, SHOWN, ends_and_middle

WIDTH, HEIGHT = 9.0, 2.7  # inches, of a page and of a row
GREY = "#888888"
STYLE = {
    "dpo": ("#777777", "-"), "gamma-dpo": ("#0072b2", "-"), "gamma-dpo-published": ("#0072b2", ":"),
    "gamma-dpo-averaged": ("#56b4e9", "-."),
    "simpo": ("#555555", "-"), "gamma-simpo": ("#d55e00", "-"),
    "gamma-simpo-published": ("#d55e00", ":"), "margin-dpo": ("#999999", "--"),
    "cdpo": ("#009e73", "--"), "rdpo": ("#009e73", ":"), "ipo": ("#cc79a7", "-"),
    "beta-dpo": ("#e69f00", "-"), "dr-dpo": ("#56b4e9", "-"), "ropo": ("#8b4513", "-"),
    "alpha-dpo": ("#e69f00", "--"), "amapo": ("#cc79a7", "--"), "sympo": ("#56b4e9", "--"),
    "holder-dpo": ("#8b4513", "--"), "re-po": ("#009e73", "-."), "plc-dpo": ("#e69f00", "-."),
    "matched-dpo": ("#0072b2", "--"), "matched-dpo-once": ("#0072b2", "-."),
    "matched-simpo": ("#d55e00", "--"), "matched-simpo-once": ("#d55e00", "-."),
}  # fmt: skip


@contextmanager
def figure(path: Path, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "γ", "font.size": 9, "axes.titlesize": 9}
    with plt.rc_context(style):
        size = (WIDTH, HEIGHT * rows)
        drawing, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **options
        )
        yield axes
        known: dict[str, Any] = {}
        for ax in axes.flat:
            ax.spines[["top", "right"]].set_visible(False)
            handles, labels = ax.get_legend_handles_labels()
            known |= zip(labels, handles, strict=True)
        # One legend above all panels: in one of them it would cover what is drawn.
        if known:
            lines = math.ceil(len(known) / 6)
            drawing.legend(
                known.values(), known, loc="outside upper center",
                ncols=math.ceil(len(known) / lines), fontsize=8, frameon=False,
            )  # fmt: skip
            drawing.set_size_inches(WIDTH, HEIGHT * rows + 0.18 * lines)
        out = io.StringIO()
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawing)
    svg = out.getvalue()
    # Inline in a page: its text and axes are in the colour of the page's text.
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    path.write_text(svg, encoding="utf-8")


def draw_verdict(results: Results, path: Path) -> None:
    """Gain of γ-PO at equal settings over κ, one point for each configuration and task."""
    colours = dict(
        zip(results.study.tasks, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=False)
    )
    with figure(path, 1, len(FAMILIES), sharey=True) as axes:
        for ax, (ours, base) in zip(axes[0], FAMILIES.items(), strict=True):
            kappas = results.kappas(ours)
            peers = ((base, "o", 1.0), (f"matched-{base}", "D", 0.0))
            for (task, colour), (theirs, marker, filled) in itertools.product(
                colours.items(), peers
            ):
                gains = results.at_equal_settings(task, ours, theirs)
                points = [
                    (kappa, *interval(gain.values()))
                    for kappa, gain in zip(kappas, gains, strict=True)
                    if gain
                ]
                if points:
                    # Tasks side by side, so that their intervals don't cover each other.
                    x, y, half = map(np.array, zip(*points, strict=True))
                    x = x * 1.15 ** (list(colours).index(task) - 1 + 0.3 * (not filled))
                    ax.errorbar(x, y, half, fmt=marker, ms=4, lw=1, color=colour,
                                mfc=colour if filled else "none",
                                label=f"{task}, − {'base' if filled else 'matched'}")  # fmt: skip
            ax.axhspan(-BOUND, BOUND, color=GREY, alpha=0.15, lw=0)
            ax.axhline(0, color=GREY, lw=0.8)
            ax.set(
                xscale="log", xlabel="κ = γ0² / τ", title=f"{METHODS[ours].label}, equal settings"
            )
        axes[0, 0].set_ylabel("gain (percentage points)")


def draw_accuracy(results: Results, path: Path) -> None:
    """Accuracy against flip rate: the paper's Figure 4."""
    kinds = sorted({kind for kind, _ in results.study.noises}, reverse=True)
    rows = list(itertools.product(results.study.tasks, kinds))
    with figure(path, len(rows), 2, sharey="row") as axes:
        for (row, (task, kind)), (column, relative) in itertools.product(
            enumerate(rows), enumerate((True, False))
        ):
            ax = axes[row, column]
            # Without flips there is nothing that could be uniform or not.
            noises = [n for n in results.noises() if n[0] == kind or n[1] == 0]
            for m, method in results.methods().items():
                points = [(n[1], *interval(results.accuracy(task, m, *n).values())) for n in noises]
                points = sorted(p for p in points if not math.isnan(p[1]))
                if method.relative == relative and points:
                    x, y, half = map(np.array, zip(*points, strict=True))
                    colour, line = STYLE[m]
                    ours = m in OURS
                    ax.plot(100 * x, y, line, color=colour, lw=2.2 if ours else 1.1, marker="o",
                            ms=3, label=method.label, zorder=3 if ours else 2)  # fmt: skip
                    if m in FAMILIES or m in FAMILIES.values():
                        ax.fill_between(100 * x, y - half, y + half, color=colour, alpha=0.12, lw=0)
            ax.set(title=f"{task}, {kind} flips", xlabel="labels flipped (%)")
            ax.grid(alpha=0.25)
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy (%)")


def draw_rewards(results: Results, path: Path) -> None:
    """Distribution of reward gaps on clean test pairs: the paper's Figure 2."""
    tasks, noise = results.study.tasks, FIGURE_NOISE
    with figure(path, 2, len(tasks)) as axes:
        for (row, relative), (column, task) in itertools.product(
            enumerate((True, False)), enumerate(tasks)
        ):
            ax = axes[row, column]
            for m in SHOWN:
                run = traced(results, task, m, noise)
                if METHODS[m].relative == relative and run:
                    gaps = np.array(run["test_gaps"])
                    gaps = gaps / np.abs(gaps).mean()  # beta is each method's own
                    colour, line = STYLE[m]
                    ax.hist(gaps, np.linspace(-3, 4, 36), density=True, histtype="step", ls=line,
                            color=colour, lw=1.6, label=METHODS[m].label)  # fmt: skip
            ax.axvline(0, color="#bbbbbb", lw=0.8)
            ax.set(title=f"{task}, {noise_name(noise)} flipped", yticks=[],
                   xlabel="reward gap of a test pair / its mean size")  # fmt: skip


def draw_margins(results: Results, path: Path) -> None:
    """Margins against gaps over training: the paper's Figure 5."""
    noise = FIGURE_NOISE
    methods = ("gamma-dpo", "gamma-simpo")
    cells = list(itertools.product(methods, results.study.tasks))
    with figure(path, len(cells), 3) as axes:
        for row, (m, task) in enumerate(cells):
            run = traced(results, task, m, noise)
            if not run:
                continue
            shown = zip(ends_and_middle(run["step"]), run["pairs"], strict=True)
            for ax, (step, columns) in zip(axes[row], shown, strict=False):
                gaps, flipped, margins, _ = map(np.array, columns)
                for value, colour, label in ((0, "#0072b2", "clean"), (1, "#d55e00", "flipped")):
                    which = flipped == value
                    ax.scatter(gaps[which], margins[which], s=6, c=colour, alpha=0.5, lw=0,
                               label=label, rasterized=True)  # fmt: skip
                ax.set(title=f"{METHODS[m].label}, {task}, step {step}",
                       xlabel="reward gap", ylabel="margin $γ_i$")  # fmt: skip


def draw_weights(results: Results, path: Path) -> None:
    """Pair weight of flipped over that of clean pairs, over training."""
    tasks, noise = results.study.tasks, FIGURE_NOISE
    with figure(path, 2, len(tasks)) as axes:
        for (row, relative), (column, task) in itertools.product(
            enumerate((True, False)), enumerate(tasks)
        ):
            ax = axes[row, column]
            for m, method in results.methods().items():
                runs = [
                    r for r in results.repeated("trace", task, m, *noise).values()
                    if r["weights"] and not r["diverged"] and all(all(w) for w in r["weights"])
                ]  # fmt: skip
                if method.relative != relative or not runs:
                    continue
                ratios = np.mean([[w[0] / w[1] for w in r["weights"]] for r in runs], 0)
                colour, line = STYLE[m]
                ax.plot(runs[0]["step"], ratios, line, color=colour, label=method.label,
                        lw=2.2 if m in OURS else 1.1)  # fmt: skip
            ax.axhline(1, color="#bbbbbb", lw=0.8)
            ax.set(title=f"{task}, {noise_name(noise)} flipped", xlabel="training step",
                   ylabel="weight, flipped / clean")  # fmt: skip


def draw_roc(results: Results, path: Path) -> None:
    """Finding flipped pairs by what training saw of them in its last part."""
    tasks, noise = results.study.tasks, FIGURE_NOISE
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


def draw_grid(results: Results, path: Path) -> None:
    """Accuracy over γ0 and τ; the labels in the fields are κ."""
    study = results.study
    noise = (*study.ablation_noises, FIGURE_NOISE)[0]
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
                ax.text(j, i, f"{kappa:.1g}" if kappa < 1 else f"{kappa:.3g}", ha="center",
                        va="center", fontsize=6, color="black" if light else "white")  # fmt: skip
            ax.set(xticks=range(shape[1]), xticklabels=[f"{t:g}" for t in plan.TAUS], xlabel="τ",
                   yticks=range(shape[0]), yticklabels=[f"{g:g}" for g in plan.GAMMA0S],
                   ylabel="γ0")  # fmt: skip

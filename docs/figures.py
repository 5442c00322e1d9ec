"""Tables and pictures for the pages of this site, out of `benchmarks/results/` and the library.

Every public function here can be called in double braces from a page whose front matter says
``figures: true``. To add a table: write a function that returns ``table(...)``, and call it there.
"""

from __future__ import annotations

import bz2
import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from gamma_loss import (
    PUBLISHED_SETTINGS,
    __version__,
    match_logistic,
    solve_margins,
    solve_margins_streaming,
)

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
version = __version__
POOL = np.array([-6.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 10.0])  # reward gaps


def results(name: str) -> dict[str, Any]:
    """Read a results file."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return record


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, numbers to the right, None as a dash."""
    lines = [[str("–" if cell is None else cell) for cell in row] for row in rows]
    right = [all(line[i][:1] in "–−+0123456789" for line in lines) for i in range(len(columns))]
    marks = ["--:" if is_number else "---" for is_number in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), marks, *lines])


def percent(share: float) -> str:
    """Return a share in percent, the smallest ones as a limit."""
    return "< 0.01 %" if share < 1e-4 else f"{100 * share:.2g} %"


def measured_on(name: str) -> str:
    """Return device, versions and command of a results file."""
    record = results(name)
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    return f"{record['device']}; {versions}. `{record['command']}`"


# --- benchmarks: a call has [10 %, 50 %, 90 %] in microseconds under "hot" and under "cold" ---

LOOP, COMPILED = "published loop", "published loop, compiled"
COLOURS = {
    "numpy": "#009e73", "auto": "#12897c", "eager": "#7fb8b0", "compile": "#d81b60",
    "triton": "#8e24aa", "jax": "#827717", LOOP: "#bbbbbb", COMPILED: "#ef6c00",
    "published, 20 steps": "#bbbbbb", "published, 2000 steps": "#ef6c00",
}  # fmt: skip


def times(call: dict[str, Any] | None, peer: dict[str, Any] | None = None) -> str | None:
    """Return a call's hot and cold median, and their speed relative to the peer."""
    if call is None:
        return None
    hot, cold = call["hot"][1], call["cold"][1]
    digits = 1 if hot < 100 else 0
    text = f"{hot:,.{digits}f}, {cold:,.{digits}f}"
    if peer and peer is not call:
        text += f"<br>({peer['hot'][1] / hot:.2g}, {peer['cold'][1] / cold:.2g})"
    return text


def margin_solve(name: str, is_hard: bool) -> str:
    """Return times of a solve, and the speed relative to its peer."""
    found = [row for row in results(name)["results"] if ("γ0" in row["setting"]) == is_hard]
    peer = "numpy" if is_hard else COMPILED
    shown = list(dict.fromkeys(solver for row in found for solver in row["solvers"]))
    setting = ["setting"] * is_hard
    return table(
        [*setting, "gaps", "dtype", *shown],
        (
            [*[row["setting"]] * is_hard, f"{row['gaps']:,}", row["dtype"]]
            + [times(row["solvers"].get(s), row["solvers"].get(peer)) for s in shown]
            for row in found
        ),
    )


def published_errors(name: str) -> str:
    """Return the range of the published algorithm's errors in hard settings."""
    found = [row for row in results(name)["results"] if "γ0" in row["setting"]]
    errors = [row["solvers"][LOOP]["error"] for row in found if LOOP in row["solvers"]]
    return f"{min(errors):.1g} to {max(errors):.1g}"


def solve_picture(name: str, setting: str) -> str:
    """Time of a solve over the size of the pool."""
    (axis,) = _axes()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in results(name)["results"]:
        if (row["setting"], row["dtype"]) == (setting, "float32"):
            for solver, call in row["solvers"].items():
                lines.setdefault(solver, []).append((row["gaps"], call["hot"][1]))
    for solver, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker=".", label=solver, color=COLOURS.get(solver))
    axis.set(xscale="log", yscale="log", xlabel="gaps in the pool", ylabel="microseconds")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _inline([axis], f"Time of a solve over the number of gaps, {setting}")


def first_calls(name: str) -> str:
    """Seconds of the first call in a new process."""
    return table(
        ["first call in a new process", "seconds, caches empty", "caches filled"],
        (
            [row["solver"], *(row[s] and f"{row[s]:.2f}" for s in ("cold", "warm"))]
            for row in results(name)["first_calls"]
        ),
    )


def loss(name: str) -> str:
    """Times of loss, forward and backward, and the multiples of DPO's time."""
    rows = []
    for row in results(name)["results"]:
        losses = row["losses"]
        for each, call in losses.items():
            peers = (losses.get(peer) for peer in ("DPO", "DPO, compiled"))
            multiples = [
                peer and ", ".join(f"{call[s][1] / peer[s][1]:.2f}" for s in ("hot", "cold"))
                for peer in peers
            ]
            rows.append([f"{row['pairs']:,}", each, times(call), *multiples])
    return table(["pairs", "loss", "µs", "/ DPO", "/ compiled DPO"], rows)


def readme_speed() -> str:
    """Return the README's lines on precision and speed; ``python docs/figures.py`` writes them."""
    solvers = next(r["solvers"] for r in results("solver_cpu")["results"] if r["gaps"] == 256)
    row = [each for each in results("loss_cpu")["results"] if each["pairs"] <= 256][-1]
    multiple = row["losses"]["γ-DPO, auto"]["hot"][1] / row["losses"]["DPO"]["hot"][1]
    auto, loop = (solvers[each]["hot"][1] for each in ("auto", COMPILED))
    return (
        "- Precision: |x − x⋆| / (1 + x⋆) of x = γ/γ0 is at most 10⁻¹³ (float64) or 3·10⁻⁶ "
        "(float32), more only in\n  ill-conditioned pools. "
        "Every solve returns a proven bound on its error.\n"
        f"- Speed on one CPU thread: a solve of 256 gaps takes {auto:.0f} µs, the published loop "
        f"under torch.compile {loop:.0f} µs; a\n  γ-DPO loss with gradient takes {multiple:.1f} "
        f"times DPO's time ({row['pairs']} pairs). No GPU is measured yet. "
        "[Benchmarks](docs/benchmarks.md)"
    )


def accuracy(name: str) -> str:
    """Return the largest error over all pools of three ranges of κ."""
    ranges = ((0, 3), (3, 100), (100, 1e8))
    worst: dict[tuple[str, str], list[float | None]] = {}
    for row in results(name)["results"]:
        part = next(i for i, (low, high) in enumerate(ranges) if low <= row["kappa"] + 1e-6 < high)
        for solver, (_, error) in row["errors"].items():
            most = worst.setdefault((solver, row["dtype"]), [None] * len(ranges))
            most[part] = max(most[part] or 0.0, np.inf if error is None else error)
    return table(
        ["solver", "dtype", "κ < 3", "3 ≤ κ < 100", "100 ≤ κ ≤ 10⁷"],
        ([*key, *(v and f"{v:.0e}" for v in values)] for key, values in sorted(worst.items())),
    )


def accuracy_picture(name: str) -> str:
    """Error of the worst pool over κ, in float64."""
    (axis,) = _axes()
    found = [row for row in results(name)["results"] if row["dtype"] == "float64"]
    for solver in found[0]["errors"]:
        points = [(row["kappa"], row["errors"].get(solver, [0, 0])[1] or 1e3) for row in found]
        x, y = zip(*points, strict=True)
        axis.plot(x, y, marker=".", label=solver, color=COLOURS.get(solver))
    axis.set(xscale="log", yscale="log", xlabel="κ = γ0² / τ", ylabel="error of the worst pool")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _inline([axis], "The error of the worst pool over kappa, float64")


def worst_pools(name: str) -> str:
    """Return the largest ratios that a search found for each implementation."""
    goals = ("error", "certificate", "disagreement")
    return table(
        ["solver", "dtype", "minutes", "pools", "error / promise", "error / bound", "disagreement"],
        (
            [row["solver"], row["dtype"], f"{row['seconds'] / 60:.0f}", f"{row['pools']:,}"]
            + [f"{row[goal]:.2g}" for goal in goals]
            for row in results(name)["results"]
        ),
    )


def many_ranks(name: str) -> str:
    """Return a rank's times and traffic, by gathering and by reducing."""
    rows = []
    for row in results(name)["over_ranks"]:
        ways = [row["ways"][way] for way in ("gather", "reduce")]
        rows.append([f"`{row['setting']}`", f"{row['pool']:,}"]
                    + [f"{way[of][1] / 1e3:,.1f}" for of in ("cpu", "wall") for way in ways]
                    + [f"{way['collectives']}, {way['bytes']:,}" for way in ways])  # fmt: skip
    return table(
        ["setting", "gaps", "processor ms: gather", "reduce", "clock ms: gather", "reduce",
         "collectives, bytes: gather", "reduce"], rows,
    )  # fmt: skip


def queue(name: str) -> str:
    """Times of pushing a batch and reading the pool."""
    found = results(name)["queue"]
    names = list(found[0]["calls"])
    return table(
        ["batch", *names], ([row["batch"], *map(times, row["calls"].values())] for row in found)
    )


# --- what the library itself computes ---


def published_settings() -> str:
    """Return the margins of each published setting on `POOL`."""
    rows = []
    for name, setting in PUBLISHED_SETTINGS.items():
        gamma0, tau = setting["gamma0"], setting["tau"]
        margins = solve_margins(POOL, gamma0=gamma0, tau=tau).margins
        a = gamma0 / tau
        rows.append(
            [
                f"`{name}`",
                *(f"{setting[key]:g}" for key in ("beta", "gamma0", "tau")),
                f"{gamma0**2 / tau:.3g}",
                f"{margins.std() / gamma0:.1%}",
                f"{margins.min():.3g}–{margins.max():.3g}",
                f"{gamma0 * np.exp(-a):.3g}–{gamma0 * np.exp(a):.3g}",
                f"{a:.3g}",
            ]
        )
    columns = ["setting", "beta", "gamma0", "tau", "κ", "spread", "margins", "bounds of γ", "a"]
    return table(columns, rows)


def margins_picture() -> str:
    """Margins over gaps for several τ: from one share for all to a steep rise."""
    (axis,) = _axes()
    gaps = np.sort(np.random.default_rng(0).normal(1.0, 3.0, 400))
    axis.axhline(4, color="gray", linestyle=":", label="τ → ∞: the same margin for every pair")
    for tau, colour in ((100.0, "#7fb8b0"), (10.0, "#12897c"), (3.0, "#ef6c00")):
        margins = solve_margins(gaps, gamma0=4.0, tau=tau).margins
        axis.plot(
            gaps, margins, color=colour, linewidth=2, label=f"τ = {tau:g}, κ = {16 / tau:.2g}"
        )
    axis.set(xlabel="reward gap of the pair (reward units)", ylabel="its target margin")
    axis.legend(frameon=False)
    return _inline([axis], "Target margins rise with the reward gap, the more the smaller tau is")


def spread_picture() -> str:
    """Spread of the margins over κ, for pools of three scales, with the published settings."""
    (axis,) = _axes()
    kappas = np.geomspace(1e-2, 1e2, 40)
    for scale, colour in ((0.5, "#7fb8b0"), (2.0, "#12897c"), (8.0, "#ef6c00")):
        gaps = scale * np.random.default_rng(0).normal(size=200)
        spread = [solve_margins(gaps, gamma0=4.0, tau=16 / k).margins.std() / 4 for k in kappas]
        axis.plot(kappas, spread, color=colour, linewidth=2, label=f"{scale:g}")
    for name, setting in PUBLISHED_SETTINGS.items():
        kappa = setting["gamma0"] ** 2 / setting["tau"]
        axis.axvline(kappa, color="gray", linestyle=":")
        side = "left" if name.startswith("llama") else "right"  # gemma's line is close
        axis.annotate(name, (kappa, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                      ha=side, va="top")  # fmt: skip
    axis.set(xscale="log", xlabel="κ = γ0² / τ, at γ0 = 4", ylabel="spread of the margins / γ0")
    axis.legend(frameon=False, loc=(0.12, 0.2), title="deviation of gaps")
    return _inline([axis], "The margins' standard deviation over gamma0 rises with kappa")


def picture(name: str, description: str, kind: str = "alone") -> str:
    """Return an SVG of this folder or of the results, in the colours of the page."""
    places = (folder / name for folder in (DOCS, RESULTS))
    svg = next(p for p in places if p.is_file()).read_text("utf-8")
    return f'<figure class="{kind}">{_svg(svg, description)}</figure>'


# --- what loss it is ---


def normal_gaps(mean: float = 1.0, deviation: float = 3.0, count: int = 1000) -> Any:
    """Return gaps in the middles of equal shares of a normal distribution."""
    normal = NormalDist(mean, deviation)
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


def sigmoid(x: Any) -> Any:
    return 0.5 + 0.5 * np.tanh(np.asarray(x) / 2)


def weights_picture() -> str:
    """Pair weights over the gap for several κ, each with the matched logistic weights."""
    (axis,) = _axes()
    gaps = normal_gaps()
    wide = np.linspace(-8, 10, 181)
    colours = ("#777777", "#7fb8b0", "#12897c", "#3b6fb6", "#ef6c00")
    for kappa, colour in zip((0.01, 1.6, 10, 100, 1e4), colours, strict=True):
        setting = {"gamma0": 4.0, "tau": 16 / kappa}
        rule = solve_margins_streaming([gaps], **setting)
        match = match_logistic(gaps, **setting)
        plain = match.scale * sigmoid(match.margin - match.beta_factor * wide)
        label = f"κ = {kappa:g}: {percent(match.unexplained)}"
        weights = sigmoid(rule.margins(wide) - wide)
        axis.plot(wide, weights, color=colour, linewidth=2, label=label)
        axis.plot(wide, plain, color=colour, linewidth=1.6, linestyle=":")
    axis.set(xlabel="reward gap of the pair (reward units)", ylabel="pair weight", ylim=(0, 1.05))
    axis.legend(frameon=False, loc="lower left")
    return _inline([axis], "Pair weights fall with the gap, the flatter the larger kappa is")


def matched() -> str:
    """Return the matched logistic loss of several settings on normal gaps."""
    published = {f"`{n}`": (s["gamma0"], s["tau"]) for n, s in PUBLISHED_SETTINGS.items()}
    rows = [
        (name, *setting, False, 1.0, 3.0)
        for name, setting in [*published.items(), ("", (2.0, 0.5))]
    ]
    rows += [
        ("the trainers' default for γ-DPO", 4.0, 10.0, True, 1.0, 1.0),
        ("the same", 4.0, 10.0, True, 1.0, 3.0),
        ("", 4.0, 0.1, False, 2.0, 6.0),
    ]

    def cells(row: tuple[str, float, float, bool, float, float]) -> list[str]:
        name, gamma0, tau, centered, mean, deviation = row
        gaps = normal_gaps(mean, deviation)
        match = match_logistic(gaps, gamma0=gamma0, tau=tau, centered=centered)
        determined = match.unexplained < 0.1
        c, d, b = (f"{v:.2f}".replace("-", "−") if determined else "–" for v in match[:3])
        return [
            name or "–",
            b,
            d,
            c,
            percent(match.unexplained),
            f"{gamma0:g}, {tau:g}",
            f"{gamma0**2 / tau:.3g}",
            "yes" if centered else "no",
            f"N({mean:g}, {deviation:g}²)",
        ]

    columns = ["setting", "b", "d", "c", "unexplained", "γ0, τ", "κ", "centred", "gaps"]
    return table(columns, map(cells, rows))


def asymmetry() -> str:
    """Asymmetry of losses at four gaps, γ-PO's in a pool of normal gaps."""
    at = np.array([0.5, 1.0, 2.0, 4.0])

    def gamma_po(gamma0: float, tau: float, centre: float) -> Callable[[Any], Any]:
        rule = solve_margins_streaming([normal_gaps()], gamma0=gamma0, tau=tau)
        return lambda g: sigmoid(rule.margins(g) - centre - g)

    losses: dict[str, Callable[[Any], Any]] = {
        "DPO": lambda g: sigmoid(-g),
        "cDPO, ε = 0.2": lambda g: sigmoid(-g) - 0.2,
        "rDPO, ε = 0.2": lambda g: sigmoid(-g) + 0.2 / 0.6,
        "ROPO, α = 14": lambda g: sigmoid(-g) * (1 + 14 * sigmoid(g)),
        "SymPO": lambda g: sigmoid(g) * sigmoid(-g),
        "Hölder-DPO, q = 2": lambda g: sigmoid(g) ** 2 * sigmoid(-g) ** 2,
        "Hölder-DPO, q = 1": lambda g: sigmoid(g) * sigmoid(-g) ** 2,
        "γ-DPO, γ0 = 4, τ = 10": gamma_po(4.0, 10.0, 4.0),
        "γ-DPO, γ0 = 2, τ = 0.5": gamma_po(2.0, 0.5, 2.0),
        "SimPO, d = 4": lambda g: sigmoid(4 - g),
        "γ-SimPO, γ0 = 4, τ = 10": gamma_po(4.0, 10.0, 0.0),
        "SimPO, d = 3": lambda g: sigmoid(3 - g),
        "γ-SimPO, γ0 = 3, τ = 3": gamma_po(3.0, 3.0, 0.0),
        "SimPO, d = 2": lambda g: sigmoid(2 - g),
        "γ-SimPO, γ0 = 2, τ = 0.5": gamma_po(2.0, 0.5, 0.0),
        "γ-SimPO, γ0 = 2, τ = 0.01": gamma_po(2.0, 0.01, 0.0),
    }
    rows = []
    for name, weight in losses.items():
        there, here = weight(-at), weight(at)
        share = np.where(here + there == 0, 0, (there - here) / (there + here))
        rows.append([name, *(f"{100 * value + 0:.0f}" for value in share.round(4))])
    return table(["loss", *(f"g = {gap:g}" for gap in at)], rows)


def suppression_of_flips() -> str:
    """How exact margins change the ratio of flipped to clean pairs' mean weights."""
    settings = ((4.0, 10.0, True), (2.0, 0.5, True), (4.0, 10.0, False), (2.0, 0.5, False))
    rows = []
    wide = (*((5, s) for s in (0.5, 1, 2)), (8, 0.5), (8, 1))
    for mean, deviation in ((0.3, 0.5), (0.5, 3), (1, 1), (1, 3), (3, 2), *wide):
        clean = normal_gaps(mean, deviation, 4000)
        flipped = -normal_gaps(mean, deviation, 1000)
        pool = np.concatenate([clean, flipped])
        cells = []
        for gamma0, tau, centered in settings:
            margins = solve_margins(pool, gamma0=gamma0, tau=tau).margins
            ratios = []
            for shifts in (gamma0, margins):
                weights = sigmoid(shifts - (gamma0 if centered else 0.0) - pool)
                ratios.append(weights[4000:].mean() / weights[:4000].mean())
            cells.append(" → ".join(f"{ratio:.4g}" for ratio in ratios))
        rows.append([f"m = {mean:g}, s = {deviation:g}", *cells])
    names = [f"γ-{'DPO' if c else 'SimPO'} {g:g}, {t:g}" for g, t, c in settings]
    return table(["clean gaps", *names], rows)


# --- the study ---


def verdict(compared: str, where: str) -> str:
    """Return a difference in the verdict's table."""
    page = (DOCS / "reproduction.md").read_text("utf-8")
    row = re.search(rf"^\| {compared} \| {where}[^|]*\| (\S+) \|", page, re.MULTILINE)
    assert row, (compared, where)
    return row[1]


TASKS = {"digits": "#0072b2", "diabetes": "#d55e00", "bytes": "#009e73"}


def study(name: str) -> list[dict[str, str]]:
    """Read a CSV file of the study."""
    path = DOCS / "study" / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("study", "tasks") == "tasks"]


@functools.cache
def traces() -> list[dict[str, Any]]:
    """Return the runs of seed 0 with 40 % flips whose training was watched, as they are kept."""
    lines = bz2.decompress((RESULTS / "noise_study.jsonl.bz2").read_bytes()).splitlines()
    runs = [json.loads(line) for line in lines if b'"stage":"trace"' in line]
    return [r for r in runs if (r["seed"], r["kind"], r["rate"]) == (0, "uniform", 0.4)]


def study_verdict() -> str:
    """Gain of γ-PO over κ, one point for each configuration and task."""
    axes = _axes(2)
    for axis, method in zip(axes, ("γ-DPO", "γ-SimPO"), strict=True):
        for k, (task, colour) in enumerate(TASKS.items()):
            rows = [
                r for r in study("configurations") if (r["task"], r["method"]) == (task, method)
            ]
            for peer, marker, fill in (("base", "o", colour), ("matched", "D", "none")):
                # Tasks side by side, so that their intervals don't cover each other.
                x = [float(r["κ"]) * 1.15 ** (k - 1 + 0.3 * (peer != "base")) for r in rows]
                y, half = ([float(r[c]) for r in rows] for c in (f"less {peer}", f"± {peer}"))
                axis.errorbar(x, y, half, fmt=marker, ms=4, lw=1, color=colour, mfc=fill,
                              label=f"{task}, less {peer}")  # fmt: skip
        axis.axhspan(-1, 1, color="gray", alpha=0.15, lw=0)
        axis.axhline(0, color="gray", lw=0.8)
        axis.set(xscale="log", xlabel="κ = γ0² / τ", title=method, ylim=(-6, 4),
                 ylabel="gain, percentage points")  # fmt: skip
    return _inline(axes, "Gains at equal settings over kappa lie around zero")


def study_accuracy() -> str:
    """Accuracy against flip rate, as the paper's Figure 4."""
    axes = _axes(3)
    rows = [row for row in study("accuracy") if row["chosen"] == "shared"]
    for axis, task in zip(axes, TASKS, strict=True):
        for k, method in enumerate(
            ("DPO", "γ-DPO", "matched DPO", "SimPO", "γ-SimPO", "matched SimPO")
        ):
            own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            flips = {"clean": 0.0} | {f"{rate}% uniform": rate for rate in (10, 20, 30, 40)}
            y = {flips[r["labels"]]: float(r["accuracy"]) for r in own if r["labels"] in flips}
            axis.plot(*zip(*sorted(y.items()), strict=True), ("-", "--", ":")[k % 3], label=method,
                      color=("#0072b2", "#d55e00")[k // 3], lw=2.4 - 0.7 * (k % 3))  # fmt: skip
        axis.set(title=task, xlabel="labels flipped, %", ylabel="test accuracy, %")
    return _inline(axes, "Accuracy falls with the share of flips, alike for γ-PO and its bases")


def study_rewards() -> str:
    """Distribution of reward gaps on clean test pairs, as the paper's Figure 2."""
    axes = _axes(3)
    for axis, task in zip(axes, TASKS, strict=True):
        for run in traces():
            if run["task"] == task and run["method"].removeprefix("gamma-") in ("dpo", "simpo"):
                gaps = np.array(run["result"]["test_gaps"])
                ours, free = "gamma" in run["method"], "simpo" in run["method"]
                axis.hist(gaps / np.abs(gaps).mean(), np.linspace(-3, 4, 36), histtype="step",
                          density=True, color=("#0072b2", "#d55e00")[free], ls="-:"[ours], lw=1.6,
                          label="γ-" * ours + ("DPO", "SimPO")[free])  # fmt: skip
        axis.axvline(0, color="gray", lw=0.8)
        axis.set(title=task, yticks=[], xlabel="reward gap / its mean size")
    return _inline(axes, "Reward gaps of test pairs, 40 % of training labels flipped")


def study_margins() -> str:
    """Margins against gaps over training, as the paper's Figure 5."""
    runs = [r for r in traces() if r["method"] in ("gamma-dpo", "gamma-simpo")]
    axes = _axes(6)
    for axis, run in zip(axes, sorted(runs, key=lambda r: r["method"]), strict=True):
        for (gaps, flipped, margins, _), fade in zip(
            run["result"]["pairs"], (0.25, 0.5, 1), strict=True
        ):
            for value, colour, label in ((0, "#0072b2", "clean"), (1, "#d55e00", "flipped")):
                which = np.array(flipped) == value
                axis.scatter(np.array(gaps)[which], np.array(margins)[which], s=5, c=colour, lw=0,
                             alpha=fade, label=label * (fade == 1), rasterized=True)  # fmt: skip
        axis.set(title=f"{'γ-DPO' if 'dpo' in run['method'] else 'γ-SimPO'}, {run['task']}",
                 xlabel="reward gap", ylabel="margin")  # fmt: skip
    return _inline(axes, "Margins against gaps at the start, the middle and the end")


# --- trainers ---


def run_with(name: str) -> str:
    """Return the version of a trainer that ran the page's code, with date, peers and errors."""
    record = results("clients").get(name)
    if record is None:
        return f"Not yet run in the trainer itself; `python -m tests.clients {name}` does that."
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    runs = "; ".join(run["run"] for run in record["runs"])
    worst = max(run.get("largest_difference", 0.0) for run in record["runs"])
    exact = f" The logged losses differ from first principles by at most {worst:.0e}." * bool(worst)
    slopes = [run.get("gradients_differ_by") for run in record["runs"]]
    if None not in slopes:
        exact += f" The gradients at the logits differ by at most {max(slopes):.0e} of the largest."
    return (
        f"Run with {record['trainer']} {record['version']} ({versions}) on {record['date']}, "
        f"tiny random models on the CPU: {runs}.{exact} `python -m tests.clients {name}` runs it "
        "again."
    )


def _axes(count: int = 1) -> list[Any]:
    """Return axes, each of a figure of its own: panels of a page can wrap."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "γ", "font.size": 11})
    import matplotlib.pyplot as plt

    size = (3.6, 2.8) if count > 1 else (6, 3.4)
    axes = [plt.subplots(figsize=size, layout="constrained")[1] for _ in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return axes


def _inline(axes: list[Any], description: str) -> str:
    """Return the axes as SVG elements in the page's own text colour, a legend of many first."""
    import matplotlib.pyplot as plt

    figures = [axis.figure for axis in axes]
    if len(axes) > 1:
        lines, names = axes[0].get_legend_handles_labels()
        legend = dict(zip(names, lines, strict=True))
        figures.insert(0, plt.figure(figsize=(4.9, 0.1 + 0.24 * -(-len(legend) // 2))))
        figures[0].legend(legend.values(), legend, loc="center", frameon=False, ncols=2)
    svg = ""
    for axis in axes:
        for scale in (axis.xaxis, axis.yaxis):
            if scale.get_scale() == "log":  # exponents would be too small to read
                scale.set_major_formatter("{x:g}")
    for figure in figures:
        figure.savefig(out := io.StringIO(), format="svg", metadata={"Date": None})
        plt.close(figure)
        svg += _svg(out.getvalue(), description)
    columns = min(len(axes), 3)
    return f'<figure class="panels" style="--columns: {columns}">{svg}</figure>'


def _svg(svg: str, description: str) -> str:
    """Black ink becomes the colour of the text; white paper and the groups' names go."""
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub('<g id="[^"]*">', "<g>", svg.replace("fill: #ffffff", "fill: none"))
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    return "".join(svg.splitlines())


# --- log-probabilities of responses ---


def sequence_logps(name: str) -> str:
    """Milliseconds and memory, in multiples of the logits', of scoring responses."""
    found = results(name)["results"]
    ways = list(dict.fromkeys(way for row in found for way in row["ways"]))

    def cell(way: dict[str, Any] | None) -> str | None:
        return way and f"{way['hot'][1] / 1e3:,.0f} ({way['memory']:.1f})"

    return table(
        ["responses", "tokens", "vocabulary", "dtype", *ways],
        (
            [*(f"{row[key]:,}" for key in ("responses", "tokens", "vocabulary")), row["dtype"]]
            + [cell(row["ways"].get(way)) for way in ways]
            for row in found
        ),
    )


def logps_errors(name: str) -> str:
    """Largest error of summed log-probabilities, in nats, by way and the logits' dtype."""
    worst: dict[str, dict[str, float]] = {}
    for row in results(name)["results"]:
        for way, measured in row["ways"].items():
            of_way = worst.setdefault(way, {})
            of_way[row["dtype"]] = max(measured["nats"], of_way.get(row["dtype"], 0.0))
    dtypes = ("bfloat16", "float32")
    return table(
        ["nats", *dtypes],
        ([way, *(f"{errors[each]:.1g}" for each in dtypes)] for way, errors in worst.items()),
    )


# --- what was run with what ---

# Page, and what was done where no results file says more.
TRAINERS = {
    "trl": ("TRL", ""),
    "accelerate": ("Accelerate", "run with 1.15.0"),
    "lightning": ("Lightning", "run with 2.6.6"),
    "llama_factory": ("LLaMA-Factory", "**not run**; its call, as of 0.9.5, by a stand-in"),
    "axolotl": ("axolotl", "**not run**; its call, as of 0.18.0, by a stand-in"),
    "openrlhf": ("OpenRLHF", "**not run**; its call, as of 0.11.0, by a stand-in"),
    "nemo_rl": ("NeMo-RL", "**not run**; its call, as of 0.7.0, by a stand-in"),
    "ms_swift": ("ms-swift", "**not run**"),
    "liger": ("Liger-Kernel", "run with 0.8.5, its fused losses"),
    "jax": ("optax", "run with 0.2.8"),
}


def trainers() -> str:
    """Return the versions that each trainer was run with, from clients.json and the pins."""
    found = results("clients") if (RESULTS / "clients.json").is_file() else {}
    rows = []
    for page, (name, state) in TRAINERS.items():
        if run := found.get(page):
            state = f"run with {run['version']} on {run['date']}"
        if page == "trl":
            pins, limits = (
                (DOCS.parent / file).read_text("utf-8")
                for file in ("constraints.txt", "pyproject.toml")
            )
            oldest, newest = re.search(r'"trl>=([\d.]+)', limits), re.search(r"\ntrl==(.*)", pins)
            state = f"tests run with {oldest[1]} and {newest[1]}; TRL's own tests {state}"
        file = DOCS / "recipes" / f"{page}.md"
        rows.append([f"[{name}](recipes/{page}.md)" if file.is_file() else name, state])
    return table(["trainer", "state, on a CPU"], rows)


if __name__ == "__main__":
    readme = RESULTS.parents[1] / "README.md"
    begin, _, rest = readme.read_text("utf-8").partition("<!-- speed -->")
    _, end, after = rest.partition("<!-- /speed -->")
    text = f"{begin}<!-- speed -->\n{readme_speed()}\n{end}{after}"
    readme.write_text(text, "utf-8")

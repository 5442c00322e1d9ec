"""Tables and pictures for the pages of this site, out of `benchmarks/results/` and the library.

Every public function here can be called in double braces from a page whose front matter says
``figures: true``. To add a table: write a function that returns ``table(...)``, and call it there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from gamma_loss import (
    PUBLISHED_SETTINGS,
    match_logistic,
    solve_margins,
    solve_margins_streaming,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
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


def median(measured: dict[str, Any], key: str = "microseconds") -> float:
    return float(measured[key]["0.5"])


def measured_on(name: str) -> str:
    """Say where a results file comes from and how to make it anew."""
    record = results(name)
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    return f"{record['device']}; {versions}. `{record['command']}`"


# --- a margin solve ---

SOLVERS = ("published", "published, compiled", "eager", "auto", "numpy", "compile", "triton")


def margin_solve(name: str) -> str:
    """Median microseconds of a solve, and how many times as fast as the published algorithm."""
    found = results(name)["results"]
    solvers = [s for s in SOLVERS if any(s in row["solvers"] for row in found)]

    def cell(measured: dict[str, Any] | None, ratio: bool) -> str | None:
        if measured is None:
            return None
        speed = measured["times_as_fast_as_published"]
        shown = f" ({speed:.{1 if speed > 0.5 else 2}f})" if ratio else ""
        return f"{median(measured):,.0f}{shown}"

    return table(
        ["setting", "gaps", "dtype", *solvers, "one copy", "compile, ns a gap"],
        (
            [
                f"`{row['setting']}`",
                f"{row['gaps']:,}",
                row["dtype"],
                *(cell(row["solvers"].get(s), s != "published") for s in solvers),
                cell(row["solvers"]["copy"], False),
                f"{row['solvers']['compile']['nanoseconds_per_gap']:,.0f}",
            ]
            for row in found
        ),
    )


def solves(
    name: str, gaps: int, dtype: str = "float32", setting: str = "llama-3-8b-instruct"
) -> Any:
    """Return one row's solvers, by name."""
    wanted = (gaps, dtype, setting)
    return next(
        row["solvers"]
        for row in results(name)["results"]
        if (row["gaps"], row["dtype"], row["setting"]) == wanted
    )


def margin_solve_targets(name: str) -> str:
    """Hold the targets that were set beforehand against what was measured."""

    def speed(gaps: int, solver: str = "compile", peer: str = "published", **which: str) -> float:
        ratio = solves(name, gaps, **which)[solver][f"times_as_fast_as_{peer.replace(', ', '_')}"]
        return float(ratio)

    compiled = "published, compiled"
    gap_times = [
        solves(name, gaps)["compile"]["nanoseconds_per_gap"]
        for gaps in (16_384, 65_536, 1_000_000, 10_000_000)
    ]
    targets = [
        ("compile, 256 gaps, over the published algorithm", 8, [speed(256)]),
        ("compile, 65,536 gaps, over the same", 8, [speed(65_536)]),
        (
            "compile, 2,048 gaps and more, over the published algorithm compiled",
            2,
            [speed(n, peer=compiled) for n in (2_048, 2_304, 16_384, 65_536, 1_000_000)],
        ),
        (
            "compile, 8, 64 and 256 gaps, over the published algorithm compiled",
            1,
            [speed(n, peer=compiled) for n in (8, 64, 256)],
        ),
        ("eager, 256 gaps, over the published algorithm", 3, [speed(256, "eager")]),
        ("the same in float64", 3, [speed(256, "eager", dtype="float64")]),
        (
            "compile, equal time a gap at 16,384 to 10,000,000 gaps (least over most)",
            0.8,
            [min(gap_times) / max(gap_times)],
        ),
    ]
    return table(
        ["times as fast", "target", "measured", "reached"],
        (
            [
                what,
                f"{target:g}",
                ", ".join(f"{value:.2g}" for value in found),
                "yes" if min(found) >= target else "**no**",
            ]
            for what, target, found in targets
        ),
    )


def first_calls(name: str) -> str:
    """Seconds of the first call in a new process."""
    return table(
        ["first call in a new process", "seconds, caches empty", "caches filled"],
        (
            [solver, *(f"{calls[state]['first_call']:.2f}" for state in ("cold", "warm"))]
            for solver, calls in results(name)["first_calls"].items()
        ),
    )


# --- a loss, a training step ---


def loss_overhead(name: str) -> str:
    """Median microseconds of loss, forward and backward, and the multiple of plain DPO."""
    found = results(name)["alone"]
    return table(
        ["pairs", *found[0]["losses"]],
        (
            [
                f"{row['pairs']:,}",
                *(
                    f"{median(loss):,.0f} ({loss['times_the_time_of_dpo']:.1f})"
                    for loss in row["losses"].values()
                ),
            ]
            for row in found
        ),
    )


def training_step(name: str) -> str:
    """Milliseconds of a whole training step, by loss."""
    return table(
        [
            "loss",
            "step, ms",
            "of it the loss, %",
            "longer than with DPO, % (quantiles)",
        ],
        (
            [
                loss,
                f"{median(step) / 1e3:,.0f}",
                f"{step['loss_alone_percent_of_step']:.2f}",
                ", ".join(
                    f"{value:.0f}" for value in step["longer_than_with_dpo_percent"].values()
                ),
            ]
            for loss, step in results(name)["step"]["losses"].items()
        ),
    )


# --- accuracy, ranks, the queue ---


def accuracy(name: str) -> str:
    """Return the largest error over all pools of three ranges of κ."""
    ranges = ((0, 3), (3, 100), (100, 1e8))
    worst: dict[tuple[str, str], list[float]] = {}
    for row in results(name)["results"]:
        for i, (low, high) in enumerate(ranges):
            if low <= row["kappa"] * 1.0000001 < high:
                most = worst.setdefault((row["solver"], row["dtype"]), [0.0] * len(ranges))
                most[i] = max([most[i], *(np.inf if e is None else e for e in row["errors"])])
    return table(
        ["solver", "dtype", "κ < 3", "3 ≤ κ < 100", "100 ≤ κ ≤ 10⁷"],
        ([*key, *(f"{value:.0e}" for value in values)] for key, values in sorted(worst.items())),
    )


def many_ranks(name: str) -> str:
    """Milliseconds of processor time that a solve takes on each rank, either way."""
    rows = []
    for row in results(name)["over_ranks"]:
        ways = row["ways"]
        rows.append(
            [
                f"`{row['setting']}`",
                row["ranks"],
                f"{row['pool']:,}",
                *(
                    f"{median(ways[w], 'cpu_microseconds') / 1e3:,.1f}"
                    for w in ("gather", "reduce")
                ),
                ", ".join(str(ways[w]["collectives"]) for w in ("gather", "reduce")),
                ", ".join(f"{ways[w]['bytes_sent_by_a_rank']:,}" for w in ("gather", "reduce")),
            ]
        )
    return table(
        ["setting", "ranks", "pool", "gather, ms", "reduce, ms", "collectives", "bytes sent"], rows
    )


def queue(name: str) -> str:
    """Microseconds of pushing a batch and reading the pool, and the multiple of `GapQueue`'s."""
    found = results(name)["queue"]
    return table(
        ["batch", *found[0]["calls"]],
        (
            [
                row["batch"],
                *(
                    f"{median(call):,.0f} ({call['times_the_time_of_gap_queue']:.2f})"
                    for call in row["calls"].values()
                ),
            ]
            for row in found
        ),
    )


# --- what the library itself computes ---


def published_settings() -> str:
    """What each published setting makes of `POOL`."""
    rows = []
    for name, setting in PUBLISHED_SETTINGS.items():
        gamma0, tau = setting["gamma0"], setting["tau"]
        margins = solve_margins(POOL, gamma0=gamma0, tau=tau).margins
        a = gamma0 / tau
        rows.append(
            [
                f"`{name}`",
                *(f"{setting[key]:g}" for key in ("beta", "gamma0", "tau")),
                f"{a:.3g}",
                f"{gamma0**2 / tau:.3g}",
                f"{gamma0 * np.exp(-a):.3g}–{gamma0 * np.exp(a):.3g}",
                f"{margins.min():.3g}–{margins.max():.3g}",
                f"{margins.std() / gamma0:.1%}",
            ]
        )
    columns = ["setting", "beta", "gamma0", "tau", "a", "κ", "bounds of γ", "margins", "spread"]
    return table(columns, rows)


def margins_picture() -> str:
    """Margins over gaps for several τ: from one share for all to a steep rise."""
    figure, axis = _axes()
    gaps = np.sort(np.random.default_rng(0).normal(1.0, 3.0, 400))
    axis.axhline(4, color="gray", linestyle=":", label="τ → ∞: the same margin for every pair")
    for tau, colour in ((100.0, "#9aa0e8"), (10.0, "#5c6bc0"), (3.0, "#ef6c00")):
        margins = solve_margins(gaps, gamma0=4.0, tau=tau).margins
        axis.plot(
            gaps, margins, color=colour, linewidth=2, label=f"τ = {tau:g}, κ = {16 / tau:.2g}"
        )
    axis.set(xlabel="reward gap of the pair (reward units)", ylabel="its target margin")
    axis.legend(frameon=False)
    return _inline(figure, "Target margins rise with the reward gap, the more the smaller tau is")


def spread_picture() -> str:
    """Spread of the margins over κ, for pools of three scales, with the published settings."""
    figure, axis = _axes()
    kappas = np.geomspace(1e-2, 1e2, 40)
    for scale, colour in ((0.5, "#9aa0e8"), (2.0, "#5c6bc0"), (8.0, "#ef6c00")):
        gaps = scale * np.random.default_rng(0).normal(size=200)
        spread = [solve_margins(gaps, gamma0=4.0, tau=16 / k).margins.std() / 4 for k in kappas]
        label = f"gaps of scale {scale:g}"
        axis.plot(kappas, spread, color=colour, linewidth=2, label=label)
    for name, setting in PUBLISHED_SETTINGS.items():
        kappa = setting["gamma0"] ** 2 / setting["tau"]
        axis.axvline(kappa, color="gray", linestyle=":")
        axis.annotate(name, (kappa, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                      fontsize=9, ha="right", va="top")  # fmt: skip
    axis.set(xscale="log", xlabel="κ = γ0² / τ, at γ0 = 4", ylabel="spread of the margins / γ0")
    axis.legend(frameon=False, loc=(0.12, 0.6))
    return _inline(figure, "The margins' standard deviation over gamma0 rises with kappa")


def picture(name: str, description: str) -> str:
    """Return an SVG of this folder, in the text colour of the page that shows it."""
    return _element((Path(__file__).parent / name).read_text("utf-8"), description)


# --- what loss it is ---


def normal_gaps(mean: float = 1.0, deviation: float = 3.0, count: int = 1000) -> Any:
    """Return gaps in the middles of equal shares of a normal distribution."""
    normal = NormalDist(mean, deviation)
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


def sigmoid(x: Any) -> Any:
    return 0.5 + 0.5 * np.tanh(np.asarray(x) / 2)


def weights_picture() -> str:
    """Pair weights over the gap for several κ, each with the matched logistic weights."""
    figure, axis = _axes()
    gaps = normal_gaps()
    wide = np.linspace(-8, 10, 181)
    colours = ("#777777", "#9aa0e8", "#5c6bc0", "#009e73", "#ef6c00")
    for kappa, colour in zip((0.01, 1.6, 10, 100, 1e4), colours, strict=True):
        setting = {"gamma0": 4.0, "tau": 16 / kappa}
        rule = solve_margins_streaming([gaps], **setting)
        match = match_logistic(gaps, **setting)
        plain = match.scale * sigmoid(match.margin - match.beta_factor * wide)
        label = f"κ = {kappa:g}: {match.unexplained:.0e}"
        weights = sigmoid(rule.margins(wide) - wide)
        axis.plot(wide, weights, color=colour, linewidth=2, label=label)
        axis.plot(wide, plain, color=colour, linewidth=1.6, linestyle=":")
    axis.set(xlabel="reward gap of the pair (reward units)", ylabel="pair weight", ylim=(0, 1.05))
    axis.legend(frameon=False, loc="lower left")
    return _inline(figure, "Pair weights fall with the gap, the flatter the larger kappa is")


def matched() -> str:
    """Which plain logistic loss several settings amount to on normal gaps."""
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
        return [
            name or "–",
            f"{gamma0:g}, {tau:g}",
            f"{gamma0**2 / tau:.2g}",
            "yes" if centered else "no",
            f"N({mean:g}, {deviation:g}²)",
            *(f"{v:.2f}".replace("-", "−") if determined else "–" for v in match[:3]),
            f"{match.unexplained:.1e}".replace("-", "−"),
        ]

    columns = ["setting", "γ0, τ", "κ", "centred", "gaps", "c", "d", "b", "unexplained"]
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
    for mean, deviation in ((0.3, 0.5), (1, 1), (1, 3), (2, 2), (3, 2), (5, 2)):
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
            cells.append(" → ".join(f"{ratio:.2f}" for ratio in ratios))
        rows.append([f"m = {mean:g}, s = {deviation:g}", *cells])
    names = [f"γ-{'DPO' if c else 'SimPO'} {g:g}, {t:g}" for g, t, c in settings]
    return table(["clean gaps", *names], rows)


def _axes() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "γ", "font.size": 12})
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _inline(figure: Any, description: str) -> str:
    """Return the figure as an SVG element in the page's own text colour."""
    import matplotlib.pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = out.getvalue()
    return _element(svg[svg.index("<svg") :].replace("#000000", "currentColor"), description)


def _element(svg: str, description: str) -> str:
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    return "<figure>" + "".join(svg.splitlines()) + "</figure>"


# --- log-probabilities of responses ---


def sequence_logps(name: str) -> str:
    """Milliseconds and memory, in multiples of the logits', of scoring responses."""
    found = results(name)["results"]
    ways = list(found[0]["ways"])

    def cell(way: dict[str, Any] | None) -> str | None:
        if way is None:
            return None
        return f"{median(way['both']) / 1e3:,.0f} ({way['both']['memory']:.1f})"

    return table(
        ["responses", "tokens", "vocabulary", "dtype", *ways],
        (
            [
                *(f"{row[key]:,}" for key in ("responses", "tokens", "vocabulary")),
                row["dtype"],
                *(cell(row["ways"].get(way)) for way in ways),
            ]
            for row in found
        ),
    )

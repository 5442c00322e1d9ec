"""Tables and pictures for the pages of this site, out of `benchmarks/results/` and the library.

Every public function here can be called in double braces from a page whose front matter says
``figures: true``. To add a table: write a function that returns ``table(...)``, and call it there.
"""

from __future__ import annotations

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

OURS = ("auto", "eager", "compile", "triton", "numpy", "jax")
SHOWN = ("eager", "compile", "triton", "numpy", "jax", "published, compiled", "published", "copy")
ALSO = "published, compiled"
LLAMA = "llama-3-8b-instruct"


def solves(name: str, gaps: int, dtype: str = "float32", setting: str = LLAMA) -> Any:
    """Return one row's solvers, by name."""
    return _solves(name)[setting, gaps, dtype]


def _solves(name: str) -> dict[tuple[str, int, str], Any]:
    found = results(name)["results"]
    return {(row["setting"], row["gaps"], row["dtype"]): row["solvers"] for row in found}


def margin_solve(name: str) -> str:
    """Median microseconds of a solve, and how many times as fast as the published algorithm."""
    found = _solves(name)
    shown = [solver for solver in SHOWN if any(solver in row for row in found.values())]

    def cell(row: dict[str, Any], solver: str) -> str | None:
        if solver not in row:
            return None
        speed = row[solver]["times_as_fast_as_published"]
        ratio = f" ({speed:.{1 if speed > 0.5 else 2}f})"
        return f"{median(row[solver]):,.0f}" + ratio * (solver not in ("published", "copy"))

    return table(
        ["setting", "gaps", "dtype", *shown],
        (
            [f"`{setting}`", f"{gaps:,}", dtype, *(cell(row, solver) for solver in shown)]
            for (setting, gaps, dtype), row in found.items()
            if dtype == "float32" or gaps == 256
        ),
    )


def published_errors(name: str) -> str:
    """From what to what the published algorithm errs in hard settings."""
    errors = [row["published"]["error"] for key, row in _solves(name).items() if "γ0" in key[0]]
    return f"{min(errors):.1g} to {max(errors):.1g}"


def where_the_published_loop_wins(name: str, solver: str) -> str:
    """On which mild pools the published loop, compiled, is faster than a solver, and how much."""
    wins = [
        f"{gaps:,} gaps in {dtype} ({median(row[solver]) / median(row[ALSO]):.1f} times as fast)"
        for (setting, gaps, dtype), row in _solves(name).items()
        if setting == LLAMA and ALSO in row and median(row[ALSO]) < median(row[solver])
    ]
    return ", ".join(wins) or "no pool measured"


def compile_pays_off(name: str, gaps: int) -> str:
    """After how many calls impl="compile" has saved what its first call took."""
    calls = next(row for row in results(name)["first_calls"] if row["solver"] == "compile")
    saved = median(solves(name, gaps)["eager"]) - median(solves(name, gaps)["compile"])
    return f"{1e6 * calls['cold'] / saved:,.0f}" if saved > 0 else "no number of"


def readme_speed() -> str:
    """What the README says of speed; ``python docs/figures.py`` writes it there."""
    shown = {"published loop, compiled": ALSO, "here: eager torch": "eager",
             '`impl="compile"`': "compile", "NumPy": "numpy", "JAX, jitted": "jax"}  # fmt: skip

    def speed(row: dict[str, Any]) -> list[str | None]:
        found = [row.get(solver) for solver in shown.values()]
        return [each and f"{each['times_as_fast_as_published']:.1f}" for each in found]

    rows = [[dtype, *speed(solves("solver_cpu", 256, dtype))] for dtype in ("float32", "float64")]
    hard = [
        1 / row["eager"]["times_as_fast_as_published"]
        for (setting, _, dtype), row in _solves("solver_cpu").items()
        if "γ0" in setting and dtype == "float32"
    ]
    losses = next(r["losses"] for r in results("loss_overhead_cpu")["alone"] if r["pairs"] == 256)
    multiple = {name: 1 / loss["times_as_fast_as_dpo"] for name, loss in losses.items()}
    dpo, ours = (median(losses[name]) / 1e3 for name in ("DPO", "γ-DPO, eager"))
    whole, inside = multiple["γ-DPO, eager"], multiple["γ-DPO, auto, in torch.compile"]
    return (
        "Speed of a solve, times that of the published loop in eager torch (256 gaps, settings of "
        f"`{LLAMA}`, one CPU\nthread):\n\n{table(['', *shown], rows)}\n\n"
        "In hard settings, where that loop is wrong, an exact solve in eager torch takes "
        f"{min(hard):.1f} to {max(hard):.1f} times its time.\nA whole γ-DPO loss with gradient, "
        f"256 pairs, takes {whole:.1f} times DPO's time in eager torch ({ours:.2f} ms against "
        f"{dpo:.2f} ms),\n{inside:.1f} times inside torch.compile. No GPU is measured yet. "
        "[Benchmarks](docs/benchmarks.md)"
    )


def margin_solve_targets(name: str) -> str:
    """Hold the targets that were set beforehand against what was measured."""

    def speed(gaps: int, solver: str = "compile", peer: str = "published", **which: str) -> float:
        ratio = solves(name, gaps, **which)[solver][f"times_as_fast_as_{peer.replace(', ', '_')}"]
        return float(ratio)

    hard = sorted({setting for setting, _, _ in _solves(name) if setting.startswith("γ0")})
    targets = [
        ("compile, 256 gaps, over the published algorithm", 8, [speed(256)]),
        ("compile, 65,536 gaps, over the same", 8, [speed(65_536)]),
        ("compile, 2,304, 65,536 and 1,000,000 gaps, over the published algorithm compiled", 2,
         [speed(n, peer=ALSO) for n in (2_304, 65_536, 1_000_000)]),
        ("compile, 8 and 256 gaps, over the same", 1, [speed(n, peer=ALSO) for n in (8, 256)]),
        ("eager, 256 gaps, over the published algorithm", 3, [speed(256, "eager")]),
        ("the same in float64", 3, [speed(256, "eager", dtype="float64")]),
        ("auto, the slowest of the hard settings, over the same in float32", round(1 / 1.3, 2),
         [min(speed(n, "auto", setting=each) for each in hard for n in (256, 2_304, 65_536))]),
        ("compile over eager, 65,536 gaps, the slowest of the hard settings", 3,
         [min(speed(65_536, setting=s) / speed(65_536, "eager", setting=s) for s in hard)]),
    ]  # fmt: skip
    return table(
        ["reached", "times as fast", "measured", "target"],
        (
            [
                "yes" if min(found) >= target else "**no**",
                what,
                ", ".join(f"{value:.2g}" for value in found),
                f"{target:g}",
            ]
            for what, target, found in targets
        ),
    )


def before_after(before: str, after: str, dtype: str = "float32") -> str:
    """How many times as fast a solve has become, in units of the published algorithm's time."""
    old, new = _solves(before), _solves(after)
    shown = [
        s for s in OURS if any(s in old[case] and s in new[case] for case in old if case in new)
    ]
    key = "times_as_fast_as_published"

    def cell(case: tuple[str, int, str], solver: str) -> str | None:
        if solver not in old[case] or solver not in new[case]:
            return None
        ratio = new[case][solver][key] / old[case][solver][key]
        return f"{ratio:.1f} ({median(old[case][solver]):,.0f} → {median(new[case][solver]):,.0f})"

    return table(
        ["setting", "gaps", *shown],
        (
            [f"`{case[0]}`", f"{case[1]:,}", *(cell(case, solver) for solver in shown)]
            for case in new
            if case[2] == dtype and case in old
        ),
    )


def passes(name: str) -> str:
    """Passes over a pool of 256 gaps, and how many of them moved the level, over κ."""
    cells: dict[float, list[object]] = {}
    for row in results(name)["passes"]:
        of_kappa = cells.setdefault(row["kappa"], [])
        of_kappa += [f"{row[k]['median']:g}, {row[k]['most']}" for k in ("passes", "moves")]
    columns = [
        f"{what}, {dtype}" for dtype in ("float32", "float64") for what in ("passes", "moves")
    ]
    return table(
        ["κ", *columns], ([f"{kappa:.1e}", *row] for kappa, row in list(cells.items())[::2])
    )


def streaming(before: str, after: str) -> str:
    """Seconds for each million gaps, and readings of them, before and after."""
    rows = []
    for old, new in zip(*(results(name)["streaming"] for name in (before, after)), strict=True):
        seconds = [median(row["solvers"]["streaming"]) / row["gaps"] for row in (new, old)]
        of_numpy = new["solvers"]["streaming"].get("times_as_fast_as_numpy")
        rows.append(
            [f"`{new['setting']}`", f"{new['gaps']:,}", *(f"{value:.2f}" for value in seconds),
             new["readings"], old["readings"], of_numpy and f"{1 / of_numpy:.1f}"]
        )  # fmt: skip
    columns = [
        "setting",
        "gaps",
        "s / million gaps",
        "before",
        "readings",
        "before",
        "of NumPy's time",
    ]
    return table(columns, rows)


def first_calls(name: str) -> str:
    """Seconds of the first call in a new process."""
    return table(
        ["first call in a new process", "seconds, caches empty", "caches filled"],
        (
            [row["solver"], *(row[s] and f"{row[s]:.2f}" for s in ("cold", "warm"))]
            for row in results(name)["first_calls"]
        ),
    )


# --- a loss ---


def loss_overhead(name: str) -> str:
    """Median microseconds of loss, forward and backward, and the multiple of plain DPO."""
    found = results(name)["alone"]
    return table(
        ["pairs", *found[0]["losses"]],
        (
            [
                f"{row['pairs']:,}",
                *(
                    f"{1 / loss['times_as_fast_as_dpo']:.1f} ({median(loss):,.0f})"
                    for loss in row["losses"].values()
                ),
            ]
            for row in found
        ),
    )


def loss_parts(name: str) -> str:
    """Where the time of eager γ-DPO goes."""
    (row,) = results(name)["parts"]
    parts = {**row["parts"], "all of γ-DPO": row["whole"], "all of plain DPO": row["dpo"]}
    return table(
        ["part", "multiple of plain DPO", "µs"],
        ([part, f"{us / row['dpo']:.2f}", f"{us:,.0f}"] for part, us in parts.items()),
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


def worst_pools(name: str) -> str:
    """Return the worst that a search found of each implementation, in how many pools."""
    goals = ("error", "certificate", "disagreement")
    return table(
        ["solver", "dtype", "minutes", "pools", *goals],
        (
            [
                row["solver"],
                row["dtype"],
                f"{row['seconds'] / 60:.0f}",
                f"{row['pools']:,}",
                *(f"{row[goal]:.2g}" for goal in goals),
            ]
            for row in results(name)["results"]
        ),
    )


def many_ranks(name: str) -> str:
    """How many times as fast reducing is as gathering, and a rank's milliseconds of both."""
    rows = []
    for row in results(name)["over_ranks"]:
        ways = [row["ways"][way] for way in ("gather", "reduce")]
        cpu, wall = ([median(way, f"{of}_microseconds") for way in ways] for of in ("cpu", "wall"))
        rows.append(
            [f"`{row['setting']}`", f"{row['pool']:,}"]
            + [f"{gather / reduce:.2f}" for gather, reduce in (cpu, wall)]
            + [f"{microseconds / 1e3:,.1f}" for microseconds in cpu]
        )
    columns = ["reduce, times as fast", "by the clock", "gather, ms", "reduce, ms"]
    return table(["setting", "pool", *columns], rows)


def collectives(before: str, after: str) -> str:
    """Collectives of one solve over two ranks, and bytes that a rank sends."""
    rows = []
    for old, new in zip(*(results(name)["ranks"] for name in (before, after)), strict=True):
        for way, row in new["ways"].items():
            counts = [row["collectives"], old["ways"][way]["collectives"]]
            rows.append([f"`{new['setting']}`", way, *counts, row["bytes_sent_by_a_rank"]])
    return table(["setting", "way", "collectives", "before", "bytes sent"], rows)


def trillion(name: str) -> str:
    """What 10¹² gaps on 1,000 ranks take on paper, from the measured streaming of a mild pool."""
    row = next(row for row in results(name)["streaming"] if row["setting"] == LLAMA)
    minutes = 1e9 * median(row["solvers"]["streaming"]) / row["gaps"] / 6e7
    readings = row["readings"]
    return table(
        ["a rank", "", ""],
        [
            [
                "reads",
                f"{readings + 1} × 4 GB",
                "10⁹ float32 numbers in each pass, the last to write",
            ],
            ["writes", "12 GB", "three float32 numbers a pair"],
            [
                "sends",
                f"{48 * readings:,} bytes",
                "four float64 sums and two extremes in each pass",
            ],
            [
                "computes",
                f"{minutes:,.0f} minutes",
                "on one core, without what the last pass takes",
            ],
        ],
    )


def queue(name: str) -> str:
    """Microseconds of pushing a batch and reading the pool, and the multiple of `GapQueue`'s."""
    rows = []
    for row in results(name)["queue"]:
        ours = median(row["calls"]["GapQueue"])
        cells = (
            f"{median(call):,.0f} ({median(call) / ours:.2f})" for call in row["calls"].values()
        )
        rows.append([row["batch"], *cells])
    return table(["batch", *results(name)["queue"][0]["calls"]], rows)


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
    """Return an SVG of this folder or of the results, in the colours of the page that shows it."""
    places = (folder / name for folder in (Path(__file__).parent, RESULTS))
    return _element(next(p for p in places if p.is_file()).read_text("utf-8"), description)


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
        c, d, b = (f"{v:.2f}".replace("-", "−") if determined else "–" for v in match[:3])
        return [
            name or "–",
            b,
            d,
            c,
            f"{match.unexplained:.1e}".replace("-", "−"),
            f"{gamma0:g}, {tau:g}",
            f"{gamma0**2 / tau:.2g}",
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


# --- trainers ---


def run_with(name: str) -> str:
    """Which version of a trainer ran the page's code, with what and when, and how exactly."""
    record = results("clients").get(name)
    if record is None:
        return f"Not yet run in the trainer itself; `python -m tests.clients {name}` does that."
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    runs = "; ".join(run["run"] for run in record["runs"])
    worst = max(run.get("largest_difference", 0.0) for run in record["runs"])
    exact = f" The logged losses differ from first principles by at most {worst:.0e}." * bool(worst)
    return (
        f"Run with {record['trainer']} {record['version']} ({versions}) on {record['date']}, "
        f"tiny random models on the CPU: {runs}.{exact} `python -m tests.clients {name}` runs it "
        "again."
    )


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
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return _element(out.getvalue(), description)


def _element(svg: str, description: str) -> str:
    """Black ink becomes the colour of the text; white paper and the groups' names go."""
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub('<g id="[^"]*">', "<g>", svg.replace("fill: #ffffff", "fill: none"))
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


def logps_errors(name: str) -> str:
    """Largest error of summed log-probabilities, in nats, by way and the logits' dtype."""
    worst: dict[str, dict[str, float]] = {}
    for row in results(name)["results"]:
        for way, measured in row["ways"].items():
            if measured:
                of_way = worst.setdefault(way, {})
                nats = measured["error"]["nats"]
                of_way[row["dtype"]] = max(nats, of_way.get(row["dtype"], 0.0))
    dtypes = ("bfloat16", "float32")
    return table(
        ["nats", *dtypes],
        ([way, *(f"{errors[each]:.1g}" for each in dtypes)] for way, errors in worst.items()),
    )


# --- what was run with what ---

# Page, and what was done where no results file says more.
TRAINERS = {
    "trl": ("TRL", "run with 1.8.0 and 1.16.0"),
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
    """What each trainer was run with: from clients.json, which `tests.clients` writes."""
    found = results("clients") if (RESULTS / "clients.json").is_file() else {}
    rows = []
    for page, (name, state) in TRAINERS.items():
        if run := found.get(page):
            state = f"run with {run['version']} on {run['date']}"
        file = Path(__file__).parent / "recipes" / f"{page}.md"
        rows.append([f"[{name}](recipes/{page}.md)" if file.is_file() else name, state])
    return table(["trainer", "state, on a CPU"], rows)


if __name__ == "__main__":
    readme = RESULTS.parents[1] / "README.md"
    begin, _, rest = readme.read_text("utf-8").partition("<!-- speed -->")
    _, end, after = rest.partition("<!-- /speed -->")
    text = f"{begin}<!-- speed -->\n{readme_speed()}\n{end}{after}"
    readme.write_text(text, "utf-8")

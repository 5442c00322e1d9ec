"""How accurate are the margins, and where does the published algorithm stop converging?

    python -m benchmarks.accuracy [--quick] [--out FILE.json] [--device cpu|cuda]

Over κ = γ0²/τ, which is what makes a pool hard, the error |x - x*| / (1 + x*) of x = γ/γ0 at its
worst in the pool, for every implementation and for the published algorithm with 20 (as published)
and 2000 steps; float32 and float64. x* is from the bisection in extended precision in
`tests/oracles.py`. For each κ several γ0 and τ from the domain that the library promises, each with
pools of four scales.

The gaps are the same in both dtypes (numbers that float32 holds). The published algorithm always
runs on the CPU: its arithmetic is the same, and its 2000 steps would take a GPU's whole time.
With TRITON_INTERPRET=1 Triton's interpreter takes part on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks.published import published_margins
from gamma_loss import solve_margins

SIZE = 32  # the oracle is slow
SCALES = (0.1, 1.0, 10.0, 100.0)
KAPPAS = 10 ** np.linspace(-3, 7, 21)
GAMMA0_RANGE, TAU_RANGE = (1e-3, 1e2), (1e-3, 1e3)
PUBLISHED_STEPS = (20, 2000)

Solver = Callable[[torch.Tensor, float, float], torch.Tensor]  # (pools, gaps) -> margins


def oracle() -> ModuleType:
    """Load tests/oracles.py, which is not a package's."""
    path = Path(__file__).parents[1] / "tests" / "oracles.py"
    spec = importlib.util.spec_from_file_location("oracles", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(kappa: float, count: int) -> list[tuple[float, float]]:
    """Return (gamma0, tau) with gamma0² / tau = κ over what the domain leaves, the middle first."""
    low = max(GAMMA0_RANGE[0], np.sqrt(kappa * TAU_RANGE[0]))
    high = min(GAMMA0_RANGE[1], np.sqrt(kappa * TAU_RANGE[1]))
    gammas = np.unique(np.geomspace(low, max(low, high), count + 2)[1:-1])
    gammas = gammas[np.argsort(np.abs(np.arange(len(gammas)) - (len(gammas) - 1) / 2))]
    return [(float(g), float(np.clip(g * g / kappa, *TAU_RANGE))) for g in gammas]


def solvers(usable: list[str], device: str) -> dict[str, Solver]:
    """Return what to compare, each taking several pools of one setting."""

    def ours(impl: str, pools: torch.Tensor, gamma0: float, tau: float) -> torch.Tensor:
        solved = [
            solve_margins(pool, gamma0=gamma0, tau=tau, impl=impl).margins
            for pool in pools.to(device)
        ]
        return torch.stack(solved).cpu()

    def published(steps: int, pools: torch.Tensor, gamma0: float, tau: float) -> torch.Tensor:
        return torch.vmap(partial(published_margins, gamma0=gamma0, tau=tau, steps=steps))(pools)

    return {impl: partial(ours, impl) for impl in usable} | {
        f"published, {steps} steps": partial(published, steps) for steps in PUBLISHED_STEPS
    }


def summary(
    problems: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> dict[Any, dict[str, float]]:
    """Return the median pool's and the worst pool's error of each group of problems."""
    groups: dict[Any, list[float]] = {}
    for problem in problems:
        groups.setdefault(key(problem), []).extend(problem["errors"])
    # A result that is no number counts as infinitely wrong.
    groups = {name: np.nan_to_num(errors, nan=np.inf) for name, errors in groups.items()}
    return {
        name: {"median": float(np.median(errors)), "worst": float(np.max(errors))}
        for name, errors in groups.items()
    }


def draw(problems: list[dict[str, Any]], axes: list[Any]) -> None:
    """Draw the error over κ: the median pool, a band up to the worst, and the peer by τ."""
    published = [f"published, {steps} steps" for steps in PUBLISHED_STEPS]
    colours = harness.COLOURS | dict(zip(published, ("tab:orange", "tab:brown"), strict=True))

    def line(axis: Any, chosen: list[dict[str, Any]], statistic: str, **style: Any) -> Any:
        points = summary(chosen, lambda problem: problem["kappa"])
        kappas = sorted(points)
        values = np.clip([points[k][statistic] for k in kappas], 1e-18, 1e3)  # both edges are drawn
        axis.plot(kappas, values, **style)
        return kappas, values

    for axis, dtype in zip(axes, ("float32", "float64"), strict=False):
        for name in dict.fromkeys(problem["solver"] for problem in problems):
            chosen = [p for p in problems if (p["solver"], p["dtype"]) == (name, dtype)]
            style = {"color": colours[name]}
            kappas, median = line(axis, chosen, "median", label=name, marker=".", **style)
            _, worst = line(axis, chosen, "worst", linewidth=0.5, **style)
            axis.fill_between(kappas, median, worst, alpha=0.15, **style)
        axis.axhline(torch.finfo(getattr(torch, dtype)).eps, color="gray", linestyle="--")
        axis.set(title=dtype, ylabel="error of γ / γ0: median pool, band to the worst")
    for name in published:
        for label, slow, linestyle in (("τ ≥ 0.5", False, "-"), ("τ < 0.5", True, ":")):
            chosen = [
                p
                for p in problems
                if (p["solver"], p["dtype"]) == (name, "float64") and (p["tau"] < 0.5) == slow
            ]
            style = {"color": colours[name], "linestyle": linestyle, "marker": "."}
            line(axes[2], chosen, "worst", label=f"{name}, {label}", **style)
    axes[2].set(title="the published algorithm by τ, float64", ylabel="error: worst pool")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="κ = γ0² / τ", ylim=(3e-19, 3e3))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left", title="dashed: the dtype's precision")
    axes[2].legend(fontsize=8, loc="lower left")


def main() -> None:
    """Solve every pool by every solver, print a table, write the results."""
    args = harness.arguments(__doc__, seconds=300)
    usable, skipped = harness.implementations(args.device, interpret=True)
    kappas, count = (KAPPAS, 4) if not args.quick else (10.0 ** np.array([-3, 0, 3, 7]), 1)
    # Every κ once, then every κ with its second setting, and so on as long as there is time.
    rounds = zip_longest(*(settings(kappa, count) for kappa in kappas))
    plan = [
        (turn, float(kappa), *setting)
        for turn, row in enumerate(rounds)
        for kappa, setting in zip(kappas, row, strict=True)
        if setting
    ]
    exact_margins = oracle().margins
    compared = solvers(usable, args.device)
    budget = harness.Budget(args.seconds, len(plan))
    problems: list[dict[str, Any]] = []
    record = harness.machine(args.device) | {
        "pools": {"gaps": SIZE, "scales": SCALES},
        "left_out": skipped,
        "results": problems,  # each with one error for each scale
    }
    for turn, kappa, gamma0, tau in harness.progress(plan, "accuracy"):
        if turn and not budget.left():
            continue
        generator = np.random.default_rng(len(problems))
        pools = generator.normal(size=(len(SCALES), SIZE)) * np.array(SCALES)[:, None]
        pools = pools.astype(np.float32).astype(np.float64)
        exact = np.stack([exact_margins(pool, gamma0, tau)[0] for pool in pools]) / gamma0
        for dtype in (torch.float32, torch.float64):
            for name, solve in list(compared.items()):
                try:
                    margins = solve(torch.tensor(pools, dtype=dtype), gamma0, tau)
                except Exception as error:
                    skipped[name] = f"γ0 = {gamma0:g}, τ = {tau:g}: {harness.reason(error)}"
                    print(f"Left out: {name} ({skipped[name]})")
                    del compared[name]
                    continue
                x = margins.numpy().astype(np.longdouble) / gamma0
                worst = np.max(np.abs(x - exact) / (1 + exact), axis=1)
                problems.append(
                    {
                        "kappa": kappa,
                        "gamma0": gamma0,
                        "tau": tau,
                        "solver": name,
                        "dtype": str(dtype).split(".")[1],
                        "errors": [float(value) for value in worst],
                    }
                )
        harness.write(args.out, record)  # each time, so that an interrupted run leaves something

    print("Error |x - x*| / (1 + x*) of x = γ / γ0: of the median pool, and of the worst")
    cells = summary(
        problems, lambda problem: (problem["kappa"], problem["solver"], problem["dtype"])
    )
    columns = list(dict.fromkeys((name, dtype) for _, name, dtype in cells))
    harness.table(
        ["κ", *(f"{name}, {dtype}" for name, dtype in columns)],
        [
            [f"{kappa:.2g}"]
            + [
                f"{cell['median']:.0e} {cell['worst']:.0e}" if cell else None
                for cell in (cells.get((float(kappa), *column)) for column in columns)
            ]
            for kappa in kappas
        ],
    )
    with harness.picture(args.out, panels=3) as axes:
        if axes:
            draw(problems, axes)


if __name__ == "__main__":
    main()

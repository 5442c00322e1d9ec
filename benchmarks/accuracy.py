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

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator
from itertools import product, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks._harness import Result
from benchmarks.published import published_margins
from gamma_loss import solve_margins

SIZE = 32  # the oracle is slow
SCALES = (0.1, 1.0, 10.0, 100.0)
KAPPAS = 10 ** np.linspace(-3, 7, 21)
GAMMA0_RANGE, TAU_RANGE = (1e-3, 1e2), (1e-3, 1e3)
PUBLISHED_STEPS = (20, 2000)
EDGES = (2.9, 99.0)  # between ranges of κ

Solver = Callable[[torch.Tensor, float, float], torch.Tensor]  # (pools, gaps) -> margins


@functools.cache
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
        return torch.vmap(
            functools.partial(published_margins, gamma0=gamma0, tau=tau, steps=steps)
        )(pools)

    return {impl: functools.partial(ours, impl) for impl in usable} | {
        f"published, {steps} steps": functools.partial(published, steps)
        for steps in PUBLISHED_STEPS
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


def draw(record: Result, axes: list[Any]) -> None:
    """Draw the error over κ: the median pool, a band up to the worst, and the peer by τ."""
    problems = record["results"]
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


def cases(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Every κ once, then every κ with its second setting, and so on."""
    kappas, count = (KAPPAS[::7], 1) if args.quick else (KAPPAS, 4)
    compared = solvers(harness.implementations(args, interpret=True), args.device)
    rounds = zip_longest(*(settings(kappa, count) for kappa in kappas))
    return [
        (turn, float(kappa), *setting, compared)
        for turn, row in enumerate(rounds)
        for kappa, setting in zip(kappas, row, strict=True)
        if setting
    ]


def measure(
    args: argparse.Namespace, seconds: float, turn: int, kappa: float, gamma0: float, tau: float,
    compared: dict[str, Solver],
) -> Iterator[Result]:  # fmt: skip
    """Yield the errors of each solver in each dtype: one for each scale of the pool."""
    if turn and not seconds:
        return
    pools = np.random.default_rng(turn).normal(size=(len(SCALES), SIZE)) * np.array(SCALES)[:, None]
    pools = pools.astype(np.float32).astype(np.float64)
    exact = np.stack([oracle().margins(pool, gamma0, tau)[0] for pool in pools]) / gamma0
    for dtype, name in product(("float32", "float64"), list(compared)):
        try:
            solved = compared[name](torch.tensor(pools, dtype=getattr(torch, dtype)), gamma0, tau)
        except Exception as error:
            args.left_out[name] = f"γ0 = {gamma0:g}, τ = {tau:g}: {harness.reason(error)}"
            continue
        x = solved.numpy().astype(np.longdouble) / gamma0
        errors = np.max(np.abs(x - exact) / (1 + exact), axis=1)
        yield {
            "kappa": kappa,
            "gamma0": gamma0,
            "tau": tau,
            "solver": name,
            "dtype": dtype,
            "errors": [float(value) for value in errors],
        }


def rows(problems: list[Result]) -> Iterator[list[Any]]:
    """Yield the error of the worst pool in three ranges of κ."""
    found = summary(
        problems, lambda p: (p["solver"], p["dtype"], sum(p["kappa"] > edge for edge in EDGES))
    )
    for solver, dtype in dict.fromkeys(key[:2] for key in found):
        worst = [found.get((solver, dtype, part), {}).get("worst") for part in range(3)]
        yield [solver, dtype, *worst]


SECTIONS = {
    "results": harness.Section(
        cases, measure, ("largest error", "dtype", "κ < 3", "κ < 100", "κ ≤ 10⁷"), rows
    )
}


def main() -> None:
    """Solve every pool by every solver."""
    harness.run(__doc__, 300, SECTIONS, draw, panels=3, pools={"gaps": SIZE, "scales": SCALES})


if __name__ == "__main__":
    main()

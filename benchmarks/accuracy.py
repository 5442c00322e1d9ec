"""How accurate are the margins, and where does the published algorithm stop converging?

    python -m benchmarks.accuracy [--quick] [--out FILE.json] [--device cpu|cuda]

Over κ = γ0²/τ, which is what makes a pool hard, the error |x - x*| / (1 + x*) of x = γ/γ0 at its
worst in a pool, as the median pool and the worst pool have it: for every implementation, and for
the published algorithm with 20 (as published) and 2000 steps; float32 and float64. x* is from the
bisection in extended precision in `tests/oracles.py`. For each κ up to four γ0 and τ from the
domain that the library promises, each with pools of four scales.

The gaps are the same in both dtypes (numbers that float32 holds). The published algorithm always
runs on the CPU: its arithmetic is the same, and its 2000 steps would take a GPU's whole time.
With TRITON_INTERPRET=1 Triton's interpreter takes part on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks._harness import Result, Way
from benchmarks.published import published_margins

SECONDS = 120
SIZE = 32  # the oracle is slow
DTYPES = "float32", "float64"
SCALES = (0.1, 1.0, 10.0, 100.0)
KAPPAS = 10 ** np.linspace(-3, 7, 21)
GAMMA0_RANGE, TAU_RANGE = (1e-3, 1e2), (1e-3, 1e3)
PUBLISHED = {f"published, {steps} steps": steps for steps in (20, 2000)}
EDGES = (2.9, 99.0)  # between ranges of κ


@functools.cache
def oracle() -> ModuleType:
    """Load tests/oracles.py, which is not a package's."""
    path = Path(__file__).parents[1] / "tests" / "oracles.py"
    spec = importlib.util.spec_from_file_location("oracles", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(kappa: float, count: int) -> list[tuple[float, float]]:
    """Return (gamma0, tau) with gamma0² / tau = κ over what the domain leaves."""
    low = max(GAMMA0_RANGE[0], np.sqrt(kappa * TAU_RANGE[0]))
    high = min(GAMMA0_RANGE[1], np.sqrt(kappa * TAU_RANGE[1]))
    gammas = np.unique(np.geomspace(low, max(low, high), count + 2)[1:-1])
    return [(float(g), float(np.clip(g * g / kappa, *TAU_RANGE))) for g in gammas]


def solve(name: str, ways: dict[str, Way], pools: np.ndarray, gamma0: float, tau: float) -> Any:
    """Return the margins of several pools of one setting."""
    if name in PUBLISHED:
        loop = functools.partial(published_margins, gamma0=gamma0, tau=tau, steps=PUBLISHED[name])
        return torch.vmap(loop)(torch.tensor(pools)).numpy()
    array, way = ways[name]
    return np.array([way(array(pool), gamma0=gamma0, tau=tau)[0].tolist() for pool in pools])


def cases(args: argparse.Namespace) -> list[tuple[float, str, dict[str, Way], int]]:
    """Every κ in both dtypes."""
    kappas, count, dtypes = (KAPPAS[::20], 1, DTYPES[:1]) if args.quick else (KAPPAS, 4, DTYPES)
    ways = harness.ways(args, interpret=True)
    return [(float(k), dtype, ways, count) for dtype in dtypes for k in kappas]


def measure(
    args: argparse.Namespace, _: float, kappa: float, dtype: str, ways: dict[str, Way], count: int
) -> list[Result]:
    """Return the median and the worst error of each solver over all pools of a κ."""
    errors: dict[str, list[float]] = {name: [] for name in (*ways, *PUBLISHED)}
    for turn, setting in enumerate(settings(kappa, count)):
        pools = np.random.default_rng(turn).normal(size=(len(SCALES), SIZE))
        pools = (pools * np.array(SCALES)[:, None]).astype(np.float32).astype(dtype)
        exact = np.stack([oracle().margins(pool, *setting)[0] for pool in pools]) / setting[0]
        for name, found in errors.items():
            try:
                margins = solve(name, ways, pools, *setting)
            except Exception as error:
                args.left_out[f"{name}, γ0, τ = {setting}"] = harness.reason(error)
                continue
            off = np.abs(margins.astype(np.longdouble) / setting[0] - exact) / (1 + exact)
            found += np.nan_to_num(off.max(1).astype(float), nan=np.inf).tolist()
    return [{"kappa": kappa, "dtype": dtype, "errors": {
        name: [float(np.median(found)), max(found)] for name, found in errors.items() if found
    }}]  # fmt: skip


def worst(results: list[Result], solver: str, dtype: str) -> list[float | None]:
    """Return the error of the worst pool in three ranges of κ; null in a file is infinite."""
    found: list[float | None] = [None] * (len(EDGES) + 1)
    for row in results:
        if row["dtype"] == dtype and solver in row["errors"]:
            part, error = sum(row["kappa"] > edge for edge in EDGES), row["errors"][solver][1]
            found[part] = max(found[part] or 0.0, np.inf if error is None else error)
    return found


def rows(results: list[Result]) -> Iterator[list[Any]]:
    for dtype in DTYPES:
        for solver in results[0]["errors"]:
            yield [solver, dtype, *worst(results, solver, dtype)]


SECTIONS = {
    "results": harness.Section(
        cases, measure, ("largest error", "dtype", "κ < 3", "κ < 100", "κ ≤ 10⁷"), rows
    )
}


def main() -> None:
    harness.run(__doc__, SECONDS, SECTIONS, ("jax",), pools={"gaps": SIZE, "scales": SCALES})


if __name__ == "__main__":
    main()

"""How fast is a margin solve, against the published algorithm and against physics?

    python -m benchmarks.solver [--quick] [--out FILE.json] [--device cpu|cuda]

- ``results``: every implementation of `solve_margins`, NumPy and jax.jit solve the same pools as
  the published algorithm (20 multiplicative-weights steps), which runs eager and through
  torch.compile. Calls alternate in one process, and ratios are of medians. In turn with them:
  ``copy``, which moves as many bytes as a solve must; ``empty call``, torch.compile's ``x + 1`` on
  8 numbers; on CUDA ``published routine``, the published step as a whole with its copies to the
  host (a batch of 16, the deque full), and ``(graph)``, a replay of a CUDA graph. The error is
  |γ - γ*| / (γ0 + γ*) at its worst, against the library's eager float64 solve.
- ``first_calls``: in processes of their own, compilers' caches empty (cold) and filled (warm).
- ``passes`` over a pool that a solve takes, and how many of them moved the level, over κ = γ0²/τ.
- ``streaming``: gaps in chunks, a million against NumPy's solve of the same in one piece.
- ``ranks``: the collectives of a solve over two ranks.

The speed of an older version of the library is measured by this module among that version's files.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks import accuracy, distributed
from benchmarks._harness import HARD, LLAMA, SETTINGS, Call, Result
from benchmarks.published import POOL_SIZE, QUEUE_SIZE, published_margins, published_routine
from gamma_loss import solve_margins, solve_margins_streaming

try:
    from gamma_loss import _mild, _solver
except ImportError:  # an older version, whose passes are not counted
    _solver = None

SIZES = (8, POOL_SIZE, 2304, 65_536, 1_000_000)
DTYPES = ("float32", "float64")
BATCH = 16  # pairs of the published routine's batch
PEERS = ("published", "published, compiled", "copy")

FIRST_CALLS = ("auto", "compile", "published, compiled")
FIRST_CALL = """
import sys, time, torch
from gamma_loss import solve_margins
from benchmarks._harness import fresh_compile
from benchmarks.published import published_margins
torch.set_num_threads(1)
name, device = sys.argv[1:]
gaps = torch.randn(256).to(device)  # the device's own start is not the library's
float(gaps.sum())
start = time.perf_counter()
if name == "published, compiled":
    margins = fresh_compile(published_margins)(gaps, 4.0, 10.0)
else:
    margins = solve_margins(gaps, gamma0=4.0, tau=10.0, impl=name).margins
float(margins[0])
print(time.perf_counter() - start)
"""


def measure_first_call(args: argparse.Namespace, seconds: float, name: str) -> list[Result]:
    """Time the first solve of 256 gaps in fresh processes, with empty and with filled caches."""
    result: Result = {"solver": name}
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        line = [sys.executable, "-c", FIRST_CALL, name, args.device]
        for state in ("cold", "warm"):
            done = subprocess.run(line, env=environment, capture_output=True, text=True)
            result[state] = None if done.returncode else float(done.stdout)
            if done.returncode:
                args.left_out[f"first call of {name}"] = done.stderr.strip().splitlines()[-1]
    return [result]


def jax_solve(gaps: np.ndarray, setting: dict[str, float]) -> Call:
    """Return a solve through jax.jit."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax

    jax.config.update("jax_enable_x64", True)
    compiled, array = jax.jit(partial(solve_margins, **setting)), jax.numpy.asarray(gaps)
    return lambda: compiled(array).margins.block_until_ready()


def solvers(gaps: torch.Tensor, setting: dict[str, float], impls: list[str]) -> dict[str, Call]:
    """Return every solver as a call on the same pool."""
    problem = tuple(setting.values())
    compiled = harness.fresh_compile(published_margins)
    calls: dict[str, Call] = {
        "published": lambda: published_margins(gaps, *problem),
        "published, compiled": lambda: compiled(gaps, *problem),
    }
    for impl in impls:
        calls[impl] = lambda impl=impl: solve_margins(gaps, impl=impl, **setting).margins
    if gaps.device.type == "cpu":
        array = gaps.numpy()
        calls["numpy"] = lambda: solve_margins(array, **setting).margins
        try:
            calls["jax"] = jax_solve(array, setting)
        except ImportError:
            print("Left out: jax (it is not installed)")
    return calls


def solve_cases(args: argparse.Namespace) -> list[tuple[str, int, str, list[str]]]:
    """Every setting at the size of the published pool, all hard ones and one mild at more."""
    impls = [*harness.implementations(args), "auto"]
    if args.quick:
        return [(name, POOL_SIZE, "float32", impls) for name in (LLAMA, "γ0 = 4, τ = 0.1")]
    sizes = dict.fromkeys(SETTINGS, (POOL_SIZE,)) | dict.fromkeys(HARD, SIZES[1:4]) | {LLAMA: SIZES}
    return [(name, size, dtype, impls) for dtype in DTYPES for name in SETTINGS
            for size in sizes[name]]  # fmt: skip


def measure_solve(
    args: argparse.Namespace, seconds: float, name: str, size: int, dtype: str, impls: list[str]
) -> list[Result]:
    """Time all solvers on one pool."""
    setting, on_gpu = SETTINGS[name], args.device == "cuda"
    gaps = torch.tensor(
        harness.pool(setting, size), dtype=getattr(torch, dtype), device=args.device
    )
    exact = solve_margins(gaps.double(), **setting, impl="eager").margins
    spread = float(exact.std()) / setting["gamma0"]
    assert spread >= 0.1 or name not in HARD, f"{name}: margins all alike measure nothing"
    calls = solvers(gaps, setting, impls)
    harness.warm_up(calls, args.device, args.left_out, 1)
    plain = dict(calls)
    if on_gpu:
        for solver, call in plain.items():
            try:
                calls[f"{solver} (graph)"] = harness.graph_replay(call)
            except Exception as error:
                args.left_out[f"{solver} (graph)"] = harness.reason(error)
                torch.cuda.synchronize()
        if size == POOL_SIZE:
            queue, batch = deque([0.0] * QUEUE_SIZE, maxlen=QUEUE_SIZE), gaps[:BATCH].clone()
            problem = (*setting.values(), queue, random.Random(0))
            calls["published routine"] = lambda: published_routine(batch, *problem)
    target, eight = torch.empty_like(gaps), gaps[:8].clone()
    empty = harness.fresh_compile(_add_one)
    calls |= {"copy": lambda: target.copy_(gaps), "empty call": lambda: empty(eight)}

    rows, found = harness.compare(args, calls, seconds, (*PEERS, "published routine"))
    for solver in plain.keys() & rows.keys():
        margins = torch.from_numpy(np.array(found[solver].tolist()))
        error = (margins - exact.cpu()).abs() / (setting["gamma0"] + exact.cpu())
        rows[solver]["error"] = float(error.max())
        if on_gpu:
            count = partial(harness.launches, plain[solver])
            args.later.append(lambda solver=solver, count=count: rows[solver].update(count()))
    return [{"setting": name, "gaps": size, "dtype": dtype, "spread": spread, "solvers": rows}]


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def solve_rows(results: list[Result]) -> Iterator[list[Any]]:
    for result, (name, row) in ((r, item) for r in results for item in r["solvers"].items()):
        yield [
            result["setting"], result["gaps"], result["dtype"], name,
            *row["microseconds"].values(), *(row.get(harness.speed_key(peer)) for peer in PEERS),
            row.get("error"), row.get("device_microseconds"), row.get("kernels"),
        ]  # fmt: skip


def pass_cases(args: argparse.Namespace) -> list[tuple[float, str]]:
    """Every κ in both dtypes, where the passes can be counted."""
    kappas = accuracy.KAPPAS[:: 10 if args.quick else 1] if _solver and args.device == "cpu" else []
    return [(float(kappa), dtype) for kappa in kappas for dtype in DTYPES]


def passes(gaps: np.ndarray, gamma0: float, tau: float) -> tuple[int, int]:
    """Return how many passes a solve takes, and how many of them moved the level."""
    if mild := _mild.mild_passes(gamma0, tau, gaps.dtype == np.float64):
        return mild, 0
    moved: list[bool] = []

    def see(arguments: tuple[Any, ...], result: tuple[Any, ...]) -> None:
        moved.append(result[0].at != arguments[0].at)

    with harness.watched(_solver, "level_step", see):  # once in each pass
        solve_margins(gaps, gamma0=gamma0, tau=tau)
    return len(moved), sum(moved)


def measure_passes(args: argparse.Namespace, _: float, kappa: float, dtype: str) -> list[Result]:
    """Count on 256 gaps of several scales around 0, and on some around γ0."""
    values, counts = np.random.default_rng(0).normal(size=256), []
    for gamma0, tau in accuracy.settings(kappa, 4):
        for pool in (*(s * values for s in accuracy.SCALES), gamma0 + max(gamma0 / 3, 1) * values):
            counts.append(passes(pool.astype(dtype), gamma0, tau))
    result: Result = {"kappa": kappa, "dtype": dtype}
    for name, numbers in zip(("passes", "moves"), zip(*counts, strict=True), strict=True):
        result[name] = {"median": float(np.median(numbers)), "most": max(numbers)}
    return [result]


class Chunks:
    """An array in chunks, and how often it was read."""

    def __init__(self, gaps: np.ndarray, size: int = 2**17) -> None:
        self.chunks, self.readings = np.split(gaps, range(size, len(gaps), size)), 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.readings += 1
        return iter(self.chunks)


def streaming_cases(args: argparse.Namespace) -> list[tuple[str, int]]:
    if args.device != "cpu":
        return []
    cases = [(name, 2**14 if args.quick else 1_000_000) for name in (LLAMA, *HARD)]
    return cases if args.quick else [*cases, (next(iter(HARD)), 100_000_000)]


def measure_streaming(
    args: argparse.Namespace, seconds: float, name: str, size: int
) -> list[Result]:
    """Time a streaming solve against one of the whole array, while that fits into memory."""
    setting = SETTINGS[name]
    gaps = harness.pool(setting, size)

    def streaming() -> tuple[Any, int]:
        chunks = Chunks(gaps)
        return solve_margins_streaming(chunks, **setting), chunks.readings

    calls: dict[str, Call] = {"streaming": streaming}
    if size <= 1_000_000:
        calls["numpy"] = lambda: solve_margins(gaps, **setting)
    rows, first = harness.compare(args, calls, seconds, ("numpy",), warm=1, least=len(calls))
    rule, readings = first["streaming"]
    row = {"setting": name, "gaps": size, "readings": readings, "residual": rule.residual}
    return [row | {"solvers": rows}]


def streaming_rows(results: list[Result]) -> Iterator[list[Any]]:
    for result in results:
        streaming = result["solvers"]["streaming"]
        million = streaming["microseconds"]["0.5"] / result["gaps"]
        of_numpy = streaming.get("times_as_fast_as_numpy")
        yield [result["setting"], result["gaps"], result["readings"], million, of_numpy]


def measure_ranks(args: argparse.Namespace, seconds: float) -> list[Result]:
    """Count the collectives of both ways."""
    names = (LLAMA,) if args.quick else (LLAMA, *HARD)
    return distributed.over_ranks([(name, POOL_SIZE) for name in names], seconds)


SECTIONS = {
    "results": harness.Section(
        solve_cases, measure_solve,
        ("setting", "gaps", "dtype", "solver", "µs 10 %", "median", "90 %", "× published",
         "× compiled", "× copy", "error", "device µs", "kernels"),
        solve_rows, share=0.85,
    ),
    "first_calls": harness.Section(
        lambda args: [] if args.quick else [(name,) for name in FIRST_CALLS],
        measure_first_call, ("solver", "cold, seconds", "warm"), lambda rs: map(dict.values, rs),
        share=0.1,
    ),
    "passes": harness.Section(
        pass_cases, measure_passes, ("κ", "dtype", "passes", "most", "moves of the level", "most"),
        lambda found: [[r["kappa"], r["dtype"], *r["passes"].values(), *r["moves"].values()]
                       for r in found],
        share=0.01,
    ),
    "streaming": harness.Section(
        streaming_cases, measure_streaming,
        ("setting", "gaps", "readings", "s / million gaps", "× numpy"), streaming_rows, share=0.1,
    ),
    "ranks": harness.Section(
        lambda args: [()] * (args.device == "cpu"), measure_ranks, distributed.COLUMNS,
        distributed.rank_rows, share=0.01,
    ),
}  # fmt: skip


def draw(record: Result, axes: list[Any]) -> None:
    """Draw time against the size of the pool, for a mild and for a hard setting."""
    for axis, setting in zip(axes, (LLAMA, "γ0 = 4, τ = 0.1"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in record["results"]:
            if (result["setting"], result["dtype"]) == (setting, "float32"):
                for name, row in result["solvers"].items():
                    lines.setdefault(name, []).append((result["gaps"], row["microseconds"]["0.5"]))
        for name, points in lines.items():
            if name not in ("empty call", "auto"):
                colour = harness.COLOURS.get(name.removesuffix(" (graph)"), "black")
                style = ":" if name.endswith("(graph)") else "-"
                x, y = zip(*sorted(points), strict=True)
                axis.plot(x, y, style, label=name, marker=".", color=colour)
        axis.set(
            xscale="log", yscale="log", xlabel="gaps in the pool", ylabel="microseconds a call"
        )
        axis.set_title(f"A margin solve (float32, {setting})\n{record['device']}", fontsize=9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def main() -> None:
    harness.run(__doc__, 900, SECTIONS, draw, panels=2, packages=("jax",), settings=SETTINGS)


if __name__ == "__main__":
    main()

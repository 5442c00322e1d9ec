"""How fast is a margin solve, against the published algorithm?

    python -m benchmarks.solver [--quick] [--out FILE.json] [--device cpu|cuda]

- ``results``: every implementation of `solve_margins` on the same pools, in the mild setting of
  llama-3-8b-instruct and in hard settings. Beside them the published algorithm (20
  multiplicative-weights steps), in eager torch and, in the mild setting, through torch.compile; and
  `solve_margins_streaming` with 65,536 gaps in one chunk. "auto" is NumPy on a view of a CPU
  tensor, "eager" torch's own operations, "jax" under jax.jit. On CUDA "(graph)" is a replay of a
  CUDA graph. The error is |γ - γ*| / (γ0 + γ*) at its worst, against NumPy in float64.
- ``first_calls``: in processes of their own, compilers' caches empty (cold) and filled (warm), by
  the clock, since compilers start processes.

Times are "hot" and "cold" medians: see `_harness.in_turns`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks._harness import HARD, LLAMA, SETTINGS, Call, Result, Way
from benchmarks.published import POOL_SIZE, published_margins
from gamma_loss import solve_margins, solve_margins_streaming

SECONDS = 300
SIZES = {LLAMA: (8, 64, POOL_SIZE, 2304, 65_536)} | dict.fromkeys(
    HARD, (8, POOL_SIZE, 4096, 65_536)
)
LOOP, COMPILED = "published loop", "published loop, compiled"


def cases(args: argparse.Namespace) -> list[tuple[str, int, str, dict[str, Way]]]:
    """Every setting at every size, in both dtypes."""
    ways = harness.ways(args)
    if args.quick:
        return [(name, POOL_SIZE, "float32", ways) for name in (LLAMA, "γ0 = 4, τ = 0.1")]
    return [(name, size, dtype, ways) for dtype in ("float32", "float64") for name in SETTINGS
            for size in SIZES[name]]  # fmt: skip


def calls_on(
    gaps: np.ndarray, name: str, ways: dict[str, Way], device: str, steps: int
) -> tuple[dict[str, Call], dict[str, Call]]:
    """Return every solver as a call on the same pool, and the published algorithm's."""
    setting, tensor = SETTINGS[name], torch.tensor(gaps, device=device)
    calls: dict[str, Call] = {way: partial(solve, array(gaps), **setting)
                              for way, (array, solve) in ways.items()}  # fmt: skip
    if "jax" in ways:
        import jax

        jitted, array = jax.jit(partial(solve_margins, **setting)), ways["jax"].array(gaps)
        calls["jax"] = lambda: jax.block_until_ready(jitted(array))
    if (gaps.size, gaps.dtype, device) == (65_536, np.float64, "cpu"):
        calls["streaming"] = lambda: [solve_margins_streaming([gaps], **setting).margins(gaps)]
    peers: dict[str, Call] = {LOOP: lambda: [published_margins(tensor, **setting, steps=steps)]}
    if name == LLAMA:
        compiled = harness.fresh_compile(published_margins)
        peers[COMPILED] = lambda: [compiled(tensor, **setting, steps=steps)]
    return calls, peers


def measure(
    args: argparse.Namespace, seconds: float, name: str, size: int, dtype: str,
    ways: dict[str, Way],
) -> list[Result]:  # fmt: skip
    """Time all solvers on one pool."""
    setting, gaps = SETTINGS[name], harness.pool(name, size).astype(dtype)
    exact = solve_margins(gaps.astype(np.float64), **setting).margins
    ours, peers = calls_on(gaps, name, ways, args.device, steps=2 if args.quick else 20)
    calls = ours | peers
    harness.warm_up(calls, args.device, args.left_out, 1)
    plain = dict(calls)
    if args.device == "cuda":
        for solver, call in plain.items():
            try:
                calls[f"{solver} (graph)"] = harness.graph_replay(call)
            except Exception as error:
                args.left_out[f"{solver} (graph)"] = harness.reason(error)
                torch.cuda.synchronize()
    rows, found = harness.compare(args, calls, seconds)
    for solver in plain.keys() & rows.keys():
        margins = np.asarray(found[solver][0].tolist())
        rows[solver]["error"] = float(np.max(np.abs(margins - exact) / (setting["gamma0"] + exact)))
        if args.device == "cuda":
            count = partial(harness.launches, plain[solver])
            args.later.append(lambda solver=solver, count=count: rows[solver].update(count()))
    return [{"setting": name, "gaps": size, "dtype": dtype, "solvers": rows}]


def rows(results: list[Result]) -> Iterator[list[Any]]:
    for result in results:
        solvers = result["solvers"]
        peer = COMPILED if COMPILED in solvers else "numpy" if "numpy" in solvers else LOOP
        for name, row in solvers.items():
            yield [
                result["setting"], result["gaps"], result["dtype"], name, *row["hot"],
                row["cold"][1], peer,
                *(harness.speed(solvers, name, peer, state) for state in harness.STATES),
                row.get("error"), row.get("device_microseconds"), row.get("kernels"),
            ]  # fmt: skip


# --- first calls ---

FIRST_CALLS = ("auto", "compile", COMPILED)
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
if name.startswith("published"):
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


SECTIONS = {
    "results": harness.Section(
        cases, measure,
        ("setting", "gaps", "dtype", "solver", "hot, µs: 10 %", "median", "90 %", "cold", "peer",
         "× peer hot", "cold", "error", "device µs", "kernels"),
        rows, share=0.8,
    ),
    "first_calls": harness.Section(
        lambda args: [] if args.quick else [(name,) for name in FIRST_CALLS],
        measure_first_call, ("solver", "cold, seconds", "warm"), lambda rs: map(dict.values, rs),
        share=0.2,
    ),
}  # fmt: skip


def main() -> None:
    harness.run(__doc__, SECONDS, SECTIONS, packages=("jax",), settings=SETTINGS)


if __name__ == "__main__":
    main()

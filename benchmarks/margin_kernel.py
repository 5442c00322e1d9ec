"""How fast is a margin solve, against the published algorithm and against physics?

    python -m benchmarks.margin_kernel [--quick] [--out FILE.json] [--device cpu|cuda]

Every implementation of `solve_margins`, and NumPy, solve the same pools as the published algorithm
(20 multiplicative-weights steps), which runs eager and through torch.compile. Calls alternate in
one process, and ratios are of medians. Beside them, in turn with them:

- ``copy``: the floor. A solve must read the gaps and write the margins; this moves as many bytes.
- ``empty call``: torch.compile's ``x + 1`` on 8 numbers, what calling any compiled function costs.
- on CUDA, ``published routine``: the published step as a whole, with its copies to the host and its
  random sample (the batch 16 pairs, the deque full); and ``(graph)``: a replay of a CUDA graph.

Data stays in the caches that it fits in. The error beside a time is |γ - γ*| / (γ0 + γ*) at its
worst, against the library's eager float64 solve of the same gaps. First calls are timed in
processes of their own, with compilers' caches empty (cold) and filled by such a process (warm).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks.published import POOL_SIZE, QUEUE_SIZE, published_margins, published_routine
from gamma_loss import PUBLISHED_SETTINGS, solve_margins

LLAMA = "llama-3-8b-instruct"
SIZES = (8, 64, 256, 2048, 2304, 16_384, 65_536, 1_000_000, 10_000_000)
DOUBLE_SIZES = (256, 2048, 65_536)
SETTINGS: dict[str, dict[str, float]] = {
    name: {"gamma0": setting["gamma0"], "tau": setting["tau"]}
    for name, setting in PUBLISHED_SETTINGS.items()
} | {"hard: γ0 = 20, τ = 2": {"gamma0": 20.0, "tau": 2.0}}
BATCH = 16  # pairs of the published routine's batch
PEERS = ("published", "published, compiled", "published routine")

# Prints the seconds of the imports, of the first and the second call, and Inductor's kernels.
FIRST_CALL = """
import json, sys, time
start = time.perf_counter()
import torch
from gamma_loss import solve_margins
from benchmarks._harness import fresh_compile
from benchmarks.published import published_margins
torch.set_num_threads(1)
name, device = sys.argv[1:]
imported = time.perf_counter()
gaps = torch.randn(256).to(device)  # the device's own start is not the library's
float(gaps.sum())
if name == "published, compiled":
    call = lambda f=fresh_compile(published_margins): f(gaps, 4.0, 10.0)
else:
    call = lambda: solve_margins(gaps, gamma0=4.0, tau=10.0, impl=name).margins
times = []
for _ in range(2):
    begin = time.perf_counter()
    float(call()[0])
    times.append(time.perf_counter() - begin)
result = {"import": imported - start, "first_call": times[0], "second_call": times[1]}
if "torch._inductor.metrics" in sys.modules:
    metrics = sys.modules["torch._inductor.metrics"]
    result["inductor_kernels"] = getattr(metrics, "generated_kernel_count", None)
print(json.dumps(result))
"""


def first_calls(names: list[str], device: str, seconds: float, warm: bool) -> dict[str, Any]:
    """Time the first solve of 256 gaps in fresh processes, with empty and with filled caches."""
    end = time.perf_counter() + seconds
    plan = [(state, name) for state in ("cold", "warm")[: 1 + warm] for name in names]
    results: dict[str, Any] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as caches:
        for state, name in harness.progress(plan, "first calls"):
            directory = Path(caches) / name.replace(", ", "_")  # a compiler chokes on the space
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
                "TRITON_CACHE_DIR": str(directory / "triton"),
            }
            left = end - time.perf_counter()
            results[name][state] = _first_call(name, device, environment, left)
    return results


def _first_call(name: str, device: str, environment: dict[str, str], seconds: float) -> dict:
    if seconds <= 0:
        return {"left_out": "no time left"}
    line = [sys.executable, "-c", FIRST_CALL, name, device]
    try:
        done = subprocess.run(
            line, env=environment, timeout=seconds, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"left_out": f"not there after {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"left_out": (error.stderr.strip().splitlines() or ["failed"])[-1]}


def solvers(
    gaps: torch.Tensor, setting: dict[str, float], usable: list[str], compiled_peer: bool
) -> dict[str, harness.Call]:
    """Return every solver as a call on the same pool."""
    gamma0, tau = setting["gamma0"], setting["tau"]
    calls: dict[str, harness.Call] = {"published": lambda: published_margins(gaps, gamma0, tau)}
    if compiled_peer:
        compiled = harness.fresh_compile(published_margins)
        calls["published, compiled"] = lambda: compiled(gaps, gamma0, tau)
    for impl in usable:
        calls[impl] = lambda impl=impl: solve_margins(gaps, impl=impl, **setting).margins
    if gaps.device.type == "cpu":
        array = gaps.numpy()
        calls["numpy"] = lambda: torch.from_numpy(solve_margins(array, **setting).margins)
    elif gaps.shape[0] == POOL_SIZE:
        queue = deque(np.random.default_rng(0).normal(size=QUEUE_SIZE).tolist(), maxlen=QUEUE_SIZE)
        batch, generator = gaps[:BATCH].clone(), random.Random(0)
        calls["published routine"] = lambda: published_routine(batch, gamma0, tau, queue, generator)
    return calls


def measure(
    size: int,
    dtype: torch.dtype,
    setting: dict[str, float],
    device: str,
    usable: list[str],
    budget: harness.Budget,
) -> tuple[dict[str, Any], dict[str, harness.Call]]:
    """Time all solvers on one pool. Returns the results, and the calls to count launches of."""
    seconds = budget.share()
    started = time.perf_counter()
    gaps = torch.tensor(np.random.default_rng(size).normal(size=size) * 2, dtype=dtype).to(device)
    skipped: dict[str, str] = {}
    if not (in_time := budget.left() > 0):
        skipped["published, compiled"] = "no time left"
    calls = solvers(gaps, setting, usable, in_time)
    large = size >= 1_000_000
    results = harness.warm_up(calls, device, skipped, times=1 if large else 3)
    results.pop("published routine", None)  # of a batch and a pool of its own
    exact = solve_margins(gaps.double(), **setting, impl="eager").margins
    errors = {
        name: float(((margins - exact).abs() / (setting["gamma0"] + exact)).max())
        for name, margins in results.items()
    }
    plain = {name: call for name, call in calls.items() if name != "numpy"}
    if device == "cuda":
        for name in [n for n in calls if n != "published routine"]:
            try:
                calls[f"{name} (graph)"] = harness.graph_replay(calls[name])
            except Exception as error:
                skipped[f"{name} (graph)"] = harness.reason(error)
                torch.cuda.synchronize()
    target, eight, empty = torch.empty_like(gaps), gaps[:8].clone(), harness.fresh_compile(_add_one)
    floors = {"copy": lambda: target.copy_(gaps), "empty call": lambda: empty(eight)}
    harness.warm_up(floors, device, skipped)
    calls |= floors
    plain["copy"] = floors["copy"]

    left = max(seconds - (time.perf_counter() - started), 0.2)
    times = harness.in_turns(calls, left, device, least=2 if large else harness.LEAST)
    moved = 2 * gaps.numel() * gaps.element_size()
    rows = {}
    for name, t in times.items():
        wall = t["wall"]
        row: dict[str, Any] = {"microseconds": harness.quantiles(wall), "turns": len(wall)}
        if device == "cuda":
            row["host_microseconds"] = harness.quantiles(t["host"])
        for peer in (*PEERS, "copy"):
            if peer in times and name != "empty call":
                ratio = harness.times_as_fast(wall, times[peer]["wall"])
                row[f"times_as_fast_as_{peer.replace(',', '').replace(' ', '_')}"] = ratio
        if name in errors:
            row["error"] = errors[name]
        if name in ("compile", "published, compiled") and "empty call" in times:
            row["share_of_empty_call"] = harness.times_as_fast(wall, times["empty call"]["wall"])
        if name != "empty call":
            row["nanoseconds_per_gap"] = 1e9 * float(np.median(wall)) / size
            row["gigabytes_per_second"] = moved / float(np.median(wall)) / 1e9
        rows[name] = row
    return {"bytes": moved, "solvers": rows, "left_out": skipped}, plain


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def show(record: dict[str, Any], device: str) -> None:
    """Print the tables."""
    count = "kernels" if device == "cuda" else "operators"
    columns = ["setting", "gaps", "dtype", "solver", "µs 10 %", "median", "90 %"]
    columns += ["host µs", "device µs"] if device == "cuda" else []
    columns += ["× published", "× compiled"] + (["× routine"] if device == "cuda" else [])
    columns += ["× copy's time", count, "ns / gap", "of it empty call", "error"]
    rows = []
    for result in record["results"]:
        for name, row in result["solvers"].items():
            cells = [result["setting"], result["gaps"], result["dtype"], name]
            cells += [row["microseconds"][str(q)] for q in harness.QUANTILES]
            if device == "cuda":
                cells += [row["host_microseconds"]["0.5"], row.get("device_microseconds")]
            cells += [row.get("times_as_fast_as_published")]
            cells += [row.get("times_as_fast_as_published_compiled")]
            if device == "cuda":
                cells += [row.get("times_as_fast_as_published_routine")]
            copy = row.get("times_as_fast_as_copy")
            cells += [copy and 1 / copy, row.get(count), row.get("nanoseconds_per_gap")]
            rows.append([*cells, row.get("share_of_empty_call"), row.get("error")])
    print("Times are of one call. × PEER: how many times as fast as that peer.")
    harness.table(columns, rows)
    print("\nSeconds from the imports to the first result, 256 gaps, in a process of its own")
    columns = ["solver", "caches", "imports", "first call", "second call", "Inductor kernels"]
    keys = ("import", "first_call", "second_call", "inductor_kernels")
    harness.table(
        columns,
        [
            [name, state, *(times.get(key, times.get("left_out")) for key in keys)]
            for name, states in record["first_calls"].items()
            for state, times in states.items()
        ],
    )


def draw(record: dict[str, Any], axes: Any) -> None:
    """Draw time against the size of the pool."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in record["results"]:
        if result["setting"] == LLAMA and result["dtype"] == "float32":
            for name, row in result["solvers"].items():
                lines.setdefault(name, []).append((result["gaps"], row["microseconds"]["0.5"]))
    lines.pop("empty call", None)
    for name, points in lines.items():
        plain = name.removesuffix(" (graph)")
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=harness.COLOURS.get(plain, "black"),
            linestyle="--" if name == "copy" else ":" if plain != name else "-",
            marker="o" if len(points) == 1 else ".",
        )
    axes.set(xscale="log", yscale="log", xlabel="gaps in the pool", ylabel="microseconds a call")
    axes.set_title(f"A margin solve (float32, {LLAMA})\n{record['device']}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def main() -> None:
    """Run every combination, print tables, write the results."""
    args = harness.arguments(__doc__, seconds=600)
    usable, skipped = harness.implementations(args.device)
    record: dict[str, Any] = harness.machine(args.device)
    record |= {"settings": SETTINGS, "left_out": skipped, "first_calls": {}, "results": []}

    whole = harness.Budget(args.seconds, 1)
    names = (
        ["eager"]
        if args.quick
        else [*dict.fromkeys(["auto", *reversed(usable)]), "published, compiled"]
    )
    most = max(args.seconds * 0.35, 15)
    record["first_calls"] = first_calls(names, args.device, most, warm=not args.quick)
    harness.write(args.out, record)

    single, double = torch.float32, torch.float64
    plan = [(LLAMA, size, single) for size in SIZES]
    plan += [(LLAMA, size, double) for size in DOUBLE_SIZES]
    plan += [(name, 256, single) for name in SETTINGS if name != LLAMA]  # the hard one last
    if args.quick:
        plan = [(LLAMA, 256, single)]
    budget = harness.Budget(max(whole.left(), args.seconds / 2), len(plan))
    calls: dict[int, dict[str, harness.Call]] = {}  # to profile when all is timed
    for name, size, dtype in harness.progress(plan, "margin_kernel"):
        row = {"setting": name, "gaps": size, "dtype": str(dtype).split(".")[1]}
        result, calls[len(record["results"])] = measure(
            size, dtype, SETTINGS[name], args.device, usable, budget
        )
        record["results"].append(row | result)
        harness.write(args.out, record)  # each time, so that an interrupted run leaves something
    for index, solve in calls.items():
        result = record["results"][index]
        for name in solve:
            times = 10 if result["gaps"] < 100_000 else 1
            result["solvers"][name] |= harness.launches(solve[name], args.device, times)
    harness.write(args.out, record)
    show(record, args.device)
    with harness.picture(args.out) as axes:
        if axes:
            draw(record, axes[0])


if __name__ == "__main__":
    main()

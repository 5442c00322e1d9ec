"""What does a pool over many ranks cost, and a queue beside a Python deque?

    python -m benchmarks.distributed [--quick] [--out FILE.json]

Ranks: gloo processes on this machine, one thread each, solve one pool that is split evenly over
them, in float32, by either way of `gamma_loss.torch.distributed`:

- ``gather``: every rank gathers all gaps and solves the whole pool;
- ``reduce``: every rank keeps its gaps, and sums are reduced at each Newton pass.

Calls of both alternate, each between two barriers. ``wall`` is that of the slowest rank. ``cpu`` is
the processor time of a rank: what ``wall`` would be without the waiting if every rank had a core of
its own, so where there are more ranks than cores it is the one to read. Collectives and bytes are
those that a rank hands to torch.distributed in one solve. ``switch`` is the smallest pool from
which on ``reduce`` is the faster.

Queue: what a step pays for remembering: `GapQueue` pushes a batch and returns all 2,048 gaps as a
tensor; the deque does the same (``deque``), or returns a random sample of 256 as the published
routine does (``deque, sample``).
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import deque
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from benchmarks import _harness as harness
from benchmarks.published import POOL_SIZE, QUEUE_SIZE
from gamma_loss import GapQueue, solve_margins
from gamma_loss.torch import distributed

RANKS = (1, 2)
SIZES = tuple(2**k for k in range(8, 23, 2))
HARD_SIZES = tuple(2**k for k in range(8, 19, 2))
SETTINGS = {
    "llama-3-8b-instruct": {"gamma0": 4.0, "tau": 10.0},
    "hard: γ0 = 20, τ = 2": {"gamma0": 20.0, "tau": 2.0},
}
LIMITS = {"gather": 2**62, "reduce": 0}
BATCHES = (2, 16, 256)
COLOURS = {"gather": "tab:blue", "reduce": "tab:red"}


def share(size: int, group: Any) -> torch.Tensor:
    """Return this rank's part of a pool."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start, stop = size * rank // ranks, size * (rank + 1) // ranks
    values = np.random.default_rng(rank).normal(size=stop - start) * 5
    return torch.tensor(values, dtype=torch.float32)


def solve(gaps: torch.Tensor, group: Any, way: str, setting: dict[str, float]) -> torch.Tensor:
    """Solve by one way."""
    with mock.patch.object(distributed, "GATHER_LIMIT", LIMITS[way]):
        return solve_margins(gaps, group=group, **setting).margins


def traffic(group: Any, size: int, way: str, setting: dict[str, float]) -> dict[str, int]:
    """Count the collectives of a solve, and the bytes that this rank hands to them."""
    log = []

    def logged(original: Any, *arguments: Any, **keywords: Any) -> Any:
        sent = next(each for each in reversed(arguments) if isinstance(each, torch.Tensor))
        log.append(sent.numel() * sent.element_size())
        return original(*arguments, **keywords)

    names = ("all_reduce", "all_gather")
    replaced = {name: partial(logged, getattr(dist, name)) for name in names}
    with mock.patch.multiple(dist, **replaced):
        solve(share(size, group), group, way, setting)
    return {"collectives": len(log), "bytes_sent_by_a_rank": sum(log)}


def measure(group: Any, size: int, setting: dict[str, float], seconds: float) -> dict[str, Any]:
    """Time both ways in turns; on every rank as often, and as the slowest rank has it."""
    gaps, count = share(size, group), dist.get_world_size(group)
    times: dict[str, list[list[float]]] = {way: [] for way in LIMITS}
    turns = torch.tensor([harness.LEAST], dtype=torch.int64)
    turn = -1
    while turn < turns:
        begun = time.perf_counter()
        for way in LIMITS:
            dist.barrier(group)
            cpu, start = time.process_time(), time.perf_counter()
            solve(gaps, group, way, setting)
            spent = [time.perf_counter() - start, time.process_time() - cpu]
            times[way].append(spent)
        if turn == 0:  # the first turn warms up, the second tells how many there is time for
            turns[0] = min(max(int(seconds / (time.perf_counter() - begun)), harness.LEAST), 200)
            dist.broadcast(turns, 0, group=group)
        turn += 1
    rows: dict[str, Any] = {}
    for way, spent in times.items():
        slowest = torch.tensor(spent[1:], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        wall, cpu = slowest.T.tolist()
        rows[way] = {
            "wall_microseconds": harness.quantiles(wall),
            "cpu_microseconds": harness.quantiles(cpu),
            "turns": len(wall),
            **traffic(group, size, way, setting),
        }
    for of in ("wall", "cpu"):
        medians = {way: rows[way][f"{of}_microseconds"]["0.5"] for way in LIMITS}
        rows[f"reduce_times_as_fast_{of}"] = medians["gather"] / medians["reduce"]
    return {"ranks": count, "pool": size, "ways": rows}


def rank_main(
    rank: int, folder: str, jobs: list[tuple[int, str, int]], seconds: float, results: Any
) -> None:
    """Run all jobs on one rank, and send what rank 0 found."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=max(RANKS)
    )
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS}
    for ranks, name, size in harness.progress(jobs, "ranks") if rank == 0 else jobs:
        if rank < ranks:
            result = measure(groups[ranks], size, SETTINGS[name], seconds / len(jobs))
            if rank == 0:
                results.put({"setting": name, **result})
        dist.barrier()
    dist.destroy_process_group()


def over_ranks(jobs: list[tuple[int, str, int]], seconds: float) -> list[dict[str, Any]]:
    """Run the jobs in real processes."""
    context = processes.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        started = processes.spawn(
            rank_main, (folder, jobs, seconds, results), nprocs=max(RANKS), join=False
        )
        found = []
        while not started.join(timeout=0.1):
            while not results.empty():
                found.append(results.get())
    while not results.empty():
        found.append(results.get())
    return found


def switches(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return from which pool on reduce is the faster, by wall and by processor time."""
    rows = []
    for name in dict.fromkeys(result["setting"] for result in found):
        for ranks in RANKS:
            chosen = [r for r in found if (r["setting"], r["ranks"]) == (name, ranks)]
            row: dict[str, Any] = {"setting": name, "ranks": ranks}
            for of in ("wall", "cpu"):
                row[of] = None
                for result in sorted(chosen, key=lambda r: -r["pool"]):
                    if result["ways"][f"reduce_times_as_fast_{of}"] < 1:
                        break
                    row[of] = result["pool"]
            rows.append(row)
    return rows


def queue_calls(batch: torch.Tensor) -> dict[str, harness.Call]:
    """Return a step's push and read, of a full queue and of a full deque."""
    queue, plain = GapQueue(QUEUE_SIZE), deque([0.0] * QUEUE_SIZE, maxlen=QUEUE_SIZE)
    queue.push(torch.zeros(QUEUE_SIZE))
    generator = random.Random(0)

    def ours() -> Any:
        queue.push(batch)
        return queue.context()

    def all_of_deque() -> torch.Tensor:
        plain.extend(batch.tolist())
        return torch.tensor(plain)

    def sample_of_deque() -> torch.Tensor:
        plain.extend(batch.tolist())
        return torch.tensor(generator.sample(plain, POOL_SIZE))

    return {"GapQueue": ours, "deque": all_of_deque, "deque, sample": sample_of_deque}


def measure_queue(size: int, seconds: float) -> dict[str, Any]:
    """Time the queue and the deque in turns."""
    times = harness.in_turns(queue_calls(torch.randn(size)), seconds, "cpu")
    ours = times["GapQueue"]["wall"]
    return {
        "batch": size,
        "calls": {
            name: {
                "microseconds": harness.quantiles(t["wall"]),
                "times_the_time_of_gap_queue": harness.times_as_fast(ours, t["wall"]),
                "turns": len(t["wall"]),
            }
            for name, t in times.items()
        },
    }


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    for name in SETTINGS:
        rows = []
        for result in record["over_ranks"]:
            if result["setting"] != name:
                continue
            for way in LIMITS:
                row = result["ways"][way]
                rows.append(
                    [result["ranks"], result["pool"], way, row["collectives"],
                     row["bytes_sent_by_a_rank"], row["wall_microseconds"]["0.5"],
                     row["cpu_microseconds"]["0.5"]]
                )  # fmt: skip
        print(f"\n{name}, {record['cores']} core(s) for all ranks")
        columns = ["ranks", "pool", "way", "collectives", "bytes sent", "µs wall", "µs cpu"]
        harness.table(columns, rows)
    print("\nSmallest pool from which on reduce is the faster")
    harness.table(
        ["setting", "ranks", "by wall", "by cpu"], [list(row.values()) for row in record["switch"]]
    )
    print(f"\nPush a batch and read, {QUEUE_SIZE} gaps kept")
    harness.table(
        ["batch", "what", "µs", "times GapQueue's"],
        [
            [result["batch"], name, row["microseconds"]["0.5"], row["times_the_time_of_gap_queue"]]
            for result in record["queue"]
            for name, row in result["calls"].items()
        ],
    )


def draw(record: dict[str, Any], axes: list[Any]) -> None:
    """Draw the processor time of both ways over the pool, a panel for each setting."""
    for axis, name in zip(axes, SETTINGS, strict=True):
        for ranks, style in zip(RANKS, ("--", "-"), strict=True):
            chosen = sorted(
                (r for r in record["over_ranks"] if (r["setting"], r["ranks"]) == (name, ranks)),
                key=lambda r: r["pool"],
            )
            for way in LIMITS:
                spent = [r["ways"][way]["cpu_microseconds"]["0.5"] for r in chosen]
                label = f"{way}, {ranks} rank{'s' * (ranks > 1)}"
                pools = [r["pool"] for r in chosen]
                axis.plot(pools, spent, style, color=COLOURS[way], marker=".", label=label)
        axis.axvline(distributed.GATHER_LIMIT, color="gray", linewidth=0.8, label="GATHER_LIMIT")
        axis.set(xscale="log", yscale="log", xlabel="gaps in the pool of all ranks")
        axis.set(ylabel="processor time of a rank, microseconds")
        axis.set_title(f"{name}\n{record['device']}", fontsize=9)
        axis.legend(fontsize=7)


def main() -> None:
    """Run both parts, print tables, write the results."""
    args = harness.arguments(__doc__, seconds=180)
    sizes = dict(zip(SETTINGS, (SIZES, HARD_SIZES), strict=True))
    if args.quick:
        sizes = dict.fromkeys(SETTINGS, (2**8, 2**14))
    jobs = [(n, name, size) for name in SETTINGS for size in sizes[name] for n in RANKS]
    record: dict[str, Any] = harness.machine("cpu")
    record |= {"cores": len(os.sched_getaffinity(0)), "gather_limit": distributed.GATHER_LIMIT}
    record["over_ranks"] = over_ranks(jobs, 0.8 * args.seconds)
    record["switch"] = switches(record["over_ranks"])
    harness.write(args.out, record)
    batches = BATCHES[:1] if args.quick else BATCHES
    record["queue"] = [measure_queue(size, 0.2 * args.seconds / len(batches)) for size in batches]
    harness.write(args.out, record)
    show(record)
    with harness.picture(args.out, panels=2) as axes:
        if axes:
            draw(record, axes)


if __name__ == "__main__":
    main()

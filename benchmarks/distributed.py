"""What does a pool over many ranks cost, and a queue beside a Python deque?

    python -m benchmarks.distributed [--quick] [--out FILE.json]

Ranks: two gloo processes on this machine, one thread each, solve one pool that is split evenly over
them, in float32, by either way:

- ``gather``: every rank gathers all gaps and solves the whole pool;
- ``reduce``: every rank keeps its gaps, and sums are reduced at each pass.

Calls of both alternate, each between two barriers. ``wall`` is that of the slowest rank. ``cpu`` is
the processor time of a rank: what ``wall`` would be without the waiting if every rank had a core of
its own, so where there are fewer cores it is the one to read. Collectives and bytes are those that
a rank hands to torch.distributed in one solve.

Queue: what a step pays for remembering: `GapQueue` pushes a batch and returns all 2,048 gaps as a
tensor; the deque does the same (``deque``), or returns a random sample of 256 as the published
routine does (``deque, sample``).
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from benchmarks import _harness as harness
from benchmarks._harness import LLAMA, SETTINGS, Result
from benchmarks.published import POOL_SIZE, QUEUE_SIZE
from gamma_loss import GapQueue, _comm, solve_margins

SECONDS = 120
RANKS = 2
SIZES = (2**8, 2**12, 2**16, 2**17, 2**18, 2**20)
NAMES = (LLAMA, "γ0 = 4, τ = 0.1")
LIMITS = {"gather": 2**62, "reduce": 0}
BATCHES = (2, 16, 256)
COLUMNS = ("setting", "pool", "way", "µs wall", "µs cpu", "collectives", "bytes sent")


def share(size: int, group: Any, name: str) -> torch.Tensor:
    """Return this rank's part of a pool."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    part = size * (rank + 1) // ranks - size * rank // ranks
    return torch.tensor(harness.pool(name, part, seed=rank), dtype=torch.float32)


def traffic(group: Any, size: int, way: str, name: str) -> dict[str, int]:
    """Count the collectives of a solve, and the bytes that this rank hands to them."""
    _comm.GATHER_LIMIT = LIMITS[way]
    with (
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather,
    ):
        solve_margins(share(size, group, name), group=group, **SETTINGS[name])
    sent = [
        next(each for each in reversed(call.args) if isinstance(each, torch.Tensor))
        for call in reduce.call_args_list + gather.call_args_list
    ]
    return {"collectives": len(sent), "bytes": sum(each.nbytes for each in sent)}


def measure(group: Any, size: int, name: str, seconds: float) -> Result:
    """Time both ways in turns; on every rank as often, and as the slowest rank has it."""
    gaps, setting = share(size, group, name), SETTINGS[name]
    times: dict[str, list[list[float]]] = {way: [] for way in LIMITS}
    turns = torch.tensor([harness.LEAST], dtype=torch.int64)
    turn = -1
    while turn < turns:
        begun = time.perf_counter()
        for way, _comm.GATHER_LIMIT in LIMITS.items():
            dist.barrier(group)
            cpu, start = time.process_time(), time.perf_counter()
            solve_margins(gaps, group=group, **setting)
            times[way].append([time.perf_counter() - start, time.process_time() - cpu])
        if turn == 0:  # the first turn warms up, the second tells how many there is time for
            turns[0] = min(max(int(seconds / (time.perf_counter() - begun)), harness.LEAST), 200)
            dist.broadcast(turns, 0, group=group)
        turn += 1
    rows: Result = {}
    for way, spent in times.items():
        slowest = torch.tensor(spent[1:], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        wall, cpu = map(harness.quantiles, slowest.T.tolist())
        rows[way] = {"wall": wall, "cpu": cpu, "turns": len(slowest)}
        rows[way] |= traffic(group, size, way, name)
    return {"setting": name, "pool": size, "ways": rows}


def rank_main(rank: int, folder: str, jobs: list[Any], seconds: float, results: Any) -> None:
    """Run all jobs on one rank, and send what rank 0 found."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=RANKS
    )
    for name, size in jobs:
        result = measure(dist.group.WORLD, size, name, seconds / len(jobs))
        if rank == 0:
            results.put(result)
    dist.destroy_process_group()


def measure_ranks(args: argparse.Namespace, seconds: float) -> list[Result]:
    """Measure every setting and size in real processes, in one start of the ranks."""
    jobs = list(product(NAMES, (2**8, 2**14) if args.quick else SIZES))
    context = processes.get_context("forkserver")  # which imports torch once for all ranks
    context.set_forkserver_preload(["benchmarks._harness"])
    results, found = context.SimpleQueue(), []
    with tempfile.TemporaryDirectory() as folder:
        job = (folder, jobs, seconds, results)
        started = processes.start_processes(rank_main, job, RANKS, False, start_method="forkserver")
        alive = True
        while alive:  # what it has sent fits no pipe, so it is read meanwhile
            alive = not started.join(timeout=0.1)
            while not results.empty():
                found.append(results.get())
    return found


def rank_rows(results: list[Result]) -> Iterator[list[Any]]:
    for result, way in product(results, LIMITS):
        row = result["ways"][way]
        medians, sent = [row["wall"][1], row["cpu"][1]], [row["collectives"], row["bytes"]]
        yield [result["setting"], result["pool"], way, *medians, *sent]


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


def measure_queue(args: argparse.Namespace, seconds: float, size: int) -> list[Result]:
    """Time the queue and the deque in turns."""
    rows, _ = harness.compare(args, queue_calls(torch.randn(size)), seconds)
    return [{"batch": size, "calls": rows}]


def queue_rows(results: list[Result]) -> Iterator[list[Any]]:
    for result in results:
        for name, row in result["calls"].items():
            yield [result["batch"], name, row["hot"][1], row["cold"][1]]


SECTIONS = {
    "over_ranks": harness.Section(lambda args: [()], measure_ranks, COLUMNS, rank_rows, share=0.8),
    "queue": harness.Section(
        lambda args: [(size,) for size in (BATCHES[:1] if args.quick else BATCHES)],
        measure_queue, ("batch", "what", "µs, hot", "cold"), queue_rows, share=0.2,
    ),
}  # fmt: skip


def main() -> None:
    facts = {"cores": len(os.sched_getaffinity(0)), "gather_limit": _comm.GATHER_LIMIT}
    harness.run(__doc__, SECONDS, SECTIONS, **facts)


if __name__ == "__main__":
    main()

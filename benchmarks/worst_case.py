"""Which pool is worst? A search for errors, broken certificates and disagreement.

    python -m benchmarks.worst_case [--seconds N] [--quick] [--out FILE.json] [--device cpu|cuda]

For every implementation and dtype climbs over pools and settings of the promised domain, from many
starts, towards the largest of three figures: ``error``, |x - x*| / (1 + x*) of x = γ/γ0 at its
worst in the pool, over what is promised for it; ``certificate``, mean |x - x*| over its
``error_bound``; and ``disagreement``, |x - x'| / (1 + x*) from NumPy's result, over twice what
is promised. Above 1 any of them is broken. Pools are a few distinct gaps, many times over, so that
the bisecting oracle of `tests/oracles.py`, which has the promise too, is quick for any size.

The worst pools found are printed as code that reproduces them and, with ``--out``, appended to
FILE.jsonl, from which the next search starts and which the tests replay. A further run goes on with
those that have not had their time yet (without FILE.json: with all). The seconds are the
processor's, so that other work beside takes nothing away, and all implementations have as many.
"ranks" is the solver for shards, with all gaps in one; "eager" is torch's own operations, "auto"
NumPy's on views of tensors. With TRITON_INTERPRET=1 Triton's interpreter solves small pools.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import _harness as harness
from benchmarks._harness import Result, Way
from benchmarks.accuracy import GAMMA0_RANGE, TAU_RANGE, oracle
from gamma_loss import _solver, solve_margins, solve_margins_streaming
from gamma_loss._backend import get_backend
from gamma_loss._comm import LOCAL

SECONDS = 600
GOALS = ("error", "certificate", "disagreement")
LIMIT = 1e4  # of gaps
SIZES = (64, 1024, 2**17)  # pools are no larger; JAX compiles for each of these
INTERPRETED = 64  # the largest pool of Triton's interpreter
DISTINCT = 8
PATIENCE = 40  # changes that make nothing worse, after which a climb starts elsewhere

Solve = Callable[[np.ndarray, float, float], tuple[np.ndarray, float]]  # margins and error bound


class Pool(NamedTuple):
    """Some gaps, each so many times, and a setting."""

    values: list[float]
    counts: list[int]
    gamma0: float
    tau: float


class Alone:
    """One of two ranks, the other one without gaps."""

    size, all_reduce_sum, all_reduce_max = 2, LOCAL.all_reduce_sum, LOCAL.all_reduce_max


def solvers(args: argparse.Namespace) -> dict[str, Solve]:
    """Return all that can solve a pool here."""

    def by_jax(gaps: np.ndarray, gamma0: float, tau: float) -> Any:
        import jax.numpy as jnp

        size = next(size for size in SIZES if size >= gaps.size)
        mask = None if size == gaps.size else jnp.asarray(np.arange(size) < gaps.size)
        padded = jnp.asarray(np.pad(gaps, (0, size - gaps.size)))
        margins, *numbers = solve_margins(padded, gamma0=gamma0, tau=tau, mask=mask)
        return margins[: gaps.size], *numbers

    def by_ranks(gaps: torch.Tensor, gamma0: float, tau: float) -> Any:
        xp = get_backend(gaps)
        return _solver.solve(xp, gaps, None, gamma0, tau, Alone())

    def by_streaming(gaps: np.ndarray, gamma0: float, tau: float) -> Any:
        rule = solve_margins_streaming([gaps], gamma0=gamma0, tau=tau)
        return rule.margins(gaps), rule.multiplier, rule.error_bound

    def solve(way: Way, gaps: np.ndarray, gamma0: float, tau: float) -> tuple[np.ndarray, float]:
        margins, _, bound = way.solve(way.array(gaps), gamma0=gamma0, tau=tau)
        return np.asarray(margins.cpu() if hasattr(margins, "cpu") else margins), float(bound)

    found = harness.ways(args, interpret=True)
    found |= {
        "numpy": Way(np.asarray, solve_margins),
        "ranks": Way(found["eager"].array, by_ranks),
        "streaming": Way(np.asarray, by_streaming),
    }
    if "jax" in found:
        found["jax"] = Way(np.asarray, by_jax)
    return {name: functools.partial(solve, way) for name, way in sorted(found.items())}


def figures(solve: Solve, peer: Solve, dtype: str, pool: Pool) -> dict[str, float]:
    """Return what is wrong with a solution; a failure, or no number, is infinitely wrong."""
    gaps, setting = np.repeat(np.asarray(pool.values, dtype), pool.counts), pool[2:]
    exact, nu = oracle().margins(gaps, *setting)
    promised, exact = oracle().promised(dtype, exact, nu, gaps, *setting), exact / pool.gamma0
    try:
        margins, bound = solve(gaps, *setting)
    except Exception:
        return dict.fromkeys(GOALS, math.inf)
    x = margins.astype(np.longdouble) / pool.gamma0
    other = peer(gaps, *setting)[0].astype(np.longdouble) / pool.gamma0
    found = [
        np.max(np.abs(x - exact) / (1 + exact)) / promised,
        np.mean(np.abs(x - exact)) / max(bound, 1e-30),
        np.max(np.abs(x - other) / (1 + exact)) / (2 * promised),
    ]
    return dict(zip(GOALS, map(float, np.nan_to_num(found, nan=np.inf)), strict=True))


# --- the search ---


def search(
    solve: Solve, peer: Solve, dtype: str, seconds: float, most: int, starts: list[Pool], seed: int
) -> tuple[dict[str, tuple[float, Pool]], int]:
    """Return the worst figure of each goal with its pool, and how many pools were looked at.

    All of the pools to start from are looked at, however little time there is.
    """
    rng, end = np.random.default_rng(seed), time.process_time() + seconds
    worst: dict[str, tuple[float, Pool]] = {}
    looked = 0

    def look(pool: Pool) -> dict[str, float]:
        nonlocal looked
        found, looked = figures(solve, peer, dtype, pool), looked + 1
        for goal, value in found.items():
            if goal not in worst or value > worst[goal][0]:
                worst[goal] = value, pool
        return found

    for start in starts:
        look(start)
    goals = cycle(GOALS)
    while not looked or time.process_time() < end:
        goal, again = next(goals), worst and rng.random() < 0.3
        pool = worst[goal][1] if again else drawn(rng, dtype, most)
        height, quiet = look(pool)[goal], 0
        while quiet < PATIENCE and time.process_time() < end:
            other = changed(rng, dtype, most, pool)
            value = look(other)[goal]
            quiet = 0 if value > height else quiet + 1
            if value >= height:
                pool, height = other, value
    return worst, looked


def drawn(rng: np.random.Generator, dtype: str, most: int) -> Pool:
    """Return a random pool."""
    gamma0, tau = (math.exp(rng.uniform(*np.log(edges))) for edges in (GAMMA0_RANGE, TAU_RANGE))
    pool = Pool([], [], gamma0, tau)
    for _ in range(rng.integers(1, DISTINCT + 1)):
        pool = kept(dtype, most, pool, [*pool.values, gap(rng, pool)], [*pool.counts, count(rng)])
    return switched(rng, pool) if rng.random() < 0.3 else pool


def changed(rng: np.random.Generator, dtype: str, most: int, pool: Pool) -> Pool:
    """Return a pool beside a pool."""
    values, counts, i = [*pool.values], [*pool.counts], rng.integers(len(pool.values))
    what = rng.integers(8)
    nudge = math.exp(rng.normal() * 10 ** rng.uniform(-6, 1))
    if what == 0:
        values, counts = [*values, gap(rng, pool)], [*counts, count(rng)]
    elif what == 1 and len(values) > 1:
        del values[i], counts[i]
    elif what == 2:
        counts[i] = count(rng)
    elif what == 3:
        pool = pool._replace(gamma0=float(np.clip(pool.gamma0 * nudge, *GAMMA0_RANGE)))
    elif what == 4:
        pool = pool._replace(tau=float(np.clip(pool.tau * nudge, *TAU_RANGE)))
    elif what == 5:
        pool = switched(rng, pool)
    elif what == 6:
        values[i] = gap(rng, pool)
    else:
        values[i] *= nudge
    return kept(dtype, most, pool, values, counts)


def kept(dtype: str, most: int, pool: Pool, values: list[float], counts: list[int]) -> Pool:
    """Return the pool with other gaps, kept inside the domain, the dtype and the largest size."""
    values = np.clip(values[-DISTINCT:], -LIMIT, LIMIT).astype(dtype).tolist()
    counts = counts[-DISTINCT:]
    while sum(counts) > most:
        counts = [max(1, each // 2) for each in counts]
    return pool._replace(values=values, counts=counts)


def gap(rng: np.random.Generator, pool: Pool) -> float:
    """Return a gap: near γ0 or another gap, an outlier, or of any scale."""
    near = float(rng.choice([pool.gamma0, 0.0, *pool.values]))
    far = rng.normal() * 10 ** rng.uniform(-8, 4)
    return [near, near + far, far, LIMIT * rng.choice([-1.0, 1.0])][rng.integers(4)]


def count(rng: np.random.Generator) -> int:
    return int(10 ** rng.uniform(0, rng.choice([0.3, 2, math.log10(SIZES[-1])])))


def switched(rng: np.random.Generator, pool: Pool) -> Pool:
    """Move the setting to where another solver, or number of passes, is taken, or right beside."""
    g = pool.gamma0
    edge = math.log1p(8.5 / g)
    for _ in range(20):  # Newton's steps to where κ e^a = 8.5
        edge -= (edge - 8.5 / g * math.exp(-edge)) / (1 + edge)
    a = rng.choice([1.5, 0.42, 1.65 / g, edge]) * (1 + rng.choice([-1e-9, 0.0, 1e-9]))
    return pool._replace(tau=float(np.clip(g / a, *TAU_RANGE)))


# --- the run ---


def cases(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Every implementation in both dtypes."""
    args.corpus, args.done, ways = [], [], solvers(args)
    if args.out:
        corpus, before = args.out.with_suffix(".jsonl"), args.out.read_text("utf-8")
        if corpus.exists():
            args.corpus = [json.loads(line) for line in corpus.read_text("utf-8").splitlines()]
        args.done = json.loads(before)["results"] if before else []
    dtypes = dict.fromkeys(ways, ("float64", "float32")) | {"streaming": ("float64",)}
    share = args.seconds / len(ways)
    return [(name, each, ways, share / len(dtypes[name])) for name in ways for each in dtypes[name]]


def measure(
    args: argparse.Namespace, _: float, name: str, dtype: str, ways: dict[str, Solve],
    share: float,
) -> Iterator[Result]:  # fmt: skip
    """Yield the worst that an implementation does in its share of time, and keep the pools.

    What it has had of its share before counts.
    """
    who = {"solver": name, "dtype": dtype}
    before = {"seconds": 0.0, "pools": 0} | dict.fromkeys(GOALS, 0.0)
    for row in args.done:
        if who.items() <= row.items():
            before = row
    if before["seconds"] >= 0.9 * share:
        yield before
        return
    starts = [Pool(*(each[key] for key in Pool._fields)) for each in args.corpus
              if who.items() <= each.items()]  # fmt: skip
    most = INTERPRETED if name == "triton" and args.device == "cpu" else SIZES[-1]
    begin, left = time.process_time(), share - before["seconds"]
    worst, pools = search(
        ways[name], ways["numpy"], dtype, left, most, starts, time.time_ns() % 2**32
    )
    spent = {"seconds": before["seconds"] + time.process_time() - begin}
    found = {goal: max(value, before[goal]) for goal, (value, _) in worst.items()}
    yield who | spent | {"pools": before["pools"] + pools} | found
    for goal, (value, pool) in worst.items():
        if args.out and value and pool not in starts:
            with args.out.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(who | {"goal": goal, "found": value} | pool._asdict()) + "\n")
            starts.append(pool)
        code = f"reproduce({name!r}, {dtype!r}, {pool})  # {goal} {value:.2g}"
        args.later.append(functools.partial(print, code))


def reproduce(name: str, dtype: str, pool: Pool) -> dict[str, float]:
    """Return the figures of an implementation on a pool (on the CPU)."""
    ways = solvers(argparse.Namespace(device="cpu", quick=False, left_out={}))
    return figures(ways[name], ways["numpy"], dtype, pool)


def rows(results: list[Result]) -> Iterator[list[Any]]:
    """Yield the worst figures of each implementation."""
    for row in results:
        yield [row[key] for key in ("solver", "dtype", "pools", *GOALS)]


SECTIONS = {
    "results": harness.Section(cases, measure, ("solver", "dtype", "pools", *GOALS), rows),
}


def main() -> None:
    """Search with every implementation in turn."""
    print("from benchmarks.worst_case import Pool, reproduce")
    harness.run(__doc__, SECONDS, SECTIONS, packages=("jax",))


if __name__ == "__main__":
    main()

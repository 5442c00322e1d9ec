"""What do log-probabilities of responses cost, in time, memory and accuracy?

    python -m benchmarks.sequence_logps [--quick] [--out FILE.json] [--device cpu|cuda]

`sequence_logps` against TRL's ``selective_log_softmax`` (left out where trl is not installed),
torch's ``cross_entropy``, and ``log_softmax`` in float32 followed by ``gather``, eager and compiled
by torch.compile. Each scores responses whose first half is prompt, from logits to one sum for each.

- ``forward`` is without autograd, as for the reference model; ``both`` is forward and backward.
- ``memory`` is the most that a call holds at once beside logits and labels, in multiples of the
  logits' size. The gradient alone is 1.
- ``error`` is the largest one of a log-probability, in nats, and of the gradient, in multiples of
  its largest entry, against float64 on the same logits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import _harness as harness
from benchmarks._harness import Result
from gamma_loss import sequence_logps

SHAPES = {  # responses, tokens of each, vocabulary
    "cpu": ((2, 256, 32_000), (8, 256, 32_000), (2, 256, 128_256)),
    "cuda": ((8, 256, 32_000), (8, 1024, 32_000), (8, 1024, 128_256)),
}
QUICK = ((2, 16, 32_000),)
DTYPES = (torch.float32, torch.bfloat16)
OURS, TRL, PLAIN = "sequence_logps", "TRL", "log_softmax + gather"
COMPILED, CROSS_ENTROPY = f"{PLAIN}, compiled", "cross_entropy"
PARTS = ("forward", "both")

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Score by a full float32 log-softmax."""
    logps = logits[:, :-1].log_softmax(-1, dtype=torch.float32)
    return (logps.gather(2, labels[:, 1:, None]).squeeze(2) * mask[:, 1:]).sum(1)


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Score by torch's fused loss."""
    targets = F.pad(labels.masked_fill(~mask, -100)[:, 1:], (0, 1), value=-100)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -each.view(targets.shape).sum(1)


def scores(compiled: bool, skipped: dict[str, str]) -> dict[str, Score]:
    """Return what is compared."""
    found: dict[str, Score] = {OURS: sequence_logps, PLAIN: plain, CROSS_ENTROPY: cross_entropy}
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError as error:
        skipped[TRL] = harness.reason(error)
    else:

        def trl(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            return (selective_log_softmax(logits[:, :-1], labels[:, 1:]) * mask[:, 1:]).sum(1)

        found[TRL] = trl
    if compiled:
        found[COMPILED] = harness.fresh_compile(plain)
    return found


def peak_memory(call: harness.Call, device: str) -> int:
    """Return the most bytes that a call holds at once, beside what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max(initial=0))


def errors(found: Tensor, gradient: Tensor, case: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Return the largest errors of a result and its gradient, against float64."""
    rows = []
    for logps, grads, *row in zip(found, gradient, *case, strict=True):
        logits, labels, mask = (x[None].detach() for x in row)
        logits = logits.double().requires_grad_()
        each = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None]).squeeze(2)
        expected = (each * mask[:, 1:]).sum()
        (slope,) = torch.autograd.grad(expected, logits)
        off = (grads.double() - slope[0]).abs().max() / slope.abs().max()
        rows.append((float((logps.detach().double() - expected.detach()).abs()), float(off)))
    return dict(zip(("nats", "gradient"), np.max(rows, 0).tolist(), strict=True))


def cases(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    return list(product(QUICK if args.quick else SHAPES[args.device], DTYPES))


def measure(
    args: argparse.Namespace, seconds: float, shape: tuple[int, int, int], dtype: torch.dtype
) -> list[Result]:
    """Compare on one batch."""
    started = time.perf_counter()
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape, device=args.device)).to(dtype).requires_grad_()
    labels = torch.randint(shape[2], shape[:2], device=args.device)
    mask = (torch.arange(shape[1], device=args.device) >= shape[1] // 2).expand(shape[:2])
    case = (logits, labels, mask)

    def forward(score: Score) -> Tensor:
        with torch.no_grad():
            return score(*case)

    def both(score: Score) -> tuple[Tensor, Tensor]:
        logps = score(*case)
        return logps, torch.autograd.grad(logps.sum(), logits)[0]

    compared = scores(not args.quick, args.left_out)
    calls = {n: (lambda score=score: errors(*both(score), case)) for n, score in compared.items()}
    found = harness.warm_up(calls, args.device, args.left_out, times=1)
    ways: dict[str, Result] = {name: {"error": error} for name, error in found.items()}
    size = logits.numel() * logits.element_size()
    for i, (part, run) in enumerate(zip(PARTS, (forward, both), strict=True)):
        calls = {name: (lambda run=run, name=name: run(compared[name])) for name in ways}
        left = (seconds - (time.perf_counter() - started)) / (len(PARTS) - i)
        rows, _ = harness.compare(args, calls, left, (TRL,), warm=1, least=3)
        for name, row in rows.items():
            ways[name][part] = row | {"memory": peak_memory(calls[name], args.device) / size}
    return [
        dict(zip(("responses", "tokens", "vocabulary"), shape, strict=True))
        | {"dtype": str(dtype).removeprefix("torch."), "ways": ways}
    ]


def label(result: Result) -> str:
    shape = f"{result['responses']} × {result['tokens']} × {result['vocabulary']:,}"
    return f"{shape} {result['dtype']}"


def rows(results: list[Result]) -> Iterator[list[Any]]:
    for shape, name, way in ((label(r), *item) for r in results for item in r["ways"].items()):
        cells = [shape, name, *way["error"].values()]
        for part in PARTS:
            one = way.get(part, {"microseconds": {"0.5": math.nan}})
            ratio = one.get(harness.speed_key(TRL))
            cells += [one["microseconds"]["0.5"] / 1e3, ratio, one.get("memory")]
        yield cells


COLUMNS = ["logits", "", "error, nats", "of gradient"]
COLUMNS += [f"{part}: {name}" for part in PARTS for name in ("ms", "× TRL", "memory / logits")]
SECTIONS = {"results": harness.Section(cases, measure, COLUMNS, rows)}


def draw(record: Result, axes: list[Any]) -> None:
    """Draw bars: time and memory of forward and backward."""
    found = record["results"]
    names = dict.fromkeys(name for result in found for name in result["ways"])
    ways = {name: [result["ways"].get(name, {}).get("both") for result in found] for name in names}
    labels = ["\n".join(label(result).rsplit(" ", 2)) for result in found]
    heights = ({n: [way and way["microseconds"]["0.5"] / 1e3 for way in ways[n]] for n in names},
               {n: [way and way["memory"] for way in ways[n]] for n in names})  # fmt: skip
    for axis, height, name in zip(
        axes, heights, ("milliseconds", "memory / size of the logits"), strict=True
    ):
        harness.bars(axis, labels, height)
        axis.set_ylabel(f"{name}, forward and backward")
        axis.set_title(record["device"], fontsize=8)
    axes[0].set_yscale("log")
    axes[0].set_ylim(top=10 * axes[0].get_ylim()[1])  # room for the legend


def main() -> None:
    harness.run(__doc__, 240, SECTIONS, draw, panels=2, packages=("trl",))


if __name__ == "__main__":
    main()

"""What do log-probabilities of responses cost, in time, memory and accuracy?

    python -m benchmarks.logps [--quick] [--out FILE.json] [--device cpu|cuda]

- ``results``: `sequence_logps` against TRL's ``selective_log_softmax``, torch's ``cross_entropy``,
  and ``log_softmax`` in float32 followed by ``gather``. Each scores responses whose first half is
  prompt, from logits to one sum for each, forward and backward. ``memory`` is the most that a call
  holds at once beside logits and labels, in multiples of the logits; the gradient alone is 1.
  ``nats`` is the largest error of a sum, against float64 on the same logits.
- ``steps``: the MiB that a γ-SimPO step adds at its peak, from hidden states: with all logits, and
  in chunks of 1,024 tokens that the backward pass computes again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import _harness as harness
from benchmarks._harness import Result
from gamma_loss import gamma_simpo_loss, sequence_logps

SECONDS = 120
SHAPES = ((2, 256, 32_000), (8, 256, 32_000), (2, 256, 128_256))  # responses, tokens, vocabulary
QUICK = ((2, 16, 32_000),)
STEP = (4, 512, 256, 32_768)  # pairs, tokens, width, vocabulary

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


def scores(left_out: dict[str, str]) -> dict[str, Score]:
    """Return what is compared."""
    found = {"sequence_logps": sequence_logps, "log_softmax + gather": plain}
    found["cross_entropy"] = cross_entropy
    try:
        from trl.trainer.utils import selective_log_softmax as trl
    except ImportError as error:
        left_out["TRL"] = harness.reason(error)
        return found
    return found | {
        "TRL": lambda x, labels, mask: (trl(x[:, :-1], labels[:, 1:]) * mask[:, 1:]).sum(1)
    }


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


def cases(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    return list(product(QUICK if args.quick else SHAPES, (torch.float32, torch.bfloat16)))


def measure(
    args: argparse.Namespace, seconds: float, shape: tuple[int, int, int], dtype: torch.dtype
) -> list[Result]:
    """Compare on one batch."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape, device=args.device)).to(dtype).requires_grad_()
    labels = torch.randint(shape[2], shape[:2], device=args.device)
    mask = (torch.arange(shape[1], device=args.device) >= shape[1] // 2).expand(shape[:2])
    exact = torch.stack([
        (row[:-1].double().log_softmax(-1).gather(1, label[1:, None])[:, 0] * some[1:]).sum()
        for row, label, some in zip(logits.detach(), labels, mask, strict=True)
    ])  # fmt: skip

    def both(score: Score) -> Tensor:
        logps = score(logits, labels, mask)
        torch.autograd.grad(logps.sum(), logits)
        return logps.detach()

    compared = scores(args.left_out)
    calls = {n: (lambda score=score: both(score)) for n, score in compared.items()}
    rows, found = harness.compare(args, calls, seconds, warm=1, least=3)
    for name, row in rows.items():
        row["nats"] = float((found[name].double() - exact).abs().max())
        row["memory"] = peak_memory(calls[name], args.device) / logits.nbytes
    sizes = dict(zip(("responses", "tokens", "vocabulary"), shape, strict=True))
    return [sizes | {"dtype": str(dtype).removeprefix("torch."), "ways": rows}]


def rows(results: list[Result]) -> Iterator[list[Any]]:
    for result, (name, row) in ((r, item) for r in results for item in r["ways"].items()):
        yield [*list(result.values())[:4], name, row["hot"][1] / 1e3, row["memory"], row["nats"]]


# --- a step without all logits ---


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def step(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None) -> Tensor:
    """Return γ-SimPO's loss, with all logits at once or in chunks of tokens."""
    if chunk is None:
        logps = token_logps(hidden.flatten(0, 1), weight, labels.flatten())
    else:
        chunks = zip(hidden.flatten(0, 1).split(chunk), labels.flatten().split(chunk), strict=True)
        logps = torch.cat(
            [checkpoint(token_logps, h, weight, each, use_reentrant=False) for h, each in chunks]
        )
    means = logps.view(2, -1, labels.shape[1]).mean(-1)
    return gamma_simpo_loss(*means, beta=10.0, gamma0=4.0, tau=10.0)[0]


def measure_step(
    args: argparse.Namespace, seconds: float, way: str, chunk: int | None
) -> list[Result]:
    pairs, tokens, width, vocabulary = (2, 64, 16, 512) if args.quick else STEP
    hidden = torch.randn(2 * pairs, tokens, width, device=args.device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=args.device, requires_grad=True)
    labels = torch.randint(vocabulary, (2 * pairs, tokens), device=args.device)
    peak = peak_memory(lambda: step(hidden, weight, labels, chunk).backward(), args.device)
    return [{"way": way, "mib": peak / 2**20}]


SECTIONS = {
    "results": harness.Section(
        cases, measure,
        ("responses", "tokens", "vocabulary", "dtype", "", "ms", "memory / logits", "nats"), rows,
    ),
    "steps": harness.Section(
        lambda args: [("all logits", None), ("chunks, recomputed", 1024)], measure_step,
        ("way", "peak MiB"), lambda found: map(dict.values, found), share=0.05,
    ),
}  # fmt: skip


def main() -> None:
    harness.run(__doc__, SECONDS, SECTIONS, packages=("trl",))


if __name__ == "__main__":
    main()

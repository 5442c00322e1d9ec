"""Peak memory of a γ-SimPO step: with all logits, without, and with Liger's fused loss.

Each way runs in a process of its own. What counts is the resident memory that the forward and
backward pass add to that of the inputs, as Linux reports it (VmHWM in /proc/self/status).
"""

from __future__ import annotations

import argparse
import multiprocessing
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import _harness as harness
from benchmarks._harness import Result
from gamma_loss import GapQueue, gamma_simpo_loss

SETTING = {"beta": 10.0, "gamma0": 4.0, "tau": 10.0}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def with_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logps = token_logps(hidden.flatten(0, 1), weight, labels.flatten())
    return gamma_simpo_loss(*logps.view(2, -1, labels.shape[1]).mean(-1), **SETTING)[0]


def without_logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    chunks = zip(
        hidden.flatten(0, 1).split(2 * labels.shape[1]),
        labels.flatten().split(2 * labels.shape[1]),
        strict=True,
    )
    logps = torch.cat(
        [checkpoint(token_logps, h, weight, each, use_reentrant=False) for h, each in chunks]
    )
    return gamma_simpo_loss(*logps.view(2, -1, labels.shape[1]).mean(-1), **SETTING)[0]


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    queue = GapQueue(2048)
    queue.push(torch.randn(2048))

    class FusedGammaSimPO(LigerFusedLinearSimPOFunction):
        @staticmethod
        def preference_loss_fn(chosen, rejected, labels, beta, **_):
            gaps, filled = queue.context()
            loss, aux = gamma_simpo_loss(
                chosen, rejected, context=gaps, context_mask=filled, reduction="sum", **SETTING
            )
            return loss / (len(labels) // 2), aux.chosen_rewards, aux.rejected_rewards

    options = (None, -100, SETTING["beta"], 1.0, 0.0, False, False)
    return FusedGammaSimPO.apply(hidden, weight, labels, *options)[0]


WAYS = {
    "all logits": with_logits,
    "chunks, recomputed": without_logits,
    "Liger, margins from the queue": fused,
}


def inputs(pairs: int, tokens: int, width: int, vocabulary: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    labels = torch.randint(vocabulary, (2 * pairs, tokens), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def status(name: str) -> int:
    """Return a number of bytes that the kernel reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(way: str, sizes: tuple[int, int, int, int]) -> float:
    """Return the MiB that one forward and backward pass adds at its peak."""
    torch.set_num_threads(1)
    WAYS[way](*inputs(2, 4, 8, 16)).backward()  # imports and first calls
    prepared = inputs(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    WAYS[way](*prepared).backward()
    return (status("VmHWM") - before) / 2**20


def measure(args: argparse.Namespace, seconds: float, way: str) -> list[Result]:
    """Run one way in a process of its own."""
    if way.startswith("Liger") and not find_spec("liger_kernel"):
        args.left_out[way] = "liger_kernel is not installed"
        return []
    sizes = (4, 512, 256, 2_048 if args.quick else 32_768)
    with multiprocessing.get_context("spawn").Pool(1) as process:
        mib = process.apply(peak, (way, sizes))
    result = dict(zip(("pairs", "tokens", "width", "vocabulary"), sizes, strict=True))
    logits = 2 * sizes[0] * sizes[1] * sizes[3] * 4 / 2**20
    return [{"way": way, "peak_mib": mib, "logits_mib": logits, **result}]


SECTIONS = {
    "results": harness.Section(
        lambda args: [(way,) for way in WAYS], measure,
        ("way", "peak MiB", "/ logits"),
        lambda found: [[r["way"], r["peak_mib"], r["peak_mib"] / r["logits_mib"]] for r in found],
    )
}  # fmt: skip


def main() -> None:
    harness.run(__doc__, 60, SECTIONS, packages=("liger_kernel",))


if __name__ == "__main__":
    main()

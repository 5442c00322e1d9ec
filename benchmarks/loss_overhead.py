"""What does γ-DPO cost over plain DPO, and where does it go?

    python -m benchmarks.loss_overhead [--quick] [--out FILE.json] [--device cpu|cuda]

- ``alone``: forward and backward of the loss, from log-probabilities to their gradients, for
  batches of 2 to 2304 pairs. The peer is TRL's sigmoid loss, ``-logsigmoid(beta * (logratios -
  reference logratios))`` and its mean, eager and compiled by torch.compile. γ-DPO runs eager with
  each ``impl`` of the solve, and as a whole inside a caller's torch.compile; it returns its ``aux``
  as well.
- ``parts``: what of eager γ-DPO goes where, on the CPU: from ever smaller pieces of it, called in
  turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import _harness as harness
from benchmarks._harness import Call, Result
from gamma_loss import _pool, gamma_dpo_loss
from gamma_loss._loss import Logps, LossSettings, array_loss
from gamma_loss._pool import ALONE, Problem
from gamma_loss._spread import WHOLE
from gamma_loss._torch import host

SIZES = (2, 8, 32, 256, 2304)
PARTS_SIZE = 256
BETA, GAMMA0, TAU = 0.1, 4.0, 10.0  # γ0 and τ of llama-3-8b-instruct
PEERS = ("DPO", "DPO, compiled")

Loss = Callable[..., Tensor]


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """TRL's sigmoid loss."""
    logratios = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(BETA * logratios).mean()


def gamma_dpo(impl: str) -> Loss:
    """γ-DPO with one implementation of the solve."""

    def loss(*logps: Tensor) -> Any:
        return gamma_dpo_loss(*logps, beta=BETA, gamma0=GAMMA0, tau=TAU, impl=impl)[0]

    return loss


def compared(impls: list[str]) -> dict[str, Loss]:
    """Return the losses to compare, as functions of four log-probabilities."""

    def in_graph(impl: str) -> Loss:
        return harness.fresh_compile(
            lambda *logps: gamma_dpo_loss(*logps, beta=BETA, gamma0=GAMMA0, tau=TAU, impl=impl)
        )

    found: dict[str, Loss] = {"DPO": dpo, "DPO, compiled": harness.fresh_compile(dpo)}
    found |= {f"γ-DPO, {impl}": gamma_dpo(impl) for impl in impls}
    for impl in ["auto"] + ["triton"] * ("triton" in impls):
        compiled = in_graph(impl)
        found[f"γ-DPO, {impl}, in torch.compile"] = lambda *logps, f=compiled: f(*logps)[0]
    return found


def batch(pairs: int, device: str) -> list[Tensor]:
    """Return log-probabilities of both responses, and the reference's."""
    values = np.random.default_rng(pairs).normal(size=(4, pairs)) * 15 - 100
    rows = torch.tensor(values, dtype=torch.float32, device=device)
    return [row.clone().requires_grad_(i < 2) for i, row in enumerate(rows)]


def measure_alone(
    args: argparse.Namespace, seconds: float, pairs: int, impls: list[str]
) -> list[Result]:
    """Time forward and backward of every loss on one batch."""
    logps = batch(pairs, args.device)
    calls = {
        name: (lambda loss=loss: torch.autograd.grad(loss(*logps), logps[:2]))
        for name, loss in compared(impls).items()
    }
    rows, _ = harness.compare(args, calls, seconds, PEERS)
    if args.device == "cuda":
        for name in rows:
            args.later.append(lambda name=name: rows[name].update(harness.launches(calls[name])))
    return [{"pairs": pairs, "losses": rows}]


def alone_rows(results: list[Result]) -> Iterator[list[Any]]:
    for pairs, name, row in ((r["pairs"], *item) for r in results for item in r["losses"].items()):
        ratios = [
            1 / row[key] if (key := harness.speed_key(peer)) in row else None for peer in PEERS
        ]
        times = [*row["microseconds"].values(), row.get("device_microseconds"), row.get("kernels")]
        yield [pairs, name, *ratios, *times]


def measure_parts(args: argparse.Namespace, seconds: float) -> list[Result]:
    """Time the parts of eager γ-DPO by themselves."""
    logps, loss = batch(PARTS_SIZE, "cpu"), gamma_dpo("eager")
    settings = LossSettings(BETA, GAMMA0, TAU, 0.0, True, "mean")
    problem = Problem(GAMMA0, TAU, ALONE, PARTS_SIZE)
    views = [each.numpy(force=True) for each in logps]
    gaps = BETA * ((views[0] - views[2]) - (views[1] - views[3]))
    solved = _pool.solve(gaps, problem)
    calls: dict[str, Call] = {
        "DPO, both": lambda: torch.autograd.grad(dpo(*logps), logps[:2]),
        "both": lambda: torch.autograd.grad(loss(*logps), logps[:2]),
        "forward": lambda: loss(*logps),
        "all but checks": lambda: host.loss(Logps(*logps), problem, settings),
        "solve": lambda: _pool.solve(gaps, problem),
        "loss": lambda: array_loss(Logps(*views), None, settings, lambda _: solved, WHOLE),
    }
    rows, _ = harness.compare(args, calls, seconds)
    us = {name: row["microseconds"]["0.5"] for name, row in rows.items()}
    parts = {
        "checks and the choice of a solver": us["forward"] - us["all but checks"],
        "tensors to NumPy's arrays and back": us["all but checks"] - us["solve"] - us["loss"],
        "solve": us["solve"],
        "loss and aux": us["loss"],
        "backward": us["both"] - us["forward"],
    }
    return [{"pairs": PARTS_SIZE, "parts": parts, "whole": us["both"], "dpo": us["DPO, both"]}]


def part_rows(results: list[Result]) -> Iterator[list[Any]]:
    (result,) = results
    whole = result["whole"]
    for name, us in result["parts"].items():
        yield [name, us, us / whole, us / result["dpo"]]
    yield ["all of it", whole, 1.0, whole / result["dpo"]]
    yield ["plain DPO", result["dpo"], result["dpo"] / whole, 1.0]


def alone_cases(args: argparse.Namespace) -> list[tuple[int, list[str]]]:
    impls = harness.implementations(args)
    return [(size, impls) for size in ((8,) if args.quick else SIZES)]


SECTIONS = {
    "alone": harness.Section(
        alone_cases, measure_alone,
        ("pairs", "loss, forward and backward", "/ DPO's time", "/ compiled DPO's", "µs 10 %",
         "median", "90 %", "device µs", "kernels"),
        alone_rows, share=0.8,
    ),
    "parts": harness.Section(
        lambda args: [()] * (args.device == "cpu"), measure_parts,
        ("part", "µs", "of the whole", "of DPO"), part_rows, share=0.2,
    ),
}  # fmt: skip


def draw(record: Result, axes: list[Any]) -> None:
    """Draw bars: the time of each loss for each batch."""
    found = record["alone"]
    heights = {
        name: [r["losses"].get(name, {}).get("microseconds", {}).get("0.5") for r in found]
        for name in dict.fromkeys(name for r in found for name in r["losses"])
    }
    harness.bars(axes[0], [str(r["pairs"]) for r in found], heights)
    axes[0].set(xlabel="pairs", ylabel="microseconds, forward and backward")
    axes[0].set_title(record["device"], fontsize=9)


def main() -> None:
    harness.run(__doc__, 240, SECTIONS, draw, beta=BETA, gamma0=GAMMA0, tau=TAU)


if __name__ == "__main__":
    main()

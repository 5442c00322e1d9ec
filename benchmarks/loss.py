"""What does γ-DPO cost over plain DPO?

    python -m benchmarks.loss [--quick] [--out FILE.json] [--device cpu|cuda]

- ``results``: forward and backward of the loss, from log-probabilities to their gradients. The peer
  is TRL's sigmoid loss, the mean of ``-logsigmoid(beta * (logratios - reference logratios))``, in
  eager torch and compiled by torch.compile. γ-DPO, which returns its ``aux`` as well, runs with
  ``impl="auto"`` (NumPy on a view of a CPU tensor) and "compile", and as a whole inside the user's
  own torch.compile. Times are "hot" and "cold" medians: see `_harness.in_turns`.
- ``python_calls``: the Python functions of the package that one eager loss with its backward calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import gamma_loss
from benchmarks import _harness as harness
from benchmarks._harness import Call, Result
from gamma_loss import gamma_dpo_loss

SECONDS = 120
SIZES = (8, 256, 2304)
BETA, GAMMA0, TAU = 0.1, 4.0, 10.0  # γ0 and τ of llama-3-8b-instruct
DPO, COMPILED = "DPO", "DPO, compiled"
PACKAGE = str(Path(gamma_loss.__file__).parent)

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
    found: dict[str, Loss] = {DPO: dpo, COMPILED: harness.fresh_compile(dpo)}
    found |= {f"γ-DPO, {impl}": gamma_dpo(impl) for impl in impls}
    whole = harness.fresh_compile(
        lambda *logps: gamma_dpo_loss(*logps, beta=BETA, gamma0=GAMMA0, tau=TAU)
    )  # with its aux
    return found | {"γ-DPO, in torch.compile": lambda *logps: whole(*logps)[0]}


def batch(pairs: int, device: str) -> list[Tensor]:
    """Return log-probabilities of both responses, and the reference's."""
    values = np.random.default_rng(pairs).normal(size=(4, pairs)) * 15 - 100
    rows = torch.tensor(values, dtype=torch.float32, device=device)
    return [row.clone().requires_grad_(i < 2) for i, row in enumerate(rows)]


def gradients(loss: Loss, logps: list[Tensor]) -> Call:
    return lambda: torch.autograd.grad(loss(*logps), logps[:2])


def cases(args: argparse.Namespace) -> list[tuple[int, list[str]]]:
    impls = [impl for impl in harness.ways(args) if impl in ("auto", "compile", "triton")]
    return [(size, impls) for size in ((8,) if args.quick else SIZES)]


def measure(args: argparse.Namespace, seconds: float, pairs: int, impls: list[str]) -> list[Result]:
    """Time forward and backward of every loss on one batch."""
    logps = batch(pairs, args.device)
    calls = {name: gradients(loss, logps) for name, loss in compared(impls).items()}
    rows, _ = harness.compare(args, calls, seconds)
    if args.device == "cuda":
        for name in rows:
            args.later.append(lambda name=name: rows[name].update(harness.launches(calls[name])))
    return [{"pairs": pairs, "losses": rows}]


def rows(results: list[Result]) -> Iterator[list[Any]]:
    for result in results:
        losses = result["losses"]
        for name, row in losses.items():
            ratios = [1 / speed if (speed := harness.speed(losses, name, peer, state)) else None
                      for peer in (DPO, COMPILED) for state in harness.STATES]  # fmt: skip
            yield [result["pairs"], name, *row["hot"], row["cold"][1], *ratios,
                   row.get("device_microseconds"), row.get("kernels")]  # fmt: skip


def python_calls(call: Call) -> int:
    """Count the Python functions of the package that a call enters."""
    files: list[str] = []
    call()
    sys.setprofile(lambda f, event, _: event == "call" and files.append(f.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(None)
    return sum(file.startswith(PACKAGE) for file in files)


def measure_calls(args: argparse.Namespace, seconds: float) -> list[Result]:
    """Count for eager γ-DPO."""
    count = python_calls(gradients(gamma_dpo("auto"), batch(256, args.device)))
    return [{"loss": "γ-DPO, auto", "calls": count}]


SECTIONS = {
    "results": harness.Section(
        cases, measure,
        ("pairs", "loss, forward and backward", "hot, µs: 10 %", "median", "90 %", "cold",
         "/ DPO's hot", "cold", "/ compiled DPO's hot", "cold", "device µs", "kernels"),
        rows,
    ),
    "python_calls": harness.Section(
        lambda args: [()], measure_calls, ("loss", "Python calls in the package"),
        lambda rs: map(dict.values, rs), share=0.01,
    ),
}  # fmt: skip


def main() -> None:
    harness.run(__doc__, SECONDS, SECTIONS, beta=BETA, gamma0=GAMMA0, tau=TAU)


if __name__ == "__main__":
    main()

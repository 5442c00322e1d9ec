"""What does γ-DPO cost over plain DPO, alone and in a training step?

    python -m benchmarks.loss_overhead [--quick] [--out FILE.json] [--device cpu|cuda]

Alone: forward and backward of the loss, from log-probabilities to their gradients, for batches of 2
to 2304 pairs. The peer is TRL's sigmoid loss, ``-logsigmoid(beta * (logratios - reference
logratios))`` and its mean, eager and compiled by torch.compile. γ-DPO runs eager with each ``impl``
of the solve, and as a whole inside a caller's torch.compile; it returns its ``aux`` as well.

In a step: forward, backward and AdamW of a small causal transformer with either loss, in turn; the
reference's log-probabilities are given. On CUDA some 100 million parameters in bfloat16 autocast;
on the CPU only some 10 million and short texts in float32, so that it ends: there a share of the
step says little about training that people do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import _harness as harness
from gamma_loss import gamma_dpo_loss

SIZES = (2, 8, 32, 256, 2304)
BETA, GAMMA0, TAU = 0.1, 4.0, 10.0  # γ0 and τ of llama-3-8b-instruct
PEER, COMPILED_PEER = "DPO", "DPO, compiled"

Loss = Callable[..., Tensor]


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """TRL's sigmoid loss."""
    logratios = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(BETA * logratios).mean()


def gamma_dpo(impl: str) -> Callable[..., Any]:
    """γ-DPO with one implementation of the solve."""

    def loss(*logps: Tensor) -> Any:
        return gamma_dpo_loss(*logps, beta=BETA, gamma0=GAMMA0, tau=TAU, impl=impl)

    return loss


def losses(usable: list[str], compiled: bool) -> dict[str, Loss]:
    """Return the losses to compare, as functions of four log-probabilities."""

    def first(function: Callable[..., Any]) -> Loss:
        return lambda *logps: function(*logps)[0]

    found: dict[str, Loss] = {PEER: dpo}
    if compiled:
        found[COMPILED_PEER] = harness.fresh_compile(dpo)
    for impl in usable:
        found[f"γ-DPO, {impl}"] = first(gamma_dpo(impl))
    if compiled:
        found["γ-DPO in torch.compile"] = first(harness.fresh_compile(gamma_dpo("auto")))
        if "triton" in usable:
            triton = first(harness.fresh_compile(gamma_dpo("triton")))
            found["γ-DPO, triton, in torch.compile"] = triton
    return found


def measure_alone(
    pairs: int, device: str, usable: list[str], budget: harness.Budget
) -> tuple[dict[str, Any], dict[str, harness.Call]]:
    """Time forward and backward of every loss on one batch. Returns the results and the calls."""
    seconds, started = budget.share(), time.perf_counter()
    values = np.random.default_rng(pairs).normal(size=(4, pairs)) * 15 - 100
    logps = [
        torch.tensor(row, dtype=torch.float32, device=device, requires_grad=i < 2)
        for i, row in enumerate(values)
    ]
    skipped: dict[str, str] = {}
    if not (in_time := budget.left() > 0):
        skipped["everything compiled"] = "no time left"
    calls = {
        name: (lambda loss=loss: torch.autograd.grad(loss(*logps), logps[:2]))
        for name, loss in losses(usable, in_time).items()
    }
    harness.warm_up(calls, device, skipped)
    times = harness.in_turns(calls, max(seconds - (time.perf_counter() - started), 0.2), device)
    rows = {}
    for name, t in times.items():
        rows[name] = {"microseconds": harness.quantiles(t["wall"]), "turns": len(t["wall"])}
        if device == "cuda":
            rows[name]["host_microseconds"] = harness.quantiles(t["host"])
        for key, peer in (("dpo", PEER), ("compiled_dpo", COMPILED_PEER)):
            if peer in times:
                ratio = 1 / harness.times_as_fast(t["wall"], times[peer]["wall"])
                rows[name][f"times_the_time_of_{key}"] = ratio
    return {"pairs": pairs, "losses": rows, "left_out": skipped}, calls


class Shape(NamedTuple):
    """A model and a batch."""

    width: int
    layers: int
    vocabulary: int
    pairs: int
    tokens: int  # of each response


SHAPES = {"cuda": Shape(768, 12, 16_384, 32, 512), "cpu": Shape(320, 6, 8192, 8, 32)}


class Transformer(nn.Module):
    """A plain causal transformer, with the embedding as its head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(torch.randn(shape.tokens, shape.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.width // 64, 4 * shape.width, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, shape.layers, nn.LayerNorm(shape.width), enable_nested_tensor=False
        )
        mask = nn.Transformer.generate_square_subsequent_mask(shape.tokens)
        self.register_buffer("mask", mask, persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each sequence, given its first token."""
        hidden = self.layers(self.embedding(tokens) + self.positions, self.mask, is_causal=True)
        logits = F.linear(hidden[:, :-1], self.embedding.weight)
        targets = tokens[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -each.view(targets.shape).sum(1)


def measure_steps(
    shape: Shape, device: str, usable: list[str], seconds: float, alone: dict[str, Any]
) -> dict[str, Any]:
    """Time training steps that differ only in the loss."""
    started = time.perf_counter()
    model = Transformer(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda" or None)
    tokens = torch.randint(shape.vocabulary, (2 * shape.pairs, shape.tokens), device=device)
    with torch.no_grad():
        reference = model(tokens).view(2, -1)

    def step(loss: Loss) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            policy = model(tokens).float().view(2, -1)
        loss(*policy, *reference).backward()
        optimizer.step()
        optimizer.zero_grad()

    skipped: dict[str, str] = {}
    calls = {n: (lambda loss=loss: step(loss)) for n, loss in losses(usable, False).items()}
    harness.warm_up(calls, device, skipped, times=2)
    left = seconds - (time.perf_counter() - started)
    times = harness.in_turns(calls, left, device, least=3)
    peer = np.array(times[PEER]["wall"])
    rows = {}
    for name, t in times.items():
        wall = np.array(t["wall"])
        difference = np.quantile(wall - peer, harness.QUANTILES) / np.median(peer)
        rows[name] = {"microseconds": harness.quantiles(t["wall"]), "turns": len(wall)}
        rows[name]["longer_than_with_dpo_percent"] = {
            str(q): float(100 * d) for q, d in zip(harness.QUANTILES, difference, strict=True)
        }
        loss_time = alone["losses"].get(name)
        if loss_time:
            share = loss_time["microseconds"]["0.5"] / (1e6 * float(np.median(peer)))
            rows[name]["loss_alone_percent_of_step"] = 100 * share
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, **shape._asdict(), "losses": rows, "left_out": skipped}


def show(record: dict[str, Any], device: str) -> None:
    """Print the tables."""
    count = "kernels" if device == "cuda" else "operators"
    columns = ["pairs", "loss, forward and backward", "µs 10 %", "median", "90 %"]
    columns += ["host µs", "device µs"] if device == "cuda" else []
    rows = []
    for result in record["alone"]:
        for name, row in result["losses"].items():
            cells = [result["pairs"], name, *row["microseconds"].values()]
            if device == "cuda":
                cells += [row["host_microseconds"]["0.5"], row.get("device_microseconds")]
            ratios = [row.get(f"times_the_time_of_{peer}") for peer in ("dpo", "compiled_dpo")]
            rows.append([*cells, *ratios, row.get(count)])
    harness.table([*columns, "/ DPO's time", "/ compiled DPO's", count], rows)
    step = record["step"]
    print(
        f"\nA training step: {step['parameters'] / 1e6:.0f} million parameters, "
        f"{step['pairs']} pairs of {step['tokens']} tokens"
    )
    rows = []
    for name, row in step["losses"].items():
        longer = " … ".join(f"{d:+.2f}" for d in row["longer_than_with_dpo_percent"].values())
        milliseconds = [us / 1e3 for us in row["microseconds"].values()]
        rows.append([name, *milliseconds, row.get("loss_alone_percent_of_step"), longer])
    columns = ["loss", "ms 10 %", "median", "90 %", "loss alone, % of it"]
    harness.table([*columns, "longer than with DPO, % (10 % … median … 90 %)"], rows)


def draw(record: dict[str, Any], axes: list[Any]) -> None:
    """Draw bars: the time of each loss for each batch, and its share of a step."""
    names = list(dict.fromkeys(name for r in record["alone"] for name in r["losses"]))
    for i, name in enumerate(names):
        points = [
            (x, result["losses"][name]["microseconds"]["0.5"])
            for x, result in enumerate(record["alone"])
            if name in result["losses"]
        ]
        x, height = np.array(points).T
        width = 1 / (len(names) + 1)
        axes[0].bar(x + (i - (len(names) - 1) / 2) * width, height, width, label=name)
    axes[0].set_xticks(range(len(record["alone"])), [str(r["pairs"]) for r in record["alone"]])
    axes[0].set(xlabel="pairs", ylabel="microseconds, forward and backward")
    axes[0].set_title(f"The loss alone\n{record['device']}", fontsize=9)
    axes[0].legend(fontsize=7)
    step = record["step"]
    for name, row in step["losses"].items():
        if "loss_alone_percent_of_step" in row:
            axes[1].bar(name, row["loss_alone_percent_of_step"], color=f"C{names.index(name)}")
    axes[1].tick_params(axis="x", labelsize=7)
    axes[1].set_ylabel("% of a training step")
    title = f"{step['parameters'] / 1e6:.0f} million parameters, {step['pairs']} pairs"
    axes[1].set_title(f"{title} of {step['tokens']} tokens", fontsize=9)


def main() -> None:
    """Run both parts, print tables, write the results."""
    args = harness.arguments(__doc__, seconds=240)
    usable, skipped = harness.implementations(args.device)
    shape = SHAPES[args.device]
    if args.quick:
        shape = shape._replace(pairs=2)
    sizes = (shape.pairs,) if args.quick else SIZES
    record: dict[str, Any] = harness.machine(args.device)
    record |= {"beta": BETA, "gamma0": GAMMA0, "tau": TAU, "left_out": skipped}
    record["alone"] = []
    whole = harness.Budget(args.seconds, 1)
    budget = harness.Budget(args.seconds * 0.6, len(sizes))
    calls: dict[int, dict[str, harness.Call]] = {}  # to profile when all is timed
    for size in harness.progress(sizes, "loss_overhead"):
        result, calls[size] = measure_alone(size, args.device, usable, budget)
        record["alone"].append(result)
        harness.write(args.out, record)  # each time, so that an interrupted run leaves something
    alone = next(result for result in record["alone"] if result["pairs"] == shape.pairs)
    record["step"] = measure_steps(shape, args.device, usable, whole.left(), alone)
    harness.write(args.out, record)
    for result in record["alone"]:
        for name, row in result["losses"].items():
            row |= harness.launches(calls[result["pairs"]][name], args.device)
    harness.write(args.out, record)
    show(record, args.device)
    with harness.picture(args.out, panels=2) as axes:
        if axes:
            draw(record, axes)


if __name__ == "__main__":
    main()

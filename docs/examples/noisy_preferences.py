"""Preference training on noisy labels, to watch: plain DPO against γ-DPO.

A byte-level language model learns the source text of Python's standard library. It is then aligned
on preference pairs: a true continuation of a prompt, and a corrupted one (from barely to heavily).
A fraction of the pairs has its two responses swapped by mistake. DPO and γ-DPO start from the same
model and see the same pairs in the same order. The gaps at the end of DPO's run choose γ-DPO's tau.
Nothing is downloaded.

    python noisy_preferences.py                       # 100 s of processor time, one core
    python noisy_preferences.py --quick               # a smoke test
    python noisy_preferences.py --pairs mine.jsonl    # own data: prompt, chosen, rejected,
                                                      # and no label flipped without --flip

One run with one seed and one learning rate for both methods is a demonstration and no evidence.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from _common import Parser, WrongInput, check_output, number, part_of, read, run, texts
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm as progress

from gamma_loss import (
    choose_settings,
    gamma_dpo_loss,
    gamma_preference_loss,
    match_logistic,
    solve_margins_streaming,
)

tqdm = partial(progress, disable=None)  # a bar appears on a terminal only
PROMPT_BYTES, RESPONSE_BYTES = 40, 24  # of the pairs made here
LONGEST_BYTES = 256  # of a prompt and of a response from a file
CORRUPTION = 0.03, 0.6  # the share of replaced bytes, drawn uniformly for each pair
BATCH_SIZE = 32  # pairs in an alignment step
RECENT_GAPS = 256  # gaps of earlier batches that join the margin solve
EVALUATIONS = 8  # of the watched training pairs, in the course of a run
WATCHED = 1024  # training pairs
WEAKER = 10  # the factor on tau for the picture's second strength
FORMATS = ".jpg", ".pdf", ".png", ".svg"  # the formats of matplotlib that need nothing else


class Pairs(NamedTuple):
    """Preference pairs as bytes: index 0 of the second axis is chosen, 1 is rejected."""

    tokens: Tensor  # (pairs, 2, length), a zero byte first
    in_response: Tensor  # (pairs, 2, length), True for the bytes that are scored
    flipped: Tensor  # (pairs,), whether this program swapped the responses; no loss sees it

    def at(self, index: Tensor) -> Pairs:
        """Select pairs."""
        return Pairs(*(field[index] for field in self))

    def to(self, device: torch.device) -> Pairs:
        """Move to a device."""
        return Pairs(*(field.to(device) for field in self))


class Run(NamedTuple):
    """The results of one method."""

    steps: list[int]
    accuracy: float  # on held-out pairs, at the end
    gaps: Tensor  # (steps, watched training pairs)
    margins: Tensor  # of these as one pool at each step; zeros for DPO
    pair_weights: Tensor


class ByteModel(nn.Module):
    """A recurrent language model over bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width // 4)
        self.recurrent = nn.GRU(width // 4, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each byte but the first, given those before it."""
        hidden, _ = self.recurrent(self.embedding(tokens[:, :-1]))
        return -F.cross_entropy(self.head(hidden).transpose(1, 2), tokens[:, 1:], reduction="none")


def response_logps(model: ByteModel, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and the rejected responses, summed over their bytes."""
    logps = model(pairs.tokens.flatten(0, 1)) * pairs.in_response.flatten(0, 1)[:, 1:]
    chosen, rejected = logps.sum(1).unflatten(0, (-1, 2)).unbind(1)
    return chosen, rejected


@torch.no_grad()
def all_response_logps(model: ByteModel, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The same for many pairs, a slice at a time."""
    slices = torch.arange(len(pairs.flipped)).split(64)
    chosen, rejected = zip(*(response_logps(model, pairs.at(s)) for s in slices), strict=True)
    return torch.cat(chosen), torch.cat(rejected)


def library_text(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The standard library's source, for pre-training, for pairs and held out: no shared file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = ("asyncio", "collections", "concurrent", "ctypes", "distutils", "email", "encodings",
                "html", "http", "importlib", "json", "logging", "multiprocessing", "sqlite3",
                "tkinter", "unittest", "urllib", "wsgiref", "xml", "xmlrpc")  # fmt: skip
    files = sorted(f for folder in ("", *packages) for f in (root / folder).glob("*.py"))
    order = torch.randperm(len(files), generator=generator).tolist()
    texts = [bytearray(files[i].read_bytes()) for i in order]
    tenth, third = len(texts) // 10, len(texts) // 3
    heldout, pairs, language = texts[:tenth], texts[tenth:third], texts[third:]
    return tuple(
        torch.frombuffer(bytearray().join(part), dtype=torch.uint8)
        for part in (language, pairs, heldout)
    )


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random stretches of a text, shape (count, length)."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def make_pairs(text: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Pairs of a true and a corrupted continuation; new bytes are as frequent as in the text."""
    tokens = windows(text, count, 1 + PROMPT_BYTES + RESPONSE_BYTES, generator)
    tokens[:, 0] = 0
    true = tokens[:, -RESPONSE_BYTES:]
    corrupted = true.clone()
    low, high = CORRUPTION
    share = low + (high - low) * torch.rand((count, 1), generator=generator)
    while (same := (corrupted == true).all(1)).any():  # until all differ
        replaced = (torch.rand(true.shape, generator=generator) < share) & same[:, None]
        noise = text[torch.randint(len(text), true.shape, generator=generator)].long()
        corrupted = torch.where(replaced, noise, corrupted)
    rejected = torch.cat([tokens[:, :-RESPONSE_BYTES], corrupted], 1)
    in_response = torch.arange(tokens.shape[1]) > PROMPT_BYTES
    return Pairs(
        torch.stack([tokens, rejected], 1),
        in_response.expand(count, 2, -1),
        torch.zeros(count, dtype=torch.bool),
    )


def from_file(file: Path) -> Pairs:
    """Read pairs. Long texts are cut, and the cuts are counted on the screen."""
    rows, cut, dropped = [], [0, 0], 0
    for row in read(file):
        prompt, *responses = (text.encode(errors="replace") for text in texts(row))
        cut[0] += len(prompt) > LONGEST_BYTES
        cut[1] += max(map(len, responses)) > LONGEST_BYTES
        responses = [response[:LONGEST_BYTES] for response in responses]
        if responses[0] == responses[1]:
            dropped += 1
        else:
            rows += [(b"\0" + prompt[-LONGEST_BYTES:], response) for response in responses]
    if len(rows) < 20:
        raise WrongInput(f"{file}: need at least 10 pairs, got {len(rows) // 2}")
    if any(cut):
        print(
            f"{file}: the model reads {LONGEST_BYTES} bytes of a text. So {cut[0]} prompts lost "
            f"their start,\nand {cut[1]} pairs the end of a response. {dropped} pairs were "
            "dropped: their responses differ only there."
        )
    size = len(rows), max(len(prompt) + len(response) for prompt, response in rows)
    tokens, in_response = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(list(prompt + response))
        in_response[i, len(prompt) : end] = True
    tokens, in_response = (each.unflatten(0, (-1, 2)) for each in (tokens, in_response))
    return Pairs(tokens, in_response, torch.zeros(len(tokens), dtype=torch.bool))


def flip_labels(pairs: Pairs, share: float, generator: torch.Generator) -> Pairs:
    """Swap chosen and rejected in exactly this share of the pairs."""
    count = len(pairs.flipped)
    flipped = torch.zeros(count, dtype=torch.bool)
    flipped[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    tokens, in_response = (
        torch.where(flipped[:, None, None], field.flip(1), field) for field in pairs[:2]
    )
    return Pairs(tokens, in_response, flipped)


def pretrain(text: Tensor, args: argparse.Namespace, generator: torch.Generator) -> ByteModel:
    """Train the language model on the standard library's source."""
    torch.manual_seed(args.seed)
    model = ByteModel(args.width).to(args.device)
    optimizer = torch.optim.Adam(model.parameters())
    steps = args.pretrain_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="language model")
    for step in bar:
        batch = windows(text, 64, 1 + PROMPT_BYTES + RESPONSE_BYTES, generator).to(args.device)
        loss = -model(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix_str(f"{loss.item() / 0.6931:.2f} bits/byte")
    return model


def align(
    name: str, gamma0: float, tau: float,
    start: ByteModel, train: Pairs, heldout: Pairs, args: argparse.Namespace,
) -> Run:  # fmt: skip
    """Align a copy of the model on the pairs with γ-DPO, which is DPO where gamma0 is 0."""
    generator = torch.Generator().manual_seed(args.seed)
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    reference = torch.stack(all_response_logps(start, train))
    heldout_reference = torch.stack(all_response_logps(start, heldout))
    context = None

    def reward_gaps(pairs: Pairs, reference: Tensor) -> Tensor:
        chosen, rejected = torch.stack(all_response_logps(model, pairs)) - reference
        gaps = args.beta * (chosen - rejected)
        if not gaps.isfinite().all():
            raise WrongInput(f"{name} diverged by step {step}: lower --lr or --beta")
        return gaps

    watched, watched_reference = train.at(slice(WATCHED)), reference[:, :WATCHED]
    steps = sorted({-(-args.steps * i // EVALUATIONS) for i in range(EVALUATIONS + 1)})
    history = [torch.zeros_like(watched_reference[0])]  # of gaps: the policy is the reference
    bar = tqdm(range(1, args.steps + 1), desc=f"{name:>14}")
    for step in bar:
        index = torch.randint(len(train.flipped), (BATCH_SIZE,), generator=generator)
        # A batch alone is a poor sample of the pool, so recent gaps join the solve (the paper's
        # Algorithm 2).
        loss, aux = gamma_dpo_loss(
            *response_logps(model, train.at(index)), *reference[:, index],
            beta=args.beta, gamma0=gamma0, tau=tau, context=context,
        )  # fmt: skip
        recent = aux.reward_gaps if context is None else torch.cat([context, aux.reward_gaps])
        context = recent[-RECENT_GAPS:]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in steps:
            history.append(reward_gaps(watched, watched_reference))
            bar.set_postfix_str(f"accuracy on training pairs {accuracy_of(history[-1]):.3f}")

    solved = [
        gamma_preference_loss(gaps, gamma0=gamma0, tau=tau, centered=True)[1] for gaps in history
    ]
    return Run(
        steps,
        accuracy_of(reward_gaps(heldout, heldout_reference)),
        torch.stack(history),
        torch.stack([aux.margins for aux in solved]),
        torch.stack([aux.pair_weights for aux in solved]),
    )


def accuracy_of(gaps: Tensor) -> float:
    """Return the share of positive gaps; a gap of zero counts half."""
    return ((gaps > 0).float() + (gaps >= 0).float()).mean().item() / 2


def interval(accuracy: float, count: int) -> str:
    """Return Wilson's 95 % interval of an accuracy on so many pairs."""
    square = 1.96**2 / count
    middle = (accuracy + square / 2) / (1 + square)
    half = (square * (accuracy * (1 - accuracy) + square / 4)) ** 0.5 / (1 + square)
    return f"{middle - half:.3f} to {middle + half:.3f}"


def groups(flipped: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Return the pairs of each kind of label. Only the labels made here are known to be clean."""
    found = {"as labelled" if args.pairs else "clean": ~flipped, "flipped": flipped}
    return {name: group for name, group in found.items() if group.any()}


def report(
    runs: dict[str, Run], flipped: Tensor, heldout: int, args: argparse.Namespace
) -> Iterator[str]:
    """Yield the lines of the closing table, and of the findings in words."""
    kinds = groups(flipped, args)
    yield f"\nThe accuracy on {heldout} held-out pairs, and the mean pair weight of training pairs:"
    yield f"{'':6}  accuracy  95 % interval  {''.join(f'{kind:>13}' for kind in kinds)}"
    for name, result in runs.items():
        weights = result.pair_weights[-1]
        cells = "".join(f"{weights[group].mean():13.3f}" for group in kinds.values())
        yield f"{name:6}  {result.accuracy:8.3f}  {interval(result.accuracy, heldout)}{cells}"
    gaps, margins = runs["γ-DPO"].gaps[-1], runs["γ-DPO"].margins[-1]
    means = (f"{margins[group].mean():.2f} ({kind})" for kind, group in kinds.items())
    match = match_logistic(gaps, gamma0=args.gamma0, tau=args.tau, centered=True)
    yield (
        f"\nFindings:\n- γ-DPO's mean margin is {', '.join(means)}.\n"
        f"- DPO with {match.beta_factor:.2f} times the beta and a margin of {match.margin:.2f} "
        f"has γ-DPO's pair weights,\n  but for {match.unexplained:.1%} of their variance."
    )
    if len(kinds) > 1:
        yield "- The mean pair weight of flipped pairs, divided by that of the others:"
        weights = {f"in {name}'s run": result.pair_weights[-1] for name, result in runs.items()}
        weights["at γ-DPO's gaps, without margins"] = torch.sigmoid(-gaps)
        for place, each in weights.items():
            yield f"    {place:34}{each[flipped].mean() / each[~flipped].mean():.2f}"
    yield (
        "- One seed and one learning rate are no evidence for or against either method.\n"
        "  Where the intervals overlap, the run shows no difference in accuracy."
    )


def choose_tau(gaps: Tensor, args: argparse.Namespace) -> float:
    """Choose tau by how much flatter γ-DPO is to be than DPO, on the gaps that DPO ended with."""
    options = {"gamma0": args.gamma0, "beta_factor": args.beta_factor, "centered": True}
    try:
        tau = choose_settings(gaps, **options)["tau"]
        why = f"on DPO's last gaps γ-DPO acts as DPO with {args.beta_factor:g} times the beta"
    except ValueError as error:  # no tau does
        tau, why = args.gamma0**2, f"κ = γ0²/τ = 1, as no tau gives that --beta-factor: {error}"
    print(f"tau = {tau:.3g}: {why}")
    return tau


def draw(runs: dict[str, Run], flipped: Tensor, args: argparse.Namespace) -> None:
    """Save the picture: margins and weights over training; margins and weights over the gap."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "γ"}  # text stays text
    import numpy as np
    from matplotlib import pyplot as plt

    from gamma_loss.plots import COLOURS

    groups_of = groups(flipped.cpu(), args).items()
    kinds = [(*each, colour) for each, colour in zip(groups_of, COLOURS, strict=False)]
    gamma = runs["γ-DPO"]
    gaps = gamma.gaps[-1].cpu().double().numpy()
    figure, axes = plt.subplots(2, 2, figsize=(10.0, 7.6), layout="constrained")
    of_margins, over_steps, over_gap, of_weights = axes.flat
    counts = over_gap.twinx()
    for kind, group, colour in kinds:
        for name, result in runs.items():
            weights = result.pair_weights.cpu()[:, group].mean(1)
            style = {"color": colour, "linestyle": "-" if result is gamma else "--"}
            over_steps.plot(result.steps, weights, label=f"{name}, {kind}", **style)
        margins = gamma.margins.cpu()[:, group]
        low, middle, high = margins.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)
        label = f"{kind}: median, 10 to 90 %"
        of_margins.plot(gamma.steps, middle, color=colour, label=label)
        of_margins.fill_between(gamma.steps, low, high, color=colour, alpha=0.2, lw=0)
        counts.hist(gaps[group], 40, color=colour, alpha=0.3, label=f"{kind} pairs")
    over_steps.set(xlabel="training step", ylabel="mean pair weight", ylim=(0, None))
    over_steps.set_title("How hard pairs pull")
    of_margins.set(xlabel="training step", ylabel="target margin (reward units)")
    of_margins.set_title("γ-DPO's margins")
    counts.set_yticks([])
    counts.spines[:].set_visible(False)
    counts.legend(frameon=False, loc="lower right")

    wide = np.linspace(gaps.min(), gaps.max(), 200)
    for tau, style in ((WEAKER * args.tau, ":"), (args.tau, "-")):
        margins = solve_margins_streaming([gaps], gamma0=args.gamma0, tau=tau).margins(wide)
        label = f"κ = γ0²/τ = {args.gamma0**2 / tau:.2g}"
        over_gap.plot(wide, margins, style, color=COLOURS[2], label=label)
    over_gap.set(xlabel="reward gap at the end (reward units)", ylabel="target margin")
    over_gap.set_title("What κ does to margins, on the same gaps")

    match = match_logistic(gaps, gamma0=args.gamma0, tau=args.tau, centered=True)
    label = f"matched logistic loss, β × {match.beta_factor:.2f}"
    plain = match.scale / (1 + np.exp(match.beta_factor * wide - match.margin))
    weights = 1 / (1 + np.exp(wide - margins + args.gamma0))
    of_weights.plot(wide, weights, color=COLOURS[2], lw=3, alpha=0.6, label="γ-DPO")
    of_weights.plot(wide, plain, ":", color=COLOURS[3], lw=2, label=label)
    of_weights.plot(wide, 1 / (1 + np.exp(wide)), "--", color=COLOURS[4], label="DPO")
    of_weights.set(xlabel="reward gap at the end (reward units)", ylabel="pair weight")
    of_weights.set_title("What loss that is")
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="upper left" if ax is over_gap else None)
    figure.savefig(part_of(args.out), format=args.out.suffix.lower()[1:], dpi=150)
    part_of(args.out).replace(args.out)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and refuse what could not be done after the training."""
    parser = Parser(description=" ".join(__doc__.split("\n\n")[:2]))
    add, share = parser.add_argument, number(float, 0, 0.5)
    add("--flip", type=share, help="share of training labels made wrong: 0.2, or 0 with --pairs")
    steps = "alignment steps of each method: 250, or 12 with --quick"
    add("--steps", type=number(int, 1, 10**9), help=steps)
    add("--lr", type=number(float, 1e-12, 1), default=2.5e-4, help="learning rate: %(default)s")
    add("--beta", type=number(float), default=0.2, help="reward units per nat: %(default)s")
    add("--gamma0", type=number(float), default=4.0, help="γ-DPO's mean margin: %(default)s")
    factor = "γ-DPO acts as DPO with so many times the beta, on DPO's last gaps: %(default)s"
    add("--beta-factor", type=number(float, 1e-12, 0.999), default=0.7, help=factor)
    add("--tau", type=number(float), help="γ-DPO's weight of the KL term, without --beta-factor")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything: %(default)s")
    add("--pairs", type=Path, metavar="FILE", help="own pairs: prompt, chosen, rejected")
    add("--out", type=Path, default=Path("noisy_preferences.png"), help="the picture: %(default)s")
    add("--quick", action="store_true", help="few steps and a small model: shows nothing but work")
    args = parser.parse_args(argv)
    if not find_spec("matplotlib"):
        parser.error("drawing needs matplotlib: pip install matplotlib")
    if args.pairs and not args.pairs.exists():
        parser.error(f"no such file: {args.pairs}")
    args.out = check_output(args.out, FORMATS)
    try:
        gamma_preference_loss(torch.zeros(2), gamma0=args.gamma0, tau=args.tau or args.gamma0**2)
    except ValueError as error:
        parser.error(str(error))
    if args.flip is None:
        args.flip = 0.0 if args.pairs else 0.2
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.width, args.pretrain_steps, args.train_pairs, steps = 96, 400, 2048, 250
    if args.quick:
        args.width, args.pretrain_steps, args.train_pairs, steps = 64, 10, 128, 12
    args.steps = args.steps or steps
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the comparison that the command line asks for."""
    torch.set_num_threads(1)  # threads of a model this small mostly wait for each other
    args = arguments(argv)
    generator = torch.Generator().manual_seed(args.seed)
    text, pair_text, heldout_text = library_text(generator)
    if args.pairs:
        pairs = from_file(args.pairs)
        order = torch.randperm(len(pairs.flipped), generator=generator)
        cut = len(order) // 5
        heldout, train = pairs.at(order[:cut]), pairs.at(order[cut:])
    else:
        train = make_pairs(pair_text, args.train_pairs, generator)
        heldout = make_pairs(heldout_text, max(args.train_pairs // 4, 64), generator)
    train = flip_labels(train, args.flip, generator).to(args.device)
    heldout = heldout.to(args.device)
    print(
        f"Training a byte-level language model, a GRU of width {args.width}, on "
        f"{len(text) / 1e6:.1f} MB of Python's library.\nThen DPO and γ-DPO align it on "
        f"{len(train.flipped)} pairs, {int(train.flipped.sum())} of them with a flipped label."
    )
    job = pretrain(text, args, generator), train, heldout, args
    runs = {"DPO": align("DPO", 0.0, 1.0, *job)}
    args.tau = args.tau or choose_tau(runs["DPO"].gaps[-1], args)
    runs["γ-DPO"] = align("γ-DPO", args.gamma0, args.tau, *job)
    watched = train.flipped[:WATCHED]
    print("\n".join(report(runs, watched, len(heldout.flipped), args)))
    draw(runs, watched, args)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    run(main)

"""Preference training on noisy labels, to watch: plain DPO against γ-DPO.

A byte-level language model learns the source text of Python's standard library. It is then aligned
on preference pairs, a true continuation of a prompt against a corrupted one (from barely to
heavily), of which a fraction has its two responses swapped by mistake. Plain DPO and γ-DPO start
from the same model and see the same pairs in the same order; γ-DPO's tau is chosen by the gaps that
DPO ends with. Nothing is downloaded.

    python noisy_preferences.py                       # about two minutes on two CPU cores
    python noisy_preferences.py --quick               # a smoke test
    python noisy_preferences.py --pairs mine.jsonl    # own data: prompt, chosen, rejected,
                                                      # and no label flipped without --flip

One run with one seed and one learning rate for both methods is a demonstration and no evidence.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm as progress

from gamma_loss import (
    MatchedLoss,
    choose_settings,
    gamma_dpo_loss,
    gamma_preference_loss,
    match_logistic,
    preference_loss,
    solve_margins_streaming,
)

tqdm = partial(progress, disable=None)  # which is: only on a terminal
PROMPT_BYTES, RESPONSE_BYTES = 40, 24  # of the pairs made here
LONGEST_BYTES = 256  # of a prompt and of a response from a file
CORRUPTION = 0.03, 0.6  # the share of replaced bytes, drawn uniformly for each pair
BATCH_SIZE = 32  # pairs in an alignment step
RECENT_GAPS = 256  # how many gaps of earlier batches join the margin solve
EVALUATIONS = 12  # in the course of a run, of held-out pairs and of some training pairs:
WATCHED = 1024
WEAKER = 10  # how many times tau the picture's second strength has
FORMATS = ".jpg", ".pdf", ".png", ".svg"  # of matplotlib's those that need nothing else
METHODS = {"dpo": "DPO", "gamma-dpo": "γ-DPO"}


class Pairs(NamedTuple):
    """Preference pairs as bytes: index 0 of the second axis is chosen, 1 is rejected."""

    tokens: Tensor  # (pairs, 2, length), a zero byte first
    in_response: Tensor  # (pairs, 2, length), True for the bytes that are scored
    flipped: Tensor  # (pairs,), whether the label is wrong; never seen by a loss

    def at(self, index: Tensor) -> Pairs:
        """Select pairs."""
        return Pairs(*(field[index] for field in self))

    def to(self, device: torch.device) -> Pairs:
        """Move to a device."""
        return Pairs(*(field.to(device) for field in self))


class Run(NamedTuple):
    """What one method's run leaves behind."""

    steps: list[int]
    accuracies: list[float]  # on held-out pairs, at those steps
    heldout_loss: float
    gaps: Tensor  # (steps, watched training pairs)
    margins: Tensor  # of these as one pool at each step; zeros for DPO
    pair_weights: Tensor
    seconds: float


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
    slices = torch.arange(len(pairs.flipped)).split(256)
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


def stop(problem: str) -> NoReturn:
    """End the program with one line that says what is wrong."""
    print(problem, file=sys.stderr)
    sys.exit(2)


def read_pairs(path: Path) -> Pairs:
    """Pairs from a JSONL file; ends the program with a line's number where it is malformed."""
    rows = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        stop(f"{path}: {error.strerror}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {type(record).__name__}")
            for name in ("prompt", "chosen", "rejected"):
                if not isinstance(record.get(name), str):
                    raise ValueError(f"{name!r} must be a string, got {record.get(name)!r}")
                if name != "prompt" and not record[name]:
                    raise ValueError(f"{name!r} is empty")
            prompt = b"\0" + record["prompt"].encode()[-LONGEST_BYTES:]
            responses = [record[name].encode()[:LONGEST_BYTES] for name in ("chosen", "rejected")]
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, half a surrogate pair
            stop(f"{path}:{number}: {error}")
        rows += [(prompt, response) for response in responses]
    if len(rows) < 20:
        stop(f"{path}: need at least 10 pairs, got {len(rows) // 2}")
    length = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    in_response = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(list(prompt + response))
        in_response[i, len(prompt) : end] = True
    return Pairs(
        tokens.unflatten(0, (-1, 2)),
        in_response.unflatten(0, (-1, 2)),
        torch.zeros(len(rows) // 2, dtype=torch.bool),
    )


def flip_labels(pairs: Pairs, share: float, generator: torch.Generator) -> Pairs:
    """Swap chosen and rejected in exactly this share of the pairs."""
    count = len(pairs.flipped)
    flipped = torch.zeros(count, dtype=torch.bool)
    flipped[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    swap = flipped[:, None, None]
    return Pairs(
        torch.where(swap, pairs.tokens.flip(1), pairs.tokens),
        torch.where(swap, pairs.in_response.flip(1), pairs.in_response),
        flipped,
    )


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
    method: str, start: ByteModel, train: Pairs, heldout: Pairs, args: argparse.Namespace
) -> Run:
    """Align a copy of the model on the pairs, with one of the two losses."""
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    reference = torch.stack(all_response_logps(start, train))
    heldout_reference = torch.stack(all_response_logps(start, heldout))
    recent = torch.zeros(0, device=args.device)

    def reward_gaps(pairs: Pairs, reference: Tensor) -> Tensor:
        chosen, rejected = torch.stack(all_response_logps(model, pairs)) - reference
        return args.beta * (chosen - rejected)

    watched, watched_reference = train.at(slice(WATCHED)), reference[:, :WATCHED]
    steps, accuracies, history = [], [], []
    evaluate_at = {round(args.steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)}
    bar = tqdm(range(args.steps + 1), desc=f"{METHODS[method]:>14}")
    for step in bar:
        if step in evaluate_at:
            accuracy = (reward_gaps(heldout, heldout_reference) > 0).float().mean().item()
            steps.append(step)
            accuracies.append(accuracy)
            history.append(reward_gaps(watched, watched_reference))
            bar.set_postfix_str(f"held-out accuracy {accuracy:.3f}")
        if step == args.steps:
            break
        index = torch.randint(len(train.flipped), (BATCH_SIZE,), generator=generator)
        chosen, rejected = response_logps(model, train.at(index))
        reference_chosen, reference_rejected = reference[:, index]
        if method == "dpo":
            gaps = args.beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
            loss = preference_loss(gaps).mean()
        else:
            # A batch alone is a poor sample of the pool, so recent gaps join the solve (the
            # paper's Algorithm 2).
            loss, aux = gamma_dpo_loss(
                chosen, rejected, reference_chosen, reference_rejected,
                beta=args.beta, gamma0=args.gamma0, tau=args.tau,
                context=recent if len(recent) else None,
            )  # fmt: skip
            recent = torch.cat([recent, aux.reward_gaps])[-RECENT_GAPS:]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - began

    gamma0, tau = (args.gamma0, args.tau) if method == "gamma-dpo" else (0.0, 1.0)
    seen = [
        gamma_preference_loss(gaps, gamma0=gamma0, tau=tau, centered=True)[1] for gaps in history
    ]
    return Run(
        steps,
        accuracies,
        preference_loss(reward_gaps(heldout, heldout_reference)).mean().item(),
        torch.stack(history),
        torch.stack([aux.margins for aux in seen]),
        torch.stack([aux.pair_weights for aux in seen]),
        seconds,
    )


def contrast(weights: Tensor, flipped: Tensor) -> float:
    """How many times as hard as the clean pairs the flipped ones pull, on average."""
    return float(weights[flipped].mean() / weights[~flipped].mean())


def report(runs: dict[str, Run], flipped: Tensor, args: argparse.Namespace) -> str:
    """Return the closing table, and what was seen in words."""
    lines = [
        "",
        f"{'':8}  {'held-out clean pairs':^20}  {'mean pair weight at the end':^30}",
        f"{'':8}  {'accuracy':>9}  {'DPO loss':>9}  {'flipped':>8}  {'clean':>8}  {'ratio':>10}"
        f"  {'seconds':>7}",
    ]
    for method, run in runs.items():
        weights = run.pair_weights[-1]
        of_flipped = f"{weights[flipped].mean():8.3f}", f"{contrast(weights, flipped):10.2f}"
        if not flipped.any():
            of_flipped = f"{'-':>8}", f"{'-':>10}"
        lines.append(
            f"{METHODS[method]:8}  {run.accuracies[-1]:9.3f}  {run.heldout_loss:9.3f}  "
            f"{of_flipped[0]}  {weights[~flipped].mean():8.3f}  {of_flipped[1]}  {run.seconds:7.1f}"
        )
    lines += ["", "What was seen:"]
    if "gamma-dpo" in runs:
        run = runs["gamma-dpo"]
        gaps, margins = run.gaps[-1], run.margins[-1]
        if flipped.any():
            wrong, right = margins[flipped].mean(), margins[~flipped].mean()
            ratio = contrast(run.pair_weights[-1], flipped)
            lines += [
                f"- Flipped pairs ended with a mean margin of {wrong:.2f}, clean ones {right:.2f}.",
                f"- Under γ-DPO flipped pairs pull {ratio:.2f} times as hard as clean ones.",
            ]
            others = {"Without margins, on the same gaps": torch.sigmoid(-gaps)}
            if "dpo" in runs:
                others["In the run of DPO"] = runs["dpo"].pair_weights[-1]
            for name, weights in others.items():
                other = contrast(weights, flipped)
                word = "less hard" if other < ratio else "harder"
                word = word if abs(other / ratio - 1) > 0.01 else "about as hard"
                lines.append(f"  {name} they pull {other:.2f} times as hard: {word}.")
        match = matched(gaps, args)
        lines += [
            f"- γ-DPO's pair weights are those of DPO with {match.beta_factor:.2f} times the beta "
            f"and a margin of {match.margin:.2f},",
            f"  but for {match.unexplained:.1%} of their variance.",
        ]
    accuracies = (f"{METHODS[name]} {run.accuracies[-1]:.3f}" for name, run in runs.items())
    lines += [
        f"- Accuracy on held-out pairs: {', '.join(accuracies)}. One seed and one learning rate",
        "  are no evidence for or against either method.",
    ]
    return "\n".join(lines)


def choose_tau(gaps: Tensor, args: argparse.Namespace) -> float:
    """Choose tau by how much flatter γ-DPO is to be than DPO, on the gaps that DPO ended with."""
    try:
        settings = choose_settings(
            gaps, gamma0=args.gamma0, beta_factor=args.beta_factor, centered=True
        )
    except ValueError as error:  # that cannot be had
        stop(f"argument --beta-factor: {error}")
    tau = settings["tau"]
    print(
        f"tau = {tau:.3g}: on DPO's last gaps γ-DPO then acts as DPO with {args.beta_factor:g} "
        "times the beta"
    )
    return tau


def matched(gaps: Tensor, args: argparse.Namespace) -> MatchedLoss:
    """Find the plain logistic loss that γ-DPO amounts to on these gaps."""
    return match_logistic(gaps, gamma0=args.gamma0, tau=args.tau, centered=True)


def draw(runs: dict[str, Run], flipped: Tensor, args: argparse.Namespace) -> None:
    """Save the picture: margins and weights over training; margins and weights over the gap."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "γ"}  # text stays text
    import numpy as np
    from matplotlib import pyplot as plt

    from gamma_loss.plots import COLOURS

    flips = flipped.cpu()
    groups = {"clean": (~flips, COLOURS[0]), "flipped": (flips, COLOURS[1])}
    groups = {name: group for name, group in groups.items() if group[0].any()}
    run = runs.get("gamma-dpo")
    size, rows = ((10.0, 7.6), 2) if run else ((5.6, 4.2), 1)
    figure, axes = plt.subplots(rows, rows, figsize=size, layout="constrained", squeeze=False)

    over_steps = axes[0, -1]
    for method, each in runs.items():
        style = "-" if method == "gamma-dpo" else "--"
        for name, (group, colour) in groups.items():
            label = f"{METHODS[method]}, {name}"
            weights = each.pair_weights.cpu()[:, group].mean(1)
            over_steps.plot(each.steps, weights, style, color=colour, label=label)
    over_steps.set(xlabel="training step", ylabel="mean pair weight", ylim=(0, None))
    over_steps.set_title("How hard pairs pull")

    if run:
        of_margins, over_gap, of_weights = axes[0, 0], axes[1, 0], axes[1, 1]
        for name, (group, colour) in groups.items():
            margins = run.margins.cpu()[:, group]
            low, middle, high = margins.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)
            of_margins.plot(run.steps, middle, color=colour, label=f"{name}: median, 10 to 90 %")
            of_margins.fill_between(run.steps, low, high, color=colour, alpha=0.2, lw=0)
        of_margins.set(xlabel="training step", ylabel="target margin (reward units)")
        of_margins.set_title("γ-DPO's margins")

        gaps = run.gaps[-1].cpu().double().numpy()
        wide = np.linspace(gaps.min(), gaps.max(), 200)
        for tau, style in ((args.tau, "-"), (WEAKER * args.tau, ":")):
            rule = solve_margins_streaming([gaps], gamma0=args.gamma0, tau=tau)
            label = f"κ = γ0²/τ = {args.gamma0**2 / tau:.2g}"
            over_gap.plot(wide, rule.margins(wide), style, color=COLOURS[2], label=label)
            if tau == args.tau:
                weights = 1 / (1 + np.exp(wide - rule.margins(wide) + args.gamma0))
        counts = over_gap.twinx()
        counts.set_yticks([])
        for name, (group, colour) in groups.items():
            counts.hist(gaps[group], 40, color=colour, alpha=0.3, label=f"{name} pairs")
        counts.spines[:].set_visible(False)
        counts.legend(frameon=False, loc="lower right")
        over_gap.set(xlabel="reward gap at the end (reward units)", ylabel="target margin")
        over_gap.set_title("What κ does to margins, on the same gaps")

        match = matched(run.gaps[-1], args)
        plain = match.scale / (1 + np.exp(match.beta_factor * wide - match.margin))
        of_weights.plot(wide, weights, color=COLOURS[2], lw=3, alpha=0.6, label="γ-DPO")
        label = f"matched logistic loss, β × {match.beta_factor:.2f}"
        of_weights.plot(wide, plain, ":", color=COLOURS[3], lw=2, label=label)
        of_weights.plot(wide, 1 / (1 + np.exp(wide)), "--", color=COLOURS[4], label="DPO")
        of_weights.set(xlabel="reward gap at the end (reward units)", ylabel="pair weight")
        of_weights.set_title("What loss that is")
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="upper left" if ax is axes[-1, 0] and run else None)
    figure.savefig(args.out, dpi=150)


def why_not_drawn(out: Path) -> str | None:
    """Say why a picture cannot get this name, before the training that it shows."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "drawing needs matplotlib: pip install matplotlib"
    if not out.resolve().parent.is_dir():
        return f"no such folder: {out.resolve().parent}"
    if out.suffix.lower() not in FORMATS:
        return f"must end in one of {', '.join(FORMATS)}, got {out}"
    new = not out.exists()
    try:
        with out.open("ab"):  # which leaves a picture of before as it is
            pass
        if new:
            out.unlink()
    except OSError as error:
        return f"cannot write {out}: {error.strerror}"
    return None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def share(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 0.5:
            raise argparse.ArgumentTypeError(f"must be between 0 and 0.5, got {text}")
        return value

    def positive(kind: type) -> object:
        def parse(text: str) -> float:
            if not 0 < kind(text) < float("inf"):
                raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
            return kind(text)

        parse.__name__ = kind.__name__
        return parse

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] + " " + __doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--flip",
        type=share,
        default=argparse.SUPPRESS,
        help="share of training pairs whose label is made wrong (default: 0.2, or 0 with --pairs)",
    )
    add("--method", choices=("both", *METHODS), default="both", help="which loss to train with")
    add(
        "--steps",
        type=positive(int),
        default=argparse.SUPPRESS,
        help="alignment steps of each method (default: 300, or 12 with --quick)",
    )
    add("--lr", type=positive(float), default=2.5e-4, help="learning rate of either method")
    add("--beta", type=positive(float), default=0.2, help="reward units per nat")
    add("--gamma0", type=positive(float), default=4.0, help="γ-DPO: mean margin, reward units")
    add(
        "--beta-factor",
        type=positive(float),
        default=0.7,
        help="γ-DPO acts as DPO with so many times the beta, on DPO's last gaps: tau is chosen so",
    )
    add(
        "--tau",
        type=positive(float),
        default=argparse.SUPPRESS,
        help="γ-DPO: weight of the KL term, instead of --beta-factor",
    )
    add("--seed", type=int, default=0, help="of everything random")
    add("--pairs", type=Path, metavar="FILE.jsonl", help="own pairs: prompt, chosen, rejected")
    add("--out", type=Path, default=Path("noisy_preferences.png"), help="where the picture goes")
    add("--quick", action="store_true", help="few steps and a small model: shows nothing but work")
    args = parser.parse_args(argv)
    if problem := why_not_drawn(args.out):
        stop(f"{parser.prog}: error: argument --out: {problem}")
    if args.pairs and not args.pairs.is_file():
        stop(f"{parser.prog}: error: argument --pairs: no such file: {args.pairs}")
    args.tau = getattr(args, "tau", None)
    if args.method == "gamma-dpo" and not args.tau:
        problem = "gamma-dpo alone needs --tau: there are no gaps of DPO's to choose it by"
        stop(f"{parser.prog}: error: argument --method: {problem}")
    args.flip = getattr(args, "flip", 0.0 if args.pairs else 0.2)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.width, args.pretrain_steps, args.train_pairs, steps = 192, 500, 4096, 300
    if args.quick:
        args.width, args.pretrain_steps, args.train_pairs, steps = 64, 10, 128, 12
    args.steps = getattr(args, "steps", steps)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the comparison that the command line asks for."""
    args = arguments(argv)
    generator = torch.Generator().manual_seed(args.seed)
    text, pair_text, heldout_text = library_text(generator)
    if args.pairs:
        pairs = read_pairs(args.pairs)
        order = torch.randperm(len(pairs.flipped), generator=generator)
        cut = len(order) // 5
        heldout, train = pairs.at(order[:cut]), pairs.at(order[cut:])
    else:
        train = make_pairs(pair_text, args.train_pairs, generator)
        heldout = make_pairs(heldout_text, max(args.train_pairs // 8, 64), generator)
    train = flip_labels(train, args.flip, generator).to(args.device)
    heldout = heldout.to(args.device)

    model = pretrain(text, args, generator)
    methods = list(METHODS) if args.method == "both" else [args.method]
    runs: dict[str, Run] = {}
    for method in methods:
        if method == "gamma-dpo" and not args.tau:
            args.tau = choose_tau(runs["dpo"].gaps[-1], args)
        runs[method] = align(method, model, train, heldout, args)
    watched = train.flipped[:WATCHED]
    print(report(runs, watched, args))
    draw(runs, watched, args)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()

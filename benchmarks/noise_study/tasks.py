"""Preference tasks whose true labels are known, and ways to get labels wrong.

``bytes``      docs/examples/noisy_preferences.py with a smaller model: true against corrupted
               continuations of the standard library's source, by a recurrent language model. The
               difference of a pair is its number of corrupted bytes.
``digits``     which of two handwritten digits is the larger (scikit-learn's copy of the UCI set).
               The difference is that of the digits.
``diabetes``   which of two patients' diabetes has progressed further a year later (scikit-learn's
               442 patients). The difference is that of the measured progression. Ten measurements
               do not determine it: even clean labels leave a good share of pairs undecidable.

``movies``, ``tweets``, ``products``, ``editorials``: which of two texts people find more positive,
by one rater or by the others (`raters`). The difference is that of mean ratings.

``reviews``: the same with a language model as the policy (`language`).

In the tables the policy is a small network's score, a log-probability up to a constant that the
two sides of a pair share (only their difference enters a loss), and the reference is the network
after a little regression on few labelled items.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq
from sklearn import datasets
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.noise_study import language, raters

PROMPT_BYTES = 16  # the last of the example's 40, for speed

# What a run costs. "large" is for a GPU. Steps and pairs are such that a run sees each training
# pair about five times: wrong labels can be learned by heart.
SIZES = {
    "quick": {
        "bytes": {"width": 16, "pretrain": 5, "pairs": 96, "steps": 6, "batch": 16},
        "digits": {"width": 16, "pretrain": 30, "pairs": 128, "steps": 18, "batch": 32},
        "diabetes": {"width": 16, "pretrain": 30, "pairs": 128, "steps": 18, "batch": 32},
    },
    "full": {
        "bytes": {"width": 32, "pretrain": 300, "pairs": 768, "steps": 120, "batch": 32},
        "digits": {"width": 64, "pretrain": 100, "pairs": 1024, "steps": 200, "batch": 64},
        "diabetes": {"width": 32, "pretrain": 100, "pairs": 1024, "steps": 200, "batch": 64},
    },
    "large": {
        "bytes": {"width": 512, "pretrain": 2000, "pairs": 4096, "steps": 320, "batch": 64},
        "digits": {"width": 64, "pretrain": 100, "pairs": 1024, "steps": 200, "batch": 64},
        "diabetes": {"width": 32, "pretrain": 100, "pairs": 1024, "steps": 200, "batch": 64},
    },
}
for size in SIZES.values():  # the raters' tasks are tables too
    size |= dict.fromkeys(raters.DOMAINS, size["digits"])
SIZES["quick"]["reviews"] = {"layers": 1, "pairs": 8, "steps": 2, "batch": 4, "samples": 2}
SIZES["full"]["reviews"] = {"layers": 6, "pairs": 1024, "steps": 60, "batch": 16, "samples": 64}
SIZES["large"]["reviews"] = {
    "layers": 30,
    "pairs": 8000,
    "steps": 1000,
    "batch": 16,
    "samples": 512,
}
TASKS = tuple(SIZES["full"])
CHECKPOINTS = 6
RESPONSE_TOKENS = 32  # that a language model may write
MICRO_BATCH = 2  # pairs of a loss call in three of the four published settings
RATER_KINDS = ("rater", "as often")
LABELLED_ITEMS = 40  # that the reference of a table has learned from


class Split(NamedTuple):
    """Pairs. Index 0 of the second axis is the truly better side."""

    inputs: Tensor  # (pairs, 2, ...)
    difference: Tensor  # (pairs,), how much better, > 0
    reference: Tensor  # (pairs, 2), log-probabilities under the reference
    tokens: Tensor  # (pairs, 2), of the responses: what an averaged log-probability is divided by
    by_rater: Tensor | None = None  # (pairs,), whether the one rater's label is wrong

    def __len__(self) -> int:
        return self.inputs.shape[0]


class Task(NamedTuple):
    reference: nn.Module
    logps: Callable[[nn.Module, Tensor], Tensor]  # (pairs, 2) of a model and a split's inputs
    train: Split
    validation: Split
    test: Split
    steps: int
    batch: int
    checkpoints: int = CHECKPOINTS  # at which a run is evaluated
    sample: Callable[[nn.Module], dict[str, float]] | None = None  # what a policy writes


@functools.lru_cache(maxsize=32)
def load(name: str, size: str, seed: int, device: str) -> Task:
    """Make a task: data, splits and reference, all from the seed."""
    if name == "bytes":
        return byte_task(SIZES[size][name], seed, device)
    if name == "reviews":
        return review_task(SIZES[size][name], seed, device)
    make = rater_task if name in raters.DOMAINS else table_task
    return make(name, SIZES[size][name], seed, device)


def wrong_labels(split: Split, kind: str, rate: float, seed: int) -> Tensor:
    """Say which labels of a split are wrong.

    ``rater``: those that one rater got wrong. ``as often``: as many in expectation, but each with
    the same probability. Otherwise `flips`.
    """
    if kind in RATER_KINDS:
        assert split.by_rater is not None
        if kind == "rater":
            return split.by_rater
        kind, rate = "uniform", split.by_rater.double().mean().item()
    return flips(split.difference, kind, rate, seed)


def flips(difference: Tensor, kind: str, rate: float, seed: int) -> Tensor:
    """Draw which labels are wrong.

    ``uniform``: each with probability `rate`. ``ambiguous``: with probability σ(-difference / s), a
    Bradley-Terry annotator, with s such that the mean probability is `rate`. ``call``: as
    `flips_of_a_call`. A seed's flips at a lower rate are among those at a higher one.
    """
    if kind == "call":
        return flips_of_a_call(len(difference), rate, torch.Generator().manual_seed(seed))
    probability = torch.full_like(difference, rate)
    if kind == "ambiguous" and rate > 0:

        def excess(log_scale: float) -> float:
            return torch.sigmoid(-difference * 10**-log_scale).mean().item() - rate

        probability = torch.sigmoid(-difference * 10 ** -brentq(excess, -6, 9))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(difference), generator=generator) < probability


def flips_of_a_call(pairs: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw flips as the published code does: all pairs of a micro-batch together, or none.

    There a draw belongs to a call of the loss and not to a pair (simpo_trainer.py, line 639), so
    that a pair may come with either label, and evaluation draws as well.
    """
    calls = torch.rand(-(-pairs // MICRO_BATCH), generator=generator) <= rate
    return calls.repeat_interleave(MICRO_BATCH)[:pairs]


def example() -> ModuleType:
    """Import docs/examples/noisy_preferences.py, without its progress bars."""
    path = Path(__file__).parents[2] / "docs" / "examples" / "noisy_preferences.py"
    spec = importlib.util.spec_from_file_location("noisy_preferences", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tqdm = functools.partial(tqdm, disable=True)
    return module


def byte_task(size: dict[str, int], seed: int, device: str) -> Task:
    job = example()
    generator = torch.Generator().manual_seed(seed)
    text, pair_text, test_text = job.library_text(generator)
    settings = argparse.Namespace(
        seed=seed, width=size["width"], device=device, pretrain_steps=size["pretrain"]
    )
    reference = job.pretrain(text, settings, generator).requires_grad_(False)
    cut = len(pair_text) * 4 // 5  # no byte is in training and validation pairs
    length = job.RESPONSE_BYTES

    def logps(model: nn.Module, tokens: Tensor) -> Tensor:
        # What `job.response_logps` gives, but the prompt is read once for both responses.
        _, state = model.recurrent(model.embedding(tokens[:, 0, : -length - 1]))
        states = state.repeat_interleave(2, dim=1)
        responses = tokens[:, :, -length - 1 :].flatten(0, 1)
        hidden, _ = model.recurrent(model.embedding(responses[:, :-1]), states)
        logits, targets = model.head(hidden).flatten(0, 1), responses[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        return -losses.view(len(tokens), 2, length).sum(2)

    def split(source: Tensor, count: int) -> Split:
        pairs = job.make_pairs(source, count, generator)
        tokens = pairs.tokens[:, :, -PROMPT_BYTES - length :].to(device)
        difference = (tokens[:, 0] != tokens[:, 1]).sum(1).cpu().float()
        logged = in_slices(logps, reference, tokens)
        return Split(tokens, difference, logged, torch.full_like(logged, length))

    count = size["pairs"]
    train = split(pair_text[:cut], count)
    validation = split(pair_text[cut:], count // 2)
    test = split(test_text, count * 2 // 3)
    return Task(reference, logps, train, validation, test, size["steps"], size["batch"])


def table_task(name: str, size: dict[str, int], seed: int, device: str) -> Task:
    generator = torch.Generator().manual_seed(seed)
    table: Any = getattr(datasets, f"load_{name}")()
    features, target = (torch.tensor(a, dtype=torch.float32) for a in (table.data, table.target))
    order = torch.randperm(len(target), generator=generator)
    features, target = features[order], target[order]
    bounds = [0, len(target) * 3 // 5, len(target) * 3 // 4, len(target)]
    learned = features[: bounds[1]]
    features = ((features - learned.mean(0)) / (learned.std(0) + 1e-3)).to(device)

    reference = regression(features, target, size, seed)

    def split(first: int, last: int, count: int) -> Split:
        pairs = torch.randint(first, last, (4 * count, 2), generator=generator)
        values = target[pairs]
        keep = (values[:, 0] != values[:, 1]).nonzero()[:count, 0]
        pairs, values = pairs[keep], values[keep]
        pairs = torch.where((values[:, 0] > values[:, 1])[:, None], pairs, pairs.flip(1))
        inputs = features[pairs]
        difference = (values[:, 0] - values[:, 1]).abs()
        logged = in_slices(score, reference, inputs)
        return Split(inputs, difference, logged, torch.ones_like(logged))

    count = size["pairs"]
    train = split(bounds[0], bounds[1], count)
    validation = split(bounds[1], bounds[2], count // 2)
    test = split(bounds[2], bounds[3], count)
    return Task(reference, score, train, validation, test, size["steps"], size["batch"])


def rater_task(domain: str, size: dict[str, int], seed: int, device: str) -> Task:
    rated, features = raters.load(domain)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rated.texts), generator=generator)
    bounds = [0, len(order) * 3 // 5, len(order) * 3 // 4, len(order)]
    learned = order[: bounds[1]]
    features = ((features - features[learned].mean(0)) / (features[learned].std(0) + 1e-3)).to(
        device
    )
    means = torch.tensor([sum(r) / len(r) for r in rated.ratings])
    reference = regression(features[learned], means[learned], size, seed)

    def split(first: int, last: int, count: int) -> Split:
        pairs = raters.draw(rated.ratings, order[first:last], count, generator)
        inputs = features[pairs.items]
        logged = in_slices(score, reference, inputs)
        return Split(inputs, pairs.difference, logged, torch.ones_like(logged), pairs.wrong)

    count = size["pairs"]
    train = split(bounds[0], bounds[1], count)
    validation = split(bounds[1], bounds[2], count // 2)
    test = split(bounds[2], bounds[3], count)
    return Task(reference, score, train, validation, test, size["steps"], size["batch"])


def review_task(size: dict[str, int], seed: int, device: str) -> Task:
    """Pairs of responses of a language model; those that train it are rated at most 1 apart."""
    rated = raters.read(raters.fetch(), "movies")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rated.texts), generator=generator)
    bounds = [0, len(order) * 3 // 5, len(order) * 3 // 4, len(order)]
    count = size["pairs"]
    within = {
        "train": (count, 1.0),
        "validation": (count // 8, 1.0),
        "test": (count // 2, math.inf),
    }
    drawn = [
        raters.draw(rated.ratings, order[first:last], pairs, generator, apart)
        for (first, last), (pairs, apart) in zip(
            itertools.pairwise(bounds), within.values(), strict=True
        )
    ]
    used = torch.cat([pairs.items for pairs in drawn]).unique()
    reviews = language.prepare([rated.texts[i] for i in used], size["layers"], device)
    reference = reviews.reference(size["layers"]).requires_grad_(False)

    def split(pairs: raters.Pairs) -> Split:
        inputs = torch.searchsorted(used, pairs.items).to(device)
        logged = in_slices(reviews.logps, reference, inputs)
        return Split(inputs, pairs.difference, logged, reviews.lengths()[inputs], pairs.wrong)

    return Task(  # evaluated at its end alone, as that takes long
        reference, reviews.logps, *map(split, drawn), size["steps"], size["batch"], checkpoints=1,
        sample=functools.partial(reviews.sample, count=size["samples"], longest=RESPONSE_TOKENS),
    )  # fmt: skip


def score(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)[..., 0]


def regression(features: Tensor, target: Tensor, size: dict[str, int], seed: int) -> nn.Module:
    """Return a small network after a little regression on the first items of a table."""
    torch.manual_seed(seed)
    width, device = size["width"], features.device
    model = nn.Sequential(nn.Linear(features.shape[1], width), nn.ReLU(), nn.Linear(width, 1))
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    wanted = target[:LABELLED_ITEMS].to(device)
    wanted = (wanted - wanted.mean()) / wanted.std()
    for _ in range(size["pretrain"]):
        loss = (model(features[:LABELLED_ITEMS])[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@torch.no_grad()
def in_slices(
    logps: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, inputs: Tensor
) -> Tensor:
    return torch.cat([logps(model, part) for part in inputs.split(512)])

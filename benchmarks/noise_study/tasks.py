"""Preference tasks whose true labels are known, and ways to get labels wrong.

``bytes``: docs/examples/noisy_preferences.py with a smaller model; a pair's difference is its
number of corrupted bytes. ``digits``: which of two handwritten digits is the larger. ``diabetes``:
which of 442 patients' diabetes has progressed further. ``movies``, ``tweets``, ``products``,
``editorials``: which of two texts people find more positive (`raters`). ``reviews``: the same with
a language model as the policy.

In the tables the policy is a small network's score, a log-probability up to a constant that the
two sides of a pair share, and the reference the network after a little regression on few items.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq
from sklearn import datasets
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.noise_study import raters

PROMPT_BYTES = 16  # the last of the example's 40, for speed


# A run sees each training pair several times: wrong labels can be learned.
def _size(*values: int, names: str = "width pretrain pairs steps batch") -> dict[str, int]:
    return dict(zip(names.split(), values, strict=True))


_model = partial(_size, names="layers pairs steps batch samples")
SIZES = {
    "quick": {"bytes": _size(16, 5, 48, 3, 16), "digits": _size(16, 30, 128, 12, 32),
              "diabetes": _size(16, 30, 128, 12, 32), "reviews": _model(1, 8, 2, 4, 2)},
    "full": {"bytes": _size(32, 300, 768, 120, 32), "digits": _size(64, 100, 1024, 200, 64),
             "diabetes": _size(32, 100, 1024, 200, 64), "reviews": _model(6, 1024, 60, 16, 64)},
}  # fmt: skip
for size in SIZES.values():  # the raters' tasks are tables too
    size |= dict.fromkeys(raters.DOMAINS, size["digits"])
TASKS = tuple(SIZES["full"])
CHECKPOINTS = 6
RESPONSE_TOKENS = 32  # that a language model may write
MICRO_BATCH = 2  # pairs of a loss call in three of the four published settings
LABELLED_ITEMS = 40  # that the reference of a table has learned from


Logged = Callable[[nn.Module, Tensor], Tensor]  # (pairs, 2) of a model and a split's inputs


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
    logps: Logged
    train: Split
    validation: Split
    test: Split
    steps: int
    batch: int
    checkpoints: int = CHECKPOINTS  # at which a run is evaluated
    sample: Callable[[nn.Module], dict[str, float]] | None = None  # what a policy writes


@lru_cache(maxsize=32)
def load(name: str, size: str, seed: int) -> Task:
    """Make a task: data, splits and reference, all from the seed."""
    make = {"bytes": byte_task, "reviews": review_task}.get(name, partial(table_task, name))
    return make(SIZES[size][name], seed)


def wrong_labels(split: Split, kind: str, rate: float, seed: int) -> Tensor:
    """Draw which labels are wrong: one rater's, as often as these, or at a rate.

    ``ambiguous``: with probability σ(-difference / s), a Bradley-Terry annotator, with s such that
    the mean is `rate`. A seed's flips at a lower rate are among those at a higher one.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "rater":
        return split.by_rater
    if kind == "call":
        return flips_of_a_call(len(split), rate, generator)
    if kind == "as often":
        rate = split.by_rater.double().mean().item()
    probability = torch.full_like(split.difference, rate)
    if kind == "ambiguous" and rate > 0:

        def mean(log_scale: float) -> float:
            return torch.sigmoid(-split.difference * 10**-log_scale).mean().item()

        scale = 10 ** -brentq(lambda x: mean(x) - rate, -6, 9)
        probability = torch.sigmoid(-split.difference * scale)
    return torch.rand(len(split), generator=generator) < probability


def flips_of_a_call(pairs: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw flips as the published code does (simpo_trainer.py:639), of whole micro-batches."""
    calls = torch.rand(-(-pairs // MICRO_BATCH), generator=generator) <= rate
    return calls.repeat_interleave(MICRO_BATCH)[:pairs]


def example() -> ModuleType:
    """Import docs/examples/noisy_preferences.py, without its progress bars."""
    folder = str(Path(__file__).parents[2] / "docs" / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.import_module("noisy_preferences")
    module.tqdm = partial(tqdm, disable=True)
    return module


def byte_task(size: dict[str, int], seed: int) -> Task:
    job = example()
    generator = torch.Generator().manual_seed(seed)
    text, pair_text, test_text = job.library_text(generator)
    how = {"width": size["width"], "pretrain_steps": size["pretrain"]}
    settings = SimpleNamespace(seed=seed, device="cpu", **how)
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
        tokens = pairs.tokens[:, :, -PROMPT_BYTES - length :]
        difference = (tokens[:, 0] != tokens[:, 1]).sum(1).float()
        logged = in_slices(logps, reference, tokens)
        return Split(tokens, difference, logged, torch.full_like(logged, length))

    counts = size["pairs"], size["pairs"] // 2, size["pairs"] * 2 // 3
    texts = pair_text[:cut], pair_text[cut:], test_text
    splits = [split(text, count) for text, count in zip(texts, counts, strict=True)]
    return Task(reference, logps, *splits, size["steps"], size["batch"])


def table_task(name: str, size: dict[str, int], seed: int) -> Task:
    """Pairs of a table's rows, or of the texts of one of the raters' domains."""
    ratings = None
    if name in raters.DOMAINS:
        (_, ratings), features = raters.load(name)
        target = torch.tensor([sum(r) / len(r) for r in ratings])
    else:
        table: Any = getattr(datasets, f"load_{name}")()
        features, target = torch.tensor(table.data).float(), torch.tensor(table.target).float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=generator)
    parts = order.tensor_split([len(order) * 3 // 5, len(order) * 3 // 4])
    learned = features[parts[0]]
    features = (features - learned.mean(0)) / (learned.std(0) + 1e-3)
    reference = regression(features[parts[0]], target[parts[0]], size, seed)

    def score(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs)[..., 0]

    def split(items: Tensor, count: int) -> Split:
        if ratings is None:
            wrong = None
            pairs = items[torch.randint(len(items), (4 * count, 2), generator=generator)]
            pairs = pairs[target[pairs].diff()[:, 0] != 0][:count]
            pairs = torch.where(target[pairs].diff() < 0, pairs, pairs.flip(1))
            difference = -target[pairs].diff()[:, 0]
        else:
            pairs, difference, wrong = raters.draw(ratings, items, count, generator)
        inputs = features[pairs]
        logged = in_slices(score, reference, inputs)
        return Split(inputs, difference, logged, torch.ones_like(logged), wrong)

    counts = size["pairs"], size["pairs"] // 2, size["pairs"]
    splits = [split(items, count) for items, count in zip(parts, counts, strict=True)]
    return Task(reference, score, *splits, size["steps"], size["batch"])


def review_task(size: dict[str, int], seed: int) -> Task:
    """Pairs of responses of a language model; those that train it are rated at most 1 apart."""
    rated = raters.read(raters.fetch(), "movies")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rated.texts), generator=generator)
    parts = order.tensor_split([len(order) * 3 // 5, len(order) * 3 // 4])
    asked = [(size["pairs"], 1.0), (size["pairs"] // 8, 1.0), (size["pairs"] // 2, math.inf)]
    drawn = [
        raters.draw(rated.ratings, items, pairs, generator, apart)
        for items, (pairs, apart) in zip(parts, asked, strict=True)
    ]
    used = torch.cat([pairs.items for pairs in drawn]).unique()
    reviews = raters.prepare([rated.texts[i] for i in used], size["layers"], "cpu")
    reference = reviews.reference(size["layers"]).requires_grad_(False)

    def split(pairs: raters.Pairs) -> Split:
        inputs = torch.searchsorted(used, pairs.items)
        logged = in_slices(reviews.logps, reference, inputs)
        return Split(inputs, pairs.difference, logged, reviews.lengths()[inputs], pairs.wrong)

    return Task(  # evaluated at its end alone, as that takes long
        reference, reviews.logps, *map(split, drawn), size["steps"], size["batch"], checkpoints=1,
        sample=partial(reviews.sample, count=size["samples"], longest=RESPONSE_TOKENS),
    )  # fmt: skip


def regression(features: Tensor, target: Tensor, size: dict[str, int], seed: int) -> nn.Module:
    """Return a small network after a little regression on the first items of a table."""
    torch.manual_seed(seed)
    width = size["width"]
    model = nn.Sequential(nn.Linear(features.shape[1], width), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    wanted = target[:LABELLED_ITEMS]
    wanted = (wanted - wanted.mean()) / wanted.std()
    for _ in range(size["pretrain"]):
        loss = (model(features[:LABELLED_ITEMS])[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@torch.no_grad()
def in_slices(logps: Logged, model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([logps(model, part) for part in inputs.split(512)])

"""How well do gaps find wrong labels? ``python -m benchmarks.noise_study.suspects``, 7 minutes.

Pairs of sentences of film reviews, rated at most 1 apart, carry one rater's label each. A label is
wrong where the mean of the other raters says the opposite (`raters.draw`). Each pair is scored by a
gap from SmolLM2-135M-Instruct; small gaps are suspect:

- ``untrained``: difference of its mean log-probabilities, as in SimPO before training.
- ``dpo_seen``: gap of a policy that DPO trained on this pair with its label, among others.
- ``dpo_unseen``: gap of a policy that DPO trained on the other half of the pairs.
- ``reward_unseen``: gap of a logistic reward model on mean hidden states, fitted to other pairs.

``auc`` is the area under the ROC curve, with 95 % by a bootstrap over the pairs of this one run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import _harness as harness
from benchmarks.noise_study import raters

PAIRS, STEPS, BATCH, LAYERS = 480, 200, 2, 6  # two runs of DPO, in the last 6 layers
APART = 1.0  # as the training pairs of the study's language model
BETA, RATE = 0.1, 1e-4  # those of the study's language model
OUT = Path(__file__).parents[1] / "results" / "suspects_cpu.json"


def dpo_gaps(reviews: raters.Reviews, pairs: Tensor, reference: Tensor, half: Tensor) -> Tensor:
    """Train by DPO on some (chosen, rejected) pairs, and return the gaps of all."""
    tail = reviews.reference(LAYERS).requires_grad_(True)
    optimizer = torch.optim.Adam(tail.parameters(), lr=RATE)
    for step in tqdm(range(STEPS), desc="DPO", disable=None):
        part = half.roll(-step * BATCH)[:BATCH]
        ratios = reviews.logps(tail, pairs[part]) - reference[part]
        loss = -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tail.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        ratios = reviews.logps(tail, pairs) - reference
    return BETA * (ratios[:, 0] - ratios[:, 1])


def reward_gaps(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return out-of-fold gaps of a logistic reward model that learns from these labels."""
    x = features[pairs[:, 0]] - features[pairs[:, 1]]
    sign = np.random.default_rng(0).choice([-1.0, 1.0], len(x))  # both classes, and no intercept
    model = LogisticRegressionCV(
        Cs=np.logspace(-6, 0, 7), cv=5, fit_intercept=False, scoring="neg_log_loss",
        l1_ratios=(0,), use_legacy_attributes=False, max_iter=1000,
    )  # fmt: skip
    return sign * cross_val_predict(model, x * sign[:, None], sign, method="decision_function")


def judge(gaps: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Return the area, its interval, and how many of the smallest gaps are of wrong labels."""
    rng, areas = np.random.default_rng(0), []
    for _ in range(2000):
        some = rng.integers(len(gaps), size=len(gaps))
        areas.append(roc_auc_score(wrong[some], -gaps[some]))
    return {
        "auc": float(roc_auc_score(wrong, -gaps)),
        "interval": np.quantile(areas, (0.025, 0.975)).tolist(),
        "wrong_in_100": int(wrong[np.argsort(gaps)[:100]].sum()),
        "ranked_right_by_others": float(((gaps > 0) != wrong).mean()),
        "negative": int((gaps < 0).sum()),
        "mean": float(gaps.mean()), "std": float(gaps.std()),
    }  # fmt: skip


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    rated = raters.read(raters.fetch(), "movies")
    generator = torch.Generator().manual_seed(0)
    drawn = raters.draw(rated.ratings, torch.arange(len(rated.texts)), PAIRS, generator, APART)
    used = drawn.items.unique()
    reviews = raters.prepare([rated.texts[i] for i in used], LAYERS, "cpu")
    better = torch.searchsorted(used, drawn.items)
    pairs = torch.where(drawn.wrong[:, None], better.flip(1), better)  # as the labels have it
    with torch.no_grad():
        reference = reviews.logps(reviews.reference(LAYERS), pairs)
    halves = torch.randperm(PAIRS, generator=generator).tensor_split(2)
    seen, unseen = torch.empty(PAIRS), torch.empty(PAIRS)
    for one, other in (halves, halves[::-1]):
        gaps = dpo_gaps(reviews, pairs, reference, one)
        seen[one], unseen[other] = gaps[one], gaps[other]
    means = reference / reviews.lengths()[pairs]
    kept = reviews.kept[..., None]
    features = (reviews.states * kept).sum(1) / kept.sum(1)
    features = (features - features.mean(0)) / (features.std(0) + 1e-3)
    found = {
        "untrained": (means[:, 0] - means[:, 1]).numpy(),
        "dpo_seen": seen.numpy(),
        "dpo_unseen": unseen.numpy(),
        "reward_unseen": reward_gaps(features.numpy(), pairs.numpy()),
    }
    wrong = drawn.wrong.numpy()
    return {
        "pairs": PAIRS, "wrong": int(wrong.sum()),
        "steps": STEPS, "batch": BATCH, "beta": BETA, "learning_rate": RATE,
        **{name: judge(gaps.astype(float), wrong) for name, gaps in found.items()},
        "processor_seconds": round(time.process_time()),
        "machine": harness.machine("cpu", ("transformers", "scikit-learn"))
        | {"command": "python -m benchmarks.noise_study.suspects"},
    }  # fmt: skip


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    harness.write(OUT, measure())

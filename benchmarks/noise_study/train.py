"""One run of the study: train a copy of the reference with one method on noisy labels."""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.baselines import METHODS, GammaVariant, Logps, Method
from benchmarks.noise_study import tasks
from benchmarks.noise_study.tasks import Split, Task
from gamma_loss import label_smoothing_from_shift, solve_margins

# Added to a run's seed, for streams of random numbers that have nothing to do with each other.
FLIPS, VALIDATION_FLIPS, BATCHES = 10_000, 20_000, 30_000
TRACED = 250  # pairs of a traced interval that the figures get
FIGURED = ("dpo", "simpo", "gamma-dpo", "gamma-simpo")  # of these methods, for the file's size
FIGURE_NOISE = ("uniform", 0.4)
Spec = dict[str, Any]


def run(spec: Spec) -> dict[str, Any]:
    """Do what a spec asks for, and return it with its result. The same spec, the same result."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    task = tasks.load(spec["task"], spec["size"], spec["seed"])
    with warnings.catch_warnings():  # that γ-PO does nothing in some settings is what is studied
        warnings.filterwarnings("ignore", "gamma/kl is")
        if "method" in spec:
            result = train(spec, task)
        else:  # of the reference, where every policy starts
            result = {"ranking": accuracy(-task.test.reference.diff()[:, 0])}
    return {**spec, "result": result, "seconds": round(time.perf_counter() - began, 2)}


def method_of(spec: Spec) -> tuple[Method, dict[str, Any]]:
    """Return a spec's method and the settings of its loss, without the learning rate."""
    method, settings = METHODS[spec["method"]], dict(spec["settings"])
    del settings["lr"]
    if spec["stage"] == "ablation":
        settings |= spec["change"]
        variant = functools.partial(GammaVariant, relative=method.relative)
        method = method._replace(loss=variant, raw=False)
    if method.scheduled:
        settings["steps"] = tasks.SIZES[spec["size"]][spec["task"]]["steps"]
    return method, settings


def train(spec: Spec, task: Task) -> dict[str, Any]:
    method, settings = method_of(spec)
    noise = spec["kind"], spec["rate"]
    wrong = tasks.wrong_labels(task.train, *noise, spec["seed"] + FLIPS)
    wrong_validation = tasks.wrong_labels(task.validation, *noise, spec["seed"] + VALIDATION_FLIPS)

    torch.manual_seed(spec["seed"])
    compute_loss = method.make(**settings)
    model = copy.deepcopy(task.reference).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=spec["settings"]["lr"])
    order = torch.Generator().manual_seed(spec["seed"] + BATCHES)  # the same for every method
    calls = torch.Generator().manual_seed(spec["seed"] + FLIPS)
    at = {round(task.steps * (i + 1) / task.checkpoints) for i in range(task.checkpoints)}

    traced = spec["stage"] == "trace"
    names = ["test", "ranking", "noisy", "clean"]
    names += ["clear"] * (task.test.by_rater is not None)
    names += ["weights", "auc_loss", "auc_margin", "auc_smoothing", "pairs"] * traced
    curves: dict[str, list[Any]] = {name: [] for name in names}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []  # since the last checkpoint
    diverged = False
    for step in range(1, task.steps + 1):
        index = torch.randint(len(task.train), (task.batch,), generator=order)
        flipped = wrong[index]
        if spec["kind"] == "call":
            flipped = tasks.flips_of_a_call(len(index), spec["rate"], calls)
        tokens = task.train.tokens[index] if method.averaged else 1
        policy = labelled(task.logps(model, task.train.inputs[index]) / tokens, flipped)
        reference = labelled(task.train.reference[index] / tokens, flipped)
        policy.retain_grad()
        logps = Logps(*policy.unbind(1), *reference.unbind(1))
        loss = compute_loss(logps)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(norm.item()):
            diverged = True
            break
        optimizer.step()

        if traced:
            gaps = method.gaps(logps, settings["beta"]).detach()
            weights = -policy.grad[:, 0] * task.batch / settings["beta"]
            seen.append((gaps, weights, flipped))
        if step in at:
            evaluate(task, model, method, wrong_validation, curves)
            if traced:
                trace(*(torch.cat(parts) for parts in zip(*seen, strict=True)), spec, curves)
                seen = []
    if kept := curves.get("pairs"):
        middle = [kept[0], kept[len(kept) // 2]] * (noise == FIGURE_NOISE)
        curves["pairs"] = [*middle, kept[-1]]
    result = {**curves, "diverged": diverged}
    if task.sample and not diverged:
        result |= task.sample(model)
        if "gamma0" in settings:
            gaps = settings["beta"] * gaps_of(task, task.validation, model, method)[0]
            margins = margins_of(torch.where(wrong_validation, -gaps, gaps), settings)
            result["spread"] = round(margins.std().item() / settings["gamma0"], 5)
    if traced and spec["seed"] == 0 and spec["method"] in FIGURED:
        gaps = settings["beta"] * gaps_of(task, task.test, model, method)[0]
        result["test_gaps"] = rounded(gaps[: 2 * TRACED])
    return result


def trace(
    gaps: Tensor, weights: Tensor, flipped: Tensor, spec: Spec, curves: dict[str, list[Any]]
) -> None:
    """Append what training saw of its pairs since the last checkpoint."""
    curves["weights"].append([mean(weights[flipped]), mean(weights[~flipped])])
    curves["auc_loss"].append(auc(-gaps, flipped))
    columns = [gaps, flipped.int()]
    settings = spec["settings"]
    if "gamma0" in settings:  # the margins that these gaps have as one pool
        gaps = gaps.double()
        margins = margins_of(gaps, settings)
        shift = margins - settings["gamma0"]
        smoothing = label_smoothing_from_shift(gaps, shift, kind="conservative", match="slope")
        curves["auc_margin"].append(auc(-margins, flipped))
        curves["auc_smoothing"].append(auc(smoothing, flipped))
        columns += [margins, smoothing]
    if spec["seed"] == 0 and spec["method"] in FIGURED:
        curves["pairs"].append([rounded(column[:TRACED]) for column in columns])


def labelled(logps: Tensor, swap: Tensor) -> Tensor:
    """Columns (chosen, rejected) as the labels have it, from (better, worse)."""
    return torch.where(swap[:, None], logps.flip(1), logps)


def margins_of(gaps: Tensor, settings: dict[str, Any]) -> Tensor:
    return solve_margins(gaps, gamma0=settings["gamma0"], tau=settings["tau"]).margins


def gaps_of(task: Task, split: Split, model: nn.Module, method: Method) -> tuple[Tensor, Tensor]:
    """Return what a method ranks pairs by, the gap of its rewards over β; and log-ratios."""
    logps = tasks.in_slices(task.logps, model, split.inputs)
    own = logps - split.reference if method.relative else logps
    if method.averaged:
        own = own / split.tokens
    return own[:, 0] - own[:, 1], logps[:, 0] - logps[:, 1]


def evaluate(
    task: Task, model: nn.Module, method: Method, wrong: Tensor, curves: dict[str, list[Any]]
) -> None:
    """Append accuracies; ``ranking`` is by log-probability, ``clear`` of pairs rated 1 apart."""
    gaps, ratios = gaps_of(task, task.test, model, method)
    curves["test"].append(accuracy(gaps))
    if "clear" in curves:
        curves["clear"].append(accuracy(gaps[task.test.difference > 1]))
    curves["ranking"].append(accuracy(ratios))
    gaps, _ = gaps_of(task, task.validation, model, method)
    curves["clean"].append(accuracy(gaps))
    curves["noisy"].append(accuracy(torch.where(wrong, -gaps, gaps)))


def accuracy(gaps: Tensor) -> float:
    return round(((gaps > 0).float() + 0.5 * (gaps == 0).float()).mean().item(), 4)


def mean(values: Tensor) -> float | None:
    return float(f"{values.mean().item():.5g}") if len(values) else None


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def auc(score: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve of telling the positive by a high score; a tie counts a half."""
    if positive.all() or not positive.any():
        return None
    return round(float(roc_auc_score(positive.numpy(), score.numpy())), 5)

"""One run of the study: train a copy of the reference with one method on noisy labels."""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks.baselines import METHODS, Logps, Method
from benchmarks.noise_study.tasks import (
    SIZES,
    Split,
    Task,
    flips_of_a_call,
    in_slices,
    load,
    wrong_labels,
)
from benchmarks.noise_study.variants import GammaVariant
from benchmarks.published import published_margins
from gamma_loss import label_smoothing_from_shift, solve_margins

# Added to a run's seed, for streams of random numbers that have nothing to do with each other.
FLIPS, VALIDATION_FLIPS, BATCHES = 10_000, 20_000, 30_000
TRACED = 250  # pairs of a traced interval that the figures get
FIGURED = ("dpo", "simpo", "gamma-dpo", "gamma-simpo")  # of these methods, for the file's size
SHOWN = (*FIGURED, "gamma-dpo-published", "gamma-simpo-published")  # and their test gaps
FIGURE_NOISE = ("uniform", 0.4)
Spec = dict[str, Any]


def run(spec: Spec) -> dict[str, Any]:
    """Do what a spec asks for, and return it with its result. The same spec, the same result."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    stages = {"cost": cost, "loop": loop, "reference": untrained}
    with warnings.catch_warnings():  # that γ-PO does nothing in some settings is what is studied
        warnings.filterwarnings("ignore", "gamma/kl is")
        result = stages.get(spec["stage"], train)(spec)
    return {**spec, "result": result, "seconds": round(time.perf_counter() - start, 2)}


def method_of(spec: Spec) -> tuple[Method, dict[str, Any]]:
    """Return a spec's method and the settings of its loss, without the learning rate."""
    method, settings = METHODS[spec["method"]], dict(spec["settings"])
    del settings["lr"]
    if spec["stage"] == "ablation":
        settings |= spec["change"]
        method = method._replace(loss=functools.partial(GammaVariant, relative=method.relative))
    return method, settings


def make_loss(spec: Spec) -> Callable[[Logps], Tensor]:
    method, settings = method_of(spec)
    if method.scheduled:
        settings["steps"] = SIZES[spec["size"]][spec["task"]]["steps"]
    return method.loss(**settings) if spec["stage"] == "ablation" else method.make(**settings)


def train(spec: Spec) -> dict[str, Any]:
    device = spec["device"]
    task = load(spec["task"], spec["size"], spec["seed"], device)
    method, settings = method_of(spec)
    noise = spec["kind"], spec["rate"]
    wrong = wrong_labels(task.train, *noise, spec["seed"] + FLIPS)
    wrong_validation = wrong_labels(task.validation, *noise, spec["seed"] + VALIDATION_FLIPS)
    wrong_validation = wrong_validation.to(device)

    torch.manual_seed(spec["seed"])
    compute_loss = make_loss(spec)
    model = copy.deepcopy(task.reference).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=spec["settings"]["lr"])
    order = torch.Generator().manual_seed(spec["seed"] + BATCHES)  # the same for every method
    calls = torch.Generator().manual_seed(spec["seed"] + FLIPS)
    at = {round(task.steps * (i + 1) / task.checkpoints) for i in range(task.checkpoints)}

    traced = spec["stage"] == "trace"
    names = ["test", "ranking", "noisy", "clean"]
    names += ["clear"] * (task.test.by_rater is not None)
    if traced:
        names += ["step", "weights", "auc_loss", "auc_margin", "auc_smoothing", "pairs"]
    curves: dict[str, list[Any]] = {name: [] for name in names}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []  # since the last checkpoint
    diverged = False
    for step in range(1, task.steps + 1):
        index = torch.randint(len(task.train), (task.batch,), generator=order)
        on_device = index.to(device)
        flipped = wrong[index]
        if spec["kind"] == "call":
            flipped = flips_of_a_call(len(index), spec["rate"], calls)
        swap = flipped.to(device)
        tokens = task.train.tokens[on_device] if method.averaged else 1
        policy = labelled(task.logps(model, task.train.inputs[on_device]) / tokens, swap)
        reference = labelled(task.train.reference[on_device] / tokens, swap)
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
            gaps = settings["beta"] * (logps.h if method.relative else logps.d).detach()
            assert policy.grad is not None
            weights = -policy.grad[:, 0] * task.batch / settings["beta"]
            seen.append((gaps.cpu(), weights.cpu(), flipped))
        if step in at:
            evaluate(task, model, method, wrong_validation, curves)
            if traced:
                curves["step"].append(step)
                trace(*(torch.cat(parts) for parts in zip(*seen, strict=True)), spec, curves)
                seen = []
    if traced:
        last = curves["pairs"][-1:]
        curves["pairs"] = ends_and_middle(curves["pairs"]) if noise == FIGURE_NOISE else last
    result = {**curves, "diverged": diverged}
    if task.sample and not diverged:
        result |= task.sample(model)
        if "gamma0" in settings:
            logps = in_slices(task.logps, model, task.validation.inputs)
            gaps = settings["beta"] * gaps_of(task.validation, logps, method)
            result["spread"] = spread(torch.where(wrong_validation, -gaps, gaps), settings)
    if traced and spec["seed"] == 0 and spec["method"] in SHOWN:
        result["test_gaps"] = rounded(test_gaps(task, model, spec))
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
        margins = solve_margins(gaps, gamma0=settings["gamma0"], tau=settings["tau"]).margins
        shift = margins - settings["gamma0"]
        smoothing = label_smoothing_from_shift(gaps, shift, kind="conservative", match="slope")
        curves["auc_margin"].append(auc(-margins, flipped))
        curves["auc_smoothing"].append(auc(smoothing, flipped))
        columns += [margins, smoothing]
    if spec["seed"] == 0 and spec["method"] in FIGURED:
        curves["pairs"].append([rounded(column[:TRACED]) for column in columns])


def ends_and_middle(values: list[Any]) -> list[Any]:
    """Return the first, the middle and the last, which a figure shows."""
    return [values[i] for i in sorted({0, len(values) // 2, len(values) - 1})] if values else []


def spread(gaps: Tensor, settings: dict[str, Any]) -> float:
    """Return how much the margins of a pool differ: their standard deviation over gamma0."""
    margins = solve_margins(gaps, gamma0=settings["gamma0"], tau=settings["tau"]).margins
    return decimal(margins.std() / settings["gamma0"])


def labelled(logps: Tensor, swap: Tensor) -> Tensor:
    """Columns (chosen, rejected) as the labels have it, from (better, worse)."""
    return torch.where(swap[:, None], logps.flip(1), logps)


def gaps_of(split: Split, logps: Tensor, method: Method) -> Tensor:
    """What a method ranks a pair by: log-probabilities, less the reference's if it is relative."""
    own = logps - split.reference if method.relative else logps
    if method.averaged:
        own = own / split.tokens
    return own[:, 0] - own[:, 1]


def evaluate(
    task: Task, model: nn.Module, method: Method, wrong: Tensor, curves: dict[str, list[Any]]
) -> None:
    """Append accuracies at a checkpoint.

    ``test``: by the method's own reward, on clean labels. ``ranking``: the same by the policy's
    log-probabilities. ``clear``: of the test pairs that people rate further apart than 1.
    ``noisy`` and ``clean``: on validation pairs. A tie counts a half.
    """
    logps = in_slices(task.logps, model, task.test.inputs)
    gaps = gaps_of(task.test, logps, method)
    curves["test"].append(accuracy(gaps))
    if "clear" in curves:
        curves["clear"].append(accuracy(gaps[(task.test.difference > 1).to(gaps.device)]))
    curves["ranking"].append(accuracy(logps[:, 0] - logps[:, 1]))
    logps = in_slices(task.logps, model, task.validation.inputs)
    gaps = gaps_of(task.validation, logps, method)
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
    hits = int(positive.sum())
    misses = len(positive) - hits
    if not hits or not misses:
        return None
    ranks = rankdata(score.numpy())[positive.numpy()].sum()
    return round(float((ranks - hits * (hits + 1) / 2) / (hits * misses)), 5)


def test_gaps(task: Task, model: nn.Module, spec: Spec) -> Tensor:
    """Reward gaps of the first test pairs, in reward units."""
    method, settings = method_of(spec)
    logps = in_slices(task.logps, model, task.test.inputs)
    return (settings["beta"] * gaps_of(task.test, logps, method))[: 2 * TRACED]


def cost(spec: Spec) -> dict[str, Any]:
    """Seconds of a training step of every method, measured in turns; quantiles 10, 50, 90 %."""
    device = spec["device"]
    task = load(spec["task"], spec["size"], spec["seed"], device)
    index = torch.arange(task.batch, device=device)
    middle = {
        "epsilon": 0.2, "margin": 1.0, "a": 0.5, "rho": 0.2, "beta_prime": 1.0, "alpha": 14.0,
        "exponent": 2.0, "eta0": 0.9, "momentum": 0.1, "gamma0": 4.0, "tau": 10.0,
        "tau_dir": 0.55, "gamma_max": 0.85, "steps": task.steps,
    }  # fmt: skip

    def step(method: Method) -> Callable[[], None]:
        names = (*method.settings, *["steps"] * method.scheduled)
        compute_loss = method.make(beta=0.5, **{name: middle[name] for name in names})
        model = copy.deepcopy(task.reference).requires_grad_(True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def call() -> None:
            logps = task.logps(model, task.train.inputs[index])
            loss = compute_loss(Logps(*logps.unbind(1), *task.train.reference[index].unbind(1)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return call

    calls = {name: step(method) for name, method in METHODS.items()}
    for call in calls.values():
        for _ in range(10):  # fills the queues
            call()
    times = harness.in_turns(calls, spec["budget"], device)
    parameters = sum(p.numel() for p in task.reference.parameters())
    microseconds = {name: harness.quantiles(t["wall"]) for name, t in times.items()}
    machine = torch.cuda.get_device_name() if device == "cuda" else harness.processor()
    return {"machine": machine, "parameters": parameters, "microseconds": microseconds}


def untrained(spec: Spec) -> dict[str, Any]:
    """What the reference, where every policy starts, ranks right."""
    task = load(spec["task"], spec["size"], spec["seed"], spec["device"])
    logps = task.test.reference
    return {"ranking": accuracy(logps[:, 0] - logps[:, 1])}


def loop(spec: Spec) -> dict[str, Any]:
    """What the published loop returns for normally distributed gaps, beside the exact margins."""
    generator = torch.Generator().manual_seed(spec["seed"])
    gaps = spec["scale"] * torch.randn(256, generator=generator, dtype=torch.float64)
    gamma0, tau = spec["gamma0"], spec["tau"]
    exact = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
    looped = published_margins(gaps, gamma0, tau)
    ordered = looped[gaps.argsort()].numpy()
    earlier = np.triu(np.ones((len(gaps), len(gaps)), dtype=bool), 1)
    result: dict[str, Any] = {
        "error": decimal((looped - exact).abs().max() / gamma0),
        "one_step_more": decimal(
            (published_margins(gaps, gamma0, tau, 21) - looped).abs().max() / gamma0
        ),
        "out_of_order": round(float((ordered[:, None] > ordered + 1e-9)[earlier].mean()), 4),
    }
    for name, margins in {"exact": exact, "loop": looped}.items():
        result[name] = {
            "top_tenth": decimal(margins.sort().values[-len(gaps) // 10 :].sum() / margins.sum()),
            "negative": decimal(margins[gaps < 0].mean() / gamma0),
            "largest": decimal(margins.max() / gamma0),
        }
    return result


def decimal(value: Tensor) -> float:
    return round(value.item(), 5)

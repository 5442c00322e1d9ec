"""What came out: accuracies of chosen runs, gains over seeds, and what tests say of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from benchmarks.noise_study.plan import Noise, Runs, score

LEVEL = 0.05
FEWEST = 5  # seeds that a test takes: accuracies come in steps, a few may differ alike by chance
BOUND = 1.0  # percentage points within which two methods count as equivalent
TEST_TO_TRAIN = 0.25 / 0.60  # items that a seed tests on, over those that it trains on
WAYS = ("last", "best", "shared")  # how settings and checkpoint are chosen
BySeed = dict[int, float]
Gains = dict[int, list[tuple[float, float]]]  # by seed (κ, gain) of each configuration


def gains(
    runs: Runs, task: str, ours: str, theirs: str, noises: Iterable[Noise], stage: str = "search",
    of: str = "test",
) -> Gains:  # fmt: skip
    """Return gains of runs that share all that both have, mean over noises."""
    found = {}
    for seed in range(runs.study.seeds):
        both = ours, theirs
        cells = [[runs.cell(task, m, noise, seed, stage=stage) for m in both] for noise in noises]
        if all(map(all, cells)):
            points = np.array([[[last(run, of) for run in part] for part in c] for c in cells])
            kappas = [kappa(run["settings"]) for run in cells[0][0]]
            means = (points[:, 0] - points[:, 1]).mean(0).tolist()
            found[seed] = list(zip(kappas, means, strict=True))
    return found


def kappa(settings: dict[str, float]) -> float:
    return settings["gamma0"] ** 2 / settings["tau"]


def last(run: Any, of: str = "test") -> float:
    """Return a run's accuracy at the last checkpoint, in per cent."""
    return 100 * score(run["result"], "noisy", "last", of)


def mean(values: Iterable[float]) -> float:
    known = list(values)
    return float(np.mean(known)) if known else math.nan


def within(gains: Gains, low: float, high: float) -> BySeed:
    """Return by seed the mean gain over the configurations with κ in a range."""
    kept = {seed: [g for k, g in pairs if low <= k < high] for seed, pairs in gains.items()}
    return {seed: mean(values) for seed, values in kept.items() if values}


def mean_by_seed(runs: Sequence[BySeed]) -> BySeed:
    """Return the mean over runs of each seed that all of them have."""
    seeds = set.intersection(*map(set, runs)) if runs else set()
    return {seed: mean(run[seed] for run in runs) for seed in sorted(seeds)}


def less(ours: BySeed, theirs: BySeed) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


class Tested(NamedTuple):
    """Differences over seeds. ``half`` is of a plain 95 % t-interval; the others are corrected."""

    seeds: int
    mean: float = math.nan
    half: float = math.nan
    corrected: float = math.nan
    p: float = math.nan  # of no difference
    equivalence_p: float = math.nan  # the larger of two one-sided tests against ± BOUND
    error: float = math.nan


def tested(values: Iterable[float]) -> Tested:
    """Test differences over seeds, which split the same items anew and so depend on each other.

    Hence the variance of a mean is 1 + n · (test / training items) times s²/n (Nadeau and Bengio,
    *Inference for the generalization error*, Machine Learning 52, 2003).
    """
    values = list(values)
    count = len(values)
    if count < 2:
        return Tested(count, *values)
    mean, free = float(np.mean(values)), count - 1
    plain = float(np.std(values, ddof=1)) / math.sqrt(count)
    error = plain * math.sqrt(1 + count * TEST_TO_TRAIN)
    critical = stats.t.ppf(1 - LEVEL / 2, free)
    found = Tested(count, mean, critical * plain, critical * error)
    if count < FEWEST:
        return found
    if error == 0:  # alike in every seed
        p, outside = float(mean == 0), float(abs(mean) >= BOUND)
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, free))
        outside = float(stats.t.sf((BOUND - abs(mean)) / error, free))
    return found._replace(p=p, equivalence_p=outside, error=error)


def detectable(found: Tested, tests: int) -> float:
    """Return the effect that four of five studies would have found beside so many other tests."""
    return found.error * _detectable(found.seeds - 1, tests) if found.error > 0 else found.error


@functools.cache
def _detectable(free: int, tests: int) -> float:
    critical = stats.t.ppf(1 - LEVEL / tests / 2, free)
    return float(optimize.brentq(lambda x: stats.nct.sf(critical, free, x) - 0.8, 0.1, 100.0))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method; NaN stays out."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted


def verdicts(found: Sequence[Tested]) -> list[str]:
    """Return what tests say together, each kind after Holm's correction for all of them."""
    different = holm([each.p for each in found])
    equivalent = holm([each.equivalence_p for each in found])
    words = []
    for each, p, q in zip(found, different, equivalent, strict=True):
        said = ["equivalent"] * (q < LEVEL)
        said += ["better" if each.mean > 0 else "worse"] * (p < LEVEL)
        words.append(", ".join(said) or ("not tested" if math.isnan(p) else "open"))
    return words

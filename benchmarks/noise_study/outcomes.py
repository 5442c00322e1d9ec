"""What came out of a results file: chosen runs, paired differences, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from benchmarks.baselines import METHODS
from benchmarks.noise_study import plan
from benchmarks.noise_study.plan import Records, Study

OURS = ("gamma-dpo", "gamma-dpo-published", "gamma-simpo", "gamma-simpo-published")
FAMILIES = {"gamma-dpo": "dpo", "gamma-simpo": "simpo"}  # γ-PO and its base
LEVEL = 0.05
FEWEST = 5  # seeds that a test takes
BOUND = 1.0  # percentage points within which two methods count as equivalent
WAYS: dict[str, dict[str, Any]] = {  # how settings and checkpoint are chosen
    "last": {"checkpoint": "last"},
    "best": {"checkpoint": "best"},
    "shared": {"checkpoint": "last", "shared": True},
}


class Results:
    """Looks up the runs that were chosen in a cell."""

    def __init__(self, study: Study, records: Records) -> None:
        self.study, self.records = study, records
        self._chosen: dict[Any, Any] = {}
        self._searched = {run["method"] for run in self.of_stage("search")}

    def chosen(
        self, *cell: Any, seed: int, labels: str = "noisy", checkpoint: str = "last",
        stage: str = "search",
    ) -> Any:  # fmt: skip
        if cell[1] not in self._searched:
            return None
        how = (*cell, seed, labels, checkpoint, stage)
        if how not in self._chosen:
            self._chosen[how] = plan.choose(self.study, self.records, *how)
        return self._chosen[how]

    def runs(self, *cell: Any, **how: Any) -> dict[int, Any]:
        """Return the results of the chosen runs by seed."""
        runs = {seed: self.chosen(*cell, seed=seed, **how) for seed in range(self.study.seeds)}
        return {seed: run["result"] for seed, run in runs.items() if run}

    def shared(self, *cell: Any, checkpoint: str = "last") -> dict[int, Any]:
        """Return by seed the results of the one setting that is chosen for all of them."""
        runs = plan.choose_for_all(self.study, self.records, *cell, checkpoint=checkpoint) or []
        return {run["seed"]: run["result"] for run in runs}

    def repeated(self, stage: str, *cell: Any, **more: Any) -> dict[int, Any]:
        """Return the results of another stage with the chosen settings, by seed."""
        results = {}
        for seed in range(self.study.seeds):
            if chosen := self.chosen(*cell, seed=seed):
                spec = plan.spec(self.study, stage, *cell, seed)
                run = self.records.get(plan.key({**spec, "settings": chosen["settings"], **more}))
                if run:
                    results[seed] = run["result"]
        return results

    def accuracy(
        self, *cell: Any, labels: str = "noisy", checkpoint: str = "last", of: str = "test",
        shared: bool = False, stage: str = "search",
    ) -> dict[int, float]:  # fmt: skip
        """Return percentages by seed, or none where a seed is missing."""
        if shared:
            runs = self.shared(*cell, checkpoint=checkpoint)
        else:
            runs = self.runs(*cell, labels=labels, checkpoint=checkpoint, stage=stage)
        if len(runs) < self.study.seeds:
            return {}
        return {s: 100 * plan.score(r, labels, checkpoint, of) for s, r in runs.items()}

    def noises(self) -> list[tuple[str, float]]:
        return sorted(self.study.noises, key=lambda noise: (noise[0] != "uniform", noise[1]))

    def ablation(self, task: str, method: str, noise: tuple[str, float], change: dict) -> dict:
        runs = self.repeated("ablation", task, method, *noise, change=change)
        return {s: 100 * plan.score(r, "noisy", "last", "test") for s, r in runs.items()}

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        return [record for record in self.records.values() if record["stage"] == stage]

    def methods(self) -> dict[str, Any]:
        """Return the methods of which anything was searched."""
        return {name: method for name, method in METHODS.items() if name in self._searched}

    def noisy(self) -> list[tuple[str, float]]:
        return [noise for noise in self.noises() if noise[1] > 0]

    def at_equal_settings(
        self, task: str, ours: str, theirs: str, stage: str = "search",
        noises: Sequence[tuple[str, float]] = (), of: str = "test",
    ) -> list[dict[int, float]]:  # fmt: skip
        """Return for each configuration the gain of one method on another, by seed.

        In percentage points at the last checkpoint, mean over the noisy cells, between runs that
        share learning rate, β, margin (where both have one), seed, wrong labels and batches.
        """
        gains: list[dict[int, float]] = [{} for _ in range(self.study.configurations)]
        if not {ours, theirs} <= self.methods().keys():
            return gains
        for seed in range(self.study.seeds):
            cells = [
                [
                    plan.search(self.study, task, name, *noise, seed, stage)
                    for name in (ours, theirs)
                ]
                for noise in noises or self.noisy()
            ]
            for k, gain in enumerate(gains):
                runs = [[self.records.get(plan.key(specs[k])) for specs in cell] for cell in cells]
                if runs and all(map(all, runs)):
                    points = [[accuracy_of(run, of) for run in cell] for cell in runs]
                    gain[seed] = float(np.mean([first - second for first, second in points]))
        return gains

    def kappas(self, method: str, draw: int = 0) -> list[float]:
        """Return the strength of each configuration of a γ method."""
        task, count = self.study.tasks[0], self.study.configurations
        settings = plan.configurations(method, task, count, draw)
        return [s["gamma0"] ** 2 / s["tau"] for s in settings]


def accuracy_of(run: Any, of: str = "test") -> float:
    """Return a run's accuracy on test pairs, or clear ones, at the last checkpoint, in per cent."""
    return 100 * plan.score(run["result"], "noisy", "last", of)


# --- statistics ---


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t-interval (NaN for fewer than two)."""
    values = list(values)
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float]:
    """Return the mean difference, its half width and the p of a paired t-test, over seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    gains = [ours[seed] - theirs[seed] for seed in seeds]
    centre, half = interval(gains)
    if len(gains) < 2:
        return centre, half, math.nan
    if half == 0:  # alike in every seed
        return centre, half, 1.0 if centre == 0 else 0.0
    t = centre / half * stats.t.ppf(0.975, len(gains) - 1)
    return centre, half, float(2 * stats.t.sf(abs(t), len(gains) - 1))


class Comparison(NamedTuple):
    """Paired differences over seeds, in percentage points."""

    mean: float
    half: float  # width of the 95 % t-interval
    p: float  # of a paired t-test of no difference
    equivalence_p: float  # the larger of two one-sided tests against ± BOUND
    detectable: float  # what a two-sided test at 5 % would have found in four of five studies
    seeds: int


def compare(gains: Sequence[float]) -> Comparison:
    """Test differences for a difference, and for being within ± `BOUND`.

    Not fewer than `FEWEST`: accuracies come in steps, so that a few may differ alike by chance.
    """
    if len(gains) < FEWEST:
        return Comparison(float(np.mean(gains)), *[math.nan] * 4, len(gains))
    mean, half, p = paired(dict(enumerate(gains)), dict.fromkeys(range(len(gains)), 0.0))
    free, error = len(gains) - 1, float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    if error == 0:
        return Comparison(mean, half, p, 0.0 if abs(mean) < BOUND else 1.0, 0.0, len(gains))
    equivalence = stats.t.sf((BOUND - abs(mean)) / error, free)
    critical = stats.t.ppf(1 - LEVEL / 2, free)

    def missing(shift: float) -> float:  # power at this many standard errors, less 0.8
        return float(stats.nct.sf(critical, free, shift)) - 0.8  # the other side adds nothing

    shift = optimize.brentq(missing, 0.1, 25.0)
    return Comparison(mean, half, p, float(equivalence), shift * error, len(gains))


def mean_by_seed(runs: Sequence[dict[int, float]]) -> dict[int, float]:
    """Return the mean over runs of each seed that all of them have."""
    seeds = set.intersection(*map(set, runs)) if runs else set()
    return {seed: float(np.mean([run[seed] for run in runs])) for seed in sorted(seeds)}


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method; NaN stays out."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted


def pairings(methods: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is compared: all with DPO, or with SimPO where the reward has no reference."""
    baselines = {True: "dpo", False: "simpo"}
    peers = [(name, baselines[method.relative]) for name, method in methods.items()]
    pairs = [(name, f"{name}-published") for name in FAMILIES]
    pairs += [(name, f"matched-{base}") for name, base in FAMILIES.items()]
    known = [(ours, theirs) for ours, theirs in peers + pairs if {ours, theirs} <= methods.keys()]
    return [(ours, theirs) for ours, theirs in known if ours != theirs]


def compared(
    results: Results, task: str, names: tuple[str, str], **how: Any
) -> dict[tuple[str, float], tuple[float, float, float]]:
    """Compare two methods in every noise: (gain, half width, p adjusted for the noises)."""
    found = {}
    for noise in results.noises():
        ours, theirs = (results.accuracy(task, name, *noise, **how) for name in names)
        found[noise] = paired(ours, theirs)
    adjusted = holm([p for *_, p in found.values()])
    return {noise: (*f[:2], p) for (noise, f), p in zip(found.items(), adjusted, strict=True)}


def over_noises(
    results: Results, task: str, methods: Iterable[str], **how: Any
) -> tuple[int, dict[str, dict[int, float]]]:
    """Return how many noisy cells all the methods have, and by method and seed its mean over them.

    A method's seeds are those that it has in each of these cells.
    """
    table = {
        noise: {m: results.accuracy(task, m, *noise, **how) for m in methods}
        for noise in results.noisy()
    }
    cells = [cell for cell in table.values() if all(cell.values())]
    return len(cells), {m: mean_by_seed([cell[m] for cell in cells]) for m in methods}

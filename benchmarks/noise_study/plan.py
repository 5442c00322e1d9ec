"""Which runs there are, in the order in which they are worth doing, and how settings are chosen."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from scipy.stats import qmc

from benchmarks.baselines import METHODS
from benchmarks.noise_study.raters import DOMAINS
from benchmarks.noise_study.tasks import TASKS
from benchmarks.noise_study.train import Spec

Noise = tuple[str, float]  # kind and rate
Records = dict[str, dict[str, Any]]

CONFIGURATIONS = 12  # tried for each method, task, noise and seed

# Spaces that configurations are drawn from: logarithmic, except those marked False.
LEARNING_RATE = dict.fromkeys(TASKS, (1e-4, 3e-2))
LEARNING_RATE |= {"bytes": (1e-4, 1e-2), "reviews": (1e-4, 1e-4)}
BETA = dict.fromkeys(TASKS, (0.1, 3.0)) | {"bytes": (0.05, 1.0), "reviews": (0.1, 0.1)}
# Averaging takes beta times the response's length.
RESPONSE_LENGTH = dict.fromkeys(TASKS, 1) | {"bytes": 24, "reviews": 24}
SPACE = {
    "margin": (0.25, 8.0, True), "gamma0": (0.25, 8.0, True), "tau": (0.1, 30.0, True),
    "epsilon": (0.02, 0.45, False), "a": (0.1, 1.0, True), "rho": (0.0, 0.4, False),
    "beta_prime": (0.3, 3.0, True), "exponent": (0.5, 4.0, True), "eta0": (0.55, 0.99, False),
    "momentum": (0.003, 0.3, True), "tau_dir": (0.35, 1.5, True), "gamma_max": (0.25, 0.95, False),
    "alpha": (3.0, 60.0, True), "alpha-dpo.alpha": (0.01, 0.5, True),  # ROPO's has to be above 2
}  # fmt: skip
ONE = {  # setting of the language model: κ = 10
    "margin": 1.0, "gamma0": 1.0, "tau": 0.1, "alpha": 14.0, "exponent": 2.0, "eta0": 0.9,
    "momentum": 0.1, "tau_dir": 0.55, "gamma_max": 0.85,
}  # fmt: skip
SPACE |= {f"reviews.{name}": (value, value, False) for name, value in ONE.items()}
UNIFORM = tuple(("uniform", rate) for rate in (0.0, 0.2, 0.4, 0.1, 0.3))
AMBIGUOUS = tuple(("ambiguous", rate) for rate in (0.2, 0.4))
NOISES = UNIFORM + AMBIGUOUS
CALLS = (("call", 0.2), ("call", 0.4))  # as published, see `tasks.flips_of_a_call`
RATERS = (("rater", 1.0), ("as often", 1.0))  # at the rate that the data have
TRACED_RATES = (0.2, 0.4)  # at which the chosen runs are done again, and their pairs watched

# γ-PO and its matched loss over κ, with the learning rate and beta that were chosen for the base.
KAPPAS = (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
KAPPA_GAMMA0 = 4.0
TAU_OF = {kappa: float(f"{KAPPA_GAMMA0**2 / kappa:.6g}") for kappa in KAPPAS}
KAPPA_NOISES = (("uniform", 0.4), ("uniform", 0.2), ("ambiguous", 0.2), *RATERS)

GAMMA0S, TAUS = (0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
CHANGES: tuple[dict[str, Any], ...] = (  # of the chosen settings, one at a time
    {}, {"queue_size": 0}, {"queue_size": 128}, {"queue_size": 2048},
    {"queue_size": 2048, "sample": 256}, {"centered": False}, {"centered": True},
    {"differentiable": True},
    *({"label_smoothing": e, "robust": r} for r in (False, True) for e in (0.1, 0.3)),
    *({"gamma0": gamma0, "tau": tau} for gamma0 in GAMMA0S for tau in TAUS),
)  # fmt: skip
ABLATION_SEEDS = 3
FAMILIES = {"gamma-dpo": "dpo", "gamma-simpo": "simpo"}  # γ-PO and its base
# What the verdict compares; they are run first, and get configurations drawn anew.
CORE = ("gamma-dpo", "matched-dpo", "dpo", "gamma-simpo", "matched-simpo", "simpo")


class Study(NamedTuple):
    """What is to be run; the fields of the full study are the defaults."""

    size: str = "full"
    seeds: int = 5
    configurations: int = CONFIGURATIONS
    tasks: tuple[str, ...] = ("digits", "diabetes", "bytes")
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "gamma-dpo-averaged")
    noises: tuple[Noise, ...] = NOISES
    calls: tuple[Noise, ...] = CALLS  # which the verdict's methods get beside
    ablation_noises: tuple[Noise, ...] = UNIFORM[2:0:-1]
    changes: tuple[dict[str, Any], ...] = CHANGES
    kappas: tuple[float, ...] = KAPPAS
    redrawn: bool = True  # whether a few methods also get configurations of each seed's own


# Labels by real annotators: clean, one rater's, and uniform flips as often.
PEOPLE = Study(
    seeds=10, tasks=tuple(DOMAINS), noises=(("uniform", 0.0), *RATERS), calls=(),
    ablation_noises=(),
)  # fmt: skip
# The same for a language model as the policy, at one setting: nothing is tuned.
LANGUAGE = PEOPLE._replace(
    seeds=5, configurations=1, tasks=("reviews",), kappas=(), redrawn=False,
    methods=("dpo", "gamma-dpo", "gamma-dpo-averaged", "matched-dpo", "ropo", "re-po", "plc-dpo",
             "simpo", "gamma-simpo", "matched-simpo"),
)  # fmt: skip
STUDIES = {"tasks": Study(), "raters": PEOPLE, "language": LANGUAGE}


def quick(study: Study) -> Study:
    """Return a reduced study, which shows nothing but that all of it works."""
    return study._replace(
        size="quick", seeds=1, configurations=1, tasks=study.tasks[::2], noises=study.noises[2:3],
        calls=study.calls[1:], ablation_noises=study.ablation_noises[:1],
        changes=({}, {"differentiable": True}), kappas=study.kappas[3:4],
    )  # fmt: skip


def key(spec: Spec) -> str:
    """Identify a run by everything that decides its result."""
    names = ("stage", "size", "task", "method", "kind", "rate", "seed", "settings", "change",
             "gamma0", "tau", "scale")  # fmt: skip
    return repr([spec.get(name) for name in names])


@functools.lru_cache
def configurations(
    method: str, task: str, count: int, draw: int = 0
) -> tuple[dict[str, float], ...]:
    """Return the settings that are tried for a method, by a Latin hypercube.

    Configuration k has the same place in the range of learning rates and of beta for all methods.
    """

    def between(low: float, high: float, logarithmic: bool, place: float) -> float:
        value = low * (high / low) ** place if logarithmic else low + (high - low) * place
        return float(f"{value:.4g}")

    length = RESPONSE_LENGTH[task] if METHODS[method].averaged else 1
    spaces = {
        "lr": (*LEARNING_RATE[task], True),
        "beta": (BETA[task][0] * length, BETA[task][1] * length, True),
    }
    for name in METHODS[method].settings:
        own = f"{task}.{name}", f"{method}.{name}", name
        spaces[name] = next(SPACE[key] for key in own if key in SPACE)
    places = qmc.LatinHypercube(d=4, seed=draw).random(count).tolist()
    return tuple(
        {n: between(*space, at) for (n, space), at in zip(spaces.items(), row, strict=False)}
        for row in places
    )


def search(
    study: Study, task: str, method: str, noise: Noise, seed: int, stage: str = "search"
) -> list[Spec]:
    """Return the runs that one is chosen from; settings are each seed's own if ``redrawn``."""
    draw = seed + 1 if stage == "redrawn" else 0
    base = {
        "stage": stage, "size": study.size, "task": task, "method": method, "kind": noise[0],
        "rate": noise[1], "seed": seed,
    }  # fmt: skip
    tried = configurations(method, task, study.configurations, draw)
    return [{**base, "settings": settings} for settings in tried]


def score(result: dict[str, Any], labels: str, checkpoint: str, of: str | None = None) -> float:
    """Return an accuracy at the kept checkpoint: of ``labels`` themselves, or of ``test``, ...

    A run that diverged counts as guessing, unless an earlier checkpoint is kept.
    """
    values = result[labels]
    if not values or (result["diverged"] and checkpoint == "last"):
        return 0.5
    kept = values.index(max(values)) if checkpoint == "best" else -1
    return float(result[of or labels][kept])


def rivals(ours: str) -> tuple[str, ...]:
    """Return what γ-PO is compared with: its base, and losses that have its own settings."""
    base = FAMILIES[ours]
    return base, f"matched-{base}", f"matched-{base}-once", f"{ours}-published"


class Runs:
    """A study and its finished runs: which of them are chosen, and what is still to be done."""

    def __init__(self, study: Study, records: Records) -> None:
        self.study, self.records = study, records
        self.noises = sorted(study.noises, key=lambda noise: (noise[0] != "uniform", noise[1]))
        self.noisy = [noise for noise in self.noises if noise[1] > 0]
        self._complete: dict[Any, list[Any]] = {}

    def cell(self, *where: Any, stage: str = "search") -> list[Any]:
        """Return runs of a task, method, noise and seed by configuration, [] while some lack."""
        if (runs := self._complete.get((*where, stage))) is None:
            runs = [self.records.get(key(spec)) for spec in search(self.study, *where, stage)]
            if not all(runs):
                return []
            self._complete[(*where, stage)] = runs
        return runs

    def choose(
        self, *where: Any, labels: str = "noisy", checkpoint: str = "last", stage: str = "search"
    ) -> Any:
        """Return the run that is best on validation pairs by ``labels``, None while some lack."""
        runs = self.cell(*where, stage=stage)
        return max(runs, key=lambda run: score(run["result"], labels, checkpoint), default=None)

    def chosen(self, *where: Any, way: str = "last", **how: str) -> list[Any]:
        """Return the chosen run of each seed, [] while some lack.

        ``shared``: of the settings that do best on average over all seeds.
        """
        seeds = range(self.study.seeds)
        if way != "shared":
            runs = [self.choose(*where, seed, checkpoint=way, **how) for seed in seeds]
            return runs if all(runs) else []
        cells = [self.cell(*where, seed) for seed in seeds]
        if not all(cells):
            return []
        scores = [[score(run["result"], "noisy", "last") for run in runs] for runs in cells]
        totals = [math.fsum(values) for values in zip(*scores, strict=True)]
        return [runs[totals.index(max(totals))] for runs in cells]

    def accuracy(
        self, *where: Any, way: str = "last", labels: str = "noisy", of: str = "test", **how: str
    ) -> dict[int, float]:
        """Return percentages of the chosen runs by seed."""
        checkpoint = "best" if way == "best" else "last"
        runs = self.chosen(*where, way=way, labels=labels, **how)
        return {r["seed"]: 100 * score(r["result"], labels, checkpoint, of) for r in runs}

    def repeated(self, stage: str, *where: Any, **more: Any) -> dict[int, Any]:
        """Return results of another stage with the settings chosen in a cell, by seed."""
        specs = [{**run, "stage": stage, **more} for run in self.chosen(*where)]
        again = {spec["seed"]: self.records.get(key(spec)) for spec in specs}
        return {seed: run["result"] for seed, run in again.items() if run}

    def repeats(
        self, task: str, stage: str, noises: Iterable[Noise], methods: Iterable[str], seeds: int
    ) -> list[Spec]:
        """Return specs of the runs chosen on noisy labels at the last checkpoint, as a stage."""
        cells = itertools.product(range(seeds), noises, methods)
        runs = [self.choose(task, method, noise, seed) for seed, noise, method in cells]
        kept = ("size", "task", "method", "kind", "rate", "seed", "settings")
        return [{"stage": stage, **{name: run[name] for name in kept}} for run in runs if run]

    def ablations(self, task: str) -> list[Spec]:
        """Change one thing in the chosen settings."""
        noises = self.study.ablation_noises
        bases = self.repeats(task, "ablation", noises, FAMILIES, ABLATION_SEEDS)
        return [{**base, "change": change} for base in bases for change in self.study.changes]

    def over_kappa(self, task: str) -> list[Spec]:
        """Change κ alone, in γ-PO and in the loss that is matched to it."""
        study = self.study
        noises = [noise for noise in KAPPA_NOISES if noise in study.noises]
        specs = []
        for ours, base in FAMILIES.items():
            for limit in self.repeats(task, "kappa", noises, [base], study.seeds):
                shared = {name: limit["settings"][name] for name in ("lr", "beta")}
                if base == "simpo" and study.kappas:  # γ-PO's limit for a large tau
                    specs.append({**limit, "settings": {**shared, "margin": KAPPA_GAMMA0}})
                for kappa, method in itertools.product(study.kappas, (ours, *rivals(ours)[1:3])):
                    settings = {**shared, "gamma0": KAPPA_GAMMA0, "tau": TAU_OF[kappa]}
                    specs.append({**limit, "method": method, "settings": settings})
        return specs

    def blocks(self) -> Iterator[list[Spec]]:
        """Yield the runs in the order in which they are worth doing.

        A block is known in full only once those before it are in the records.
        """
        study = self.study

        def searches(
            task: str, methods: Iterable[str], noises: Iterable[Noise], stage: str = "search"
        ) -> list[Spec]:
            known = [noise for noise in noises if noise in study.noises + study.calls]
            cells = itertools.product(range(study.seeds), known, methods)
            return [s for seed, n, m in cells for s in search(study, task, m, n, seed, stage)]

        traced = [noise for noise in study.noises if noise[1] in TRACED_RATES]
        base = {"stage": "reference", "size": study.size}
        starts = itertools.product(study.tasks, range(study.seeds))
        yield [{**base, "task": task, "seed": seed} for task, seed in starts]
        for task in study.tasks:
            yield searches(task, [m for m in CORE if m in study.methods], study.noises)
            yield self.over_kappa(task)
        for noises in (UNIFORM[:3], UNIFORM[3:] + AMBIGUOUS, RATERS):
            for task in study.tasks:
                yield searches(task, study.methods, noises)
                yield self.repeats(task, "trace", traced, study.methods, study.seeds)
                yield self.ablations(task)
        for task in study.tasks:
            yield searches(task, CORE, study.calls)
        for task in study.tasks * study.redrawn:
            yield searches(task, CORE, [n for n in study.noises if n[1]], "redrawn")

"""Which runs there are, in the order in which they are worth doing, and how settings are chosen."""

from __future__ import annotations

import functools
import itertools
import json
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
    "beta_prime": (0.3, 3.0, True),
    "alpha": (3.0, 60.0, True),  # ROPO's; it asks for > 2
    "alpha-dpo.alpha": (0.01, 0.5, True),
    "exponent": (0.5, 4.0, True), "eta0": (0.55, 0.99, False), "momentum": (0.003, 0.3, True),
    "tau_dir": (0.35, 1.5, True), "gamma_max": (0.25, 0.95, False),
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
TRACED_RATES = (0.2, 0.4)

# γ-PO and its matched loss over κ, with the learning rate and beta that were chosen for the base.
KAPPAS = (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
KAPPA_GAMMA0 = 4.0
TAU_OF = {kappa: float(f"{KAPPA_GAMMA0**2 / kappa:.6g}") for kappa in KAPPAS}
KAPPA_METHODS = {
    "dpo": ("gamma-dpo", "matched-dpo", "matched-dpo-once"),
    "simpo": ("gamma-simpo", "matched-simpo", "matched-simpo-once"),
}
KAPPA_NOISES = (("uniform", 0.4), ("uniform", 0.2), ("ambiguous", 0.2), *RATERS)

GAMMA0S, TAUS = (0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
GRID = [{"gamma0": gamma0, "tau": tau} for gamma0 in GAMMA0S for tau in TAUS]
CHANGES: dict[str, list[dict[str, Any]]] = {
    "as chosen": [{}],
    "pool": [{"queue_size": 0}, {"queue_size": 128}, {"queue_size": 2048},
             {"queue_size": 2048, "sample": 256}],
    "form": [{"centered": False}, {"centered": True}],
    "gradient": [{"differentiable": True}],
    "smoothing": [{"label_smoothing": e, "robust": r} for r in (False, True) for e in (0.1, 0.3)],
    "grid": GRID,
}  # fmt: skip
ABLATION_METHODS = ("gamma-dpo", "gamma-simpo")
# What the verdict compares; they are run first, and get configurations drawn anew.
CORE = ("gamma-dpo", "matched-dpo", "dpo", "gamma-simpo", "matched-simpo", "simpo")


class Study(NamedTuple):
    """What is to be run; the fields of the full study are the defaults."""

    size: str = "full"
    device: str = "cpu"
    seeds: int = 5
    configurations: int = CONFIGURATIONS
    tasks: tuple[str, ...] = ("digits", "diabetes", "bytes")
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "gamma-dpo-averaged")
    noises: tuple[Noise, ...] = NOISES
    calls: tuple[Noise, ...] = CALLS  # which the verdict's methods get beside
    ablation_noises: tuple[Noise, ...] = UNIFORM[2:0:-1]
    ablation_seeds: int = 3
    changes: tuple[str, ...] = tuple(CHANGES)
    kappas: tuple[float, ...] = KAPPAS
    redrawn: bool = True  # whether a few methods also get configurations of each seed's own
    traced: bool = True  # whether chosen runs are done again and watched


# A larger model and fewer runs: meant for half an hour of one GPU.
LARGE = Study(
    size="large", device="cuda", configurations=6, tasks=("bytes",), noises=UNIFORM[:3], calls=(),
    ablation_noises=UNIFORM[2:3], ablation_seeds=1, changes=tuple(CHANGES)[:-1], kappas=(),
    redrawn=False,
)  # fmt: skip
# Labels by real annotators: clean, one rater's, and uniform flips as often.
PEOPLE = Study(
    seeds=10, tasks=tuple(DOMAINS), noises=(("uniform", 0.0), *RATERS), calls=(),
    ablation_noises=(),
)  # fmt: skip
# The same for a language model as the policy, at one setting: nothing is tuned.
LANGUAGE = Study(
    seeds=5, configurations=1, tasks=("reviews",), noises=PEOPLE.noises, calls=(),
    ablation_noises=(), kappas=(), redrawn=False, traced=False,
    methods=("dpo", "gamma-dpo", "gamma-dpo-averaged", "matched-dpo", "ropo", "re-po", "plc-dpo",
             "simpo", "gamma-simpo", "matched-simpo"),
)  # fmt: skip
QUICK = Study(
    size="quick", seeds=1, configurations=1, tasks=("digits", "bytes"),
    noises=(("uniform", 0.4), ("ambiguous", 0.4)), calls=CALLS[1:],
    ablation_noises=UNIFORM[2:3], ablation_seeds=1, changes=("as chosen", "gradient"),
    kappas=(10.0,),
)  # fmt: skip
STUDIES = {"tasks": Study(), "raters": PEOPLE, "language": LANGUAGE}


def key(spec: Spec) -> str:
    """Identify a run by everything that decides its result."""
    names = ("stage", "size", "device", "task", "method", "kind", "rate", "seed", "settings",
             "change", "gamma0", "tau", "scale")  # fmt: skip
    return json.dumps({name: spec[name] for name in names if name in spec})


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
        "stage": stage, "size": study.size, "device": study.device, "task": task,
        "method": method, "kind": noise[0], "rate": noise[1], "seed": seed,
    }  # fmt: skip
    tried = configurations(method, task, study.configurations, draw)
    return [{**base, "settings": settings} for settings in tried]


def cell(study: Study, records: Records, *where: Any, stage: str = "search") -> list[Any]:
    """Return the runs of a task, method, noise and seed by configuration, [] while some lack."""
    runs = [records.get(key(s)) for s in search(study, *where, stage)]
    return runs if all(runs) else []


def choose(
    study: Study, records: Records, *where: Any, labels: str = "noisy", checkpoint: str = "last",
    stage: str = "search",
) -> Any:  # fmt: skip
    """Return the run that is best on validation pairs by ``labels``, None while some lack."""
    runs = cell(study, records, *where, stage=stage)
    return max(runs, key=lambda run: score(run["result"], labels, checkpoint), default=None)


def choose_for_all(
    study: Study, records: Records, *where: Any, labels: str = "noisy", checkpoint: str = "last"
) -> list[Any]:
    """Return each seed's run of the settings that do best on average over all seeds."""
    cells = [cell(study, records, *where, seed) for seed in range(study.seeds)]
    if not all(cells):
        return []
    scores = [[score(r["result"], labels, checkpoint) for r in runs] for runs in cells]
    totals = [math.fsum(values) for values in zip(*scores, strict=True)]
    return [runs[totals.index(max(totals))] for runs in cells]


def score(result: dict[str, Any], labels: str, checkpoint: str, of: str | None = None) -> float:
    """Return an accuracy at the kept checkpoint: of ``labels`` themselves, or of ``test``, ...

    A run that diverged counts as guessing, unless an earlier checkpoint is kept.
    """
    values = result[labels]
    if not values or (result["diverged"] and checkpoint == "last"):
        return 0.5
    kept = values.index(max(values)) if checkpoint == "best" else -1
    return float(result[of or labels][kept])


def repeats(
    study: Study, records: Records, task: str, stage: str, noises: Iterable[Noise],
    methods: Iterable[str], seeds: int,
) -> list[Spec]:  # fmt: skip
    """Return the specs of the runs chosen on noisy labels at the last checkpoint, as a stage."""
    cells = itertools.product(range(seeds), noises, methods)
    runs = [choose(study, records, task, method, noise, seed) for seed, noise, method in cells]
    kept = ("size", "device", "task", "method", "kind", "rate", "seed", "settings")
    return [{"stage": stage, **{name: run[name] for name in kept}} for run in runs if run]


def traces(study: Study, records: Records, task: str) -> list[Spec]:
    """Do the chosen runs again, and watch their pairs."""
    noises = [noise for noise in study.noises if noise[1] in TRACED_RATES and study.traced]
    return repeats(study, records, task, "trace", noises, study.methods, study.seeds)


def ablations(study: Study, records: Records, task: str) -> list[Spec]:
    """Change one thing in the chosen settings."""
    what = task, "ablation", study.ablation_noises, ABLATION_METHODS, study.ablation_seeds
    changes = [change for name in study.changes for change in CHANGES[name]]
    return [
        {**base, "change": change} for base in repeats(study, records, *what) for change in changes
    ]


def over_kappa(study: Study, records: Records, task: str) -> list[Spec]:
    """Change κ alone, in γ-PO and in the loss that is matched to it."""
    noises = [noise for noise in KAPPA_NOISES if noise in study.noises]
    specs = []
    for base, methods in KAPPA_METHODS.items():
        for limit in repeats(study, records, task, "kappa", noises, [base], study.seeds):
            shared = {name: limit["settings"][name] for name in ("lr", "beta")}
            if base == "simpo" and study.kappas:  # γ-PO's limit for a large tau
                specs.append({**limit, "settings": {**shared, "margin": KAPPA_GAMMA0}})
            for kappa, method in itertools.product(study.kappas, methods):
                settings = {**shared, "gamma0": KAPPA_GAMMA0, "tau": TAU_OF[kappa]}
                specs.append({**limit, "method": method, "settings": settings})
    return specs


def blocks(study: Study, records: Records) -> Iterator[list[Spec]]:
    """Yield the runs in the order in which they are worth doing.

    A block is known in full only once those before it are in `records`.
    """

    def searches(
        task: str, methods: Iterable[str], noises: Iterable[Noise], stage: str = "search"
    ) -> list[Spec]:
        known = [noise for noise in noises if noise in study.noises + study.calls]
        cells = itertools.product(range(study.seeds), known, methods)
        return [s for seed, n, m in cells for s in search(study, task, m, n, seed, stage)]

    base = {"stage": "reference", "size": study.size, "device": study.device}
    starts = itertools.product(study.tasks, range(study.seeds))
    yield [{**base, "task": task, "seed": seed} for task, seed in starts]
    for task in study.tasks:
        yield searches(task, [m for m in CORE if m in study.methods], study.noises)
        yield over_kappa(study, records, task)
    for noises in (UNIFORM[:3], UNIFORM[3:] + AMBIGUOUS, RATERS):
        for task in study.tasks:
            yield searches(task, study.methods, noises)
            yield traces(study, records, task)
            yield ablations(study, records, task)
    for task in study.tasks:
        yield searches(task, CORE, study.calls)
    for task in study.tasks * study.redrawn:
        yield searches(task, CORE, [n for n in study.noises if n[1]], "redrawn")

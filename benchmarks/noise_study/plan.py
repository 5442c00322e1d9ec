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

CONFIGURATIONS = 12  # tried for each method, task, noise and seed

# Spaces that configurations are drawn from: logarithmic, except those marked False.
LEARNING_RATE = dict.fromkeys(TASKS, (1e-4, 3e-2)) | {
    "bytes": (1e-4, 1e-2),
    "reviews": (1e-4, 1e-4),
}
BETA = dict.fromkeys(TASKS, (0.1, 3.0)) | {"bytes": (0.05, 1.0), "reviews": (0.1, 0.1)}
# Averaging takes beta times the response's length.
RESPONSE_LENGTH = dict.fromkeys(TASKS, 1) | {"bytes": 24, "reviews": 24}
SPACE = {
    "margin": (0.25, 8.0, True),
    "gamma0": (0.25, 8.0, True),
    "tau": (0.1, 30.0, True),
    "epsilon": (0.02, 0.45, False),
    "a": (0.1, 1.0, True),
    "rho": (0.0, 0.4, False),
    "beta_prime": (0.3, 3.0, True),
    "alpha": (3.0, 60.0, True),  # ROPO's; it asks for > 2
    "alpha-dpo.alpha": (0.01, 0.5, True),
    "exponent": (0.5, 4.0, True),
    "eta0": (0.55, 0.99, False),
    "momentum": (0.003, 0.3, True),
    "tau_dir": (0.35, 1.5, True),
    "gamma_max": (0.25, 0.95, False),
    # The one setting of the language model: κ = 10.
    "reviews.margin": (1.0, 1.0, True),
    "reviews.gamma0": (1.0, 1.0, True),
    "reviews.tau": (0.1, 0.1, True),
    "reviews.alpha": (14.0, 14.0, True),
    "reviews.exponent": (2.0, 2.0, True),
    "reviews.eta0": (0.9, 0.9, False),
    "reviews.momentum": (0.1, 0.1, True),
    "reviews.tau_dir": (0.55, 0.55, True),
    "reviews.gamma_max": (0.85, 0.85, False),
}
UNIFORM = tuple(("uniform", rate) for rate in (0.0, 0.2, 0.4, 0.1, 0.3))
AMBIGUOUS = tuple(("ambiguous", rate) for rate in (0.2, 0.4))
NOISES = UNIFORM + AMBIGUOUS
CALLS = (("call", 0.2), ("call", 0.4))  # as published, see `tasks.flips_of_a_call`
RATERS = (("rater", 1.0), ("as often", 1.0))  # at the rate that the data have
TRACED_RATES = (0.2, 0.4)

# γ-PO and its matched loss over κ, with the learning rate and beta that were chosen for the base.
KAPPAS = (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
KAPPA_GAMMA0 = 4.0
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
ABLATION_NOISES = (("uniform", 0.4), ("uniform", 0.2))
ABLATION_METHODS = ("gamma-dpo", "gamma-simpo")
LOOPS = [(4.0, 10.0), (3.0, 3.0), (8.0, 10.0), (4.0, 2.0), (2.0, 0.5), (4.0, 0.5), (8.0, 0.5),
         (4.0, 0.1)]  # fmt: skip
# What the verdict compares; they are run first, and get configurations drawn anew.
CORE = ("gamma-dpo", "matched-dpo", "dpo", "gamma-simpo", "matched-simpo", "simpo")
Records = dict[str, dict[str, Any]]


class Study(NamedTuple):
    """What is to be run; the fields of the full study are the defaults."""

    size: str = "full"
    device: str = "cpu"
    seeds: int = 5
    configurations: int = CONFIGURATIONS
    tasks: tuple[str, ...] = ("digits", "diabetes", "bytes")
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "gamma-dpo-averaged")
    noises: tuple[tuple[str, float], ...] = NOISES
    calls: tuple[tuple[str, float], ...] = CALLS  # which the verdict's methods get beside
    ablation_noises: tuple[tuple[str, float], ...] = ABLATION_NOISES
    ablation_seeds: int = 3
    changes: tuple[str, ...] = tuple(CHANGES)
    kappas: tuple[float, ...] = KAPPAS
    redrawn: bool = True  # whether a few methods also get configurations of each seed's own
    traced: bool = True  # whether chosen runs are done again and watched
    cost_seconds: float = 30.0


# A larger model and fewer runs: meant for half an hour of one GPU.
LARGE = Study(
    size="large", device="cuda", configurations=6, tasks=("bytes",), noises=UNIFORM[:3],
    calls=(), ablation_noises=(("uniform", 0.4),), ablation_seeds=1,
    changes=("as chosen", "pool", "form", "gradient", "smoothing"), kappas=(),
    redrawn=False,
)  # fmt: skip
# Labels by real annotators: clean, one rater's, and uniform flips as often.
PEOPLE = Study(
    seeds=10, tasks=tuple(DOMAINS), noises=(("uniform", 0.0), *RATERS), calls=(),
    ablation_noises=(), cost_seconds=0.0,
)  # fmt: skip
# The same for a language model as the policy, at one setting: nothing is tuned.
LANGUAGE = Study(
    seeds=5, configurations=1, tasks=("reviews",), noises=PEOPLE.noises, calls=(),
    ablation_noises=(), kappas=(), redrawn=False, traced=False, cost_seconds=0.0,
    methods=("dpo", "gamma-dpo", "gamma-dpo-averaged", "matched-dpo", "ropo", "re-po", "plc-dpo",
             "simpo", "gamma-simpo", "matched-simpo"),
)  # fmt: skip
QUICK = Study(
    size="quick", seeds=1, configurations=1, tasks=("digits", "bytes"),
    noises=(("uniform", 0.4), ("ambiguous", 0.4)), calls=CALLS[1:],
    ablation_noises=(("uniform", 0.4),),
    ablation_seeds=1, changes=("as chosen", "gradient"), kappas=(10.0,), cost_seconds=0.2,
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

    Every method has the same number of them, and configuration k of a draw the same place in the
    range of learning rates and of beta for all methods.
    """
    names = METHODS[method].settings
    length = RESPONSE_LENGTH[task] if METHODS[method].averaged else 1
    spaces = {
        "lr": (*LEARNING_RATE[task], True),
        "beta": (BETA[task][0] * length, BETA[task][1] * length, True),
        **{name: space_of(name, method, task) for name in names},
    }
    places = qmc.LatinHypercube(d=4, seed=draw).random(count)
    return tuple(
        {
            name: between(*space, place)
            for (name, space), place in zip(spaces.items(), row, strict=False)
        }
        for row in places.tolist()
    )


def space_of(name: str, method: str, task: str) -> tuple[float, float, bool]:
    own = (f"{task}.{name}", f"{method}.{name}", name)
    return next(SPACE[key] for key in own if key in SPACE)


def between(low: float, high: float, logarithmic: bool, place: float) -> float:
    value = low * (high / low) ** place if logarithmic else low + (high - low) * place
    return float(f"{value:.4g}")


def search(
    study: Study, task: str, method: str, kind: str, rate: float, seed: int, stage: str = "search"
) -> list[Spec]:
    """Return the runs that one is chosen from, all on the data and the wrong labels of a seed.

    The settings are the same for all seeds, or each seed's own in the stage ``redrawn``.
    """
    base = spec(study, stage, task, method, kind, rate, seed)
    draw = seed + 1 if stage == "redrawn" else 0
    return [
        {**base, "settings": settings}
        for settings in configurations(method, task, study.configurations, draw)
    ]


def spec(
    study: Study, stage: str, task: str, method: str, kind: str, rate: float, seed: int
) -> Spec:
    return {
        "stage": stage, "size": study.size, "device": study.device, "task": task,
        "method": method, "kind": kind, "rate": rate, "seed": seed,
    }  # fmt: skip


def choose(
    study: Study, records: Records, task: str, method: str, kind: str, rate: float, seed: int,
    labels: str = "noisy", checkpoint: str = "last", stage: str = "search",
) -> dict[str, Any] | None:  # fmt: skip
    """Return the search run that did best on a seed's validation pairs, None while some lack.

    By accuracy on ``noisy`` or ``clean`` labels, at the ``last`` or at the ``best`` checkpoint.
    """
    runs = [records.get(key(s)) for s in search(study, task, method, kind, rate, seed, stage)]
    if not all(runs):
        return None
    return max((r for r in runs if r), key=lambda r: score(r["result"], labels, checkpoint))


def choose_for_all(
    study: Study, records: Records, task: str, method: str, kind: str, rate: float,
    checkpoint: str = "last",
) -> list[dict[str, Any]] | None:  # fmt: skip
    """Return each seed's run of the settings that do best on the noisy labels of all seeds."""
    searches = [
        [records.get(key(s)) for s in search(study, task, method, kind, rate, seed)]
        for seed in range(study.seeds)
    ]
    complete = [runs for runs in zip(*searches, strict=True) if all(runs)]
    if len(complete) < study.configurations:
        return None
    return max(
        complete, key=lambda runs: math.fsum(score(r["result"], "noisy", checkpoint) for r in runs)
    )


def best_checkpoint(result: dict[str, Any], labels: str, checkpoint: str) -> int:
    """Return the checkpoint to keep; a run that diverged early has fewer of them, or none."""
    values = result[labels]
    return values.index(max(values)) if checkpoint == "best" and values else len(values) - 1


def score(result: dict[str, Any], labels: str, checkpoint: str, of: str | None = None) -> float:
    """Return an accuracy at the kept checkpoint: of ``labels`` themselves, or of ``test``, ...

    A run that diverged has no model at its end, so it counts as guessing, unless an earlier
    checkpoint is kept.
    """
    if not result[labels] or (result["diverged"] and checkpoint == "last"):
        return 0.5
    return float(result[of or labels][best_checkpoint(result, labels, checkpoint)])


def traces(study: Study, records: Records, task: str) -> Iterator[Spec]:
    """Do the runs chosen on noisy labels at the last checkpoint again, and watch their pairs."""
    noises = [noise for noise in study.noises if noise[1] in TRACED_RATES and study.traced]
    for seed, noise, method in itertools.product(range(study.seeds), noises, study.methods):
        chosen = choose(study, records, task, method, *noise, seed)
        if chosen:
            base = spec(study, "trace", task, method, *noise, seed)
            yield {**base, "settings": chosen["settings"]}


def ablations(study: Study, records: Records, task: str) -> Iterator[Spec]:
    """Change one thing in the settings chosen on noisy labels at the last checkpoint."""
    for seed, noise, method in itertools.product(
        range(study.ablation_seeds), study.ablation_noises, ABLATION_METHODS
    ):
        chosen = choose(study, records, task, method, *noise, seed)
        for change in itertools.chain(*(CHANGES[name] for name in study.changes)):
            if chosen:
                base = spec(study, "ablation", task, method, *noise, seed)
                yield {**base, "settings": chosen["settings"], "change": change}


def over_kappa(study: Study, records: Records, task: str) -> Iterator[Spec]:
    """Change κ alone, in γ-PO and in the loss that is matched to it."""
    noises = [noise for noise in KAPPA_NOISES if noise in study.noises]
    for seed, noise, (base, methods) in itertools.product(
        range(study.seeds), noises, KAPPA_METHODS.items()
    ):
        chosen = choose(study, records, task, base, *noise, seed)
        if not chosen:
            continue
        settings = {"lr": chosen["settings"]["lr"], "beta": chosen["settings"]["beta"]}
        settings["gamma0"] = KAPPA_GAMMA0
        if base == "simpo" and study.kappas:  # γ-PO's limit for a large tau
            limit = {**spec(study, "kappa", task, base, *noise, seed), "settings": settings.copy()}
            limit["settings"]["margin"] = limit["settings"].pop("gamma0")
            yield limit
        for kappa, method in itertools.product(study.kappas, methods):
            tau = float(f"{KAPPA_GAMMA0**2 / kappa:.6g}")
            yield {
                **spec(study, "kappa", task, method, *noise, seed),
                "settings": {**settings, "tau": tau},
            }


def blocks(study: Study, records: Records) -> Iterator[list[Spec]]:
    """Yield the runs in the order in which they are worth doing.

    A block is known in full only once those before it are in `records`.
    """
    yield [
        {"stage": "loop", "gamma0": gamma0, "tau": tau, "scale": 4.0, "seed": 0}
        for gamma0, tau in LOOPS
    ]
    yield [
        {"stage": "cost", "size": study.size, "device": study.device, "task": task, "seed": 0,
         "budget": study.cost_seconds}
        for task in sorted(study.tasks, key=list(reversed(TASKS)).index)
        if study.cost_seconds
    ]  # fmt: skip
    yield [
        {
            "stage": "reference",
            "size": study.size,
            "device": study.device,
            "task": task,
            "seed": seed,
        }
        for task, seed in itertools.product(study.tasks, range(study.seeds))
    ]
    for task in study.tasks:
        core = [method for method in CORE if method in study.methods]
        yield _searches(study, task, core, study.noises, "search")
        yield list(over_kappa(study, records, task))
    for noises in (UNIFORM[:3], UNIFORM[3:] + AMBIGUOUS, RATERS):
        for task in study.tasks:
            yield _searches(study, task, study.methods, noises, "search")
            yield list(traces(study, records, task))
            yield list(ablations(study, records, task))
    for task in study.tasks:
        yield _searches(study, task, CORE, study.calls, "search")
    for task in study.tasks * study.redrawn:
        yield _searches(study, task, CORE, [n for n in study.noises if n[1]], "redrawn")


def _searches(
    study: Study, task: str, methods: Iterable[str], noises: Iterable[tuple[str, float]], stage: str
) -> list[Spec]:
    noises = [noise for noise in noises if noise in study.noises + study.calls]
    cells = itertools.product(range(study.seeds), noises, methods)
    return [
        s for seed, noise, method in cells for s in search(study, task, method, *noise, seed, stage)
    ]


def expected(study: Study) -> dict[str, int]:
    """Return how many runs each task will have."""
    searched = len(study.noises) * study.configurations
    traced = sum(rate in TRACED_RATES for _, rate in study.noises) * study.traced
    changed = sum(len(CHANGES[name]) for name in study.changes)
    ablated = len(study.ablation_noises) * len(ABLATION_METHODS) * study.ablation_seeds
    swept = sum(noise in study.noises for noise in KAPPA_NOISES) * study.seeds
    swept *= bool(study.kappas) + len(study.kappas) * sum(map(len, KAPPA_METHODS.values()))
    noisy = sum(rate > 0 for _, rate in study.noises) * study.configurations
    anew = len(CORE) * study.seeds * noisy if study.redrawn else 0
    anew += len(CORE) * study.seeds * len(study.calls) * study.configurations
    count = (
        len(study.methods) * study.seeds * (searched + traced) + ablated * changed + swept + anew
    )
    return dict.fromkeys(study.tasks, count)

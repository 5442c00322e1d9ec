"""Run the study and write its report; see the package's docstring, or ``--help``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import _harness as harness
from benchmarks.noise_study import plan, report
from benchmarks.noise_study.plan import LARGE, QUICK, STUDIES, Records, Study, key
from benchmarks.noise_study.train import Spec, run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def results_file(study: str, folder: Path = RESULTS) -> Path:
    return folder / ("noise_study.jsonl" if study == "tasks" else f"noise_study_{study}.jsonl")


def read(path: Path) -> Records:
    """Read the finished runs; a last line that a kill left half written is none of them."""
    if not path.exists():
        return {}
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    records = (json.loads(line) for line in whole.splitlines())
    return {key(record): record for record in records}


def cut(path: Path) -> None:
    """Cut off a half-written last line."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def crew(workers: int) -> Iterator[Callable[[list[Spec]], Iterator[dict[str, Any]]]]:
    """Yield what does runs and yields their records as they come, in this or in new processes."""
    if workers == 1:
        yield lambda specs: map(run, specs)
        return
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield lambda specs: (
            f.result() for f in as_completed([executor.submit(run, s) for s in specs])
        )
    finally:  # runs that have begun are waited for, and done again by a later call
        executor.shutdown(cancel_futures=True)


class Estimate:
    """What is left to do, from the mean time of each task's runs so far."""

    def __init__(self, study: Study, records: Records) -> None:
        self.left = plan.expected(study)
        self.seconds: dict[str, list[float]] = {task: [] for task in self.left}
        for record in records.values():
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        if record["stage"] in ("search", "trace", "ablation", "kappa", "redrawn"):
            self.left[record["task"]] -= 1
            self.seconds[record["task"]].append(record["seconds"])

    def runs(self) -> int:
        return sum(max(0, count) for count in self.left.values())

    def hours(self, workers: int) -> str:
        known = {task: sum(s) / len(s) for task, s in self.seconds.items() if s}
        hours = sum(max(0, self.left[t]) * mean for t, mean in known.items()) / workers / 3600
        unknown = [task for task in self.left if task not in known]
        return f"{hours:.2f} h" + (f" and {', '.join(unknown)}" if unknown else "")


def carry_out(study: Study, path: Path, workers: int, hours: float) -> bool:
    """Append what is missing to the results file; return whether nothing is missing any more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut(path)
    records = read(path)
    estimate = Estimate(study, records)
    end = time.monotonic() + 3600 * hours
    bar = tqdm(desc="noise study", initial=len(records), total=len(records), unit="run",
               mininterval=1.0, smoothing=0.02)  # fmt: skip
    with bar, path.open("a", encoding="utf-8") as file, crew(workers) as do:
        for block in plan.blocks(study, records):
            for record in do([spec for spec in block if key(spec) not in records]):
                records[key(record)] = record = harness._finite(record)
                line = json.dumps(record, allow_nan=False, separators=(",", ":"))
                file.write(line + "\n")
                file.flush()
                estimate.add(record)
                bar.total = bar.n + 1 + estimate.runs()
                bar.update()
                bar.set_postfix_str(f"left: {estimate.hours(workers)}", refresh=False)
                if time.monotonic() > end:
                    return False
    return True


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise_study", description=__doc__.split(";")[0] + "."
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("all", "run", "report"), default="all")
    add("--quick", action="store_true", help="a reduced study that shows nothing but work")
    add("--workers", type=int, help="processes (default: 2, 1 with --quick, 8 on a GPU)")
    add("--hours", type=float, default=1e9, help="stop after this time; a later call goes on")
    add("--seeds", type=int, help="repetitions of everything (default: 5)")
    add(
        "--study",
        choices=tuple(STUDIES),
        default="tasks",
        help="raters: labels by real annotators; language: the same for a language model; each in "
        "a file of its own, and in need of a network once",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a larger model, fewer runs")
    add("--results", type=Path, help="the file that runs are appended to and reports read")
    add("--docs", type=Path, help="folder of reproduction.md and its figures")
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = 1 if args.quick else 8 if args.device == "cuda" else 2
    if args.workers < 1:
        parser.error(f"argument --workers: must be at least 1, got {args.workers}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    results, docs = RESULTS, ROOT / "docs"
    if args.quick:
        results = docs = Path(tempfile.mkdtemp())
    elif args.device == "cuda":  # the pages in docs/ are about what ran on a CPU
        results = docs = results / "noise_study_cuda"
    args.results = args.results or results_file(args.study, results)
    args.docs = args.docs or docs
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    study = STUDIES[args.study]
    if args.quick:
        study = QUICK
        if args.study != "tasks":
            like = STUDIES[args.study]
            study = study._replace(tasks=like.tasks, noises=like.noises, ablation_noises=())
    elif args.device == "cuda":
        study = LARGE if args.study == "tasks" else study._replace(size="large")
    study = study._replace(device=args.device, seeds=args.seeds or study.seeds)
    complete = True
    if args.command != "report":
        complete = carry_out(study, args.results, args.workers, args.hours)
        print(f"{'Complete' if complete else 'Stopped'}: {args.results}")
    if args.command != "run":
        report.write(study, read(args.results), args.docs, args.study)
        print(f"Report: {args.docs / 'reproduction.md'}")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())

"""Run the study and write its numbers; see the package's docstring, or ``--help``."""

from __future__ import annotations

import argparse
import bz2
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.noise_study import plan, report
from benchmarks.noise_study.outcomes import Results
from benchmarks.noise_study.plan import LARGE, QUICK, STUDIES, Records, Study, key
from benchmarks.noise_study.train import Spec, run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES = {name: f"noise_study_{name}.jsonl" for name in STUDIES} | {"tasks": "noise_study.jsonl"}


def packed(path: Path) -> Path:
    return path.with_name(path.name + ".bz2")


def read(path: Path) -> Records:
    """Read the finished runs: the packed ones, then those since, without a half-written line."""
    data = bz2.decompress(packed(path).read_bytes()) if packed(path).exists() else b""
    if path.exists():
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        data += whole + newline
    records = map(json.loads, data.splitlines())
    return {key(record): record for record in records}


def pack(path: Path) -> None:
    """Move the runs of a results file to the end of the compressed one."""
    with packed(path).open("ab") as file:
        file.write(bz2.compress(path.read_bytes()))
    path.unlink()


@contextmanager
def crew(workers: int) -> Iterator[Callable[[list[Spec]], Iterator[Any]]]:
    """Yield a function that does runs and yields their records, in this or in new processes."""
    if workers == 1:
        yield lambda specs: map(run, specs)
        return
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield lambda specs: executor.map(run, specs)
    finally:  # runs that have begun are waited for, and done again by a later call
        executor.shutdown(cancel_futures=True)


def carry_out(study: Study, path: Path, workers: int, hours: float) -> bool:
    """Append what is missing to the results file; return whether nothing is missing any more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read(path)
    end = time.monotonic() + 3600 * hours
    bar = tqdm(desc="noise study", initial=len(records), total=len(records), unit="run")
    with bar, path.open("ab+") as file, crew(workers) as do:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill left half written
        for block in plan.blocks(study, records):
            missing = [spec for spec in block if key(spec) not in records]
            bar.total += len(missing)  # blocks after this one are not known yet
            for record in do(missing):
                # Numbers that are not finite become null.
                record = json.loads(json.dumps(record), parse_constant=lambda _: None)
                records[key(record)] = record
                line = json.dumps(record, allow_nan=False, separators=(",", ":"))
                file.write(line.encode() + b"\n")
                file.flush()
                bar.update()
                if time.monotonic() > end:
                    return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_study", description=__doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=("all", "run", "report"), default="all")
    add("--quick", action="store_true", help="a reduced study that shows nothing but work")
    add("--workers", type=int, default=2, choices=range(1, 65), metavar="N", help="processes")
    add("--hours", type=float, default=1e9, help="stop after this time; a later call goes on")
    add("--seeds", type=int, help="repetitions of everything (default: 5)")
    which = "raters: labels by people; language: the same for a language model (need a network)"
    add("--study", choices=tuple(STUDIES), default="tasks", help=which)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a larger model, fewer runs")
    add("--results", type=Path, help="folder of the results files")
    add("--docs", type=Path, help="folder that the report is written to")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    other = Path(tempfile.mkdtemp()) if args.quick else RESULTS / "noise_study_cuda"
    usual = not args.quick and args.device == "cpu"  # which the pages in docs/ are about
    args.results = args.results or (RESULTS if usual else other)
    args.docs = args.docs or (ROOT / "docs" if usual else other)
    studies = {}
    for name, study in STUDIES.items():
        if args.quick:
            like = () if name == "tasks" else ("tasks", "noises", "calls", "ablation_noises")
            study = QUICK._replace(**{field: getattr(study, field) for field in like})
        elif args.device == "cuda":
            study = LARGE if name == "tasks" else study._replace(size="large")
        studies[name] = study._replace(device=args.device, seeds=args.seeds or study.seeds)
    path, complete = args.results / FILES[args.study], True
    if args.command != "report":
        workers = 1 if args.quick else args.workers
        complete = carry_out(studies[args.study], path, workers, args.hours)
        pack(path)
        print(f"{'Complete' if complete else 'Stopped'}: {packed(path)}")
    if args.command != "run":
        records = {name: read(args.results / file) for name, file in FILES.items()}
        report.write({n: Results(studies[n], r) for n, r in records.items() if r}, args.docs)
        print(f"Report: {args.docs / 'reproduction.md'}")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())

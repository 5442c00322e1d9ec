"""Does γ-PO help under label noise? A study in which every method gets the same chances.

python -m benchmarks.noise_study              # all runs, then all numbers
python -m benchmarks.noise_study --quick      # a smoke test, under a minute
python -m benchmarks.noise_study report       # all numbers, from the kept results alone
"""

from __future__ import annotations

import argparse
import bz2
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.noise_study import report
from benchmarks.noise_study.plan import STUDIES, Records, Runs, Study, key, quick
from benchmarks.noise_study.train import run

RESULTS = Path(__file__).parents[1] / "results"
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


def carry_out(study: Study, path: Path, workers: int, hours: float) -> bool:
    """Append what is missing to the results file; return whether nothing is missing any more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read(path)
    end = time.monotonic() + 3600 * hours
    bar = tqdm(desc="noise study", initial=len(records), total=len(records), unit="run")
    with bar, path.open("ab+") as file, ExitStack() as stack:
        do: Callable[..., Iterable[Any]] = map
        if workers > 1:
            executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            # Runs that have begun are waited for, and done again by a later call.
            stack.callback(executor.shutdown, cancel_futures=True)
            do = executor.map
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill left half written
        for block in Runs(study, records).blocks():
            missing = [spec for spec in block if key(spec) not in records]
            bar.total += len(missing)  # blocks after this one are not known yet
            for record in do(run, missing):
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
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_study", description=about)
    add = parser.add_argument
    add("command", nargs="?", choices=("all", "report"), default="all")
    add("--quick", action="store_true", help="a reduced study that shows nothing but work")
    add("--workers", type=int, default=2, choices=range(1, 65), metavar="N", help="processes")
    add("--hours", type=float, default=1e9, help="stop after this time; a later call goes on")
    which = "raters: labels by people; language: the same for a language model (need a network)"
    add("--study", choices=tuple(STUDIES), default="tasks", help=which)
    add("--results", type=Path, help="folder of the results files")
    add("--docs", type=Path, help="folder that the report is written to")
    args = parser.parse_args(argv)
    apart = Path(tempfile.mkdtemp()) if args.quick else None  # from the pages in docs/
    results, docs = args.results or apart or RESULTS, args.docs or apart or report.DOCS
    studies = {n: (quick(s) if args.quick else s) for n, s in STUDIES.items()}
    path, complete = results / FILES[args.study], True
    if args.command != "report":
        workers = 1 if args.quick else args.workers
        complete = carry_out(studies[args.study], path, workers, args.hours)
        with packed(path).open("ab") as file:
            file.write(bz2.compress(path.read_bytes()))
        path.unlink()
        print(f"{'Complete' if complete else 'Stopped'}: {packed(path)}")
    records = {name: read(results / file) for name, file in FILES.items()}
    report.write({n: Runs(studies[n], r) for n, r in records.items() if r}, docs)
    print(f"Report: {docs / 'reproduction.md'}")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())

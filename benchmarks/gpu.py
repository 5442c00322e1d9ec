"""Do the GPU tests pass, and what do the benchmarks measure there? All of it within 8 minutes.

    python -m benchmarks.gpu [--quick] [--out-dir benchmarks/results]
    python -m benchmarks.gpu --device cpu --quick --out-dir DIRECTORY    a rehearsal without a GPU

Runs ``pytest -m gpu`` and then each benchmark in a process of its own. Writes
``gpu_tests.txt`` and, for each benchmark, ``NAME_cuda.json``; time that runs short costs
repetitions, not sizes. The exit status is 0 only if everything ran and passed. The
rehearsal takes the same steps on the CPU, where the tests that need a GPU are skipped.
``--quick`` runs one file of the tests.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from benchmarks import _harness as harness

SECONDS = 470
# Each step's share of the time.
STEPS = {"gpu_tests": 150.0, "solver": 170.0, "loss": 70.0, "accuracy": 50.0, "logps": 30.0}
AIM = 0.75  # a benchmark aims at this part of its time: imports take some too
NO_TESTS = 5  # pytest's exit status if it finds none


def command(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """Return the command of one step."""
    if name == "gpu_tests":
        tests = "tests/test_logps.py" if args.quick else "tests"
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", tests]
    out = args.out_dir / f"{name}_{args.device}.json"
    line = [sys.executable, "-m", f"benchmarks.{name}", "--device", args.device, "--out", str(out)]
    return [*line, "--quick"] if args.quick else [*line, "--seconds", f"{AIM * seconds:.0f}"]


def run(name: str, args: argparse.Namespace, seconds: float) -> str:
    """Run one step and return how it went: "passed", or what is wrong."""
    log = args.out_dir / "gpu_tests.txt" if name == "gpu_tests" else None
    line = command(name, args, seconds)
    print(f"\n== {' '.join(line[1:])}", flush=True)
    try:
        with log.open("w", encoding="utf-8") if log else nullcontext() as file:
            errors = subprocess.STDOUT if log else None
            status = subprocess.run(line, timeout=seconds, stdout=file, stderr=errors).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    finally:
        if log:
            print(log.read_text(encoding="utf-8")[-3000:])
    if status == NO_TESTS and log and args.device == "cpu":
        return "passed (no tests for a GPU)"
    return "passed" if status == 0 else f"exit status {status}"


def main() -> int:
    """Run all steps; return the exit status."""
    args = harness.arguments(__doc__, SECONDS, folder=Path("benchmarks/results"))
    budget, rows = harness.Budget(args.seconds, STEPS.values()), []
    for name in STEPS:
        begin = time.perf_counter()
        outcome = run(name, args, budget.share())
        rows.append((name, time.perf_counter() - begin, outcome))
    print(f"\n== {harness.machine(args.device)['device']}")
    harness.table(["step", "seconds", "outcome"], rows)
    return 0 if all(outcome.startswith("passed") for _, _, outcome in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

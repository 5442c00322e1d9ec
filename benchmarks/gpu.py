"""Do the GPU tests pass, and what do the benchmarks measure there? All of it within 8 minutes.

    python -m benchmarks.gpu [--quick] [--out-dir benchmarks/results]
    python -m benchmarks.gpu --device cpu --quick --out-dir DIRECTORY    a rehearsal without a GPU

Runs ``pytest -m gpu`` and then each benchmark in a process of its own. Writes
``gpu_tests.txt`` and, for each benchmark, ``NAME_cuda.json`` and ``NAME_cuda.png``; time that runs
short costs repetitions, not sizes. The exit status is 0 only if everything ran and passed. The
rehearsal takes the same steps on the CPU, where the tests that need a GPU are skipped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import _harness as harness

SECONDS = 470.0
# Each step's share of the time. What one leaves, the next ones have.
STEPS = {
    "gpu_tests": 150.0,
    "margin_kernel": 150.0,
    "loss_overhead": 70.0,
    "accuracy": 50.0,
    "sequence_logps": 50.0,
}
AIM = 0.75  # a benchmark aims at this part of its time: imports and pictures take some too
NO_TESTS = 5  # pytest's exit status if it finds none


def command(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """Return the command of one step."""
    if name == "gpu_tests":
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    out = args.out_dir / f"{name}_{args.device}.json"
    line = [sys.executable, "-m", f"benchmarks.{name}", "--device", args.device, "--out", str(out)]
    return [*line, "--quick"] if args.quick else [*line, "--seconds", f"{AIM * seconds:.0f}"]


def run(name: str, args: argparse.Namespace, seconds: float) -> str:
    """Run one step and return how it went: "passed", or what is wrong."""
    log = args.out_dir / "gpu_tests.txt" if name == "gpu_tests" else None
    line = command(name, args, seconds)
    print(f"\n== {' '.join(line[1:])}", flush=True)
    try:
        if log is None:
            status = subprocess.run(line, timeout=seconds).returncode
        else:
            with log.open("w", encoding="utf-8") as file:
                status = subprocess.run(
                    line, timeout=seconds, stdout=file, stderr=subprocess.STDOUT
                ).returncode
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes and repetitions")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no CUDA device here, so there is nothing to measure. A rehearsal on the "
            "CPU: python -m benchmarks.gpu --device cpu --quick --out-dir DIRECTORY",
            file=sys.stderr,
        )
        return 1
    args.out_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = []
    later = sum(STEPS.values())
    for name, share in STEPS.items():
        begin = time.perf_counter()
        later -= share
        outcome = run(name, args, SECONDS - (begin - start) - later)
        rows.append((name, time.perf_counter() - begin, outcome))
    print(f"\n== {harness.machine(args.device)['device']}, {time.perf_counter() - start:.0f} s")
    harness.table(["step", "seconds", "outcome"], rows)
    return 0 if all(outcome.startswith("passed") for _, _, outcome in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

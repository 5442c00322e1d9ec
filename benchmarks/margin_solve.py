"""How fast is an eager margin solve on one CPU thread, against the published algorithm?

    python -m benchmarks.margin_solve [--quick] [--out FILE.json]

Every solver gets the same pools in the same process, ten calls of each in turn, so that a slow
moment of the machine hits all of them; ratios are of medians. The error beside a time is against
the margins that the library finds in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.published import published_margins
from gamma_loss import PUBLISHED_SETTINGS, __version__, solve_margins

SIZES = (8, 256, 2048, 16384, 65536)
OUTSIDE = {"outside: γ0 = 20, τ = 2": {"gamma0": 20.0, "tau": 2.0}}
QUANTILES = (0.1, 0.5, 0.9)
CALLS = 10


def solvers(gaps: torch.Tensor, gamma0: float, tau: float) -> dict[str, object]:
    """The peer first, then the library on torch and on NumPy, on the same numbers."""
    array = gaps.numpy()
    return {
        "published": lambda: published_margins(gaps, gamma0, tau),
        "torch eager": lambda: solve_margins(gaps, gamma0=gamma0, tau=tau).margins,
        "numpy": lambda: solve_margins(array, gamma0=gamma0, tau=tau).margins,
    }


def measure(size: int, dtype: torch.dtype, gamma0: float, tau: float, seconds: float) -> dict:
    """Time the solvers in turn on one pool."""
    gaps = torch.tensor(np.random.default_rng(size).normal(size=size) * 2, dtype=dtype)
    exact = solve_margins(gaps.double(), gamma0=gamma0, tau=tau).margins
    times: dict[str, list[float]] = {}
    errors = {}
    calls = solvers(gaps, gamma0, tau)
    for name, call in calls.items():
        for _ in range(3):
            margins = torch.as_tensor(call()).double()
        errors[name] = float(((margins - exact).abs() / (gamma0 + exact)).max())
        times[name] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["numpy"]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS)
    return {
        name: {
            "microseconds": dict(
                zip(map(str, QUANTILES), (1e6 * np.quantile(t, QUANTILES)).round(1), strict=True)
            ),
            "times_as_fast_as_published": round(
                float(np.median(times["published"]) / np.median(t)), 2
            ),
            "error": errors[name],
            "calls": CALLS * len(t),
        }
        for name, t in times.items()
    }


def processor() -> str:
    """Name the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Run every combination, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and calls")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    llama = "llama-3-8b-instruct"
    settings = {name: dict(setting) for name, setting in PUBLISHED_SETTINGS.items()}
    plan = [(llama, size, dtype) for size in SIZES for dtype in (torch.float32, torch.float64)]
    plan += [(name, 256, torch.float32) for name in settings if name != llama]
    plan += [(name, 256, torch.float32) for name in OUTSIDE]
    settings |= OUTSIDE
    if args.quick:
        plan = [(llama, 256, torch.float32), (llama, 2048, torch.float64)]

    results = []
    for name, size, dtype in tqdm(plan, desc="margin_solve"):
        setting = {key: settings[name][key] for key in ("gamma0", "tau")}
        timed = measure(size, dtype, **setting, seconds=0.3 if args.quick else 3.0)
        results.append(
            {"setting": name, "gaps": size, "dtype": str(dtype).split(".")[1], "solvers": timed}
        )
    print(
        f"{'setting':26}{'gaps':>7}  {'dtype':8}{'solver':12}{'median µs':>10}{'ratio':>8}  error"
    )
    for row in results:
        for name, timed in row["solvers"].items():
            print(
                f"{row['setting']:26}{row['gaps']:7}  {row['dtype']:8}{name:12}"
                f"{timed['microseconds']['0.5']:10.0f}{timed['times_as_fast_as_published']:8.1f}"
                f"  {timed['error']:.0e}"
            )
    if args.out:
        machine = {
            "device": f"{processor()}, one thread",
            "versions": {
                "gamma_loss": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "command": "python -m benchmarks.margin_solve" + " --quick" * args.quick,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(machine | {"results": results}, indent=1, ensure_ascii=False)
        args.out.write_text(text + "\n")
        print(f"Results: {args.out}")


if __name__ == "__main__":
    main()

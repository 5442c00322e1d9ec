"""What the benchmarks share: arguments, timing in turns, counting launches, tables and files."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gamma_loss import __version__, solve_margins

Call = Callable[[], Any]

IMPLEMENTATIONS = ("eager", "auto", "compile", "triton")
QUANTILES = (0.1, 0.5, 0.9)
BLOCK = 10  # calls of one solver in a row, before the next one has its turn
LEAST = 5  # turns, however little time there is


# --- the command line and the machine ---


def arguments(doc: str, seconds: float) -> argparse.Namespace:
    """Read the command line that all benchmarks have, and set up torch for it.

    ``seconds`` is the default of ``--seconds``, which buys repetitions; sizes are never dropped.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes and repetitions")
    parser.add_argument(
        "--out", type=Path, help="write the results to this .json file, and a .png beside it"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"aim to take this long in all, by more or fewer repetitions (default {seconds:g})",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    if args.out and args.out.suffix != ".json":
        parser.error(f"--out must name a .json file, got {args.out}")
    if args.seconds is None:
        args.seconds = 5.0 if args.quick else seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return args


def processor() -> str:
    """Name the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """Return what a reader needs to know of where a result comes from."""
    host = f"{processor()}, one thread"
    versions = {"gamma_loss": __version__, "torch": torch.__version__}
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            versions["triton"] = version(name)
            break
        except PackageNotFoundError:
            continue
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    if device == "cuda":
        versions["cuda"] = torch.version.cuda or f"HIP {torch.version.hip}"
    module = Path(sys.argv[0]).stem
    return {
        "device": f"{torch.cuda.get_device_name()}, host {host}" if device == "cuda" else host,
        "versions": versions,
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
    }


def implementations(device: str, interpret: bool = False) -> tuple[list[str], dict[str, str]]:
    """Return the implementations that run here, and the others with the reason why they do not.

    ``interpret`` takes Triton's interpreter on the CPU as running (if it is on): its numbers tell
    something, its times do not.
    """
    usable, skipped = [], {}
    gaps = torch.tensor([-1.0, 0.5, 2.0], device=device)
    for impl in IMPLEMENTATIONS:
        if impl == "auto" and device == "cuda":
            continue  # it is "triton" there, which would be timed twice
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if impl == "triton" and device == "cpu" and not (interpret and interpreted):
            skipped[impl] = "needs a CUDA device" + (
                "; its interpreter is not timed" if interpreted else ""
            )
            continue
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                solve_margins(gaps, gamma0=1.0, tau=1.0, impl=impl)
        except Exception as error:
            skipped[impl] = reason(error)
            continue
        # Without a working Triton the library warns and runs eager: that is not to be timed as it.
        about = [str(w.message) for w in caught if "eager" in str(w.message)]
        if about:
            skipped[impl] = about[0]
        else:
            usable.append(impl)
    for impl, why in skipped.items():
        print(f"Left out: {impl} ({why})")
    return usable, skipped


def reason(error: BaseException) -> str:
    """Return an exception's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def fresh_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape, in one graph, whatever has been compiled before.

    Compiled code belongs to a code object, and one has room for few shapes: so each gets its own.
    """
    copy = type(function)(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(copy, fullgraph=True, dynamic=False)


# --- time ---


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Budget:
    """Shares out the time of a benchmark: what one item does not use is there for the next."""

    def __init__(self, seconds: float, items: int) -> None:
        self.end, self.items = time.perf_counter() + seconds, items

    def left(self) -> float:
        return max(self.end - time.perf_counter(), 0.0)

    def share(self) -> float:
        """Return the seconds that the next item may take."""
        self.items -= 1
        return self.left() / (self.items + 1)


def warm_up(
    calls: dict[str, Call], device: str, skipped: dict[str, str], times: int = 3
) -> dict[str, Any]:
    """Run each call, drop those that fail with the reason, and return the first results."""
    results = {}
    for name in list(calls):
        try:
            results[name] = calls[name]()
            for _ in range(times - 1):
                calls[name]()
            synchronise(device)
        except Exception as error:
            skipped[name] = reason(error)
            print(f"Left out: {name} ({skipped[name]})")
            del calls[name]
            results.pop(name, None)
    return results


def in_turns(
    calls: dict[str, Call], seconds: float, device: str, least: int = LEAST
) -> dict[str, dict[str, list[float]]]:
    """Time calls in turns, so that a slow moment of the machine hits all of them.

    Each turn is a block of up to `BLOCK` calls (fewer of a slow one), between two waits for the
    device. Returns for each name the seconds of a call in each turn: ``wall`` until the device was
    done, ``host`` until the last call returned (on a CPU the same).
    """
    times: dict[str, dict[str, list[float]]] = {n: {"wall": [], "host": []} for n in calls}
    blocks = dict.fromkeys(calls, 1)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turns = -1  # the first turn only finds out how long a block should be
        while turns < least or time.perf_counter() < end:
            for name, call in calls.items():
                synchronise(device)
                start = time.perf_counter()
                for _ in range(blocks[name]):
                    call()
                returned = time.perf_counter()
                synchronise(device)
                done = time.perf_counter()
                if turns < 0:
                    blocks[name] = min(BLOCK, max(1, int(2e-2 / (done - start))))
                else:
                    times[name]["wall"].append((done - start) / blocks[name])
                    times[name]["host"].append((returned - start) / blocks[name])
            turns += 1
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return times


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the 10 %, 50 % and 90 % quantiles in microseconds."""
    values = 1e6 * np.quantile(seconds, QUANTILES)
    return {str(q): round(float(v), 3) for q, v in zip(QUANTILES, values, strict=True)}


def times_as_fast(seconds: Sequence[float], peer: Sequence[float]) -> float:
    """Return the peer's median time over this one's."""
    return float(np.median(peer) / np.median(seconds))


def launches(call: Call, device: str, calls: int = 10) -> dict[str, Any]:
    """Count what one call hands out, by torch's profiler (which may slow down what runs after it).

    On CUDA ``kernels``, ``copies`` (memory copies and fills) and ``device_microseconds``: the time
    that both together keep the device busy, without the gaps between them. On the CPU
    ``operators``: dispatched by torch, those that another operator dispatches not counted; a kernel
    that Inductor made is no operator.
    """
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    synchronise(device)
    with profile(activities=[activity]) as profiler:
        for _ in range(calls):
            call()
        synchronise(device)
    if device == "cpu":
        aten = [e for e in profiler.events() if e.name.startswith("aten::")]
        outer = [e for e in aten if not (e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]
        return {"operators": round(len(outer) / calls, 2)}
    events = [
        event
        for event in profiler.events()
        if str(event.device_type).endswith("CUDA")
        and not getattr(event, "is_user_annotation", False)
    ]
    if not events:  # no permission for the hardware's counters, for example
        return {}
    copies = [e for e in events if e.name.startswith(("Memcpy", "Memset"))]
    busy = sum(event.time_range.elapsed_us() for event in events)
    return {
        "kernels": round((len(events) - len(copies)) / calls, 2),
        "copies": round(len(copies) / calls, 2),
        "device_microseconds": round(busy / calls, 3),
    }


def graph_replay(call: Call) -> Call:
    """Capture a call in a CUDA graph, and return the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


# --- results ---


def progress(items: Iterable[Any], name: str) -> Iterator[Any]:
    """Show a progress bar over the items."""
    return iter(tqdm(items, desc=name))


def write(out: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON, numbers that are not finite as null."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False)
    out.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows in aligned columns, numbers with three digits and None as a dash."""
    texts = [list(columns), *([_text(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    for row in texts:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-2 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.1e}"


@contextmanager
def picture(out: Path | None, panels: int = 1) -> Iterator[list[Any] | None]:
    """Yield the axes of a figure that is saved beside the JSON file, or None if there is none."""
    if out is None:
        yield None
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(2 + 4.5 * panels, 4.5), squeeze=False)
    yield list(axes[0])
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=150)
    plt.close(figure)
    print(f"Results: {out}, {out.with_suffix('.png')}")


# One colour for each name in every picture.
COLOURS = {
    "eager": "tab:blue",
    "auto": "tab:purple",
    "compile": "tab:green",
    "triton": "tab:red",
    "numpy": "tab:cyan",
    "published": "tab:orange",
    "published, compiled": "tab:brown",
}

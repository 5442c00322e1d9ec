"""What the benchmarks share: the skeleton of a run, timing in turns, counting, tables and files."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gamma_loss import PUBLISHED_SETTINGS, __version__, solve_margins

Call = Callable[[], Any]
Result = dict[str, Any]

QUANTILES = (0.1, 0.5, 0.9)
BLOCK = 10  # calls of one solver in a row, before the next one has its turn
LEAST = 5  # turns, however little time there is


# --- the problems ---

LLAMA = "llama-3-8b-instruct"
MILD = {
    name: {key: setting[key] for key in ("gamma0", "tau")}
    for name, setting in PUBLISHED_SETTINGS.items()
}
HARD = {
    f"γ0 = {gamma0:g}, τ = {tau:g}": {"gamma0": float(gamma0), "tau": tau}
    for gamma0, tau in ((3, 0.5), (4, 0.1), (8, 0.05), (50, 1.0))
}
SETTINGS = MILD | HARD


def pool(setting: dict[str, float], size: int, seed: int | None = None) -> np.ndarray:
    """Return gaps around 0, or for a hard setting around γ0, where its margins differ most."""
    values = np.random.default_rng(size if seed is None else seed).normal(size=size)
    gamma0 = setting["gamma0"]
    return gamma0 + max(gamma0 / 3, 1) * values if setting in HARD.values() else 2 * values


# --- the skeleton of a run ---


class Section(NamedTuple):
    """A list in a results file: what is measured, how, and how it is shown."""

    cases: Callable[[argparse.Namespace], Iterable[tuple[Any, ...]]]
    measure: Callable[..., Iterable[Result]]  # of the arguments, some seconds, and a case
    columns: Sequence[str]
    rows: Callable[[list[Result]], Iterable[Sequence[Any]]]
    share: float = 1.0  # of the time, beside those of other sections


def run(
    doc: str,
    seconds: float,
    sections: dict[str, Section],
    draw: Callable[[Result, list[Any]], None] | None = None,
    panels: int = 1,
    packages: Sequence[str] = (),
    **facts: Any,
) -> None:
    """Read the command line, measure all cases, write the results, show tables, draw.

    ``facts`` and the versions of ``packages`` go into the record as well.
    """
    args = arguments(doc, seconds)
    plan, shares = [], []
    for name, section in sections.items():
        cases = list(section.cases(args))
        plan += [(name, case) for case in cases]
        shares += [section.share / len(cases) for _ in cases]
    record = machine(args.device, packages) | facts | {"left_out": args.left_out}
    record |= {name: [] for name in sections}
    budget = Budget(args.seconds, shares)
    for name, case in tqdm(plan, disable=None):  # a bar on terminals only
        record[name] += sections[name].measure(args, budget.share(), *case)
        write(args.out, record)  # each time, so that an interrupted run leaves something
    for call in args.later:
        call()
    write(args.out, record)
    for name, why in args.left_out.items():
        print(f"Left out: {name} ({why})")
    for name, section in sections.items():
        if record[name]:
            print(f"\n{name.replace('_', ' ')}")
            table(section.columns, section.rows(record[name]))
    if draw and args.out:
        picture(args.out, record, draw, panels)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Say in one line what is wrong."""
        self.exit(2, f"{self.prog}: {message}\n")


def arguments(doc: str, seconds: float, folder: Path | None = None) -> argparse.Namespace:
    """Read the command line that all benchmarks have, and set up torch for it.

    ``seconds`` is the default of ``--seconds``, which buys repetitions; sizes are never dropped.
    With a ``folder`` results go there by default, and the device is a GPU.
    """
    has_cuda = torch.cuda.is_available()
    parser = Parser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}", description=doc.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few sizes and repetitions")
    if folder:
        parser.add_argument("--out-dir", type=Path, default=folder, help="write all results here")
    else:
        parser.add_argument(
            "--out", type=Path, help="write to this .json file, and an .svg beside it"
        )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if has_cuda or folder else "cpu",
        help="default: cuda" + " where there is one" * (not folder),
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"aim to take this long in all, by more or fewer repetitions (default {seconds:g})",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda, but torch finds no CUDA device")
    if args.seconds is None:
        args.seconds = 5.0 if args.quick and not folder else seconds
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds must be positive and finite, got {args.seconds:g}")
    out = args.out_dir / "gpu_tests.txt" if folder else args.out
    if out:
        if not folder and out.suffix != ".json":
            parser.error(f"--out must name a .json file, got {out}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
        except OSError as error:
            parser.error(f"can't write results: {error}")
    args.left_out, args.later = {}, []  # what does not run here, and what may wait until the end
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


def machine(device: str, packages: Sequence[str] = ()) -> Result:
    """Return what a reader needs to know of where a result comes from."""
    host = f"{processor()}, one thread"
    versions = {"gamma_loss": __version__, "torch": torch.__version__}
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", *packages):
        try:
            versions["triton" if "triton" in name else name] = version(name)
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


def implementations(args: argparse.Namespace, interpret: bool = False) -> list[str]:
    """Return the implementations that run here, but for "auto", which is one of them.

    ``interpret`` takes Triton's interpreter on the CPU as running (if it is on): its numbers tell
    something, its times do not.
    """
    usable = []
    gaps = torch.tensor([-1.0, 0.5, 2.0], device=args.device)
    for impl in ("eager", "compile", "triton"):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if impl == "triton" and args.device == "cpu" and not (interpret and interpreted):
            reasons = ["needs a CUDA device" + "; its interpreter is not timed" * interpreted]
        else:
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    solve_margins(gaps, gamma0=1.0, tau=1.0, impl=impl)
                # Without a working Triton it warns and runs eager: not to be timed as Triton.
                reasons = [str(w.message) for w in caught if "eager" in str(w.message)]
            except Exception as error:
                reasons = [reason(error)]
        if reasons:
            args.left_out[impl] = reasons[0]
        else:
            usable.append(impl)
    return usable


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

    def __init__(self, seconds: float, shares: Sequence[float]) -> None:
        self.end, self.shares = time.perf_counter() + seconds, list(shares)

    def share(self) -> float:
        """Return the seconds that the next item may take."""
        left, total = max(self.end - time.perf_counter(), 0.0), sum(self.shares)
        return left * self.shares.pop(0) / total


def compare(
    args: argparse.Namespace,
    calls: dict[str, Call],
    seconds: float,
    peers: Sequence[str] = (),
    warm: int = 3,
    least: int = LEAST,
) -> tuple[dict[str, Result], dict[str, Any]]:
    """Time calls in turns; return times and speeds against peers, and the first results."""
    started = time.perf_counter()
    results = warm_up(calls, args.device, args.left_out, warm)
    left = max(seconds - (time.perf_counter() - started), 0.2)
    times = in_turns(calls, left, args.device, least)
    rows: dict[str, Result] = {}
    for name, t in times.items():
        rows[name] = {"microseconds": quantiles(t["wall"]), "turns": len(t["wall"])}
        if args.device == "cuda":
            rows[name]["host_microseconds"] = quantiles(t["host"])
        for peer in set(peers) & set(times):
            ratio = times_as_fast(t["wall"], times[peer]["wall"])
            rows[name][speed_key(peer)] = ratio
    return rows, results


def speed_key(peer: str) -> str:
    return "times_as_fast_as_" + peer.lower().replace(",", "").replace(" ", "_")


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
            del calls[name]
            results.pop(name, None)
    return results


def in_turns(
    calls: dict[str, Call], seconds: float, device: str, least: int = LEAST
) -> dict[str, dict[str, list[float]]]:
    """Time calls in turns, so that a slow moment of the machine hits all of them.

    Each turn is a block of up to `BLOCK` calls (fewer of a slow one), between two waits for the
    device. Turns come in an order drawn anew each time, and a block after a call that is not timed:
    else a time would depend on who had the caches before. Returns for each name the seconds of a
    call in each turn: ``wall`` until the device was done, ``host`` until the last call returned (on
    a CPU the same).
    """
    times: dict[str, dict[str, list[float]]] = {n: {"wall": [], "host": []} for n in calls}
    blocks, order = dict.fromkeys(calls, 1), random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turns = -1  # the first turn only finds out how long a block should be
        while turns < least or time.perf_counter() < end:
            for name, call in order.sample(list(calls.items()), len(calls)):
                if blocks[name] > 1:  # a slow call fills the caches itself
                    call()
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


def launches(call: Call, calls: int = 10) -> Result:
    """Count what one call hands to the GPU, by torch's profiler, which may slow down what follows.

    ``kernels``, ``copies`` (memory copies and fills) and ``device_microseconds``: the time that
    both together keep the device busy, without the gaps between them.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
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


@contextmanager
def watched(place: Any, name: str, see: Callable[[tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Have ``see(arguments, result)`` told of each call of a function of a module."""
    function = getattr(place, name)

    def told(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        see(arguments, result)
        return result

    setattr(place, name, told)
    try:
        yield
    finally:
        setattr(place, name, function)


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


def write(out: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON, numbers that are not finite as null."""
    if out is None:
        return
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


def picture(out: Path, record: Result, draw: Callable[..., None], panels: int) -> None:
    """Draw a figure and save it beside the JSON file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "γ"})  # text stays text
    figure, axes = plt.subplots(1, panels, figsize=(2 + 4.5 * panels, 4.5), squeeze=False)
    draw(record, list(axes[0]))
    figure.tight_layout()
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    print(f"Results: {out}, {out.with_suffix('.svg')}")


def bars(axis: Any, labels: Sequence[str], heights: dict[str, Sequence[float | None]]) -> None:
    """Draw a group of bars for each label, one bar for each name."""
    for i, (name, values) in enumerate(heights.items()):
        width = 1 / (len(heights) + 1)
        places = np.arange(len(labels)) + (i - (len(heights) - 1) / 2) * width
        axis.bar(places, [value or 0 for value in values], width, label=name)
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.legend(fontsize=7)


# One colour for each name in every picture.
COLOURS = {
    "eager": "tab:blue",
    "auto": "tab:purple",
    "compile": "tab:green",
    "triton": "tab:red",
    "numpy": "tab:cyan",
    "jax": "tab:olive",
    "published": "tab:orange",
    "published, compiled": "tab:brown",
}

"""What the benchmarks share: the skeleton of a run, the ways to solve, timing, counting, files."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from gamma_loss import PUBLISHED_SETTINGS, __version__, solve_margins
from gamma_loss._backend import get_backend
from gamma_loss._pool import solve_eagerly

Call = Callable[[], Any]
Result = dict[str, Any]

QUANTILES = (0.1, 0.5, 0.9)
STATES = ("hot", "cold")
LEAST, MOST = 5, 1000  # turns, however little or much time there is


# --- the problems ---

LLAMA = "llama-3-8b-instruct"
MILD = {LLAMA: {key: PUBLISHED_SETTINGS[LLAMA][key] for key in ("gamma0", "tau")}}
HARD = {
    f"γ0 = {gamma0:g}, τ = {tau:g}": {"gamma0": gamma0, "tau": tau}
    for gamma0, tau in ((3.0, 0.5), (4.0, 0.1), (8.0, 0.05))
}
SETTINGS = MILD | HARD


def pool(name: str, size: int, seed: int | None = None) -> np.ndarray:
    """Return gaps around 0, or for a hard setting around γ0, where its margins differ most."""
    values = np.random.default_rng(size if seed is None else seed).normal(size=size)
    gamma0 = SETTINGS[name]["gamma0"]
    return gamma0 + max(gamma0 / 3, 1) * values if name in HARD else 2 * values


# --- the ways to solve ---


class Way(NamedTuple):
    """How an implementation takes a NumPy array, and solves: (array, gamma0=, tau=) -> solution."""

    array: Callable[[np.ndarray], Any]
    solve: Callable[..., Any]


def _by_torch(gaps: torch.Tensor, gamma0: float, tau: float) -> Any:
    return solve_eagerly(get_backend(gaps), gaps, None, gamma0, tau)


def ways(args: argparse.Namespace, interpret: bool = False) -> dict[str, Way]:
    """Return the implementations that run here; why others do not is kept in ``args.left_out``.

    "auto" is NumPy on a view of a CPU tensor, "eager" torch's own operations. ``interpret`` takes
    Triton's interpreter on the CPU, if it is on: its results tell something, its times do not.
    """
    tensor = functools.partial(torch.tensor, device=args.device)
    found = {"eager": Way(tensor, _by_torch)}
    for impl in ("auto", "compile", "triton"):
        found[impl] = Way(tensor, functools.partial(solve_margins, impl=impl))
    if args.quick:
        args.left_out["compile"] = "it takes too long for --quick"
        del found["compile"]
    if args.device == "cpu":
        found["numpy"] = Way(np.asarray, solve_margins)
        if not (interpret and os.environ.get("TRITON_INTERPRET") == "1"):
            args.left_out["triton"] = "it needs a GPU; its interpreter is not timed"
            del found["triton"]
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
        try:
            import jax
        except ImportError as error:
            args.left_out["jax"] = reason(error)
        else:
            jax.config.update("jax_enable_x64", True)
            found["jax"] = Way(jax.numpy.asarray, solve_margins)
    for name, way in list(found.items()):
        try:
            with warnings.catch_warnings():
                # Without a working Triton it warns and solves eagerly: not to be timed as Triton.
                warnings.filterwarnings("error", "Triton can't be used")
                way.solve(way.array(np.array([-1.0, 0.5, 2.0])), gamma0=1.0, tau=1.0)
        except Exception as error:
            args.left_out[name] = reason(error)
            del found[name]
    return found


def reason(error: BaseException) -> str:
    """Return an exception's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def fresh_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape, in one graph, whatever has been compiled before.

    Compiled code belongs to a code object, and one has room for few shapes: so each gets its own.
    """
    f = function
    copy = type(f)(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False)


# --- the skeleton of a run ---


class Section(NamedTuple):
    """A list in a results file: what is measured, how, and how it is shown."""

    cases: Callable[[argparse.Namespace], Iterable[tuple[Any, ...]]]
    measure: Callable[..., Iterable[Result]]  # of the arguments, some seconds, and a case
    columns: Sequence[str]
    rows: Callable[[list[Result]], Iterable[Sequence[Any]]]
    share: float = 1.0  # of the time, beside those of other sections


def run(
    doc: str, seconds: float, sections: dict[str, Section], packages: Sequence[str] = (),
    **facts: Any,
) -> None:  # fmt: skip
    """Read the command line, measure all cases, write the results, show tables.

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
        parser.add_argument("--out", type=Path, help="write to this .json file")
    default = "cuda" if has_cuda or folder else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default, help="default: cuda if there is one"
    )
    aim = f"aim to take this long in all, by more or fewer repetitions (default {seconds:g})"
    parser.add_argument("--seconds", type=float, help=aim)
    args = parser.parse_args()
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda, but torch finds no CUDA device")
    if args.seconds is None:
        args.seconds = 1.0 if args.quick and not folder else seconds
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
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
    args: argparse.Namespace, calls: dict[str, Call], seconds: float, warm: int = 3,
    least: int = LEAST,
) -> tuple[dict[str, Result], dict[str, Any]]:  # fmt: skip
    """Time calls against each other; return their quantiles in microseconds, and first results."""
    started = time.perf_counter()
    results = warm_up(calls, args.device, args.left_out, warm)
    left = max(seconds - (time.perf_counter() - started), 0.2)
    times = in_turns(calls, left, args.device, least)
    rows = {
        name: {key: quantiles(each) for key, each in found.items()} | {"turns": len(found["hot"])}
        for name, found in times.items()
    }
    return rows, results


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


def training_step(device: str) -> Call:
    """Return a step of a small network, which leaves the caches as a training loop does."""
    network = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to(device)
    optimizer, batch = torch.optim.Adam(network.parameters()), torch.randn(64, 256, device=device)

    def step() -> None:
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()

    return step


def in_turns(
    calls: dict[str, Call], seconds: float, device: str, least: int = LEAST
) -> dict[str, dict[str, list[float]]]:
    """Time calls one by one, in an order drawn anew for each turn.

    Each name has a call in two states: ``hot``, right after a call of the same, and ``cold``, right
    after a training step of a small network; neither of these is timed. On a CPU the seconds are
    the processor's, so that other work beside takes nothing away; on a GPU those of the clock until
    the device is done, and ``host`` has those until a hot call returned.
    """
    on_gpu = device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    own = float(np.median([-clock() + clock() for _ in range(1000)]))  # what the clock itself takes
    step, order = training_step(device), random.Random(0)
    todo = [(name, state) for name in calls for state in STATES]
    times: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in (*STATES, *["host"] * on_gpu)} for name in calls
    }
    collecting = gc.isenabled()
    gc.disable()
    try:
        end, turn = time.perf_counter() + seconds, 0
        while turn < least or (turn < MOST and time.perf_counter() < end):
            for name, state in order.sample(todo, len(todo)):
                call = calls[name]
                (call if state == "hot" else step)()
                synchronise(device)
                start = clock()
                call()
                done = clock()
                if on_gpu:
                    if state == "hot":
                        times[name]["host"].append(done - start)
                    synchronise(device)
                    done = clock()
                times[name][state].append(max(done - start - own, 0.0))
            turn += 1
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return times


def quantiles(seconds: Sequence[float]) -> list[float]:
    """Return the 10 %, 50 % and 90 % quantiles in microseconds."""
    return [float(value) for value in 1e6 * np.quantile(seconds, QUANTILES)]


def speed(rows: dict[str, Result], name: str, peer: str, state: str = "hot") -> float | None:
    """Return how many times as fast as its peer a call is, by their medians."""
    return rows[peer][state][1] / rows[name][state][1] if peer in rows else None


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
        "kernels": (len(events) - len(copies)) / calls,
        "copies": len(copies) / calls,
        "device_microseconds": busy / calls,
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


def write(out: Path | None, record: Result) -> None:
    """Write a record as JSON, a line for each result, five digits, null for no finite number."""
    if out is None:
        return
    rounded = json.loads(
        json.dumps(record),
        parse_float=lambda number: float(f"{float(number):.5g}"),
        parse_constant=lambda _: None,  # NaN and infinities
    )
    fields = []
    for key, value in rounded.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = [json.dumps(each, ensure_ascii=False, allow_nan=False) for each in value]
            text = "[\n  " + ",\n  ".join(lines) + "\n ]"
        fields.append(f" {json.dumps(key, ensure_ascii=False)}: {text}")
    out.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows in aligned columns, numbers with three digits and None as a dash."""
    texts = [list(columns), *([_text(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    for row in texts:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if value == 0 or 1e-2 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.1e}"

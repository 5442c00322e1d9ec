"""``impl="compile"``: the solver as programs that Inductor compiles, one for each kind of pool.

torch.export traces the solver with sizes as symbols and γ0 and a as tensors, so that neither a
schedule nor another batch size compiles anew. AOTInductor compiles the result, and its loader is
called directly: a call costs some 2 µs, where torch.compile's own costs 20. torch.compile takes the
program where AOTInductor fails. Outside mild settings there are three programs: to begin, to take a
step, which is called as often as needed, and to end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch._inductor.codecache
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from gamma_loss import _backend, _pool, _solver
from gamma_loss._backend import get_backend
from gamma_loss._comm import LOCAL

_SIZE = 1000  # gaps of an example: the loops of a program for fewer are not vectorised
Program: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
_MODULES = _backend, _pool, _solver, sys.modules[__name__]
_SOURCES = b"".join(Path(str(module.__file__)).read_bytes() for module in _MODULES)
_programs: dict[tuple[Any, ...], Program] = {}
_lock = threading.RLock()  # held while a program is compiled; calls need none


def solve(
    xp: Any, gaps: Tensor, weights: Tensor | None, gamma0: float, tau: float
) -> _solver.Solution:
    """Return margins, ν and the error bound of a pool of two or more gaps."""
    arrays = [each.contiguous() for each in (gaps, weights) if each is not None]
    settings = _scalars(gaps.dtype, gaps.device, gamma0, gamma0 / tau)
    passes = _solver.mild_passes(gamma0, tau, gaps.dtype == torch.float64)
    if passes:
        found, nu, bound = _run(_mild, passes, [*arrays, *settings])
        return found, nu, bound
    if weights is None:
        arrays.append(torch.ones_like(arrays[0]))
    problem = _run(_init, None, [*arrays, *settings])
    problem, state = problem[:-3], problem[-3:]
    state = xp.repeat_until(
        lambda state: state[-1], lambda state: _run(_step, None, [*problem, *state]), state,
        _solver.MAX_ITER,
    )  # fmt: skip
    found, nu, bound = _run(_terminate, None, [arrays[0], *problem, *state])
    return found, nu, bound


@functools.lru_cache
@torch.inference_mode(mode=False)
def _scalars(dtype: torch.dtype, device: torch.device, *values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=dtype, device=device) for value in values]


# --- the programs ---


def _mild(passes: int, gaps: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    *weights, gamma0, a = others
    xp = get_backend(gaps)
    pool, counts, lost = _pool.finite_pool(xp, gaps, weights[0] if weights else None)
    found, nu, bound = _solver.solve_mild(xp, pool, counts, gamma0, a, passes, LOCAL)
    return found + lost, nu, bound


def _init(_: None, gaps: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    *weights, gamma0, a = others
    xp = get_backend(gaps)
    pool, counts, _ = _pool.finite_pool(xp, gaps, weights[0] if weights else None)
    problem, state = _solver.init(xp, pool, counts, gamma0, a, LOCAL)
    return (*problem.pairs, problem.weights, problem.total, *_flat(state))


def _step(_: None, *arrays: Tensor) -> tuple[Tensor, ...]:
    problem, state = _unflat(*arrays)
    return _flat(_solver.flat_step(get_backend(arrays[0]), problem, state))


def _terminate(_: None, gaps: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
    found, nu, bound = _solver.terminate(get_backend(gaps), *_unflat(*arrays))
    return found + (gaps - gaps), nu, bound


def _flat(state: _solver.State) -> tuple[Tensor, ...]:
    u, dual, error, converged, largest = state
    return u, torch.stack([*dual, error, largest])[None], converged  # a call pays for each tensor


def _unflat(*arrays: Tensor) -> tuple[_solver.Problem, _solver.State]:
    gaps, gamma0, a, u_max, weights, total, u, numbers, converged = arrays
    pairs = _solver.Pairs(gaps, gamma0, a, u_max)
    *dual, error, largest = numbers[0].unbind()
    state = _solver.State(u, _solver.Dual(*dual), error, converged, largest)
    return _solver.Problem(pairs, weights, total, a, LOCAL), state


# --- their compilation ---


def _run(function: Callable[..., Any], constant: Any, arrays: list[Tensor]) -> list[Tensor]:
    """Call a function's program for tensors of this kind."""
    key = function, constant, len(arrays), arrays[0].dtype, arrays[0].device
    program = _programs.get(key)
    if program is None:
        with _lock:
            if key not in _programs:
                _programs[key] = _build(function, constant, arrays)
        program = _programs[key]
    return program(arrays)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any], constant: Any) -> None:
        super().__init__()
        self.function, self.constant = function, constant

    def forward(self, arrays: list[Tensor]) -> Any:
        return self.function(self.constant, *arrays)


def _build(function: Callable[..., Any], constant: Any, arrays: list[Tensor]) -> Program:
    """Load a program that an earlier process has kept, or compile it."""
    path = _path(function.__name__, constant, len(arrays), arrays[0])
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of torch about itself
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(arrays[0].device.type, enabled=False))
        if not path.exists():
            exported = _export(function, constant, arrays)
            try:
                _compile(exported, path)
            except Exception:  # such as a device that AOTInductor doesn't know
                program = torch.compile(exported.module(), fullgraph=True, dynamic=True)
                return functools.partial(_run_locked, program)
        return torch._inductor.aoti_load_package(str(path)).loader.run


def _export(function: Callable[..., Any], constant: Any, arrays: list[Tensor]) -> Any:
    size = torch.export.Dim("size", min=2)
    examples = [each.new_ones(_SIZE if each.ndim == 1 else each.shape) for each in arrays]
    shapes = [{0: size} if each.ndim == 1 else None for each in arrays]
    module = _Module(function, constant)
    return torch.export.export(module, (examples,), dynamic_shapes=(shapes,), strict=False)


def _compile(exported: Any, path: Path) -> None:
    """Compile a program into a package that appears at ``path`` whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = f"{folder}/{path.name}"
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        os.replace(package, path)


def _path(name: str, constant: Any, count: int, like: Tensor) -> Path:
    """Return where Inductor's cache keeps a package: another source or machine has another path."""
    device = torch.backends.cpu.get_cpu_capability()
    if like.device.type != "cpu":
        device = torch.get_device_module(like.device).get_device_name(like.device)
    facts = [torch.__version__, platform.node(), device, name, constant, count, like.dtype]
    digest = hashlib.sha256(repr([*facts, like.device]).encode() + _SOURCES).hexdigest()
    return Path(cache_dir(), "gamma_loss", f"{digest}.pt2")


def _run_locked(program: Program, arrays: list[Tensor]) -> list[Tensor]:
    """Call a program of torch.compile: Dynamo's state is not one thread's."""
    with _lock:
        return program(arrays)

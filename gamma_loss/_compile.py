"""``impl="compile"``: the solver as programs that Inductor compiles, one for each kind of pool.

torch.export traces the solver with sizes as symbols and γ0 and a as tensors, so that neither a
schedule nor another batch size compiles anew. AOTInductor compiles the result, and its loader is
called directly: a call costs some 2 µs, where torch.compile's own costs 20. Outside mild settings
the program has loops of its own, which torch 2.6 cannot export: there the solve is eager.
"""

from __future__ import annotations

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

_SIZE = 1000  # gaps of an example: the loops of a program for fewer are not vectorised
_MODULES = _backend, _pool, _solver, sys.modules[__name__]
_SOURCES = b"".join(Path(str(module.__file__)).read_bytes() for module in _MODULES)
Program: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
_programs: dict[tuple[Any, ...], Program | None] = {}
_lock = threading.RLock()  # held while a program is compiled; calls need none


def solve(
    xp: Any, gaps: Tensor, weights: Tensor | None, gamma0: float, tau: float
) -> _solver.Solution:
    """Return margins, ν and the error bound of a pool of two or more gaps."""
    program, settings = _program(weights is not None, gaps.dtype, gaps.device, gamma0, tau)
    if program is None:
        return _pool.solve_eagerly(xp, gaps, weights, gamma0, tau)
    arrays = [gaps.contiguous(), *settings]
    if weights is not None:
        arrays.append(weights.contiguous())
    found, nu, bound = program(arrays)
    return found, nu, bound


@functools.lru_cache
@torch.inference_mode(mode=False)
def _program(
    has_weights: bool, dtype: torch.dtype, device: torch.device, gamma0: float, tau: float
) -> tuple[Program | None, list[Tensor]]:
    """Return the program for a kind of pool, and its arguments γ0 and a."""
    passes = _solver.mild_passes(gamma0, tau, dtype == torch.float64)
    settings = [torch.tensor(each, dtype=dtype, device=device) for each in (gamma0, gamma0 / tau)]
    key = passes, has_weights, dtype, device
    with _lock:
        if key not in _programs:
            ones = settings[0].new_ones(_SIZE)
            _programs[key] = _load(passes, [ones, *settings, *[1 * ones] * has_weights])
        return _programs[key], settings


class _Module(torch.nn.Module):
    """A solve of a pool, with a fixed number of passes in mild settings, else 0."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes

    def forward(self, arrays: list[Tensor]) -> Any:
        gaps, gamma0, a, *others = arrays
        xp = get_backend(gaps)
        weights, lost = _pool.finite_pool(xp, gaps, others[0] if others else None)
        found, nu, bound = _solver.newton(xp, gaps, weights, gamma0, a, self.passes)
        return found + lost, nu, bound


def _load(passes: int, examples: list[Tensor]) -> Program | None:
    """Load a program that an earlier process has kept, or compile it; None where that fails."""
    path = _path(passes, len(examples), examples[0])
    no_autocast = torch.autocast(examples[0].device.type, enabled=False)
    try:
        with torch.no_grad(), no_autocast, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            if not path.exists():
                _compile(_export(passes, examples), path)
            program: Program = torch._inductor.aoti_load_package(str(path)).loader.run
    except Exception as error:  # such as no C++ compiler, or a device that Inductor does not know
        warnings.warn(
            "Inductor cannot compile this solve, so gamma_loss solves eagerly: "
            + f"{type(error).__name__}: {error}".partition("\n")[0],
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return program


def _export(passes: int, examples: list[Tensor]) -> Any:
    size = torch.export.Dim("size", min=2)
    shapes = [{0: size} if each.ndim else None for each in examples]
    return torch.export.export(_Module(passes), (examples,), dynamic_shapes=(shapes,), strict=False)


def _compile(exported: Any, path: Path) -> None:
    """Compile a program into a package that appears at ``path`` whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = f"{folder}/{path.name}"
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        os.replace(package, path)


def _path(passes: int, count: int, like: Tensor) -> Path:
    """Return where Inductor's cache keeps a package: another source or machine has another path."""
    device = torch.backends.cpu.get_cpu_capability()
    if like.device.type != "cpu":
        device = torch.get_device_module(like.device).get_device_name(like.device)
    facts = [torch.__version__, platform.node(), device, passes, count, like.dtype]
    digest = hashlib.sha256(repr([*facts, like.device]).encode() + _SOURCES).hexdigest()
    return Path(cache_dir(), "gamma_loss", f"{digest}.pt2")

"""Torch: the choice of an implementation, and ``gamma_loss::solve``, which a graph leaves whole.

The operator launches Triton's kernel where it can, and solves eagerly elsewhere.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _pool, _solver
from gamma_loss._backend import get_backend
from gamma_loss._settings import LossSettings

_without_triton: set[str] = set()  # types of device on which Triton cannot run
NUMPY_LIMIT = 2**16  # gaps up to which NumPy is faster than torch with several threads
_PLAIN = torch.Tensor, torch.nn.Parameter  # of which NumPy sees all


def choose(
    xp: Any, gaps: Tensor, inputs: _pool.PoolInputs, settings: LossSettings
) -> Callable[..., Any]:
    """Return the solver that ``impl`` stands for: the rule is in `_settings.DOCS`."""
    impl, gamma0, tau = settings.impl, settings.gamma0, settings.tau
    kernels = impl == "triton" or (impl == "auto" and gaps.device.type in ("cuda", "xpu"))
    if gamma0 and kernels and launcher(gaps.device):
        return functools.partial(solve, kernel=True)
    if xp.is_traced:
        is_mild = gamma0 == 0 or _solver.mild_passes(gamma0, tau, is_double=True) > 0
        return _pool.solve_eagerly if is_mild else solve
    if type(gaps) not in _PLAIN:
        return _pool.solve_eagerly
    size = gaps.shape[0] + (0 if inputs.context is None else inputs.context.shape[0])
    if impl == "compile" and gamma0 and size > 1:
        from gamma_loss import _compile

        return _compile.solve
    if not xp.is_host:
        return _pool.solve_eagerly
    few = size <= NUMPY_LIMIT or torch.get_num_threads() == 1
    return solve_via_numpy if few else _pool.solve_eagerly


def solve_via_numpy(
    gaps: Tensor, inputs: _pool.PoolInputs, gamma0: float, tau: float
) -> _solver.Solution:
    """Solve by NumPy on views of CPU tensors: an operation costs a third of torch's."""
    view = gaps.numpy(force=True)
    if inputs is not _pool.NO_INPUTS:
        inputs = _pool.PoolInputs(
            *(None if each is None else each.numpy(force=True) for each in inputs)
        )
    xp = get_backend(view)
    found, nu, bound = _pool.solve_in(_pool.solve_eagerly, xp, view, inputs, gamma0, tau)
    return torch.from_numpy(found), torch.from_numpy(nu), torch.from_numpy(bound)


def launcher(device: torch.device) -> ModuleType | None:
    """Return the module that launches kernels, or None with a warning, the first time."""
    if device.type in _without_triton:
        return None
    try:
        from gamma_loss.kernels import launch
    except Exception as error:  # not installed, too old, no driver, or no C compiler
        reason = f"{type(error).__name__}: {error}"
    else:
        if device.type != "cpu" or launch.INTERPRETED:
            return launch
        reason = "it has no kernels for the CPU"
    _without_triton.add(device.type)
    warnings.warn(
        f"Triton can't be used on {device.type}, gamma_loss solves eagerly there: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def solve(
    xp: Any, gaps: Tensor, weights: Tensor | None, gamma0: float, tau: float, kernel: bool = False
) -> _solver.Solution:
    """Return margins, ν and the error bound, in a graph as one operator.

    ``kernel=True`` launches Triton's kernel also on a CPU, where it is interpreted.
    """
    run = _operator if xp.is_traced else _solve_pool  # the operator costs the host as much again
    found, numbers = run(gaps, weights, gamma0, tau, kernel)
    nu, bound = numbers.unbind()
    return found, nu, bound


def _solve_pool(
    gaps: Tensor, weights: Tensor | None, gamma0: float, tau: float, kernel: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel, or solve eagerly."""
    on_device = gaps.device.type in ("cuda", "xpu")
    kernels = launcher(gaps.device) if kernel or on_device else None
    if kernels and kernels.fits(gaps, gamma0, tau):
        found, numbers = kernels.solve(gaps, weights, gamma0, tau)
        return found, numbers
    if gaps.device.type == "cpu":
        inputs = _pool.NO_INPUTS if weights is None else _pool.PoolInputs(weights=weights)
        found, *rest = solve_via_numpy(gaps, inputs, gamma0, tau)
    else:
        found, *rest = _pool.solve_eagerly(get_backend(gaps), gaps, weights, gamma0, tau)
    return found, torch.stack(rest)


_operator = torch.library.custom_op("gamma_loss::solve", _solve_pool, mutates_args=())


@_operator.register_fake
def _(gaps: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gaps), gaps.new_empty(2)


@_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """Let torch.vmap make one call for each pool."""
    rows = [
        _operator(*(
            each if dim is None else each.select(dim, i)
            for each, dim in zip(arguments, in_dims, strict=True)
        ))
        for i in range(info.batch_size)
    ]  # fmt: skip
    found, numbers = zip(*rows, strict=True)
    return (torch.stack(found), torch.stack(numbers)), (0, 0)

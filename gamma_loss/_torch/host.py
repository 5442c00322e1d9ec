"""Torch tensors on the CPU, by NumPy on views: a call of it takes the host a third of the time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gamma_loss import _pool
from gamma_loss._arrays import is_free_to_read, quiet
from gamma_loss._loss import GammaLossAux, Logps, LossSettings, array_loss, slopes_of
from gamma_loss._pool import Beside, Problem, Solution
from gamma_loss._spread import WHOLE
from gamma_loss._torch.gradient import with_slopes

LIMIT = 2**16  # beyond it torch's operations are faster, if they have threads to share among
_PLAIN = torch.Tensor, torch.nn.Parameter  # of which NumPy sees all


def can_take(gaps: Tensor, size: int) -> bool:
    """Whether a pool of a size is one to solve here."""
    if type(gaps) not in _PLAIN or not is_free_to_read(gaps):
        return False
    return size <= LIMIT or torch.get_num_threads() == 1


def solve(gaps: Tensor, problem: Problem) -> Solution:
    """Return margins, ν and the certificate."""
    margins, *numbers = _pool.solve(_view(gaps), _viewed(problem))
    nu, certificate = (_tensor(each, margins.dtype) for each in numbers)
    return _tensor(margins, margins.dtype), nu, certificate


def loss(logps: Logps, problem: Problem, settings: LossSettings) -> tuple[Tensor, GammaLossAux]:
    """Return a loss and what it knows."""
    viewed, arrays = _viewed(problem), Logps(*map(_view, logps))
    with quiet(arrays.chosen):
        value, aux = array_loss(
            arrays,
            viewed.beside.mask,
            settings,
            solve=lambda gaps: _pool.solve(gaps, viewed),
            spread=WHOLE,
        )
    dtype = aux.margins.dtype
    slopes = _tensor(slopes_of(aux, viewed.beside.mask, settings), dtype)
    numbers = [_tensor(each, dtype) for each in aux[:-1]]
    known = GammaLossAux._make([*numbers, _tensor(aux.mask, bool)])
    return with_slopes(_tensor(value, dtype), slopes, known, logps, settings), known


def _viewed(problem: Problem) -> Problem:
    return problem._replace(beside=Beside(*map(_view, problem.beside)))


def _view(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.numpy(force=True)


def _tensor(array: Any, dtype: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=dtype))

"""The queue of recent reward gaps as part of a training run's state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.types import Device

from gamma_loss import _checks
from gamma_loss.queue import QueueState, queue_init, queue_push

_DTYPES = (torch.float32, torch.float64)
_lock = threading.Lock()  # gaps and mask of a queue belong together


def _locked() -> AbstractContextManager[Any]:
    """Keep other threads out; in a graph there are none."""
    return nullcontext() if torch.compiler.is_compiling() else _lock


class GapQueue(torch.nn.Module):
    """The last `capacity` reward gaps, first in first out, as buffers of a module.

    It starts empty, has fixed shapes and never reads a value on the host: CUDA graphs and
    ``torch.compile(fullgraph=True)`` take it as it is. The buffers are in the ``state_dict``, move
    with ``.to()``, and stay float32 or float64 when the module is cast to half precision.
    ``load_state_dict`` keeps the newest gaps that fit of a queue of another capacity.

    Parameters
    ----------
    capacity : int
        How many gaps are kept, >= 1.
    dtype : torch.float32 or torch.float64
    device : torch.device or str, optional

    Attributes
    ----------
    gaps, mask : Tensor, shape (capacity,)
        As in `QueueState`. Two queues with the same gaps are equal, since a push moves the gaps up.

    Raises
    ------
    TypeError, ValueError
        For a capacity that is no integer >= 1, or another dtype.

    Notes
    -----
    The published implementation keeps 2,048 gaps on each rank and draws a pool of at most 256 from
    them (Algorithm 2 of arXiv:2506.03690), as `sample` does. Here the losses solve over all.

    Examples
    --------
    >>> queue = GapQueue(capacity=3)
    >>> queue.push(torch.tensor([1.0, torch.nan, 2.0]))
    >>> queue.context()
    QueueState(gaps=tensor([0., 1., 2.]), mask=tensor([False,  True,  True]))
    """

    gaps: torch.Tensor
    mask: torch.Tensor

    def __init__(
        self, capacity: int = 2048, *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype}")
        empty = queue_init(torch.empty(0, dtype=dtype, device=device), capacity)
        self.register_buffer("gaps", empty.gaps)
        self.register_buffer("mask", empty.mask)

    @property
    def capacity(self) -> int:
        """How many gaps the queue can hold."""
        return self.gaps.shape[0]

    def push(self, gaps: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Append gaps in place, but for those that are not finite or whose mask is False."""
        with _locked():
            state = queue_push(QueueState(self.gaps, self.mask), gaps, mask)
            # The mask last: the old mask is right for the new gaps too, if this ends in between.
            self.gaps.copy_(state.gaps)
            self.mask.copy_(state.mask)

    def context(self) -> QueueState:
        """Return copies of ``(gaps, mask)``: a loss's `context` and `context_mask`."""
        with _locked():
            return QueueState(self.gaps.clone(), self.mask.clone())

    def sample(self, k: int, *, generator: torch.Generator | None = None) -> QueueState:
        """Return k of the stored gaps, each at most once and all equally likely.

        The mask is False for the last entries if fewer than k gaps are stored. A generator on the
        queue's device draws the same gaps again in the same state. A k that is no integer between 1
        and the capacity is a TypeError or ValueError.
        """
        k = _checks.whole_number("k", k, least=1)
        if k > self.capacity:
            raise ValueError(f"k must be at most the capacity, {self.capacity}, got {k}")
        keys = torch.rand(self.capacity, device=self.gaps.device, generator=generator)
        idx = torch.topk(torch.where(self.mask, keys, -1.0), k).indices
        return QueueState(self.gaps[idx], self.mask[idx])

    def extra_repr(self) -> str:  # noqa: D102
        return f"capacity={self.capacity}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GapQueue:
        before = self.gaps
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.gaps.dtype not in _DTYPES:  # half() and its like: moved, not cast
            self.gaps = before.to(self.gaps.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = prefix + "gaps", prefix + "mask"
        saved, mask = map(state_dict.get, names)
        if saved is not None and mask is not None:
            try:  # to push them: dtype and capacity may be others, or a gap not finite
                empty = queue_init(saved.new_empty(0, dtype=self.gaps.dtype), self.capacity)
                state_dict |= zip(names, queue_push(empty, saved, mask), strict=True)
            except (TypeError, ValueError) as error:
                rest[-1].append(f"{prefix or 'the queue: '}{error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

"""A queue of recent reward gaps as a value: pure functions on arrays of any library."""

from __future__ import annotations

from typing import NamedTuple

from gamma_loss import _checks
from gamma_loss._backend import Array


class QueueState(NamedTuple):
    """The last gaps that were pushed, in arrays of fixed shape: a loss's `context`.

    Attributes
    ----------
    gaps : array, shape (capacity,)
        In reward units, the oldest first and the newest last. Empty slots come first, and are 0.
    mask : boolean array, shape (capacity,)
        True for the filled slots.
    """

    gaps: Array
    mask: Array


def queue_init(like: Array, capacity: int = 2048) -> QueueState:
    """Return an empty queue.

    Parameters
    ----------
    like : array
        An array of the library, device and dtype of the queue; half precision becomes float32. A
        TypeError if it has no real floats.
    capacity : int
        How many gaps the queue holds, >= 1. A TypeError or ValueError otherwise.

    Returns
    -------
    QueueState

    Examples
    --------
    >>> import numpy as np
    >>> queue_init(np.zeros(0), capacity=3)
    QueueState(gaps=array([0., 0., 0.]), mask=array([False, False, False]))
    """
    capacity = _checks.whole_number("capacity", capacity, least=1)
    xp, (like,) = _checks.floats(like=like)
    gaps = xp.zeros(capacity, dtype=like.dtype, device=xp.device(like))
    return QueueState(gaps, xp.zeros_like(gaps, dtype=xp.bool))


def queue_push(state: QueueState, gaps: Array, mask: Array | None = None) -> QueueState:
    """Return the queue with a batch of gaps behind it, without its oldest where it is full.

    The shapes are fixed, and no value is read on the host. Errors are those of `solve_margins`.

    Parameters
    ----------
    state : QueueState
    gaps : array, shape (pairs,)
        In reward units, the newest last; may be empty. A gap that is not finite in the queue's
        dtype is not stored.
    mask : boolean array, shape (pairs,), optional
        True for the gaps to store.

    Returns
    -------
    QueueState
        Constants for automatic differentiation.

    Examples
    --------
    >>> import numpy as np
    >>> queue_push(queue_init(np.zeros(0), capacity=3), np.array([1.0, np.nan, 2.0]))
    QueueState(gaps=array([0., 1., 2.]), mask=array([False,  True,  True]))
    """
    if not hasattr(state, "mask"):
        raise TypeError(f"state must be a QueueState, got {type(state).__name__}")
    xp, (queued, values) = _checks.floats(**{"state.gaps": state.gaps, "gaps": gaps})
    _checks.pairs(**{"state.gaps": queued})
    _checks.mask("state.mask", state.mask, "state.gaps", queued, xp)
    _checks.pairs(True, gaps=values)
    values = xp.astype(xp.detach(values), queued.dtype)
    keep = xp.isfinite(values)
    if mask is not None:
        _checks.mask("mask", mask, "gaps", values, xp)
        keep = keep & mask

    # A stable sort puts the gaps that are kept last, in their order.
    filled = xp.concat([state.mask, keep])
    everything = xp.concat([queued, xp.where(keep, values, xp.zeros_like(values))])
    order = xp.argsort(xp.astype(filled, xp.int8), stable=True)[-queued.shape[0] :]
    return QueueState(xp.take(everything, order, axis=0), xp.take(filled, order, axis=0))

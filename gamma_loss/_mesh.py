"""One margin problem over the devices of a mesh axis, inside JAX's shard_map.

The counterpart of `gamma_loss.torch.distributed` for JAX arrays: the same two ways, chosen by the
same limit. All devices run one program on shards of one shape, so nothing has to be agreed on
first, and no shape depends on a value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gamma_loss import _newton
from gamma_loss._arrays import Array
from gamma_loss._newton import GATHER_LIMIT


def solve(
    gaps: Array, in_pool: Array, gamma0: float, tau: float, axis: Any
) -> tuple[Array, Array, Array]:
    """Return the margins of this device's gaps, ν and the residual of the pool of all devices."""
    devices = _devices(axis)
    pairs = gaps.shape[0]
    if not pairs:  # one gap that is left out stands for an empty batch, and has a minimum
        gaps, in_pool = jnp.zeros(1, gaps.dtype), jnp.zeros(1, bool)
    kept = jax.lax.psum(jnp.sum(in_pool), axis)
    inside = (in_pool | (kept == 0)).astype(gaps.dtype)
    if gaps.shape[0] * devices <= GATHER_LIMIT:
        everything = jax.lax.all_gather(jnp.stack([gaps, inside]), axis, axis=1, tiled=True)
        margins, *certificate = _newton.solve(everything[0], everything[1], gamma0, tau)
        start = jax.lax.axis_index(axis) * gaps.shape[0]
        margins = jax.lax.dynamic_slice_in_dim(margins, start, gaps.shape[0])
    else:
        margins, *certificate = _newton.solve(gaps, inside, gamma0, tau, _OverAxis(axis))
    # All devices have found the same two numbers; this has shard_map know that they are.
    multiplier, residual = jax.lax.pmax(jnp.stack(certificate), axis)
    return margins[:pairs], multiplier, residual


def mean(total: Array, count: Array, axis: Any) -> tuple[Array, Array]:
    """Return numerator and denominator whose ratio averages, over devices, to the whole mean."""
    return total * _devices(axis), jax.lax.psum(count, axis)


class _OverAxis(_newton.Whole):
    """Sums and extremes over a pool of which each device holds a part."""

    def __init__(self, axis: str) -> None:
        self.axis = axis

    def sums(self, *parts: Array) -> tuple[Array, ...]:
        return tuple(jax.lax.psum(jnp.stack(parts), self.axis))

    def extremes(self, least: Array, largest: Array) -> tuple[Array, ...]:
        both = jax.lax.pmax(jnp.stack([-least, largest]), self.axis)
        return -both[0], both[1]


def _devices(axis: Any) -> int:
    """Return how many devices are along the axis."""
    if not isinstance(axis, str):
        raise TypeError(
            f"group must be the name of a mesh axis for JAX arrays, got {type(axis).__name__}"
        )
    return int(jax.lax.psum(1, axis))  # of a constant: known while tracing

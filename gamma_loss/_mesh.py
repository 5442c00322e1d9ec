"""A pool over the devices of a mesh axis, inside JAX's shard_map.

All devices run one program on shards of one shape, so nothing has to be agreed on first, and no
shape depends on a value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gamma_loss._arrays import Array


class Devices:
    """The devices along an axis, each with a shard of the gaps."""

    def __init__(self, axis: Any) -> None:
        if not isinstance(axis, str):
            raise TypeError(
                f"group must be the name of a mesh axis for JAX arrays, got {type(axis).__name__}"
            )
        self.axis = axis
        self.parts = int(jax.lax.psum(1, axis))  # of a constant: known while tracing

    def sums(self, *parts: Array) -> tuple[Array, ...]:
        """Return the sums over all devices."""
        return tuple(jax.lax.psum(jnp.stack(parts), self.axis))

    def extremes(self, least: Array, largest: Array) -> tuple[Array, Array]:
        """Return the minimum and maximum over all devices."""
        both = jax.lax.pmax(jnp.stack([-least, largest]), self.axis)
        return -both[0], both[1]

    def size(self, gaps: Array, **_: Any) -> int:
        """Return how many gaps there are; one program has one dtype and one setting."""
        self.shard = gaps.shape[0]
        return int(self.shard * self.parts)

    def gather(self, values: Array) -> Array:
        """Return all shards, one after the other."""
        return jax.lax.all_gather(values, self.axis, tiled=True)

    def own(self, values: Array) -> Array:
        """Return this device's shard."""
        start = jax.lax.axis_index(self.axis) * self.shard
        return jax.lax.dynamic_slice_in_dim(values, start, self.shard)

    def agreed(self, *numbers: Array) -> tuple[Array, ...]:
        """Have shard_map know that all devices have found the same."""
        return tuple(jax.lax.pmax(jnp.stack(numbers), self.axis))

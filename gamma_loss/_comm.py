"""The two reductions that a distributed pool needs, over ranks or over the devices of a mesh."""

from __future__ import annotations

from typing import Any

from gamma_loss._backend import Array

# The largest pool whose shards are gathered; of larger ones sums are reduced (docs/benchmarks.md).
GATHER_LIMIT = 2**17


class Comm:
    """The members of a group that share one pool, each with a shard of the gaps; here one alone."""

    size = 1

    def all_reduce_sum(self, *values: Array) -> tuple[Array, ...]:
        """Return the sums over all members."""
        return values

    def all_reduce_max(self, *values: Array) -> tuple[Array, ...]:
        """Return the maxima over all members."""
        return values

    def pool_size(self, gaps: Array, **settings: Any) -> int:
        """Return how many gaps all members have, once all agree on dtype and settings."""
        return int(gaps.shape[0] * self.size)  # on a mesh one program has the settings of all

    def all_gather(self, values: Array) -> Array:
        """Return the values of all members along the last axis, one shard after the other."""
        return values

    def local_shard(self, values: Array) -> Array:
        """Return this member's shard of gathered values."""
        return values

    def mark_replicated(self, *values: Array) -> tuple[Array, ...]:
        """Return numbers that all members have computed alike, for a compiler that cannot know."""
        return values


LOCAL = Comm()


class MeshAxisComm(Comm):
    """The devices along a mesh axis, inside JAX's shard_map, each with a shard of one size."""

    def __init__(self, axis: Any) -> None:
        if not isinstance(axis, str):
            raise TypeError(
                f"group must be the name of a mesh axis for JAX arrays, got {type(axis).__name__}"
            )
        import jax

        self.jax, self.axis = jax, axis
        self.size = int(jax.lax.psum(1, axis))  # of a constant: known while tracing

    def all_reduce_sum(self, *values: Array) -> tuple[Array, ...]:
        return tuple(self.jax.lax.psum(self.jax.numpy.stack(values), self.axis))

    def all_reduce_max(self, *values: Array) -> tuple[Array, ...]:
        return tuple(self.jax.lax.pmax(self.jax.numpy.stack(values), self.axis))

    mark_replicated = all_reduce_max

    def all_gather(self, values: Array) -> Array:
        return self.jax.lax.all_gather(values, self.axis, axis=values.ndim - 1, tiled=True)

    def local_shard(self, values: Array) -> Array:
        size = values.shape[0] // self.size
        start = self.jax.lax.axis_index(self.axis) * size
        return self.jax.lax.dynamic_slice_in_dim(values, start, size)


def as_comm(group: Any, gaps: Array, xp: Any, impl: str, /, **settings: Any) -> Comm | None:
    """Return the reductions over a group, whose members have to agree on the settings."""
    if xp.library != "torch" and impl in ("compile", "triton"):
        raise ValueError(f"impl={impl!r} needs torch tensors, got {type(gaps).__module__} arrays")
    if group is None:
        return None
    if impl not in ("auto", "eager"):
        raise ValueError(f"impl must be 'auto' or 'eager' with a group, got {impl!r}")
    if xp.library == "jax":
        return MeshAxisComm(group)
    if xp.library != "torch":
        raise TypeError(f"a group takes torch tensors, got {type(gaps).__name__}")
    return ranks_of(group, **settings)  # type: ignore[no-any-return]


def ranks_of(group: Any, /, **settings: Any) -> Any:
    """Return the reductions over a torch.distributed group."""
    from gamma_loss._ranks import ProcessGroupComm

    return ProcessGroupComm(group, **settings)


def broadcast_error(group: Any, error: Exception, numbers: int = 1) -> None:
    """Tell the other ranks of a group, which wait for so many numbers, of an error."""
    if hasattr(group, "rank"):  # of torch.distributed; all devices of a mesh run one program
        ranks_of(group).exchange(*[0] * numbers, failed=error)

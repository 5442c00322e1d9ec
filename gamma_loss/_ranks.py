"""The reductions over the ranks of a torch.distributed group.

Every rank issues the same collectives in the same order, whatever its gaps and masks are. The first
one also tells whether all ranks have the same settings, and whether one has failed: then all raise.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo


class ProcessGroupComm:
    """The ranks of a group, each with gaps of its own or none: a `gamma_loss._comm.Comm`."""

    def __init__(self, group: Any, **settings: Any) -> None:
        if isinstance(group, ProcessGroupComm):
            group, settings = group.group, group.settings | settings
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
            )
        self.group: Any = group
        self.settings: dict[str, Any] = settings
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sizes: list[int] = []

    def all_reduce_sum(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stacked = torch.stack(values)
        dist.all_reduce(stacked, group=self.group)
        return stacked.unbind()

    def all_reduce_max(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stacked = torch.stack(values)
        dist.all_reduce(stacked, dist.ReduceOp.MAX, group=self.group)
        return stacked.unbind()

    @_disable_dynamo  # Dynamo cannot read a group; torch.compiler.disable would import it
    def exchange(self, *numbers: float, failed: Exception | None = None) -> list[list[float]]:
        """Return the numbers of each rank, once all have the same settings and none has failed."""
        digest = -1 if failed else zlib.crc32(repr(sorted(self.settings.items())).encode())
        device = min(self.group._device_types, key=lambda device: device.type != "cpu")
        header = torch.tensor([*numbers, digest], dtype=torch.float64, device=device)
        headers = [torch.empty_like(header) for _ in range(self.size)]
        dist.all_gather(headers, header, group=self.group)
        rows = torch.stack(headers).tolist()
        if any(row[-1] != digest or failed for row in rows):
            gathered: list[Any] = [None] * self.size
            local = f"{type(failed).__name__}: {failed}" if failed else self.settings
            dist.all_gather_object(gathered, local, group=self.group)
            if not failed:
                _explain(gathered)
        return [row[:-1] for row in rows]

    def pool_size(self, gaps: torch.Tensor, **settings: Any) -> int:
        self.settings |= settings | {"dtype": str(gaps.dtype)}
        self.sizes = [int(size) for (size,) in self.exchange(gaps.shape[0])]
        return sum(self.sizes)

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values, (0, max(self.sizes) - values.shape[-1]))
        shards = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(shards, padded, group=self.group)
        sizes = zip(shards, self.sizes, strict=True)
        return torch.cat([shard[..., :size] for shard, size in sizes], -1)

    def local_shard(self, values: torch.Tensor) -> torch.Tensor:
        return values.split_with_sizes(self.sizes)[self.rank]

    def mark_replicated(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values

    def chunk(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's equal share of values that every rank holds."""
        return values.tensor_split(self.size)[self.rank]


def _explain(gathered: list[Any]) -> None:
    """Raise an error for the first rank that failed, or all settings that are not rank 0's."""
    for rank, said in enumerate(gathered):
        if isinstance(said, str):
            raise RuntimeError(f"rank {rank} of the group failed: {said}")
    first: dict[str, Any] = gathered[0]
    differ: dict[str, str] = {}
    for rank, settings in enumerate(gathered):
        for name in first | settings:
            ours, theirs = (each.get(name, "not given") for each in (first, settings))
            if ours != theirs:
                differ.setdefault(name, f"{name} is {ours!r} on rank 0 and {theirs!r} on {rank}")
    found = ", ".join(differ.values())
    raise ValueError(f"all ranks of a group must have the same settings: {found}")

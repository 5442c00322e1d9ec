"""A pool over the ranks of a torch.distributed group.

Every rank issues the same collectives in the same order, whatever its gaps and masks are. The first
one tells as well whether all ranks have the same settings, and whether one has failed: then all
raise an error.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The ranks of a group, each with gaps of its own or none."""

    def __init__(self, group: Any, **settings: Any) -> None:
        if isinstance(group, Ranks):
            group, settings = group.group, group.settings | settings
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
            )
        self.group: Any = group
        self.settings: dict[str, Any] = settings
        self.rank, self.parts = dist.get_rank(group), dist.get_world_size(group)
        self.sizes: list[int] = []

    def sums(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the sums over all ranks."""
        total = torch.stack(parts)
        dist.all_reduce(total, group=self.group)
        return total.unbind()

    def extremes(
        self, least: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the minimum and maximum over all ranks."""
        both = torch.stack((-least, largest))
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return -both[0], both[1]

    def exchange(self, *numbers: float, failed: Exception | None = None) -> list[list[float]]:
        """Return the numbers of each rank, once all have the same settings and none has failed."""
        digest = -1 if failed else zlib.crc32(repr(sorted(self.settings.items())).encode())
        device = torch.device("cpu")
        if device not in self.group._device_types:
            device = self.group._device_types[0]
        header = torch.tensor([*numbers, digest], dtype=torch.float64, device=device)
        headers = [torch.empty_like(header) for _ in range(self.parts)]
        dist.all_gather(headers, header, group=self.group)
        rows = torch.stack(headers).tolist()
        if any(row[-1] != digest or failed for row in rows):
            everyone: list[Any] = [None] * self.parts
            mine = f"{type(failed).__name__}: {failed}" if failed else self.settings
            dist.all_gather_object(everyone, mine, group=self.group)
            if not failed:
                _explain(everyone)
        return [row[:-1] for row in rows]

    def size(self, gaps: torch.Tensor, **settings: Any) -> int:
        """Return how many values all ranks have, once all agree on dtype and settings."""
        self.settings |= settings | {"dtype": str(gaps.dtype)}
        self.sizes = [int(size) for (size,) in self.exchange(gaps.shape[0])]
        return sum(self.sizes)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of all ranks, one rank after the other."""
        padded = torch.nn.functional.pad(values, (0, max(self.sizes) - values.shape[0]))
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of what was gathered."""
        start = sum(self.sizes[: self.rank])
        return values[start : start + self.sizes[self.rank]]

    def agreed(self, *numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the numbers: all ranks have computed the same."""
        return numbers

    def share(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of values that every rank holds."""
        return values.tensor_split(self.parts)[self.rank]


def _explain(everyone: list[Any]) -> None:
    """Raise an error for the first rank that failed, or all settings that are not rank 0's."""
    for rank, said in enumerate(everyone):
        if isinstance(said, str):
            raise RuntimeError(f"rank {rank} of the group failed: {said}")
    names = dict.fromkeys(name for settings in everyone for name in settings)
    differ = []
    for name in names:
        values = [settings.get(name, "not given") for settings in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differ.append(f"{name} is {values[0]!r} on rank 0 and {values[other]!r} on {other}")
    raise ValueError(f"all ranks of a group must have the same settings: {', '.join(differ)}")

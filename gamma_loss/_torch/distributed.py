"""A pool over the ranks of a torch.distributed group.

Every rank issues the same collectives in the same order whatever its gaps, masks and settings are.
Where a rank raises an error by itself, the others wait for it until the group's timeout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The ranks of a group, each with gaps of its own or none."""

    def __init__(self, group: Any, values: object) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
            )
        if not isinstance(values, torch.Tensor):
            raise TypeError(f"a group takes torch tensors, got {type(values).__name__}")
        self.group = group
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

    def size(self, values: torch.Tensor, *settings: float) -> int:
        """Return how many values all ranks have, once all agree on dtype and settings."""
        mine = [values.shape[0], torch.finfo(values.dtype).bits, *settings]
        header = torch.tensor(mine, dtype=torch.float64, device=values.device)
        headers = [torch.empty_like(header) for _ in range(self.parts)]
        dist.all_gather(headers, header, group=self.group)
        rows = torch.stack(headers).tolist()
        if any(row[1:] != mine[1:] for row in rows):
            raise ValueError(
                "all ranks of the group must have the same (bits of dtype, gamma0, tau), "
                f"got {[tuple(row[1:]) for row in rows]}"
            )
        self.sizes = [int(row[0]) for row in rows]
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


class HostRanks(Ranks):
    """The same for Python numbers, in a group whose backend takes tensors on the host."""

    def __init__(self, group: Any) -> None:
        super().__init__(group, torch.empty(0))

    def sums(self, *parts: float) -> tuple[float, ...]:  # type: ignore[override]
        """Return the sums over all ranks."""
        total = super().sums(*torch.tensor(parts, dtype=torch.float64))
        return tuple(each.item() for each in total)

    def extremes(self, least: float, largest: float) -> tuple[float, float]:  # type: ignore[override]
        """Return the minimum and maximum over all ranks."""
        both = super().extremes(*torch.tensor([least, largest], dtype=torch.float64))
        return both[0].item(), both[1].item()


def gather(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the values of all ranks of a group, one rank after the other."""
    ranks = Ranks(group, values)
    ranks.size(values)
    return ranks.gather(values)


def share(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Return this rank's share of values that every rank holds."""
    ranks = Ranks(group, values)
    return values.tensor_split(ranks.parts)[ranks.rank]

"""One margin problem over the gaps of all ranks of a torch.distributed group.

Two ways give the same solution, and the size of the whole pool chooses between them, so that every
rank chooses alike:

* up to `GATHER_LIMIT` gaps, each rank gathers them all and solves the whole problem itself: two
  collectives, one of them of the gaps;
* above it, each rank keeps its gaps, and the few sums of each Newton pass are reduced over the
  ranks: a collective of at most four numbers a pass, and no rank holds the whole pool.

Every rank issues the same collectives in the same order whatever its gaps, masks and settings are.
Where a rank raises an error by itself, the others wait for it until the group's timeout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gamma_loss import _newton
from gamma_loss._newton import GATHER_LIMIT


def solve(
    gaps: torch.Tensor, in_pool: torch.Tensor, gamma0: float, tau: float, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the margins of this rank's gaps, ν and the residual of the pool of all ranks."""
    rank, _ = _place(group, gaps)
    pairs = gaps.shape[0]
    if not pairs:  # one gap that is left out stands for an empty batch, and has a minimum
        gaps = gaps.new_zeros(1)
        in_pool = torch.zeros_like(gaps, dtype=torch.bool)
    sizes = _sizes(gaps, group, gamma0, tau)
    if sum(sizes) <= GATHER_LIMIT:
        # The gaps in the pool are finite, so NaN can say which are not.
        gaps = _gather(torch.where(in_pool, gaps, torch.nan), sizes, group)
        in_pool = torch.isfinite(gaps)
        gaps = torch.where(in_pool, gaps, 0.0)
        inside = (in_pool | ~in_pool.any()).to(gaps.dtype)
        margins, multiplier, residual = _newton.solve(gaps, inside, gamma0, tau)
        margins = margins[sum(sizes[:rank]) :]
    else:
        over_ranks = _OverRanks(group)
        (kept,) = over_ranks.sums(in_pool.sum().to(gaps.dtype))
        inside = (in_pool | (kept == 0)).to(gaps.dtype)
        margins, multiplier, residual = _newton.solve(gaps, inside, gamma0, tau, over_ranks)
    return margins[:pairs], multiplier, residual


def gather(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the values of all ranks, one rank after the other."""
    _place(group, values)
    return _gather(values, _sizes(values, group), group)


def part(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Return this rank's part of values that every rank holds."""
    rank, ranks = _place(group, values)
    return values.tensor_split(ranks)[rank]


def mean(total: torch.Tensor, count: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numerator and denominator whose ratio averages, over ranks, to the whole mean."""
    _, ranks = _place(group, count)
    (count,) = _OverRanks(group).sums(count)
    return total * ranks, count


class _OverRanks(_newton.Whole):
    """Sums and extremes over a pool of which each rank holds a part."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def sums(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = torch.stack(parts)
        dist.all_reduce(total, group=self.group)
        return total.unbind()

    def extremes(self, least: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = torch.stack((-least, largest))
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return -both[0], both[1]


class OfHostNumbers(_newton.Whole):
    """The same of Python numbers, in a group whose backend takes tensors on the host."""

    def __init__(self, group: Any) -> None:
        _place(group, torch.empty(0))
        self.over_ranks = _OverRanks(group)

    def sums(self, *parts: float) -> tuple[float, ...]:
        """Return the sums over the whole pool, given this process's."""
        total = self.over_ranks.sums(*torch.tensor(parts, dtype=torch.float64))
        return tuple(each.item() for each in total)

    def extremes(self, least: float, largest: float) -> tuple[float, ...]:
        """Return the minimum and maximum over the whole pool, given this process's."""
        both = torch.tensor([least, largest], dtype=torch.float64)
        return tuple(each.item() for each in self.over_ranks.extremes(both[0], both[1]))


def _place(group: Any, values: object) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"a group takes torch tensors, got {type(values).__name__}")
    return dist.get_rank(group), dist.get_world_size(group)


def _sizes(values: torch.Tensor, group: Any, *settings: float) -> list[int]:
    """Return how many values each rank has, once all agree on dtype and settings."""
    mine = [values.shape[0], torch.finfo(values.dtype).bits, *settings]
    header = torch.tensor(mine, dtype=torch.float64, device=values.device)
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size(group))]
    dist.all_gather(headers, header, group=group)
    rows = torch.stack(headers).tolist()
    if any(row[1:] != mine[1:] for row in rows):
        raise ValueError(
            "all ranks of the group must have the same (bits of dtype, gamma0, tau), "
            f"got {[tuple(row[1:]) for row in rows]}"
        )
    return [int(row[0]) for row in rows]


def _gather(values: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    padded = torch.nn.functional.pad(values, (0, max(sizes) - values.shape[0]))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

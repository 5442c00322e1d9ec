"""What a pool adds that is spread over ranks, devices or chunks.

A solver knows its pool beyond single pairs only by sums and extremes, so these two reductions are
all that it takes to solve one problem over many parts.
"""

from __future__ import annotations

from typing import Any, Protocol

from gamma_loss._arrays import Array, total

# The largest pool whose parts are gathered; of larger ones sums are exchanged (docs/benchmarks.md).
GATHER_LIMIT = 2**17


class Spread(Protocol):
    """The reductions over all parts of a pool."""

    parts: int  # how many; of one alone a reduction costs nothing

    def sums(self, *parts: Array) -> tuple[Array, ...]:
        """Return the sums over the whole pool, given this part's."""

    def extremes(self, least: Array, largest: Array) -> tuple[Array, Array]:
        """Return the minimum and maximum over the whole pool, given this part's."""


class Parts(Spread, Protocol):
    """A group whose members each have a part."""

    def size(self, gaps: Array, **settings: Any) -> int:
        """Return how many gaps all parts have, once all agree on dtype and settings."""

    def gather(self, values: Array) -> Array:
        """Return the values of all parts, one part after the other."""

    def own(self, values: Array) -> Array:
        """Return this part's share of what was gathered."""

    def agreed(self, *numbers: Array) -> tuple[Array, ...]:
        """Return numbers that all parts have found alike, for a compiler that can't know it."""


class _Whole:
    """A pool that is in one piece."""

    parts = 1

    def sums(self, *parts: Array) -> tuple[Array, ...]:
        return parts

    def extremes(self, least: Array, largest: Array) -> tuple[Array, Array]:
        return least, largest


WHOLE: Spread = _Whole()


def weighted(weights: Array | None, values: Array) -> Array:
    """Return the values, 0 for an entry left out."""
    return values if weights is None else weights * values


def count_of(gaps: Array, weights: Array | None) -> Array:
    """Return how many entries of this part take part."""
    return gaps[0] * 0 + gaps.shape[0] if weights is None else total(weights)

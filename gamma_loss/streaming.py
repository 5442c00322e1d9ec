"""The margin problem of more gaps than memory holds, read in chunks, several times over.

At one level every pair is settled on its own, and forgotten; only two sums go to the next level. So
a pass over the gaps keeps two numbers, where `gamma_loss._solver` keeps several for each pair. What
a pair has settled at before is not known, so it starts from what others have settled at first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gamma_loss import _checks, _dispatch, _solver
from gamma_loss._level import Level, certify, first_guess, first_level, level_step, side_of

Floats: TypeAlias = npt.NDArray[np.float64]

_BLOCK = 2**14  # gaps that are settled at a time: what their intermediate results need fits caches
_ROOTS = 2**16  # at most, between which pairs start
_MOST = 100  # levels, which no pool comes near
_NUMBERS = 6  # four sums and two extremes, which go from level to level
_EPS = float(np.finfo(np.float64).eps)


class MarginRule(NamedTuple):
    """The solution of a margin problem as a rule: which margin goes with which gap.

    Attributes
    ----------
    gamma0, tau : float
    multiplier : float
        ν, see `MarginSolution`.
    residual : float
        The certificate, see `MarginSolution`.
    pairs : int
        How many gaps of the pool were finite.
    level : float
        λ, which says ν = (gamma0 / tau) σ(λ) to full relative accuracy on both sides.
    log_mass : float
        What is left of log mean x at λ, by which the rule scales its margins: rounding error.
    """

    gamma0: float
    tau: float
    multiplier: float
    residual: float
    pairs: int
    level: float
    log_mass: float

    def margins(self, reward_gaps: npt.ArrayLike) -> Floats:
        """Return the margins of gaps, of the pool or others, in reward units.

        Parameters
        ----------
        reward_gaps : array_like, shape (pairs,)

        Returns
        -------
        NumPy array of float64
            NaN where the gap is not finite.

        Raises
        ------
        TypeError, ValueError
            For gaps that are no real numbers, or not 1-D.
        """
        gaps = _checks.on_host("reward_gaps", reward_gaps).astype(np.float64)
        margins, finite = np.full(gaps.shape, np.nan), np.isfinite(gaps)
        inside = gaps[finite]
        if self.gamma0 == 0 or not inside.size:
            margins[finite] = 0.0
            return margins
        level = Level(self.gamma0 / self.tau, self.level, self.level, self.level, 0.0)
        start = _between(inside.size, self.gamma0, level, inside.min(), inside.max())
        for at in range(0, inside.size, _BLOCK):
            _, u = _settled(inside[at : at + _BLOCK], self.gamma0, level, start)
            inside[at : at + _BLOCK] = self.gamma0 * np.exp(u - self.log_mass)
        margins[finite] = inside
        return margins


def solve_margins_streaming(
    chunks: Iterable[npt.ArrayLike], *, gamma0: float, tau: float, group: Any = None
) -> MarginRule:
    """Solve the problem of `solve_margins` for a pool that is read in chunks.

    The same problem and the same solution, computed in float64 with NumPy; memory is that of one
    chunk, however many there are. The chunks are read once for a start, and then as often as
    Newton's iteration needs to find the one level to rounding error: some 4 times in mild settings,
    up to some 15 times in others that were tried.

    Parameters
    ----------
    chunks : iterable of array_like, shape (pairs,)
        The gaps in reward units. Is iterated over anew for each pass, and must give the same gaps
        each time: a list or an object with ``__iter__``, not a generator.
    gamma0, tau : float
        See `solve_margins`.
    group : torch.distributed.ProcessGroup, optional
        The ranks that share the pool, each with chunks of its own or none. Each pass is one
        collective of a few numbers, which tells as well whether a rank has failed.

    Returns
    -------
    MarginRule
        Its ``margins(gaps)`` gives the margins, chunk by chunk.

    Raises
    ------
    TypeError
        For chunks that are none or can be read only once, or do not hold real numbers.
    ValueError
        If no gap is finite, for a chunk that is not 1-D, for chunks that change from one reading
        to the next, or a hyperparameter out of its range.

    Examples
    --------
    >>> chunks = [np.array([-2.0, 0.0]), np.array([2.0, 6.0])]
    >>> rule = solve_margins_streaming(chunks, gamma0=4.0, tau=10.0)
    >>> rule.margins(chunks[1]).round(3)
    array([3.827, 4.891])
    >>> rule.residual < 1e-12
    True
    """
    try:
        gamma0, tau = _checks.problem(gamma0, tau)
        if not hasattr(chunks, "__iter__") or iter(chunks) is chunks:
            raise TypeError(f"chunks must be readable several times, got {type(chunks).__name__}")
    except Exception as failure:
        _dispatch.fail(group, failure, _NUMBERS)
        raise
    a, ranks = gamma0 / tau, None
    if group is not None:
        ranks = _dispatch.ranks_of(group, gamma0=gamma0, tau=tau)

    def read_all(look: Callable[[Floats], tuple[float, ...]]) -> tuple[float, ...]:
        """Return four sums and two extremes of what a look at each block tells."""
        try:
            columns = list(zip(*map(look, _blocks(chunks)), strict=True)) or [()] * _NUMBERS
        except Exception as failure:
            _dispatch.fail(group, failure, _NUMBERS)
            raise
        least, largest = min(columns[4], default=math.inf), max(columns[5], default=-math.inf)
        mine = [*map(math.fsum, columns[:4]), least, largest]
        *sums, lows, highs = zip(*(ranks.exchange(*mine) if ranks else [mine]), strict=True)
        return *map(math.fsum, sums), min(lows), max(highs)

    pairs, total, top, bottom, least, largest = read_all(lambda gaps: _survey(gaps, gamma0, a))
    if not pairs:
        raise ValueError("chunks must hold at least one finite gap, got none")
    if gamma0 == 0:
        return MarginRule(gamma0, tau, 0.0, 0.0, int(pairs), 0.0, 0.0)

    level = first_level(gamma0, a, pairs, top, bottom, least, largest)
    rule = MarginRule(gamma0, tau, 0.0, math.inf, int(pairs), 0.0, 0.0)
    before = math.inf
    for _ in range(_MOST):
        start = _between(pairs, gamma0, level, gamma0 - largest, gamma0 - least)
        seen = read_all(functools.partial(_look, gamma0=gamma0, level=level, start=start))
        if seen[:2] != (pairs, total):
            raise ValueError("chunks must give the same gaps at each reading, got others")
        excess, rate = (each / (pairs * gamma0) for each in seen[2:4])
        error = abs(math.log1p(excess)) if excess > -1 else math.inf
        if error < before:
            # Of x with mean m: mean |x / m - x*| <= 2 |m - 1| + 2 B (1 + m), with bounds up to B.
            wrong = abs(excess) + seen[5] * (2 + excess)
            rule = MarginRule(
                gamma0, tau, _nu(level), math.log1p(wrong), int(pairs), level.at, math.log1p(excess)
            )
        # Once close, Newton squares the error each time: where it does not, it is rounding error.
        if error <= _EPS or (before < 1e-9 and error >= before / 4):
            break
        before = error
        level, _, _ = level_step(level, excess, rate, 0.0, 0.0, _EPS)
    return rule


def _blocks(chunks: Iterable[npt.ArrayLike]) -> Iterator[Floats]:
    """Yield the finite gaps, some at a time, in float64."""
    for chunk in chunks:
        gaps = _checks.on_host("chunks", chunk)
        for start in range(0, gaps.shape[0], _BLOCK):
            block = gaps[start : start + _BLOCK].astype(np.float64)
            block = block[np.isfinite(block)]
            if block.size:
                yield block


def _survey(gaps: Floats, gamma0: float, a: float) -> tuple[float, ...]:
    if gamma0 == 0:
        return gaps.size, 0.0, 0.0, 0.0, 0.0, 0.0
    (count, p, q), extremes = _solver.survey(gaps, None, *np.array([gamma0, a]))
    return count, gaps.sum(), p, q, *extremes


def _look(
    gaps: Floats, *, gamma0: float, level: Level, start: Callable[[Floats], Floats]
) -> tuple[float, ...]:
    """Settle the pairs of a block, and return what the level and the certificate need of them."""
    settled, u = _settled(gaps, gamma0, level, start)
    wrong = certify(settled.pairs, u, *side_of(level), np.float64(0.0)).max()
    return gaps.size, gaps.sum(), *settled.sums[:2], 0.0, wrong


def _between(
    pairs: float, gamma0: float, level: Level, least: float, largest: float
) -> Callable[[Floats], Floats]:
    """Return starts for gaps of a range: u on straight lines between roots of evenly spaced gaps.

    So most pairs of a large pool need one or two steps, where they need some eight from elsewhere.
    """
    roots = int(min(max(pairs / 16, 2), _ROOTS))
    # Beyond these u changes no more, to rounding.
    least = max(least, -50.0)
    largest = max(least, min(largest, gamma0 * math.exp(min(_nu(level), 600.0)) + 50.0))
    u = _settled(np.linspace(least, largest, roots), gamma0, level)[1]
    rise, each = np.diff(u, append=u[-1]), (largest - least) / (roots - 1) or 1.0

    def start(gaps: Floats) -> Floats:
        at = (np.clip(gaps, least, largest) - least) / each
        before = at.astype(np.intp)
        return u[before] + (at - before) * rise[before]

    return start


def _settled(
    gaps: Floats, gamma0: float, level: Level, start: Callable[[Floats], Floats] | None = None
) -> tuple[_solver.Settled, Floats]:
    """Let pairs settle at a level, from where they start; return also the u that they reach."""
    g0, a = np.array([gamma0, level.a])
    pairs = _solver.pairs_of(gaps, None, g0, a, g0 - gaps.max())
    u = start(gaps) if start else first_guess(pairs, level.at, *side_of(level))
    settled = _solver.settle(pairs, u, level)
    return settled, np.minimum(settled.u + settled.step.du, pairs.most)


def _nu(level: Level) -> float:
    return float(level.a) / (1 + math.exp(-level.at))

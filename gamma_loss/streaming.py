"""The margin problem of more gaps than memory holds, read in chunks, several times.

At a given λ each pair's root depends on its own gap alone (`gamma_loss._solver`). So one reading of
the gaps gives mean x at this λ from a few sums, and no root is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gamma_loss import _checks, _comm, _solver
from gamma_loss._backend import PYTHON_MATH, get_backend
from gamma_loss._settings import documented

Floats: TypeAlias = npt.NDArray[np.float64]
Evaluate: TypeAlias = Callable[[Floats], tuple[Any, ...]]

_BLOCK = 2**14  # gaps solved at a time, so that intermediate arrays fit the caches
_STARTS = 2**16  # evenly spaced gaps, at most
_MAX_READINGS = 100
_NUMBERS = 6  # of a reading: four sums and two extremes


class MarginRule(NamedTuple):
    """The solution of a margin problem as a function from a gap to its margin.

    Attributes
    ----------
    gamma0, tau : float
        The settings, in reward units and nats.
    multiplier, error_bound : float
        ν, and a proven bound on the mean of ``|γ - γ*| / γ0`` over the pool, see `MarginSolution`.
    pairs : int
        The number of finite gaps in the pool.
    lam : float
        λ, with ν = (gamma0 / tau) σ(λ), also where σ(λ) is 1 to rounding.
    log_mean : float
        The logarithm of mean x at λ: rounding error, which the margins correct.
    """

    gamma0: float
    tau: float
    multiplier: float
    error_bound: float
    pairs: int
    lam: float
    log_mean: float

    def margins(self, reward_gaps: npt.ArrayLike) -> Floats:
        """Return the margins of gaps, of the pool or others: float64 of shape (pairs,).

        Both are in reward units. A gap that is not finite has the margin NaN. Gaps that are no real
        numbers are a TypeError, gaps that are not 1-D a ValueError.
        """
        gaps = _checks.to_numpy("reward_gaps", reward_gaps).astype(np.float64)
        valid = np.isfinite(gaps)
        result, finite = np.where(valid, 0.0, np.nan), gaps[valid]
        if self.gamma0 and finite.size:
            pool = finite.size, float(finite.min()), float(finite.max())
            solve = _root_finder(self.gamma0, self.gamma0 / self.tau, self.lam, *pool)
            for block in np.array_split(finite, -(-finite.size // _BLOCK)):
                block[:] = self.gamma0 * np.exp(solve(block)[0] - self.log_mean)
            result[valid] = finite
        return result


@documented("gamma0", "tau")
def solve_margins_streaming(
    chunks: Iterable[npt.ArrayLike], *, gamma0: float, tau: float, group: Any = None
) -> MarginRule:
    """Return the solution of `solve_margins` for a pool that is read in chunks.

    Computed in float64 by NumPy, in the memory of one chunk. The chunks are read some 4 times in
    mild settings, at most 15 times in the hard pools that were tried.

    Parameters
    ----------
    chunks : iterable of array_like, shape (pairs,)
        Gaps in reward units; a gap that is not finite takes no part. Each reading must give the
        same gaps: pass a list or an object with ``__iter__``, not a generator.
    {parameters}
    group : torch.distributed.ProcessGroup, optional
        The ranks that share the pool, each with chunks of its own, or none. A reading is one
        collective of six numbers, which also tells whether a rank has failed.

    Returns
    -------
    MarginRule
        Its ``margins(gaps)`` gives the margins, chunk by chunk.

    Raises
    ------
    TypeError, ValueError
        For chunks that can be read only once, are not 1-D, hold no real numbers or no finite gap,
        or change from one reading to the next; for a setting out of its range.

    Examples
    --------
    >>> chunks = [np.array([-2.0, 0.0]), np.array([2.0, 6.0])]
    >>> rule = solve_margins_streaming(chunks, gamma0=4.0, tau=10.0)
    >>> rule.margins(chunks[1]).round(3)
    array([3.827, 4.891])
    """
    try:
        gamma0, tau = _checks.problem(gamma0, tau)
        if not hasattr(chunks, "__iter__") or iter(chunks) is chunks:
            raise TypeError(f"chunks must be readable several times, got {type(chunks).__name__}")
    except Exception as error:
        _comm.broadcast_error(group, error, _NUMBERS)
        raise
    ranks = None if group is None else _comm.ranks_of(group, gamma0=gamma0, tau=tau)

    def read(evaluate: Evaluate) -> tuple[float, ...]:
        """Return a hash of all gaps, sums of the last three of ``evaluate``, and max -g and g."""
        try:
            local = _merge(
                (_hash(gaps), *map(np.sum, evaluate(gaps)[-3:]), -gaps.min(), gaps.max())
                for gaps in _blocks(chunks)
            )
        except Exception as error:
            _comm.broadcast_error(group, error, _NUMBERS)
            raise
        return _merge(ranks.exchange(*local)) if ranks else local

    a, xp = gamma0 / tau, get_backend(np.zeros(0))
    pool, count, p, q, low, high = read(
        lambda gaps: _solver.equal_margin_sums(xp, gaps, None, gamma0, a)
    )
    if not count:
        raise ValueError("chunks must hold at least one finite gap, got none")
    if gamma0 == 0:
        return MarginRule(gamma0, tau, 0.0, 0.0, int(count), 0.0, 0.0)
    dual, *_ = _solver.first_dual(PYTHON_MATH, gamma0, a, count, p, q, -low, high, count)
    before = math.inf
    for _ in range(_MAX_READINGS):
        again, *sums, _, _ = read(_root_finder(gamma0, a, dual.lam, count, -low, high))
        if again != pool:
            raise ValueError("chunks must give the same gaps at each reading, got other gaps")
        mean, rate, wrong = (each / count for each in sums)
        left = abs(mean - 1)
        if left < before:
            # Mean |x - x(ν)| <= wrong. All x(ν) lie on one side of x*, so mean |x(ν) - x*| is at
            # most left + wrong. Division of x by its mean moves it by left.
            bound = min(2 * (wrong + left), 2.0)
            nu, log_mean = a * _solver._sigmoids(PYTHON_MATH, dual.lam)[0], math.log(mean or 1e-300)
            rule = MarginRule(gamma0, tau, nu, bound, int(count), dual.lam, log_mean)
        # Near the solution each step squares the error, until rounding error is left.
        if left <= 2.0**-52 or (before < 1e-9 and left >= before / 4):
            break
        before = left
        dual, _ = _solver.dual_step(PYTHON_MATH, a, dual, mean - 1, rate)
    return rule


def _blocks(chunks: Iterable[npt.ArrayLike]) -> Iterator[Floats]:
    """Yield the finite gaps in float64, a block at a time."""
    for chunk in chunks:
        gaps = _checks.to_numpy("chunks", chunk)
        for start in range(0, gaps.shape[0], _BLOCK):
            block = gaps[start : start + _BLOCK].astype(np.float64)
            block = block[np.isfinite(block)]
            if block.size:
                yield block


def _hash(gaps: Floats) -> float:
    """Return the sum of 32 mixed bits of each gap: the cuts between chunks do not change it."""
    odd, half = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
    bits = gaps.view(np.uint64) * odd
    return float(((bits ^ bits >> half) * odd >> half).sum())


def _merge(rows: Iterable[Iterable[float]]) -> tuple[float, ...]:
    """Return exact sums of the first four columns and the largest of the others."""
    columns = [*zip(*rows, strict=True)] or [()] * _NUMBERS
    largest = (float(max(column, default=-math.inf)) for column in columns[4:])
    return *map(math.fsum, columns[:4]), *largest


def _root_finder(
    gamma0: float, a: float, lam: float, count: float, low: float, high: float
) -> Evaluate:
    """Return a function from gaps to their roots at λ, for ``count`` gaps in a range."""
    s, k = _solver.small_side(PYTHON_MATH, lam, a)
    far = math.log1p(a) + 50  # beyond it σ(z) is 0 or 1 to well below rounding error
    nu = k if s > 0 else a + k
    u_max = min(nu, math.log1p(max(far + high, 0.0) / gamma0), 600.0)  # no root is above
    most = gamma0 * math.exp(u_max) + far
    low, high = (min(max(gap, -far), most) for gap in (low, high))  # beyond, no root changes
    # At a given z both u and g are explicit. From there evenly spaced gaps step to their roots.
    size = int(min(max(count / 16, 2), _STARTS))
    z = np.linspace(max(lam, gamma0 - low), min(lam, gamma0 - high), size).clip(-far, far)
    u = np.minimum(k - s * a / (1 + np.exp(-s * z)), u_max)
    grid = np.linspace(low, high, size)
    pairs = _solver.Pairs(grid, gamma0, a, u_max)
    u_grid = _find_roots(pairs, np.interp(grid, gamma0 * np.exp(u) - z, u), s, k)[0]
    rise, per_unit = np.diff(u_grid, append=u_grid[-1]), (size - 1) / ((high - low) or 1.0)

    def solve(gaps: Floats) -> tuple[Floats, ...]:
        gaps = gaps.clip(low, high)
        at = (gaps - low) * per_unit
        index = at.astype(np.intp)
        u = u_grid[index] + (at - index) * rise[index]
        return _find_roots(pairs._replace(gaps=gaps), u, s, k)

    return solve


@np.errstate(over="ignore")
def _find_roots(pairs: _solver.Pairs, u: Floats, s: float, k: float) -> tuple[Floats, ...]:
    """Step from u to the roots; return u, x, x / D, and a bound on |x - x(ν)|."""
    xp = get_backend(u)
    inner = _solver.newton_step(xp, pairs, u, s, k, math.inf)
    for _ in range(_solver.MAX_ITER):
        if _solver.is_close(inner):
            break
        inner = _solver.inner_step(xp, pairs, inner, s, k)
    # From here a step squares the error, until rounding error is left.
    before = math.inf
    while 1e-8 < (largest := np.max(np.abs(inner.du) * (1 + inner.y))) < 0.5 * before:
        u, before = np.minimum(inner.u + inner.du, pairs.u_max), largest
        inner = _solver.newton_step(xp, pairs, u, s, k, math.inf)
    u = np.minimum(inner.u + inner.du, pairs.u_max)
    x, off = np.exp(u), _solver.root_distance(xp, pairs, u, s, k)
    return u, x, x / inner.d, x * off * np.exp(off)

"""The margin problem of more gaps than memory holds, read in chunks, several times over.

For one level ν every pair is solved on its own, and its solution is forgotten; only the sums of
the ratios and of their slopes go to the outer solve for ν. So a pass over the gaps keeps two
numbers, where `gamma_loss._newton.bracketed` keeps ten for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gamma_loss import _checks, _newton
from gamma_loss._arrays import namespace

Floats = npt.NDArray[np.float64]

_BLOCK = 2**14  # gaps that are solved at a time: what their intermediate results need fits caches
_INNER, _OUTER = 200, 100  # passes that no pool comes near: bisection alone would end by then
_FLAT = -40.0  # below it γ0 exp(u) adds nothing to z, so a Newton step is exact


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
        """
        gaps = np.asarray(reward_gaps, dtype=np.float64)
        margins = np.full(gaps.shape, np.nan)
        for start in range(0, gaps.shape[0], _BLOCK):
            block = gaps[start : start + _BLOCK]
            finite = np.isfinite(block)
            kept = block[finite]
            if self.gamma0 > 0:
                u, _ = _pairs(kept, self.gamma0, self.tau, self.pairs, self.level)
                kept = self.gamma0 * np.exp(u - self.log_mass)
            else:
                kept = np.zeros_like(kept)
            margins[start : start + _BLOCK][finite] = kept
        return margins


def solve_margins_streaming(
    chunks: Iterable[npt.ArrayLike], *, gamma0: float, tau: float, group: Any = None
) -> MarginRule:
    """Solve the problem of `solve_margins` for a pool that is read in chunks.

    The same problem and the same solution, computed in float64 with NumPy; memory is that of one
    chunk, however many there are. The chunks are read some 5 times in mild settings, up to some 12
    times in others that were tried: as often as a safeguarded Newton iteration needs to find the
    one level ν to rounding error, once before for a start, and once after for the certificate.

    Parameters
    ----------
    chunks : iterable of array_like, shape (pairs,)
        The gaps in reward units. Is iterated over anew for each pass, and must give the same gaps
        each time: a list or an object with ``__iter__``, not a generator.
    gamma0, tau : float
        See `solve_margins`.
    group : torch.distributed.ProcessGroup, optional
        The ranks that share the pool, each with chunks of its own or none; of a backend that
        takes numbers on the host, such as gloo. Each pass is one collective of two numbers.

    Returns
    -------
    MarginRule
        Its ``margins(gaps)`` gives the margins, chunk by chunk.

    Raises
    ------
    TypeError
        For chunks that can be read only once.
    ValueError
        If no gap is finite, for a chunk that is not 1-D, or a hyperparameter out of its range.

    Examples
    --------
    >>> chunks = [np.array([-2.0, 0.0]), np.array([2.0, 6.0])]
    >>> rule = solve_margins_streaming(chunks, gamma0=4.0, tau=10.0)
    >>> rule.margins(chunks[1]).round(3)
    array([3.827, 4.891])
    >>> rule.residual < 1e-12
    True
    """
    gamma0 = _checks.number("gamma0", gamma0, least=0)
    tau = _checks.number("tau", tau, above=0)
    if iter(chunks) is chunks:
        raise TypeError("chunks must be readable several times, got an iterator")
    pool = _newton.Whole()
    if group is not None:
        from gamma_loss.torch import distributed

        pool = distributed.OfHostNumbers(group)

    a, counts, tops, bottoms = gamma0 / tau, [], [], []
    least, largest = math.inf, -math.inf
    for gaps in _blocks(chunks):
        counts.append(gaps.size)
        least, largest = min(least, float(gaps.min())), max(largest, float(gaps.max()))
        p, q = _sigmoids(gamma0 - gaps)
        d = a * gamma0 * p * q + 1
        tops.append(float((p / d).sum()))
        bottoms.append(float((q / d).sum()))
    pairs, top, bottom = pool.sums(float(sum(counts)), math.fsum(tops), math.fsum(bottoms))
    least, largest = pool.extremes(least, largest)
    if not pairs:
        raise ValueError("chunks must hold at least one finite gap, got none")
    size = int(pairs)
    if gamma0 == 0:
        return MarginRule(gamma0, tau, 0.0, 0.0, size, 0.0, 0.0)

    low, high = _level_bracket(least, largest, gamma0, a, size)
    level = (low + high) / 2
    if top > 0 and bottom > 0:  # the first Newton step, from equal margins
        level = min(max(math.log(top) - math.log(bottom), low), high)
    best, previous = (math.inf, 0.0, level), math.inf
    for _ in range(_OUTER):
        masses, slopes = [], []
        for gaps in _blocks(chunks):
            u, d = _pairs(gaps, gamma0, tau, size, level)
            x = np.exp(u)
            masses.append(float(x.sum()))
            slopes.append(float((x / d).sum()))
        mass, slope = pool.sums(math.fsum(masses), math.fsum(slopes))
        log_mass = math.log(mass / size)
        # Once close, Newton squares the error each time: where it does not, it is rounding error.
        if abs(log_mass) < 1e-9 and abs(log_mass) >= best[0] / 4:
            break
        best = min(best, (abs(log_mass), log_mass, level))
        d_nu = -log_mass * mass / slope
        if abs(d_nu) < 1e-13:  # about what scaling by the mass leaves as residual
            break
        low, high = (low, level) if log_mass > 0 else (level, high)
        new = _moved(level, d_nu / a)
        if not low < new < high or abs(new - level) > previous / 2:
            new = (low + high) / 2
        if new == level:
            break
        previous, level = abs(new - level), new
    _, log_mass, level = best

    least, largest = math.inf, -math.inf
    for gaps in _blocks(chunks):
        u, _ = _pairs(gaps, gamma0, tau, size, level)
        r, _ = _residuals(gaps, gamma0, a, u - log_mass, level)
        least, largest = min(least, r.min()), max(largest, r.max())
    least, largest = pool.extremes(least, largest)
    multiplier = a * float(_sigmoids(level)[0])
    return MarginRule(gamma0, tau, multiplier, float(largest - least) / 2, size, level, log_mass)


def _blocks(chunks: Iterable[npt.ArrayLike]) -> Iterator[Floats]:
    """Yield the finite gaps, some at a time, in float64."""
    for chunk in chunks:
        gaps = np.asarray(chunk)
        if gaps.ndim != 1:
            raise ValueError(f"chunks must be 1-D, got shape {gaps.shape}")
        for start in range(0, gaps.shape[0], _BLOCK):
            block = gaps[start : start + _BLOCK].astype(np.float64)
            block = block[np.isfinite(block)]
            if block.size:
                yield block


def _sigmoids(z: Any) -> tuple[Any, Any]:
    z = np.asarray(z)
    return _newton._sigmoids(namespace(z), z)


def _residuals(
    gaps: Floats, gamma0: float, a: float, u: Floats, level: float
) -> tuple[Floats, tuple[Floats, Floats]]:
    xp = namespace(gaps)
    result: tuple[Floats, tuple[Floats, Floats]] = _newton._residuals(
        xp, gaps, gamma0, a, u, level, _sigmoids(level)
    )
    return result


def _level_bracket(
    least: float, largest: float, gamma0: float, a: float, size: int
) -> tuple[float, float]:
    ends = np.array([least, largest])
    low, high = _newton._level_bracket(
        namespace(ends), ends, np.ones(2), np.asarray(gamma0), np.asarray(a),
        np.log(np.asarray(float(size))), _newton.Whole(),
    )  # fmt: skip
    return float(low), float(high)


def _moved(level: float, rise: float) -> float:
    """Return the λ at which σ is larger by ``rise``, or close to it where there is none."""
    xp = namespace(np.zeros(1))
    change = _newton._logit_change(xp, *_sigmoids(level), np.asarray(rise))[1]
    return level + float(change)


def _pairs(
    gaps: Floats, gamma0: float, tau: float, size: int, level: float
) -> tuple[Floats, Floats]:
    """Solve each pair at a level: return u = log x and D, the slope of its equation.

    Newton inside a bracket, which halves it instead where a step leaves it or shrinks too slowly.
    """
    xp, a = namespace(gaps), gamma0 / tau
    at_start = p, q = _sigmoids(gamma0 - gaps)
    low, high = _newton._closed_form_bracket(
        xp, gaps, gamma0, a, math.log(size), at_start, np.asarray(level), _sigmoids(level)
    )
    r, _ = _residuals(gaps, gamma0, a, np.zeros_like(gaps), level)
    d = a * gamma0 * p * q + 1
    u = np.clip(-r / d, low, high)
    before = np.full_like(gaps, np.inf)
    for _ in range(_INNER):
        r, (p, q) = _residuals(gaps, gamma0, a, u, level)
        x = np.exp(u)
        d = slope = a * gamma0 * x * p * q + 1
        low, high = np.where(r > 0, low, u), np.where(r > 0, u, high)
        if d.max() > 2:
            # Where the sigmoid dominates, in its logit instead, as `_newton.bracketed_pass` does.
            rise, z_change = _newton._logit_change(xp, p, q, -r / a)
            bend = a * (p + rise) * (q - rise)
            d_logit = gamma0 * x * bend + 1
            steep = (d > 2) & (d_logit > 2)
            r, d = np.where(steep, -bend * z_change, r), np.where(steep, d_logit, d)
        step = -r / d
        new = u + step
        # So close to the root Newton squares the error, and a bracket holds up to rounding only.
        far = np.abs(step) * (gamma0 * x + 1) > 1e-4
        halve = far & ((new < low) | (new > high) | (np.abs(step) > before / 2)) & (high > _FLAT)
        new = np.where(halve, np.maximum((low + high) / 2, _FLAT), new)
        new = np.clip(new, low, high)
        moved = np.abs(new - u)
        u, before = new, moved
        largest = moved.max()
        if largest * largest * (1 + gamma0 * np.exp(u.max())) <= 1e-17:
            break
    return u, slope

"""The plain logistic loss that γ-PO amounts to on a pool of gaps, and settings for a wanted one.

At a pool's multiplier every margin is a function of the pair's own gap, so γ-PO acts as one scalar
loss of the gap. Its pair weight ``w = σ(margin - g)`` is compared here with ``c σ(d - b g)``, that
of DPO or SimPO with b times the beta, a margin d and c / b times the loss. docs/theory.md has the
exact shape of the loss and its limits.

A diagnostic, not for a training step: it looks at values, on the host, in NumPy's float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gamma_loss import _checks
from gamma_loss._arrays import Array
from gamma_loss.margins import solve_margins

KAPPAS = np.geomspace(1e-3, 1e6, 46)  # among which settings are looked for, five a decade
STEPS = 100  # of the fit; where the three numbers are well determined it takes about ten
Vector = np.ndarray[Any, Any]


class MatchedLoss(NamedTuple):
    """A plain logistic loss ``(c / b) ℓ(b g - d)``, whose pair weights are ``c σ(d - b g)``.

    Attributes
    ----------
    scale : float
        c, the weight that no pair exceeds.
    margin : float
        d, in units of ``beta_factor`` times the reward.
    beta_factor : float
        b, what beta is multiplied by.
    unexplained : float
        Share of the variance of γ-PO's pair weights over the pool that it leaves.
    """

    scale: float
    margin: float
    beta_factor: float
    unexplained: float


def match_logistic(
    reward_gaps: Array, *, gamma0: float, tau: float, centered: bool = False
) -> MatchedLoss:
    """Find the plain logistic loss whose pair weights are closest to those of γ-PO.

    Minimises ``Σ (c σ(d - b g_i) - w_i)²`` over c > 0, d and b, where ``w_i = σ(γ_i - g_i)`` or, if
    centred, ``σ(γ_i - γ0 - g_i)``, with the exact margins γ of the gaps as one pool. Where little
    is left unexplained, γ-PO acts on these gaps as DPO or SimPO does with ``beta_factor * beta``,
    the margin ``margin`` and ``scale / beta_factor`` times the loss.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        The pool, in reward units, of any library and on any device: it is copied to the host. Gaps
        that are not finite are left out, as in a solve.
    gamma0, tau : float
        As for `gamma_preference_loss`, in reward units and nats.
    centered : bool
        Whether the loss subtracts γ_i - γ0 (γ-DPO) or γ_i (γ-SimPO).

    Returns
    -------
    MatchedLoss
        Four Python floats: ``scale`` c, ``margin`` d, ``beta_factor`` b, and ``unexplained``.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, shape or hyperparameter, or no finite gap, naming the argument.

    Notes
    -----
    Where all gaps are equal so are the margins, and the match is DPO or SimPO itself. Three numbers
    may be more than the weights determine: where they are close to a straight line or to an
    exponential of the gap (gaps far above the margins), c and d trade off against each other.
    `unexplained` says how good the three are together.

    Examples
    --------
    The published setting of llama-3-8b-instruct, on gaps with mean 1 and standard deviation 3, is
    SimPO with 0.73 times the beta and a margin of 3.3, but for half a thousandth of the variance:

    >>> import numpy as np
    >>> gaps = np.random.default_rng(0).normal(1.0, 3.0, 4000)
    >>> match = match_logistic(gaps, gamma0=4.0, tau=10.0)
    >>> print(f"{match.beta_factor:.2f} {match.margin:.1f} {match.unexplained:.4f}")
    0.73 3.3 0.0005
    """
    gaps, centered = _on_host(reward_gaps), _checks.flag("centered", centered)
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
    logits = margins - gaps - (gamma0 if centered else 0.0)
    weights = _sigmoid(logits)
    centre, width = gaps.mean(), gaps.std()
    if width <= 1e-9 * np.abs(gaps).max():  # equal, to rounding
        return MatchedLoss(1.0, float(logits.mean() + centre), 1.0, 0.0)
    (scale, d, b), error = _fit((gaps - centre) / width, logits, weights)
    variance = weights.var()
    unexplained = error / variance if variance > 0 else 0.0
    return MatchedLoss(scale, float(d + b * centre / width), float(b / width), float(unexplained))


def choose_settings(
    reward_gaps: Array,
    *,
    spread: float | None = None,
    beta_factor: float | None = None,
    gamma0: float | None = None,
    centered: bool = False,
) -> dict[str, float]:
    """Choose gamma0 and tau by what they are to do with the gaps of a short base run.

    Finds the largest tau at which the exact margins of these gaps as one pool have the wanted
    standard deviation, or `match_logistic` the wanted beta factor. Give one of the two.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Gaps in reward units, with the beta that is going to be used, of a run without γ-PO such as
        a few hundred steps of DPO or SimPO. Of any library; copied to the host.
    spread : float, optional
        Wanted standard deviation of the margins, in reward units.
    beta_factor : float, optional
        Wanted b < 1: γ-PO weighs these pairs about as b times the beta would, see `match_logistic`.
    gamma0 : float, optional
        Mean margin in reward units, such as SimPO's own ``beta * gamma_beta_ratio``. By default the
        median of the gaps, around which weights differ most, if that is positive.
    centered : bool
        As for `match_logistic`. It makes no difference to the spread.

    Returns
    -------
    dict
        ``gamma0`` and ``tau``, keyword arguments of the losses.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, shape or number, naming the argument; for both or none of
        ``spread`` and ``beta_factor``; where no tau does what is wanted, saying what can be had.

    Examples
    --------
    >>> import numpy as np
    >>> from gamma_loss import solve_margins
    >>> gaps = np.random.default_rng(0).normal(1.0, 3.0, 512)
    >>> settings = choose_settings(gaps, gamma0=2.0, spread=0.5)
    >>> print("tau = {tau:.2f}".format(**settings))
    tau = 2.73
    >>> print(f"{solve_margins(gaps, **settings).margins.std():.3f}")
    0.500
    >>> settings = choose_settings(gaps, gamma0=2.0, beta_factor=0.5)
    >>> print(f"{match_logistic(gaps, **settings).beta_factor:.3f}")
    0.500
    """
    gaps, centered = _on_host(reward_gaps), _checks.flag("centered", centered)
    if (spread is None) is (beta_factor is None):
        raise ValueError("give spread or beta_factor, one of the two")
    if gamma0 is None:
        gamma0 = float(np.median(gaps))
        if gamma0 <= 0:
            raise ValueError(f"gamma0 must be given where the median gap is not > 0: {gamma0:.3g}")
    gamma0 = _checks.number("gamma0", gamma0, above=0.0)

    def of_margins(tau: float) -> float:
        return float(solve_margins(gaps, gamma0=gamma0, tau=tau).margins.std())

    def of_beta(tau: float) -> float:  # falling, so with the sign turned
        return -match_logistic(gaps, gamma0=gamma0, tau=tau, centered=centered).beta_factor

    if spread is not None:
        wanted = _checks.number("spread", spread, above=0.0)
        return {"gamma0": gamma0, "tau": _tau("spread", of_margins, wanted, gamma0)}
    wanted = -_checks.number("beta_factor", beta_factor, above=0.0, below=1.0)
    return {"gamma0": gamma0, "tau": _tau("beta_factor", of_beta, wanted, gamma0)}


def _tau(name: str, measure: Callable[[float], float], wanted: float, gamma0: float) -> float:
    """Return the largest tau with ``measure(tau) >= wanted``, by scanning κ and then bisection."""
    most, low = -math.inf, KAPPAS[0] / 10
    for high in KAPPAS[gamma0 * _checks.STEEPEST >= KAPPAS]:
        most = max(most, measure(gamma0**2 / high))
        if most >= wanted:
            break
        low = high
    else:
        bound = "at most" if name == "spread" else "at least"
        raise ValueError(
            f"{name} can be {bound} {abs(most):.3g} with these gaps and gamma0 = {gamma0:g}, "
            f"got {abs(wanted):g}"
        )
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if measure(gamma0**2 / middle) >= wanted else (middle, high)
    return float(gamma0**2 / high)


def _fit(z: Vector, logits: Vector, weights: Vector) -> tuple[tuple[float, float, float], float]:
    """Fit ``c σ(d - b z)`` to weights, z having mean 0 and deviation 1; with the mean square error.

    Levenberg and Marquardt's method in (log c, d, b), from the best straight line through the
    logits, which is the solution at κ = 0.
    """
    trust = weights * (1 - weights) + 1e-12
    trust /= trust.sum()
    middle, level = trust @ z, trust @ logits
    slope = trust @ ((z - middle) * (logits - level)) / (trust @ (z - middle) ** 2)
    at = np.array([0.0, level - slope * middle, -slope])
    damping = 1e-3

    def fitted(at: Vector) -> tuple[Vector, Vector, float]:
        share = _sigmoid(at[1] - at[2] * z)
        error = math.exp(at[0]) * share - weights
        return share, error, float(np.mean(error**2))

    share, error, cost = fitted(at)
    for _ in range(STEPS):
        value = math.exp(at[0]) * share
        jacobian = np.stack([value, value * (1 - share), -value * (1 - share) * z])
        square = jacobian @ jacobian.T
        diagonal = square.diagonal() + 1e-12 * square.diagonal().max() + 1e-300
        step = np.linalg.solve(square + damping * np.diag(diagonal), jacobian @ error)
        new = at - np.clip(step, -2.0, 2.0)  # of logits: further a sigmoid is not what it was
        new_share, new_error, new_cost = fitted(new)
        if not new_cost < cost:
            damping *= 10
            if damping > 1e9:
                break
            continue
        gained = cost - new_cost
        at, share, error, cost = new, new_share, new_error, new_cost
        if gained <= 1e-12 * cost:
            break
        damping = max(damping / 10, 1e-12)
    return (math.exp(at[0]), float(at[1]), float(at[2])), cost


def _sigmoid(x: Vector) -> Vector:
    return np.exp(-np.logaddexp(0.0, -x))


def _on_host(reward_gaps: Array) -> Vector:
    """Return the finite gaps as NumPy's float64."""
    _checks.real(reward_gaps=reward_gaps)
    _checks.pairs(reward_gaps=reward_gaps)
    gaps: Vector = _checks.on_host("reward_gaps", reward_gaps).astype(np.float64)
    gaps = gaps[np.isfinite(gaps)]
    if not gaps.size:
        raise ValueError("reward_gaps must hold a finite gap, got none")
    return gaps

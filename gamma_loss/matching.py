"""The plain logistic loss that is closest to γ-PO on a pool, and settings for a wanted effect.

At a pool's multiplier every margin is a function of the pair's own gap, so γ-PO acts as one scalar
loss of the gap; docs/theory.md has its shape and limits. Values are read on the host: this is no
part of a training step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gamma_loss import _checks
from gamma_loss._backend import Array
from gamma_loss._settings import documented
from gamma_loss.margins import solve_margins

KAPPAS = np.geomspace(1e-3, 1e6, 46)  # the κ that `choose_settings` tries first
_MIN_T = 1e-9  # of log(1 + e^d): below it the match is an exponential of the gap to rounding
Vector: TypeAlias = np.ndarray[Any, Any]
Measure: TypeAlias = Callable[[float, float], float]  # of γ0 and κ


class MatchedLoss(NamedTuple):
    """A plain logistic loss ``(c / b) ℓ(b g - d)``, whose pair weights are ``c σ(d - b g)``.

    Attributes
    ----------
    scale : float
        c, the largest weight that a pair can have.
    margin : float
        d, in units of ``beta_factor`` times the reward.
    beta_factor : float
        b, the factor of beta.
    unexplained : float
        Share of the variance of γ-PO's pair weights over the pool that this loss leaves.
    """

    scale: float
    margin: float
    beta_factor: float
    unexplained: float


@documented("gamma0", "tau", "centered")
def match_logistic(
    reward_gaps: Array, *, gamma0: float, tau: float, centered: bool = False
) -> MatchedLoss:
    """Return the plain logistic loss whose pair weights are closest to those of γ-PO.

    Minimises ``Σ (c σ(d - b g_i) - w_i)²`` over c > 0, d and b by SciPy's ``least_squares``. The
    weights w_i are ``σ(γ_i - g_i)`` or, if centred, ``σ(γ_i - γ0 - g_i)``, with the exact margins γ
    of the gaps as one pool. If `unexplained` is small, γ-PO acts on these gaps as DPO or SimPO does
    with ``beta_factor * beta``, the margin ``margin`` and ``scale / beta_factor`` times the loss.
    For equal gaps it is DPO or SimPO itself. If the weights are close to an exponential of the gap,
    only b and ``c e^d`` are determined: c is then 1, or at most 1e9 times the weight at the mean
    gap.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Gaps in reward units, of any library and device; copied to the host. Gaps that are not
        finite are left out.
    {parameters}

    Returns
    -------
    MatchedLoss
        Python floats, computed in float64.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, shape or hyperparameter, or no finite gap, naming the argument.
    ImportError
        Without SciPy (``pip install "gamma-loss[matching]"``).

    Examples
    --------
    On these gaps llama-3-8b-instruct's setting is SimPO with 0.73 times the beta, margin 3.3:

    >>> import numpy as np
    >>> gaps = np.random.default_rng(0).normal(1.0, 3.0, 4000)
    >>> match = match_logistic(gaps, gamma0=4.0, tau=10.0)
    >>> print(f"{match.beta_factor:.2f} {match.margin:.1f} {match.unexplained:.4f}")
    0.73 3.3 0.0005
    """
    gaps, centered = _on_host(reward_gaps), _checks.flag("centered", centered)
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
    logits = margins - gaps - (gamma0 if centered else 0.0)
    centre, width = float(gaps.mean()), float(gaps.std())
    if width <= 1e-9 * np.abs(gaps).max():  # equal, to rounding
        return MatchedLoss(1.0, float(logits.mean() + centre), 1.0, 0.0)
    scale, d, b, unexplained = _fit((gaps - centre) / width, logits)
    return MatchedLoss(scale, d + b * centre / width, b / width, unexplained)


def choose_settings(
    reward_gaps: Array,
    *,
    margin_std: float | None = None,
    beta_factor: float | None = None,
    gamma0: float | None = None,
    centered: bool = False,
) -> dict[str, float]:
    """Return gamma0 and tau for a wanted effect on the gaps of a short base run.

    Finds the largest tau at which the exact margins of these gaps as one pool have the wanted
    standard deviation, or `match_logistic` the wanted beta factor. Give one of the two.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        As for `match_logistic`, with the beta of the later run, from a run without γ-PO such as a
        few hundred steps of DPO or SimPO.
    margin_std : float, optional
        Wanted standard deviation of the margins, in reward units.
    beta_factor : float, optional
        Wanted b < 1: γ-PO then acts about as b times the beta does. Needs SciPy.
    gamma0 : float, optional
        Mean margin in reward units, such as SimPO's own ``beta * gamma_beta_ratio``. By default the
        median of the gaps, around which weights differ most, if that is positive.
    centered : bool
        As for `match_logistic`. It makes no difference to ``margin_std``.

    Returns
    -------
    dict
        ``gamma0`` and ``tau``, keyword arguments of the losses.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, shape or number, naming the argument; for both or none of
        ``margin_std`` and ``beta_factor``; where no tau gives the wanted number, with the number
        that another gamma0 gives.

    Examples
    --------
    >>> import numpy as np
    >>> gaps = np.random.default_rng(0).normal(1.0, 3.0, 512)
    >>> settings = choose_settings(gaps, gamma0=2.0, margin_std=0.5)
    >>> print(f"{settings['tau']:.2f} {solve_margins(gaps, **settings).margins.std():.3f}")
    2.73 0.500
    """
    gaps, centered = _on_host(reward_gaps), _checks.flag("centered", centered)
    if (margin_std is None) is (beta_factor is None):
        raise ValueError("give margin_std or beta_factor, one of the two")
    if gamma0 is None:
        gamma0 = float(np.median(gaps))
        if gamma0 <= 0:
            raise ValueError(f"gamma0 must be given where the median gap is not > 0: {gamma0:.3g}")
    gamma0 = _checks.number("gamma0", gamma0, above=0.0)
    if beta_factor is None:
        wanted = _checks.number("margin_std", margin_std, above=0.0)
    else:  # negative, so that a larger κ gives more of both
        wanted = -_checks.number("beta_factor", beta_factor, above=0.0, below=1.0)

    def measure(gamma0: float, kappa: float) -> float:
        tau = gamma0**2 / kappa
        if beta_factor is None:
            return float(solve_margins(gaps, gamma0=gamma0, tau=tau).margins.std())
        return -match_logistic(gaps, gamma0=gamma0, tau=tau, centered=centered).beta_factor

    low, high, reached = _scan(measure, wanted, gamma0)
    if reached < wanted:
        raise ValueError(_explain(measure, wanted, gaps, gamma0, reached))
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if measure(gamma0, middle) >= wanted else (middle, high)
    return {"gamma0": gamma0, "tau": float(gamma0**2 / high)}


def _scan(measure: Measure, wanted: float, gamma0: float) -> tuple[float, float, float]:
    """Return the last κ that does not reach it, the first that does, and the largest measure."""
    most, low, high = -math.inf, 0.0, KAPPAS[0] / 10
    for kappa in KAPPAS[0.999 * gamma0 * _checks.MAX_A >= KAPPAS]:
        low, high = high, kappa
        most = max(most, measure(gamma0, kappa))
        if most >= wanted:
            break
    return low, high, most


def _explain(measure: Measure, wanted: float, gaps: Vector, gamma0: float, reached: float) -> str:
    """Say why no tau gives the wanted number, and what another gamma0 gives."""
    name, bound = ("margin_std", "at most") if wanted > 0 else ("beta_factor", "at least")
    mean, std = float(gaps.mean()), float(gaps.std())
    said = f"no tau gives {name} = {abs(wanted):g}: with gamma0 = {gamma0:g} it is {bound} "
    said += f"{abs(reached):.3g}. Your gaps (mean {mean:.3g}, standard deviation {std:.3g}) are "
    if std <= 1e-9 * np.abs(gaps).max():
        return said + "all equal, and so are their margins"
    above = "far above" if mean - 2 * std > gamma0 else "around"
    said += f"{'far below' if mean + 2 * std < gamma0 else above} gamma0; "
    if wanted >= std:
        return said + f"margins differ less than the gaps: choose a margin_std below {std:.3g}"
    others = {"lower": gamma0 / 2, "raise": 2 * gamma0}
    value, verb = max((_scan(measure, wanted, others[verb])[2], verb) for verb in others)
    if value <= reached + 1e-6 * abs(wanted):  # more is not rounding alone
        return said + "half of it and twice its value do no better"
    return said + f"{verb} gamma0: gamma0 = {others[verb]:.3g} gives {abs(value):.3g}"


def _fit(z: Vector, logits: Vector) -> tuple[float, float, float, float]:
    """Fit ``c σ(d - b z)`` to weights σ(logits), z having mean 0 and deviation 1.

    Returns c, d, b and the unexplained share of the variance. The unknowns are the logarithm of the
    value at z = 0, ``t = log(1 + e^d)`` and b. As c → ∞ the match tends to an exponential of z, and
    t to 0, where the fit is well conditioned.
    """
    try:
        from scipy.optimize import least_squares
        from scipy.special import expit, log_expit
    except ImportError:
        raise ImportError(
            "match_logistic and choose_settings(beta_factor=) need SciPy: "
            'pip install "gamma-loss[matching]"'
        ) from None
    log_weights: Vector = log_expit(logits)
    largest = float(log_weights.max())
    target = np.exp(log_weights - largest)

    def value(at: Vector) -> tuple[Vector, Vector, float]:
        top = -math.expm1(-at[1])  # σ(d)
        share = expit(at[1] + math.log(top) - at[2] * z)
        return math.exp(min(at[0], 50.0)) * share / top, share, top

    def jacobian(at: Vector) -> Vector:
        fitted, share, top = value(at)
        return np.stack([fitted, fitted * (top - share) / top, fitted * (share - 1) * z], 1)

    solve = functools.partial(
        least_squares, lambda at: value(at)[0] - target, jac=jacobian, x_scale="jac",
        bounds=([-np.inf, _MIN_T, -np.inf], np.inf), xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    # Two starts: the straight line through the logits, the solution at κ = 0, and a constant.
    trust = np.sqrt(target * -np.expm1(log_weights) + 1e-12)
    slope, height = np.polyfit(z, logits, 1, w=trust)
    starts = (height, -slope), (-2.0, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # in steps that SciPy then refuses
        firsts = ([math.log(target.mean()), max(np.logaddexp(0.0, d), 1e-6), b] for d, b in starts)
        fit = min(map(solve, firsts), key=lambda each: each.cost)
    log_value, t, b = map(float, fit.x)
    log_top = math.log(-math.expm1(-t))
    d, log_scale = t + log_top, log_value + largest - log_top
    if t <= 2 * _MIN_T and log_scale < 0:  # an exponential: c = 1 serves as well
        d, log_scale = d + log_scale, 0.0
    unexplained = 2 * float(fit.cost) / z.size / (float(target.var()) or math.inf)
    return math.exp(min(max(log_scale, -700.0), 700.0)), d, b, unexplained


def _on_host(reward_gaps: Array) -> Vector:
    """Return the finite gaps as NumPy's float64."""
    _checks.floats(reward_gaps=reward_gaps)
    gaps: Vector = _checks.to_numpy("reward_gaps", reward_gaps).astype(np.float64)
    gaps = gaps[np.isfinite(gaps)]
    if not gaps.size:
        raise ValueError("reward_gaps must hold a finite gap, got none")
    return gaps

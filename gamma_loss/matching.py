"""The plain logistic loss whose pair weights are closest to γ-PO's, and settings for a wanted one.

At a pool's multiplier every margin is a function of the pair's own gap, so γ-PO acts as one scalar
loss of the gap. Its pair weight ``w = σ(margin - g)`` is compared here with ``c σ(d - b g)``, that
of DPO or SimPO with b times the beta, a margin d and c / b times the loss. docs/theory.md has the
exact shape of the loss and its limits.

Both functions read values on the host, in float64. They are for diagnosis, not for a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gamma_loss import _checks
from gamma_loss._backend import Array
from gamma_loss.margins import solve_margins

KAPPAS = np.geomspace(1e-3, 1e6, 46)  # the κ that `choose_settings` tries first
_MIN_T = 1e-9  # of log(1 + e^d): below it the match is an exponential of the gap to rounding
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

    Minimises ``Σ (c σ(d - b g_i) - w_i)²`` over c > 0, d and b by SciPy's ``least_squares``, where
    ``w_i = σ(γ_i - g_i)`` or, if centred, ``σ(γ_i - γ0 - g_i)``, with the exact margins γ of the
    gaps as one pool. If `unexplained` is small, γ-PO acts on these gaps as DPO or SimPO does with
    ``beta_factor * beta``, the margin ``margin`` and ``scale / beta_factor`` times the loss.

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
    ImportError
        Without SciPy (``pip install "gamma-loss[matching]"``).

    Notes
    -----
    If all gaps are equal, so are the margins, and the match is DPO or SimPO itself. If the weights
    are close to an exponential of the gap, only b and ``c e^d`` are determined: c is then 1, or at
    most 1e9 times the weight at the mean gap.

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
    """Choose gamma0 and tau by what they are to do with the gaps of a short base run.

    Finds the largest tau at which the exact margins of these gaps as one pool have the wanted
    standard deviation, or `match_logistic` the wanted beta factor. Give one of the two.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Gaps in reward units, with the beta that is going to be used, of a run without γ-PO such as
        a few hundred steps of DPO or SimPO. Of any library; copied to the host.
    margin_std : float, optional
        Wanted standard deviation of the margins, in reward units.
    beta_factor : float, optional
        Wanted b < 1: γ-PO weighs these pairs about as b times the beta would, see `match_logistic`.
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
    ImportError
        For ``beta_factor`` without SciPy, see `match_logistic`.

    Examples
    --------
    >>> import numpy as np
    >>> from gamma_loss import solve_margins
    >>> gaps = np.random.default_rng(0).normal(1.0, 3.0, 512)
    >>> settings = choose_settings(gaps, gamma0=2.0, margin_std=0.5)
    >>> print("tau = {tau:.2f}".format(**settings))
    tau = 2.73
    >>> print(f"{solve_margins(gaps, **settings).margins.std():.3f}")
    0.500
    >>> settings = choose_settings(gaps, gamma0=2.0, beta_factor=0.5)
    >>> print(f"{match_logistic(gaps, **settings).beta_factor:.3f}")
    0.500
    """
    gaps, centered = _on_host(reward_gaps), _checks.flag("centered", centered)
    if (margin_std is None) is (beta_factor is None):
        raise ValueError("give margin_std or beta_factor, one of the two")
    if gamma0 is None:
        gamma0 = float(np.median(gaps))
        if gamma0 <= 0:
            raise ValueError(f"gamma0 must be given where the median gap is not > 0: {gamma0:.3g}")
    gamma0 = _checks.number("gamma0", gamma0, above=0.0)

    if margin_std is not None:
        wanted = _checks.number("margin_std", margin_std, above=0.0)
        return {"gamma0": gamma0, "tau": _find_tau("margin_std", _margin_std, wanted, gaps, gamma0)}
    wanted = _checks.number("beta_factor", beta_factor, above=0.0, below=1.0)

    def negative_factor(gaps: Vector, gamma0: float, tau: float) -> float:
        return -match_logistic(gaps, gamma0=gamma0, tau=tau, centered=centered).beta_factor

    tau = _find_tau("beta_factor", negative_factor, -wanted, gaps, gamma0)
    return {"gamma0": gamma0, "tau": tau}


def _margin_std(gaps: Vector, gamma0: float, tau: float) -> float:
    return float(solve_margins(gaps, gamma0=gamma0, tau=tau).margins.std())


def _find_tau(
    name: str, measure: Callable[..., float], wanted: float, gaps: Vector, gamma0: float
) -> float:
    """Return the largest tau with ``measure(...) >= wanted``: scan κ, then bisect."""
    low, high, reached = _scan(measure, wanted, gaps, gamma0)
    if reached < wanted:
        raise ValueError(_explain(name, measure, wanted, gaps, gamma0, reached))
    for _ in range(40):
        middle = math.sqrt(low * high)
        is_reached = measure(gaps, gamma0, gamma0**2 / middle) >= wanted
        low, high = (low, middle) if is_reached else (middle, high)
    return float(gamma0**2 / high)


def _scan(
    measure: Callable[..., float], wanted: float, gaps: Vector, gamma0: float
) -> tuple[float, float, float]:
    """Return two neighbouring κ, the second the first that reaches it, and the largest measure."""
    most, low, high = -math.inf, 0.0, KAPPAS[0] / 10
    for kappa in KAPPAS[0.999 * gamma0 * _checks.MAX_A >= KAPPAS]:
        low, high = high, kappa
        most = max(most, measure(gaps, gamma0, gamma0**2 / kappa))
        if most >= wanted:
            break
    return low, high, most


def _explain(
    name: str, measure: Callable[..., float], wanted: float, gaps: Vector, gamma0: float,
    reached: float,
) -> str:  # fmt: skip
    """Say why no tau does it, and what another gamma0 does."""
    mean, std = float(gaps.mean()), float(gaps.std())
    bound = "at most" if name == "margin_std" else "at least"
    said = f"no tau gives {name} = {abs(wanted):g}: with gamma0 = {gamma0:g} it is {bound} "
    said += f"{abs(reached):.3g}. Your gaps (mean {mean:.3g}, standard deviation {std:.3g}) are "
    if std <= 1e-9 * np.abs(gaps).max():
        return said + "all equal, and so are their margins"
    where = "far below" if mean + 2 * std < gamma0 else "around"
    said += f"{'far above' if mean - 2 * std > gamma0 else where} gamma0; "
    if name == "margin_std" and wanted >= std:
        return said + f"margins differ less than the gaps: choose a margin_std below {std:.3g}"
    others = (gamma0 / 2, 2 * gamma0)
    lower, higher = (_scan(measure, wanted, gaps, other)[2] for other in others)
    if max(lower, higher) <= reached:
        return said + "half of it and twice its value do no better"
    verb, other, value = ("lower", others[0], lower) if lower > higher else (
        "raise", others[1], higher)  # fmt: skip
    return said + f"{verb} gamma0: gamma0 = {other:.3g} gives {abs(value):.3g}"


def _fit(z: Vector, logits: Vector) -> tuple[float, float, float, float]:
    """Fit ``c σ(d - b z)`` to weights σ(logits), z having mean 0 and deviation 1.

    Returns c, d, b and the unexplained share of the variance. The unknowns are the logarithm of the
    value at z = 0, ``t = log(1 + e^d)`` and b. As c → ∞ the match tends to an exponential of z, and
    t to 0, where the fit is well conditioned.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise ImportError(
            "match_logistic and choose_settings(beta_factor=) need SciPy: "
            'pip install "gamma-loss[matching]"'
        ) from None
    log_weights = -np.logaddexp(0.0, -logits)
    largest = float(log_weights.max())
    target = np.exp(log_weights - largest)

    def value(at: Vector) -> tuple[Vector, Vector, float]:
        top = -math.expm1(-at[1])  # σ(d)
        share = _sigmoid(at[1] + math.log(top) - at[2] * z)
        return math.exp(min(at[0], 50.0)) * share / top, share, top

    def errors(at: Vector) -> Vector:
        return value(at)[0] - target

    def jacobian(at: Vector) -> Vector:
        fitted, share, top = value(at)
        return np.stack([fitted, fitted * (top - share) / top, fitted * (share - 1) * z], 1)

    # One start is the straight line through the logits, the solution at κ = 0; the other is a
    # constant.
    trust = target * -np.expm1(log_weights) + 1e-12
    trust /= trust.sum()
    middle, level = trust @ z, trust @ logits
    slope = trust @ ((z - middle) * (logits - level)) / (trust @ (z - middle) ** 2)
    with np.errstate(over="ignore", invalid="ignore"):  # in steps that SciPy then refuses
        fits = [
            least_squares(
                errors, [math.log(target.mean()), max(np.logaddexp(0.0, at_0), 1e-6), fall],
                jacobian, bounds=([-np.inf, _MIN_T, -np.inf], np.inf), x_scale="jac",
                xtol=1e-14, ftol=1e-14, gtol=1e-14,
            )
            for at_0, fall in ((level - slope * middle, -slope), (-2.0, 0.0))
        ]  # fmt: skip
    fit = min(fits, key=lambda each: each.cost)
    height, t, b = map(float, fit.x)
    d, log_scale = math.log(math.expm1(min(t, 30.0))) + max(t - 30.0, 0.0), height + largest
    log_scale -= math.log(-math.expm1(-t))
    if t <= 2 * _MIN_T and log_scale < 0:  # an exponential: c = 1 serves as well
        d, log_scale = d + log_scale, 0.0
    variance = float(target.var())
    unexplained = 2 * float(fit.cost) / z.size / variance if variance > 0 else 0.0
    return math.exp(min(max(log_scale, -700.0), 700.0)), d, b, unexplained


def _sigmoid(x: Vector) -> Vector:
    return np.exp(-np.logaddexp(0.0, -x))


def _on_host(reward_gaps: Array) -> Vector:
    """Return the finite gaps as NumPy's float64."""
    _checks.floats(reward_gaps=reward_gaps)
    _checks.pairs(reward_gaps=reward_gaps)
    gaps: Vector = _checks.to_numpy("reward_gaps", reward_gaps).astype(np.float64)
    gaps = gaps[np.isfinite(gaps)]
    if not gaps.size:
        raise ValueError("reward_gaps must hold a finite gap, got none")
    return gaps

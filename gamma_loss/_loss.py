"""The losses as arithmetic on arrays; how margins are found is passed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from gamma_loss import _checks
from gamma_loss._arrays import (
    Array,
    Namespace,
    as_floats,
    detach,
    sigmoid,
    softplus,
    solver_namespace,
)
from gamma_loss._spread import WHOLE, Spread

REDUCTIONS = ("mean", "sum", "none")

Solve: TypeAlias = Callable[[Array], tuple[Array, Array, Array]]  # gaps to margins, ν, certificate


class Logps(NamedTuple):
    """What a loss is about: log-probabilities or, with nothing rejected, reward gaps."""

    chosen: Array
    rejected: Array | None = None
    reference_chosen: Array | None = None
    reference_rejected: Array | None = None


class LossSettings(NamedTuple):
    """What a loss does with the margins, and the problem that they solve."""

    beta: float
    gamma0: float
    tau: float
    tilt: float  # c of the loss ℓ(s) + c s: what both kinds of label smoothing are
    centered: bool
    reduction: str


class Rows(NamedTuple):
    """One number for each pair: what a fused kernel writes, in this order."""

    margins: Array
    shifts: Array
    reward_gaps: Array
    pair_weights: Array
    slopes: Array  # gradient of the loss with respect to the chosen; minus that of the rejected
    chosen_rewards: Array
    rejected_rewards: Array


class GammaLossAux(NamedTuple):
    """What a γ-PO loss knows besides its value. All arrays are constants for autograd.

    Attributes
    ----------
    margins : array, shape (pairs,)
        γ_i in reward units; gamma0 for a masked pair, NaN where the gap is not finite.
    shifts : array, shape (pairs,)
        γ_i - gamma0: what the centred form subtracts, and what Theorem 3.1 is about.
    reward_gaps, chosen_rewards, rejected_rewards : array, shape (pairs,)
        In reward units, as given or computed from log-probabilities.
    pair_weights : array, shape (pairs,)
        Minus the derivative of a pair's loss with respect to its reward gap, 0 for a masked pair.
        Without label smoothing σ(margin_i - g_i): how strongly the pair trains.
    residual, multiplier : array, shape ()
        The certificate and ν of the margin solve, see `MarginSolution`.
    mask : boolean array, shape (pairs,)
        Which pairs count.
    """

    margins: Array
    shifts: Array
    reward_gaps: Array
    chosen_rewards: Array
    rejected_rewards: Array
    pair_weights: Array
    residual: Array
    multiplier: Array
    mask: Array


def tilt_of(label_smoothing: float, robust: bool) -> float:
    """Return the c of ``ℓ(s) + c s``: what both kinds of smoothing are, as ℓ(-s) = ℓ(s) + s."""
    epsilon = _checks.number("label_smoothing", label_smoothing, least=0, below=0.5)
    return -epsilon / (1 - 2 * epsilon) if _checks.flag("robust", robust) else epsilon


def logistic(xp: Namespace, s: Array, tilt: float) -> Array:
    """Return ``-log σ(s) + tilt s``."""
    loss = softplus(xp, -s)
    return loss + tilt * s if tilt else loss


def slopes_of(aux: GammaLossAux, mask: Array | None, settings: LossSettings) -> Array:
    """Return the derivatives of a loss with respect to the chosen log-probabilities."""
    slopes = -settings.beta * aux.pair_weights
    return slopes / _count(mask, slopes) if settings.reduction == "mean" else slopes


def _count(mask: Array | None, like: Array, spread: Spread = WHOLE) -> Array | int:
    """Return how many pairs count, or 1 if there are none."""
    if mask is None and spread is WHOLE:
        return max(like.shape[0], 1)
    xp = solver_namespace(like)
    (pairs,) = spread.sums(xp.sum(xp.ones_like(like) if mask is None else as_floats(mask, like)))
    return xp.maximum(pairs, 0 * pairs + 1)


def array_loss(
    logps: Logps, mask: Array | None, settings: LossSettings, solve: Solve, spread: Spread
) -> tuple[Array, GammaLossAux]:
    """Compute a loss in array operations. ``solve`` finds the margins of the gaps."""
    beta, gamma0, _, tilt, centered, reduction = settings
    chosen, rejected, *references = logps
    xp = solver_namespace(chosen)
    if rejected is None:
        chosen_rewards, rejected_rewards = chosen, xp.zeros_like(chosen)
    else:
        if references[0] is not None:
            chosen, rejected = chosen - references[0], rejected - references[1]
        chosen_rewards, rejected_rewards = beta * chosen, beta * rejected
    gaps = chosen_rewards - rejected_rewards
    margins, multiplier, residual = solve(gaps)
    shifts = margins - gamma0

    def counted(values: Array) -> Array:
        return values if mask is None else xp.where(mask, values, xp.zeros_like(values))

    # Masked before the loss, so that a masked NaN leaves no NaN in the gradient either.
    s = counted(gaps) - (shifts if centered else margins)
    losses = counted(logistic(xp, s, tilt))
    pair_weights = counted(sigmoid(-detach(s)) - tilt)
    loss = losses if reduction == "none" else xp.sum(losses)
    if reduction == "mean":
        loss = spread.parts * loss / _count(mask, losses, spread)
    return loss, GammaLossAux(
        margins=margins,
        shifts=shifts,
        reward_gaps=detach(gaps),
        chosen_rewards=detach(chosen_rewards),
        rejected_rewards=detach(rejected_rewards),
        pair_weights=pair_weights,
        residual=residual,
        multiplier=multiplier,
        mask=xp.ones_like(gaps, dtype=xp.bool) if mask is None else mask,
    )

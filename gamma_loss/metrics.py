"""Scalars for a training log."""

from __future__ import annotations

from gamma_loss._backend import Array, get_backend
from gamma_loss.losses import GammaLossAux
from gamma_loss.smoothing import label_smoothing_from_shift


def metrics(aux: GammaLossAux) -> dict[str, Array]:
    """Return scalars for a log, as arrays on the loss's device: nothing is copied to the host.

    Means are over the unmasked pairs of the batch; a pair that is not finite makes them NaN, as it
    does the loss. With every pair masked they are 0, and the margins' extremes gamma0. Of an empty
    batch, which one rank of a group may have, they are 0, and the extremes NaN.

    Parameters
    ----------
    aux : GammaLossAux
        Second result of a loss; anything else is a TypeError.

    Returns
    -------
    dict of str to array, shape ()
        - ``rewards/chosen``, ``rewards/rejected``: mean rewards (reward units).
        - ``rewards/margins``: mean reward gap, under TRL's name.
        - ``rewards/accuracies``: share of pairs with a positive gap.
        - ``gamma/mean``, ``gamma/min``, ``gamma/max``: of the target margins (reward units).
        - ``gamma/kl``: KL of the batch's shares of the margin to uniform (nats).
        - ``gamma/effective_pairs``: (Σ w)² / Σ w² of the pair weights, how many pairs train.
        - ``gamma/implied_smoothing``: mean ε that gives cDPO the slope of the shifted loss.
        - ``gamma/pairs``: share of the batch's pairs that take part.
        - ``gamma/error_bound``: the error bound of the solve, see `MarginSolution`.

    Examples
    --------
    >>> import numpy as np
    >>> from gamma_loss import gamma_preference_loss
    >>> loss, aux = gamma_preference_loss(np.array([-1.0, 0.0, 3.0]), gamma0=1.0, tau=1.0)
    >>> logs = metrics(aux)
    >>> round(float(logs["rewards/accuracies"]), 3), round(float(logs["gamma/max"]), 3)
    (0.333, 1.43)
    """
    if not isinstance(aux, GammaLossAux):
        raise TypeError(f"aux must be a GammaLossAux, got {type(aux).__name__}")
    xp = get_backend(aux.margins)
    zero, one = xp.zeros_like(aux.margins), xp.ones_like(aux.error_bound)
    pairs = xp.sum(xp.astype(aux.mask, zero.dtype))
    count = xp.maximum(pairs, one)

    def mean(values: Array) -> Array:
        return xp.sum(xp.where(aux.mask, values, zero)) / count

    shown, infinity = aux.mask | ~xp.any(aux.mask), xp.full_like(zero, float("inf"))
    if not zero.shape[0]:
        least = largest = one * float("nan")
    else:
        least = xp.min(xp.where(shown, aux.margins, infinity))
        largest = xp.max(xp.where(shown, aux.margins, -infinity))
    mean_margin = mean(aux.margins)
    share = aux.margins / xp.where(mean_margin == 0, one, mean_margin)  # n p_i, mean 1
    tiny = xp.full_like(share, xp.finfo(share.dtype).smallest_normal)
    weights = xp.sum(aux.pair_weights)
    squares = xp.sum(aux.pair_weights * aux.pair_weights)
    smoothing = label_smoothing_from_shift(
        xp.where(aux.mask, aux.reward_gaps, zero), aux.shifts, kind="conservative", match="slope"
    )
    return {
        "rewards/chosen": mean(aux.chosen_rewards),
        "rewards/rejected": mean(aux.rejected_rewards),
        "rewards/margins": mean(aux.reward_gaps),
        "rewards/accuracies": mean(xp.astype(aux.reward_gaps > 0, zero.dtype)),
        "gamma/mean": mean_margin,
        "gamma/min": least,
        "gamma/max": largest,
        "gamma/kl": mean(share * xp.log(xp.maximum(share, tiny))),
        "gamma/effective_pairs": weights * weights / xp.where(squares == 0, one, squares),
        "gamma/implied_smoothing": mean(smoothing),
        "gamma/pairs": pairs / max(zero.shape[0], 1),
        "gamma/error_bound": aux.error_bound,
    }

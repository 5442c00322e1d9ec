"""The computations behind the public functions: checks, the choice of a solver, and the loss."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from gamma_loss import _checks, _pool, _solver
from gamma_loss._backend import Array
from gamma_loss._comm import Comm, as_comm, broadcast_error
from gamma_loss._pool import PoolInputs, check_inputs
from gamma_loss._settings import LossSettings, loss_settings


class GammaLossAux(NamedTuple):
    """The diagnostics of a γ-PO loss: arrays of their own, and constants for autograd.

    Attributes
    ----------
    margins : array, shape (pairs,)
        γ_i in reward units; gamma0 for a masked pair, NaN where the gap is not finite.
    shifts : array, shape (pairs,)
        γ_i - gamma0: what the centred form subtracts, and the subject of Theorem 3.1.
    reward_gaps, chosen_rewards, rejected_rewards : array, shape (pairs,)
        In reward units, as given or computed from log-probabilities.
    pair_weights : array, shape (pairs,)
        Minus the derivative of a pair's loss with respect to its reward gap, 0 for a masked pair.
        Without label smoothing it is σ(margin_i - g_i), times the weight of the pair.
    error_bound, multiplier : array, shape ()
        The error bound and ν of the margin solve, see `MarginSolution`.
    mask : boolean array, shape (pairs,)
        True for the pairs that take part.
    """

    margins: Array
    shifts: Array
    reward_gaps: Array
    chosen_rewards: Array
    rejected_rewards: Array
    pair_weights: Array
    error_bound: Array
    multiplier: Array
    mask: Array


def solve(
    reward_gaps: Array, options: dict[str, Any], group: Any, **inputs: Any
) -> _solver.Solution:
    """Check the arguments of `solve_margins`, and return margins, ν and the error bound."""
    try:
        settings = loss_settings(**options)
        xp, (gaps,) = _checks.floats(reward_gaps=reward_gaps)
        _checks.pairs(group is not None, reward_gaps=gaps)
        pool = check_inputs("reward_gaps", gaps, xp, group, **inputs)
        comm = as_comm(group, gaps, xp, settings.impl)
    except Exception as error:
        broadcast_error(group, error)
        raise
    return solve_pool(xp, gaps, pool, settings, comm)


def solve_pool(
    xp: Any, gaps: Array, inputs: PoolInputs, settings: LossSettings, comm: Comm | None
) -> _solver.Solution:
    """Return the margins of the batch, ν and the error bound."""
    solver = _pool.solve_eagerly
    if comm is not None:
        solver = functools.partial(_pool.solve_shards, comm=comm)
    elif xp.library == "torch":
        from gamma_loss import _operator

        solver = _operator.choose(xp, gaps, inputs, settings)
        if solver is _operator.solve_via_numpy:
            return _operator.solve_via_numpy(gaps, inputs, settings.gamma0, settings.tau)
    return _pool.solve_in(solver, xp, gaps, inputs, settings.gamma0, settings.tau)


def loss(
    logps: dict[str, Array],
    *,
    context: Any = None,
    context_mask: Array | None = None,
    mask: Array | None = None,
    weights: Array | None = None,
    group: Any = None,
    **options: Any,
) -> tuple[Array, GammaLossAux]:
    """Check the arguments, and compute a loss.

    ``logps`` has the arguments' names: gaps alone; chosen and rejected; and their references.
    """
    try:
        settings = loss_settings(**options)
        xp, arrays = _checks.floats(**logps)
        _checks.pairs(group is not None, **logps)
        name, first = next(iter(logps)), arrays[0]
        inputs = check_inputs(name, first, xp, group, context, context_mask, mask, weights)
        to_compare = {} if group is None else vars(settings)
        comm = as_comm(group, first, xp, settings.impl, **to_compare)
    except Exception as error:
        broadcast_error(group, error)
        raise
    with xp.ignore_fp_errors():
        return _loss(xp, arrays, inputs, settings, comm)


def _loss(
    xp: Any, logps: list[Array], inputs: PoolInputs, settings: LossSettings, comm: Any
) -> tuple[Array, GammaLossAux]:
    """Compute a loss: rewards, gaps, margins, and the logistic loss of their difference."""
    if len(logps) == 1:
        gaps = 1 * logps[0]  # no output may share memory with an input
        chosen_rewards, rejected_rewards = 1 * xp.detach(gaps), xp.zeros_like(gaps)
    else:
        chosen, rejected, *references = logps
        if references:
            chosen = chosen - xp.detach(references[0])
            rejected = rejected - xp.detach(references[1])
        gaps = settings.beta * (chosen - rejected)
        chosen_rewards = settings.beta * xp.detach(chosen)
        rejected_rewards = settings.beta * xp.detach(rejected)
    margins, multiplier, error_bound = solve_pool(xp, gaps, inputs, settings, comm)
    shifts = margins - settings.gamma0
    mask, weights = inputs.mask, inputs.weights
    if weights is not None:
        mask = weights != 0 if mask is None else mask & (weights != 0)

    def counted(values: Array) -> Array:
        return values if mask is None else xp.where(mask, values, xp.zeros_like(values))

    # Masked before the loss, so that a masked NaN leaves no NaN in the gradient either.
    deficit = counted((shifts if settings.centered else margins) - gaps)
    coef = settings.linear_coef
    losses, pair_weights = counted(logistic(xp, deficit, coef)), xp.sigmoid(xp.detach(deficit))
    pair_weights = counted(pair_weights - coef if coef else pair_weights)
    if weights is not None:
        losses, pair_weights = losses * counted(weights), pair_weights * counted(weights)
    if settings.reduction == "none":
        loss = losses
    elif settings.reduction == "sum":
        loss = xp.sum(losses)
    elif mask is None and comm is None:
        loss = xp.mean(losses)
    else:
        loss = xp.sum(losses) / _total_weight(xp, losses, mask, weights, comm)
    return loss, GammaLossAux(
        margins=margins,
        shifts=shifts,
        reward_gaps=xp.detach(gaps),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        pair_weights=pair_weights,
        error_bound=error_bound,
        multiplier=multiplier,
        mask=xp.ones_like(gaps, dtype=xp.bool) if mask is None else mask & True,
    )


def _total_weight(
    xp: Any, like: Array, mask: Array | None, weights: Array | None, comm: Any
) -> Array | float:
    """Return the weight of all pairs that count, over the size of a group; 1 if there is none."""
    ones = xp.ones_like(like) if mask is None else xp.astype(mask, like.dtype)
    total = xp.sum(ones if weights is None else xp.where(mask, weights, 0 * ones))
    if comm is not None:
        (total,) = comm.all_reduce_sum(total)
        total = total / comm.size
    return xp.where(total > 0, total, xp.ones_like(total))


def logistic(xp: Any, deficit: Array, linear_coef: float) -> Array:
    """Return ``-log σ(-deficit) - linear_coef deficit``."""
    loss = xp.softplus(deficit)
    return loss - linear_coef * deficit if linear_coef else loss

"""The losses: -log σ(reward gap - margin), with margins that the pool of pairs decides."""

from __future__ import annotations

from typing import Any, NamedTuple

from gamma_loss import _checks
from gamma_loss._arrays import Array, Namespace, detach, sigmoid, softplus
from gamma_loss.margins import check_pool, choose_implementation, over_processes, solve_by

REDUCTIONS = ("mean", "sum", "none")


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


def gamma_dpo_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
    gamma0: float,
    tau: float,
    centered: bool = True,
    context: Array | None = None,
    context_mask: Array | None = None,
    mask: Array | None = None,
    label_smoothing: float = 0.0,
    robust: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
    group: Any = None,
) -> tuple[Array, GammaLossAux]:
    """γ-DPO: DPO in which every pair has its own target margin.

        r = β (log π - log π_ref),    g_i = r_chosen - r_rejected,    ℓ_i = -log σ(g_i - (γ_i - γ0))

    with γ from `solve_margins` as constants. Centred on γ0, as in the published code, since DPO
    has no margin of its own; ``centered=False`` subtracts the whole γ_i.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps : array, shape (pairs,)
        Log-probabilities (nats) under the policy, **summed** over each response.
    reference_chosen_logps, reference_rejected_logps : array, shape (pairs,)
        The same under the frozen reference model.
    beta : float
        Reward units per nat, > 0.
    gamma0, tau : float
        See `solve_margins`.
    centered : bool
        Whether the margin is γ_i - γ0 (True) or γ_i.
    context, context_mask, mask : array, optional
        See `solve_margins`. A masked pair takes no part in the solve, the loss or the mean.
    label_smoothing : float
        See `preference_loss`.
    robust : bool
        See `preference_loss`.
    reduction : {"mean", "sum", "none"}
        Over the unmasked pairs. "none" gives one loss a pair, 0 for a masked one.
    impl : {"auto", "eager", "compile", "triton"}
        See `solve_margins`.
    group : torch.distributed.ProcessGroup or, for JAX, str, optional
        The ranks that share the pool, see `solve_margins`. The "mean" is then over the pairs of all
        of them: each rank's loss is the sum over its own pairs, divided by all unmasked pairs and
        multiplied by the number of ranks. So the ranks' average, which is what DDP and FSDP take of
        gradients, is exactly that of one process with all pairs; with as many pairs on each rank it
        is the mean over the rank's own.

    Returns
    -------
    loss : array
        Scalar, or shape (pairs,) with ``reduction="none"``; float32 or, for float64 input, float64.
    aux : GammaLossAux
        Margins, rewards, pair weights and the solve's certificate.

    Raises
    ------
    TypeError, ValueError
        As `solve_margins` does, naming the argument.

    Notes
    -----
    A pair with a log-probability that is not finite has a loss that is not finite, and so has the
    mean: monitors and loss scalers see it. Its NaN reaches no other pair.

    References
    ----------
    Sun et al., Findings of ACL 2025, arXiv:2506.03690; Rafailov et al., *Direct Preference
    Optimization*, NeurIPS 2023, arXiv:2305.18290.

    Examples
    --------
    >>> import numpy as np
    >>> chosen, rejected = np.array([-10.0, -12.0, -9.0]), np.array([-14.0, -12.5, -8.0])
    >>> reference = np.array([-12.0, -12.0, -9.0])
    >>> loss, aux = gamma_dpo_loss(
    ...     chosen, rejected, reference, reference, beta=1.0, gamma0=1.0, tau=0.5
    ... )
    >>> aux.reward_gaps
    array([ 4. ,  0.5, -1. ])
    >>> aux.margins.round(3)
    array([1.824, 0.733, 0.443])
    >>> round(float(loss), 4)
    0.4538
    """
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    return _gamma_loss(
        logps, beta=beta, gamma0=gamma0, tau=tau, centered=centered,
        context=context, context_mask=context_mask, mask=mask,
        label_smoothing=label_smoothing, robust=robust, reduction=reduction, impl=impl, group=group,
    )  # fmt: skip


def gamma_simpo_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    *,
    beta: float,
    gamma0: float,
    tau: float,
    centered: bool = False,
    context: Array | None = None,
    context_mask: Array | None = None,
    mask: Array | None = None,
    label_smoothing: float = 0.0,
    robust: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
    group: Any = None,
) -> tuple[Array, GammaLossAux]:
    """γ-SimPO: SimPO in which every pair has its own target margin.

        r = β log π(y) / |y|,    g_i = r_chosen - r_rejected,    ℓ_i = -log σ(g_i - γ_i)

    with γ from `solve_margins` as constants. By the envelope theorem the gradient is exactly that
    of the objective minimised over the margins as well.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps : array, shape (pairs,)
        Log-probabilities (nats) under the policy, **averaged** over each response's tokens.
    beta : float
        Reward units per nat, > 0.
    gamma0 : float
        Mean target margin in reward units: ``beta * gamma_beta_ratio`` in SimPO's terms.
    tau : float
        See `solve_margins`.
    centered : bool
        Whether the margin is γ_i - γ0 or γ_i (False).
    context, context_mask, mask : array, optional
        See `solve_margins`.
    label_smoothing : float
        See `preference_loss`.
    robust : bool
        See `preference_loss`.
    reduction : {"mean", "sum", "none"}
        See `gamma_dpo_loss`.
    impl : {"auto", "eager", "compile", "triton"}
        See `solve_margins`.
    group : torch.distributed.ProcessGroup or, for JAX, str, optional
        See `gamma_dpo_loss`.

    Returns
    -------
    loss : array
    aux : GammaLossAux
        Both as for `gamma_dpo_loss`, which also tells of dtypes, errors and bad input.

    Raises
    ------
    TypeError, ValueError
        As `solve_margins` does, naming the argument.

    References
    ----------
    Sun et al., Findings of ACL 2025, arXiv:2506.03690; Meng et al., *SimPO*, NeurIPS 2024,
    arXiv:2405.14734.

    Examples
    --------
    >>> import numpy as np
    >>> from gamma_loss import PUBLISHED_SETTINGS
    >>> chosen, rejected = np.array([-0.8, -0.9]), np.array([-1.4, -0.8])
    >>> loss, aux = gamma_simpo_loss(
    ...     chosen, rejected, **PUBLISHED_SETTINGS["llama-3-8b-instruct"]
    ... )
    >>> aux.margins.round(3)
    array([4.624, 3.376])
    >>> round(float(loss), 4)
    2.307
    """
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    return _gamma_loss(
        logps, beta=beta, gamma0=gamma0, tau=tau, centered=centered,
        context=context, context_mask=context_mask, mask=mask,
        label_smoothing=label_smoothing, robust=robust, reduction=reduction, impl=impl, group=group,
    )  # fmt: skip


def gamma_preference_loss(
    reward_gaps: Array,
    *,
    gamma0: float,
    tau: float,
    centered: bool = False,
    context: Array | None = None,
    context_mask: Array | None = None,
    mask: Array | None = None,
    label_smoothing: float = 0.0,
    robust: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
    group: Any = None,
) -> tuple[Array, GammaLossAux]:
    """γ-PO on reward gaps from any source: a reward model, or another margin-based method.

    ``-log σ(g_i - γ_i)``, or with ``centered=True`` ``-log σ(g_i - (γ_i - γ0))``, with γ from
    `solve_margins` as constants.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Reward of the chosen minus reward of the rejected response, in reward units.
    gamma0, tau : float
        See `solve_margins`.
    centered : bool
        Whether the margin is γ_i - γ0 or γ_i (False).
    context, context_mask, mask : array, optional
        See `solve_margins`.
    label_smoothing : float
        See `preference_loss`.
    robust : bool
        See `preference_loss`.
    reduction : {"mean", "sum", "none"}
        See `gamma_dpo_loss`.
    impl : {"auto", "eager", "compile", "triton"}
        See `solve_margins`.
    group : torch.distributed.ProcessGroup or, for JAX, str, optional
        See `gamma_dpo_loss`.

    Returns
    -------
    loss : array
    aux : GammaLossAux
        As for `gamma_dpo_loss`. Gaps alone do not tell the two rewards (which a preference model
        knows only up to a constant for each prompt), so they are measured from the rejected
        response: ``chosen_rewards`` are the gaps and ``rejected_rewards`` 0.

    Raises
    ------
    TypeError, ValueError
        As `solve_margins` does, naming the argument.

    References
    ----------
    Sun et al., Findings of ACL 2025, arXiv:2506.03690.

    Examples
    --------
    >>> import numpy as np
    >>> loss, aux = gamma_preference_loss(np.array([-1.0, 0.0, 3.0]), gamma0=1.0, tau=1.0)
    >>> round(float(loss), 4)
    1.0936
    >>> (aux.pair_weights / 3).round(3)  # minus the gradient of the mean with respect to the gaps
    array([0.283, 0.233, 0.057])
    """
    return _gamma_loss(
        {"reward_gaps": reward_gaps}, beta=1.0, gamma0=gamma0, tau=tau, centered=centered,
        context=context, context_mask=context_mask, mask=mask,
        label_smoothing=label_smoothing, robust=robust, reduction=reduction, impl=impl, group=group,
    )  # fmt: skip


def preference_loss(
    reward_gaps: Array,
    margins: Array | float = 0.0,
    *,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Array:
    """Logistic preference loss of each pair, with a margin and label smoothing.

    With s = g - margin and ℓ(s) = -log σ(s):

        plain           ℓ(s)
        conservative    (1 - ε) ℓ(s) + ε ℓ(-s)
        robust          ((1 - ε) ℓ(s) - ε ℓ(-s)) / (1 - 2ε)

    ``preference_loss(gaps)`` is DPO's sigmoid loss, a positive constant margin SimPO's.

    Parameters
    ----------
    reward_gaps : array of any shape
        In reward units. Half precision is upcast to float32.
    margins : array of the same shape, or float
        In reward units. Gradients flow through it if it carries any.
    label_smoothing : float
        ε in [0, 0.5): the share of labels taken to be flipped.
    robust : bool
        Whether ε enters as rDPO's unbiased estimate (True) or as cDPO's mixture.

    Returns
    -------
    array
        One loss for each gap, in the dtype of the gaps.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, library, shape or ε, naming the argument.

    References
    ----------
    cDPO: Mitchell, *A note on DPO with noisy preferences*, 2023. rDPO: Chowdhury et al., *Provably
    robust DPO*, ICML 2024, arXiv:2403.00409.

    Examples
    --------
    >>> import numpy as np
    >>> preference_loss(np.array([-1.0, 0.0, 1.0])).round(4)
    array([1.3133, 0.6931, 0.3133])
    >>> preference_loss(np.array([1.0]), 0.5, label_smoothing=0.1, robust=True).round(4)
    array([0.4116])
    """
    xp, (gaps,) = _checks.floats(reward_gaps=reward_gaps)
    if not isinstance(margins, float | int):
        _, (_, margins) = _checks.floats(reward_gaps=gaps, margins=margins)
        if margins.shape != gaps.shape:
            raise ValueError(
                f"margins must have the shape of reward_gaps, {tuple(gaps.shape)}, "
                f"got {tuple(margins.shape)}"
            )
    tilt = _tilt(label_smoothing, robust)
    return _logistic(xp, gaps - margins, tilt)


def _tilt(label_smoothing: float, robust: bool) -> float:
    """Return the c of ``ℓ(s) + c s``: what both kinds of smoothing are, as ℓ(-s) = ℓ(s) + s."""
    epsilon = _checks.number("label_smoothing", label_smoothing, least=0, below=0.5)
    return -epsilon / (1 - 2 * epsilon) if robust else epsilon


def _logistic(xp: Namespace, s: Array, tilt: float) -> Array:
    loss = softplus(xp, -s)
    return loss + tilt * s if tilt else loss


def _gamma_loss(
    logps: dict[str, Array],
    *,
    beta: float,
    gamma0: float,
    tau: float,
    centered: bool,
    context: Array | None,
    context_mask: Array | None,
    mask: Array | None,
    label_smoothing: float,
    robust: bool,
    reduction: str,
    impl: str,
    group: Any = None,
) -> tuple[Array, GammaLossAux]:
    """Check, and choose between one fused operator and `array_loss`.

    ``logps`` has the argument names of its arrays: gaps alone; chosen, rejected; and references.
    """
    beta = _checks.number("beta", beta, above=0)
    gamma0 = _checks.number("gamma0", gamma0, least=0)
    tau = _checks.number("tau", tau, above=0)
    _checks.choice("reduction", reduction, REDUCTIONS)
    tilt = _tilt(label_smoothing, robust)
    xp = _checks.real(**logps)
    shared = group is not None
    _checks.pairs(shared, **logps)
    size = check_pool(xp, *next(iter(logps.items())), mask, context, context_mask, shared)
    arrays = (*logps.values(), None, None, None)[:4]
    pool = (mask, context, context_mask)
    settings = (beta, gamma0, tau, tilt, bool(centered), reduction)
    impl = choose_implementation(impl, arrays[0], size, gamma0, tau)
    if impl == "triton" and not shared:
        from gamma_loss import _operators

        if _operators.can_fuse(size):
            loss, rows, certificate, mask = _operators.fused_loss(*arrays, *pool, *settings)
            margins, shifts, gaps, weights, _, _, chosen, rejected = rows.unbind()
            multiplier, residual = certificate.unbind()
            return loss, GammaLossAux(
                margins, shifts, gaps, chosen, rejected, weights, residual, multiplier, mask
            )
    upcast: Any = [None if array is None else _checks.upcast(xp, array) for array in arrays]
    more: Any = (*pool, *settings, impl, group)
    return array_loss(xp, *upcast, *more)


def array_loss(
    xp: Namespace,
    chosen: Array,
    rejected: Array | None,
    reference_chosen: Array | None,
    reference_rejected: Array | None,
    mask: Array | None,
    context: Array | None,
    context_mask: Array | None,
    beta: float,
    gamma0: float,
    tau: float,
    tilt: float,
    centered: bool,
    reduction: str,
    impl: str,
    group: Any = None,
) -> tuple[Array, GammaLossAux]:
    """Compute a loss in array-API operations, its margins by an implementation."""
    if rejected is None:
        chosen_rewards, rejected_rewards = chosen, xp.zeros_like(chosen)
    else:
        if reference_chosen is not None:
            chosen, rejected = chosen - reference_chosen, rejected - reference_rejected
        chosen_rewards, rejected_rewards = beta * chosen, beta * rejected
    gaps = chosen_rewards - rejected_rewards
    margins, multiplier, residual = solve_by(
        impl, gaps, mask, context, context_mask, gamma0, tau, group
    )
    shifts = margins - gamma0
    if mask is None:
        mask = xp.ones_like(gaps, dtype=xp.bool)

    # Masked before the loss, so that a masked NaN leaves no NaN in the gradient either.
    zero = xp.zeros_like(gaps)
    s = xp.where(mask, gaps, zero) - (shifts if centered else margins)
    losses = xp.where(mask, _logistic(xp, s, tilt), zero)
    pair_weights = xp.where(mask, sigmoid(xp, -detach(s)) - tilt, zero)
    loss = losses if reduction == "none" else xp.sum(losses)
    if reduction == "mean":
        counted = xp.sum(xp.astype(mask, losses.dtype))
        if group is not None:
            loss, counted = over_processes(gaps).mean(loss, counted, group)
        loss = loss / xp.maximum(counted, xp.ones_like(counted))
    return loss, GammaLossAux(
        margins=margins,
        shifts=shifts,
        reward_gaps=detach(gaps),
        chosen_rewards=detach(chosen_rewards),
        rejected_rewards=detach(rejected_rewards),
        pair_weights=pair_weights,
        residual=residual,
        multiplier=multiplier,
        mask=mask,
    )

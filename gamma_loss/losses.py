"""The losses: -log σ(reward gap - margin), with margins that the pool of pairs decides."""

from __future__ import annotations

from typing import Any

from gamma_loss import _checks, _dispatch
from gamma_loss._arrays import Array, quiet
from gamma_loss._loss import (
    REDUCTIONS,
    GammaLossAux,
    Logps,
    LossSettings,
    array_loss,
    logistic,
    tilt_of,
)
from gamma_loss._pool import Beside, check
from gamma_loss._spread import WHOLE

__all__ = [
    "GammaLossAux",
    "gamma_dpo_loss",
    "gamma_preference_loss",
    "gamma_simpo_loss",
    "preference_loss",
]


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
        logps, Beside(mask, context, context_mask),
        beta=beta, gamma0=gamma0, tau=tau, centered=centered, label_smoothing=label_smoothing,
        robust=robust, reduction=reduction, impl=impl, group=group,
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
        logps, Beside(mask, context, context_mask),
        beta=beta, gamma0=gamma0, tau=tau, centered=centered, label_smoothing=label_smoothing,
        robust=robust, reduction=reduction, impl=impl, group=group,
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
        {"reward_gaps": reward_gaps}, Beside(mask, context, context_mask),
        beta=1.0, gamma0=gamma0, tau=tau, centered=centered, label_smoothing=label_smoothing,
        robust=robust, reduction=reduction, impl=impl, group=group,
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
        One loss for each gap; float64 where the gaps or the margins are, else float32.

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
    margins = _checks.number_or_array("margins", margins, "reward_gaps", gaps)
    tilt = tilt_of(label_smoothing, robust)
    with quiet(gaps):
        return logistic(xp, gaps - margins, tilt)


def _gamma_loss(
    logps: dict[str, Array],
    beside: Beside,
    *,
    beta: float,
    gamma0: float,
    tau: float,
    centered: bool,
    label_smoothing: float,
    robust: bool,
    reduction: str,
    impl: str,
    group: Any,
) -> tuple[Array, GammaLossAux]:
    """Check, and choose between one fused operator and array operations.

    ``logps`` has the argument names of its arrays: gaps alone; chosen, rejected; and references.
    """
    try:
        beta = _checks.number("beta", beta, above=0)
        _checks.choice("reduction", reduction, REDUCTIONS)
        tilt, centered = tilt_of(label_smoothing, robust), _checks.flag("centered", centered)
        xp = _checks.real(**logps)
        _checks.pairs(group is not None, **logps)
        name, first = next(iter(logps.items()))
        parts = _dispatch.join(
            group, first, beta=beta, centered=centered, reduction=reduction,
            label_smoothing=float(label_smoothing), robust=robust,
        )  # fmt: skip
        problem = check(name, first, beside, gamma0=gamma0, tau=tau, group=parts)
        settings = LossSettings(beta, problem.gamma0, problem.tau, tilt, centered, reduction)
        impl = _dispatch.choose(impl, first, problem)
    except Exception as error:
        _dispatch.fail(group, error)
        raise
    if impl == "triton":
        from gamma_loss._torch import operators

        if operators.can_fuse(problem.size):
            return operators.fused_loss(Logps(*logps.values()), problem.beside, settings)
    upcast = Logps(*(_checks.upcast(xp, array) for array in logps.values()))
    if impl == "host":
        from gamma_loss._torch import host

        return host.loss(upcast, problem, settings)
    with quiet(first):
        return array_loss(
            upcast,
            problem.beside.mask,
            settings,
            solve=lambda gaps: _dispatch.solve(impl, gaps, problem),
            spread=problem.group or WHOLE,
        )

"""The losses: -log σ(reward gap - margin), with margins that the pool of pairs decides."""

from __future__ import annotations

from typing import Any

from gamma_loss import _checks, _compute
from gamma_loss._backend import Array, in_dynamo
from gamma_loss._compute import GammaLossAux as GammaLossAux
from gamma_loss._pool import split_queue
from gamma_loss._settings import SHARED, documented, linear_coef


@documented("beta", *SHARED)
def gamma_dpo_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    *,
    beta: float,
    centered: bool = True,
    **options: Any,
) -> tuple[Array, GammaLossAux]:
    """γ-DPO: return the loss of DPO with a target margin for each pair, and diagnostics.

        r = β (log π - log π_ref),    g_i = r_chosen - r_rejected,    ℓ_i = -log σ(g_i - (γ_i - γ0))

    with γ from `solve_margins` as constants. The loss is centred on γ0, as in the published code,
    since DPO has no margin of its own; ``centered=False`` subtracts the whole γ_i. γ-DPO is by Sun
    et al., Findings of ACL 2025, arXiv:2506.03690; DPO by Rafailov et al., NeurIPS 2023,
    arXiv:2305.18290.

    A log-probability that is not finite makes the loss of its pair and the mean not finite, so that
    monitors and loss scalers see it. It changes the margin of no other pair.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps : array, shape (pairs,)
        Log-probabilities (nats) under the policy, **summed** over each response.
    reference_chosen_logps, reference_rejected_logps : array, shape (pairs,)
        The same under the frozen reference model. Constants: no gradient reaches them.
    {parameters}

    {returns}

    Examples
    --------
    >>> import numpy as np
    >>> chosen, rejected = np.array([-10.0, -12.0, -9.0]), np.array([-14.0, -12.5, -8.0])
    >>> logps = chosen, rejected, np.full(3, -12.0), np.full(3, -12.0)
    >>> loss, aux = gamma_dpo_loss(*logps, beta=1.0, gamma0=1.0, tau=0.5)
    >>> round(float(loss), 4), aux.margins.round(3)
    (0.4538, array([1.824, 0.733, 0.443]))
    """
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    return _loss_of(logps, beta=beta, centered=centered, **options)


@documented("beta", *SHARED)
def gamma_simpo_loss(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    *,
    beta: float,
    centered: bool = False,
    **options: Any,
) -> tuple[Array, GammaLossAux]:
    """γ-SimPO: return the loss of SimPO with a target margin for each pair, and diagnostics.

        r = β log π(y) / |y|,    g_i = r_chosen - r_rejected,    ℓ_i = -log σ(g_i - γ_i)

    with γ from `solve_margins` as constants. By the envelope theorem the gradient is exactly that
    of the objective minimised over the margins as well. γ-SimPO is by Sun et al., Findings of ACL
    2025, arXiv:2506.03690; SimPO by Meng et al., NeurIPS 2024, arXiv:2405.14734.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps : array, shape (pairs,)
        Log-probabilities (nats) under the policy, **averaged** over each response's tokens.
    {parameters}

    {returns}

    Examples
    --------
    >>> import numpy as np
    >>> from gamma_loss import PUBLISHED_SETTINGS
    >>> logps = np.array([-0.8, -0.9]), np.array([-1.4, -0.8])
    >>> loss, aux = gamma_simpo_loss(*logps, **PUBLISHED_SETTINGS["llama-3-8b-instruct"])
    >>> round(float(loss), 4), aux.margins.round(3)
    (2.307, array([4.624, 3.376]))
    """
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    return _loss_of(logps, beta=beta, centered=centered, **options)


@documented(*SHARED)
def gamma_preference_loss(
    reward_gaps: Array, *, centered: bool = False, **options: Any
) -> tuple[Array, GammaLossAux]:
    """Return a logistic loss of any gaps with a target margin for each pair, and diagnostics.

        ℓ_i = -log σ(g_i - γ_i)    or, with centered=True,    -log σ(g_i - (γ_i - γ0))

    with γ from `solve_margins` as constants: γ-PO (arXiv:2506.03690) for rewards of your own.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Chosen minus rejected rewards, in reward units (already multiplied by beta). Gaps do not
        tell the two rewards: ``aux.chosen_rewards`` are the gaps and ``rejected_rewards`` 0.
    {parameters}

    {returns}

    Examples
    --------
    >>> import numpy as np
    >>> loss, aux = gamma_preference_loss(np.array([-1.0, 0.0, 3.0]), gamma0=1.0, tau=1.0)
    >>> (aux.pair_weights / 3).round(3)  # minus the gradient of the mean with respect to the gaps
    array([0.283, 0.233, 0.057])
    """
    if "beta" in options:
        raise TypeError("gamma_preference_loss() takes no beta: gaps are in reward units")
    return _loss_of({"reward_gaps": reward_gaps}, centered=centered, **options)


@documented("label_smoothing", "robust")
def preference_loss(
    reward_gaps: Array,
    margins: Array | float = 0.0,
    *,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Array:
    """Return the logistic loss of each pair, with a margin and label smoothing.

        ℓ(g - margin),    ℓ(s) = -log σ(s)

    ``preference_loss(gaps)`` is DPO's sigmoid loss, a positive constant margin SimPO's. cDPO is by
    Mitchell, *A note on DPO with noisy preferences*, 2023; rDPO by Chowdhury et al., *Provably
    robust DPO*, ICML 2024, arXiv:2403.00409.

    Parameters
    ----------
    reward_gaps : array of any shape
        In reward units. Half precision is upcast to float32.
    margins : array of the same shape, or float
        In reward units. Gradients flow through it if it carries any.
    {parameters}

    Returns
    -------
    array
        One loss for each gap; float64 where the gaps or the margins are, else float32.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, library, shape or ε, naming the argument.

    Examples
    --------
    >>> import numpy as np
    >>> preference_loss(np.array([-1.0, 0.0, 1.0])).round(4)
    array([1.3133, 0.6931, 0.3133])
    >>> preference_loss(np.array([1.0]), 0.5, label_smoothing=0.1, robust=True).round(4)
    array([0.4116])
    """
    epsilon = _checks.label_smoothing(label_smoothing)
    coef = linear_coef(epsilon, _checks.flag("robust", robust))
    xp, (gaps,) = _checks.floats(reward_gaps=reward_gaps)
    margins = _checks.number_or_array("margins", margins, "reward_gaps", gaps)
    with xp.ignore_fp_errors():
        return _compute.logistic(xp, margins - gaps, coef)


def _loss_of(logps: dict[str, Array], **options: Any) -> tuple[Array, GammaLossAux]:
    """Compute a loss, in a graph of Dynamo as one call at which it does not look."""
    if in_dynamo():
        from gamma_loss._graph import loss_in_graph, outside_graphs

        if options.get("group") is not None:
            result: tuple[Array, GammaLossAux] = outside_graphs(_compute.loss, logps, **options)
            return result
        names = ("context", "context_mask", "mask", "weights")
        inputs = split_queue(*(options.pop(name, None) for name in names))
        loss, *aux = loss_in_graph(logps, inputs, options)
        return loss, GammaLossAux(*aux)
    return _compute.loss(logps, **options)

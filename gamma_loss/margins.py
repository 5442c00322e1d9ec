"""The margin problem: how a pool of preference pairs shares one total target margin."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gamma_loss import _checks, _newton
from gamma_loss._arrays import Array, detach

IMPLEMENTATIONS = ("auto", "eager")


class MarginSolution(NamedTuple):
    """The exact solution of the margin problem, and the proof that it is one.

    Attributes
    ----------
    margins : array, shape (pairs,)
        Target margins γ_i in reward units. gamma0 for a masked pair, NaN for a pair whose gap is
        not finite.
    multiplier : array, shape ()
        ν, the number that all pairs of the pool share (dimensionless, between 0 and γ0/τ).
    residual : array, shape ()
        Half the range over the pool of ``log x_i + (γ0/τ) σ(γ0 x_i - g_i)``, 0 at the exact
        solution. It bounds the error without knowing the solution:
        ``mean |x - x*| <= 2 (exp(residual) - 1)`` with ``x = γ/γ0``. It carries the rounding error
        of ``(γ0/τ) σ(γ - g)``: at κ = gamma0² / tau of 1e4 and more, float32 cannot show how
        accurate its margins are, while the margins themselves keep their accuracy.
    """

    margins: Array
    multiplier: Array
    residual: Array


def solve_margins(
    reward_gaps: Array,
    *,
    gamma0: float,
    tau: float,
    context: Array | None = None,
    context_mask: Array | None = None,
    mask: Array | None = None,
    impl: str = "auto",
    group: Any = None,
) -> MarginSolution:
    """Share a mean target margin among preference pairs, by their reward gaps.

    Over a pool of N gaps g, finds the one minimiser over the probability simplex of

        F(p; g) = (1/N) Σ log(1 + exp(γ_i - g_i)) + τ KL(p ‖ uniform),    γ_i = γ0 N p_i.

    F is strictly convex. With x = γ/γ0 (positive, mean exactly 1) and a = γ0/τ, it is least where
    ``log x_i + a σ(γ0 x_i - g_i)`` is the same number ν for every pair. So clear pairs (large gap)
    get large margins and ambiguous ones small margins, between γ0 e^-a and γ0 e^a; τ → ∞ gives
    every pair γ0.

    The number of Newton passes is fixed by gamma0, tau and the dtype. They reach rounding error
    wherever gamma0 is in [1e-3, 100], tau in [1e-3, 1e3] and the gaps in ±1e4. ``residual`` is the
    proof of accuracy that comes with each call.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Reward of the chosen minus reward of the rejected response, in reward units (already
        multiplied by beta). Any real floating dtype of torch, NumPy, JAX or another array API
        library; half precision is upcast to float32, float64 stays float64. Treated as constants:
        no gradient flows into the margins.
    gamma0 : float
        Mean target margin in reward units, >= 0. SimPO's is ``beta * gamma_beta_ratio``.
    tau : float
        Weight of the KL term in nats, > 0. The problem's difficulty is κ = gamma0² / tau.
    context : array, shape (others,), optional
        Further gaps that join the pool and get no margin, such as a queue of recent gaps.
    context_mask, mask : boolean array, optional
        True for the entries of `context` and of `reward_gaps` that take part.
    impl : {"auto", "eager"}
        "eager" runs the solver's array operations one by one; inside torch.compile or jax.jit
        they become part of the caller's graph. "auto" is "eager" for now.
    group : torch.distributed.ProcessGroup, optional
        The ranks that share the pool (``torch.distributed.group.WORLD`` is all). Each rank gives
        its own gaps and context, as many as it has or none, and gets its own margins of the one
        problem over all of them. All ranks of the group call this together, with the same settings
        and dtype. Up to 131,072 gaps are gathered; of more only sums are exchanged, at each Newton
        pass. The ranks' numbers of gaps are read on the host: one synchronisation.

    Returns
    -------
    MarginSolution
        ``(margins, multiplier, residual)``.

    Raises
    ------
    TypeError
        For an argument that is not an array, of another library, or of a wrong dtype.
    ValueError
        For shapes or devices that differ, an empty or not 1-D array, or a hyperparameter out of
        its range.

    Notes
    -----
    A gap that is not finite takes no part, and leaves the other margins as they are without it.
    If no entry takes part, every margin is gamma0.

    gamma0 and tau choose the solver, so a compiler has to take them as constants. jax.jit asks for
    that itself. torch.compile makes a variable of a number that changes between calls: for a
    schedule set ``torch._dynamo.config.specialize_float = True``, and each value compiles anew.

    References
    ----------
    Sun et al., *Robust Preference Optimization via Dynamic Target Margins*, Findings of ACL 2025,
    arXiv:2506.03690. The optimality condition and its exact solution are this library's.

    Examples
    --------
    >>> import numpy as np
    >>> gaps = np.array([-2.0, 0.0, 2.0, 6.0])
    >>> solution = solve_margins(gaps, gamma0=4.0, tau=10.0)
    >>> solution.margins.round(3)
    array([3.626, 3.657, 3.827, 4.891])
    >>> round(float(solution.margins.mean()), 12)
    4.0
    >>> bool(solution.residual < 1e-12)
    True
    """
    gamma0 = _checks.number("gamma0", gamma0, least=0)
    tau = _checks.number("tau", tau, above=0)
    _checks.choice("impl", impl, IMPLEMENTATIONS)
    xp, (gaps,) = _checks.floats(reward_gaps=reward_gaps)
    _checks.pairs(group is not None, reward_gaps=gaps)
    pool, in_pool = detach(gaps), mask
    if mask is not None:
        _checks.mask("mask", mask, "reward_gaps", gaps, xp)
    if context is not None:
        _, (_, context) = _checks.floats(reward_gaps=gaps, context=context)
        _checks.pairs(group is not None, context=context)
        pool = xp.concat([pool, xp.astype(detach(context), gaps.dtype)])
        if context_mask is not None:
            _checks.mask("context_mask", context_mask, "context", context, xp)
        if mask is not None or context_mask is not None:
            in_pool = xp.concat(
                [
                    xp.ones_like(array, dtype=xp.bool) if kept is None else kept
                    for array, kept in ((gaps, mask), (context, context_mask))
                ]
            )
    elif context_mask is not None:
        raise ValueError("context_mask was given without a context")

    finite = xp.isfinite(pool)
    in_pool = finite if in_pool is None else in_pool & finite
    pool = xp.where(in_pool, pool, xp.zeros_like(pool))
    if group is not None:
        from gamma_loss.torch import distributed

        margins, multiplier, residual = distributed.solve(pool, in_pool, gamma0, tau, group)
    else:
        if mask is not None or context_mask is not None:
            in_pool = in_pool | ~xp.any(in_pool)  # an empty pool counts as one of equal gaps
        inside = xp.astype(in_pool, pool.dtype)
        margins, multiplier, residual = _newton.solve(pool, inside, gamma0, tau)

    margins = xp.where(finite, margins, xp.full_like(margins, math.nan))
    if context is not None:
        margins = margins[: gaps.shape[0]]
    if mask is not None:
        margins = xp.where(mask, margins, xp.full_like(margins, gamma0))
    return MarginSolution(margins, multiplier, residual)

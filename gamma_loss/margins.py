"""The margin problem: how a pool of preference pairs shares one total target margin."""

from __future__ import annotations

from typing import Any, NamedTuple

from gamma_loss import _compute
from gamma_loss._backend import Array, in_dynamo
from gamma_loss._pool import split_queue
from gamma_loss._settings import documented


class MarginSolution(NamedTuple):
    """The solution of the margin problem, with a bound on its error.

    Attributes
    ----------
    margins : array, shape (pairs,)
        Target margins γ_i in reward units. gamma0 for a pair that takes no part (masked, or of
        weight 0), NaN for a pair whose gap is not finite.
    multiplier : array, shape ()
        ν, the number that all pairs of the pool share (dimensionless, from 0 to γ0/τ).
    error_bound : array, shape ()
        A proven bound, rounding included: the weighted mean of ``|γ - γ*| / γ0`` over the pool is
        at most this, for the exact margins γ*. It is some ten machine epsilons, and never above 2.
    """

    margins: Array
    multiplier: Array
    error_bound: Array


@documented("gamma0", "tau", "context", "context_mask", "mask", "weights", "impl", "group")
def solve_margins(
    reward_gaps: Array,
    *,
    gamma0: float,
    tau: float,
    context: Array | None = None,
    context_mask: Array | None = None,
    mask: Array | None = None,
    weights: Array | None = None,
    impl: str = "auto",
    group: Any = None,
) -> MarginSolution:
    """Return the target margin of each preference pair, for a given mean margin.

    Over a pool of N gaps g, finds the one minimiser over the probability simplex of

        F(p; g) = (1/N) Σ log(1 + exp(γ_i - g_i)) + τ KL(p ‖ uniform),    γ_i = γ0 N p_i.

    With ``x = γ/γ0`` (positive, mean exactly 1) and ``a = γ0/τ``, F is least where
    ``log x_i + a σ(γ0 x_i - g_i)`` is the same number ν for every pair. So clear pairs (large gap)
    get large margins and ambiguous pairs small ones, from γ0 e^-a to γ0 e^a; τ → ∞ gives every pair
    γ0. With weights w, every mean is ``Σ w · / Σ w``.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Reward of the chosen minus reward of the rejected response, in reward units (already
        multiplied by beta). Any real floating dtype of torch, NumPy, JAX or another array API
        library; half precision becomes float32, float64 stays. Constants for autograd.
    {parameters}

    Returns
    -------
    MarginSolution
        ``(margins, multiplier, error_bound)``, constants for autograd.

    Raises
    ------
    TypeError
        For an argument that is not an array, of another library, or of a wrong dtype.
    ValueError
        For shapes or devices that differ, an empty or not 1-D array, or a setting out of its range.

    Notes
    -----
    For gamma0 in [1e-3, 100], tau in [1e-3, 1e3] and gaps in ±1e4, ``|x - x*| / (1 + x*)`` is at
    most 1e-13 (float64) or 3e-6 (float32); in ill-conditioned pools (condition number C) at most
    16·C·eps. A gap that is not finite takes no part. If no entry takes part, every margin is
    gamma0.

    gamma0 and tau are constants of a compiled graph. For a schedule inside torch.compile set
    ``torch._dynamo.config.specialize_float = True``; each value then compiles anew.

    The problem is by Sun et al., *Robust Preference Optimization via Dynamic Target Margins*,
    Findings of ACL 2025, arXiv:2506.03690; the optimality condition and its exact solution are
    this library's.

    Examples
    --------
    >>> import numpy as np
    >>> solution = solve_margins(np.array([-2.0, 0.0, 2.0, 6.0]), gamma0=4.0, tau=10.0)
    >>> solution.margins.round(3)
    array([3.626, 3.657, 3.827, 4.891])
    >>> bool(solution.error_bound < 1e-12)
    True
    """
    settings = {"gamma0": gamma0, "tau": tau, "impl": impl, "centered": False}
    inputs = {"context": context, "context_mask": context_mask, "mask": mask, "weights": weights}
    if in_dynamo():
        from gamma_loss._graph import outside_graphs, solve_in_graph

        if group is not None:
            return MarginSolution(
                *outside_graphs(_compute.solve, reward_gaps, settings, group, **inputs)
            )
        return MarginSolution(*solve_in_graph(reward_gaps, split_queue(*inputs.values()), settings))
    return MarginSolution(*_compute.solve(reward_gaps, settings, group, **inputs))

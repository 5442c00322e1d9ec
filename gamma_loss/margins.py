"""The margin problem: how a pool of preference pairs shares one total target margin."""

from __future__ import annotations

from typing import Any, NamedTuple

from gamma_loss import _checks, _dispatch
from gamma_loss._arrays import Array
from gamma_loss._pool import Beside, check


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
        A proven bound on the error that needs no knowledge of the solution, rounding included:
        ``mean |x - x*| <= 2 (exp(residual) - 1)`` with ``x = γ/γ0``. At a good solution some ten
        machine epsilons.
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

    The solution is exact to the rounding of the problem's numbers wherever gamma0 is in
    [1e-3, 100], tau in [1e-3, 1e3] and the gaps in ±1e4; ``residual`` is the proof of accuracy that
    comes with each call.

    Parameters
    ----------
    reward_gaps : array, shape (pairs,)
        Reward of the chosen minus reward of the rejected response, in reward units (already
        multiplied by beta). Any real floating dtype of torch, NumPy, JAX or another array API
        library; half precision is upcast to float32, float64 stays float64. Treated as constants:
        no gradient flows into the margins.
    gamma0 : float
        Mean target margin in reward units, 0 or in [1e-14, 1e12]. SimPO's is
        ``beta * gamma_beta_ratio``.
    tau : float
        Weight of the KL term in nats, > 0 and with gamma0 / tau in [1e-30, 1e9], which float32 can
        do. The problem's difficulty is κ = gamma0² / tau.
    context : array, shape (others,), QueueState or GapQueue, optional
        Further gaps that join the pool and get no margin, such as a queue of recent gaps. A queue
        brings its own mask.
    context_mask, mask : boolean array, optional
        True for the entries of `context` and of `reward_gaps` that take part.
    impl : {"auto", "eager", "compile", "triton"}
        How to solve; all agree to rounding error.

        - "eager": array operations one by one. For torch on the CPU, NumPy's on views of the gaps,
          which take less time, but for a pool of more than 65,536 where torch has several threads.
          Inside torch.compile or jax.jit they become part of the caller's graph; other JAX arrays
          are solved by one program, compiled for each shape.
        - "compile" (torch): the same through torch.compile, compiled at the first call for a kind
          of pool (dtype, device, masks), not for a size or for values of gamma0 and tau. Outside
          mild settings (see "auto") a pool that "eager" solves by NumPy is left to it.
        - "triton" (torch, on a GPU that Triton knows): one launch of a kernel for a pool of up to
          16,384 gaps, some tens for any larger one. A loss of
          such a pool is one launch as well, and its gradient one elementwise step. If Triton is
          missing or fails, it warns once and solves as "eager" does.
        - "auto": "triton" for a torch tensor on such a GPU, else "eager". In a graph that
          torch.compile or torch.export traces, and under torch.func, forward mode or a dispatch
          mode, where "compile" is "auto", the operations of a mild setting (gamma0 < 1.5 tau,
          and about gamma0² < 3 tau) become part of it, and any other solve is one operator.
    group : torch.distributed.ProcessGroup or, for JAX, str, optional
        The ranks that share the pool (``torch.distributed.group.WORLD`` is all). Each rank gives
        its own gaps and context, as many as it has or none, and gets its own margins of the one
        problem over all of them. All ranks of the group call this together, with the same settings
        and dtype; where they differ, or one rank refuses its arguments, all raise an error. Up to
        131,072 gaps are gathered; of more only sums are exchanged, at each Newton pass of a mild
        setting or each level of another. Numbers are read on the host: how many gaps the ranks have
        and, where levels are exchanged, their sums. Solved as "eager" does: no other `impl` goes
        with a group. For JAX arrays inside shard_map: the name of a mesh axis, whose
        devices share the pool in the same way, without reading a number.

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
    try:
        _, (gaps,) = _checks.floats(reward_gaps=reward_gaps)
        _checks.pairs(group is not None, reward_gaps=gaps)
        beside, parts = Beside(mask, context, context_mask), _dispatch.join(group, gaps)
        problem = check("reward_gaps", gaps, beside, gamma0=gamma0, tau=tau, group=parts)
        impl = _dispatch.choose(impl, gaps, problem)
    except Exception as error:
        _dispatch.fail(group, error)
        raise
    return MarginSolution(*_dispatch.solve(impl, gaps, problem))

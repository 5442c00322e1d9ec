"""The margin problem: how a pool of preference pairs shares one total target margin."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gamma_loss import _checks, _newton
from gamma_loss._arrays import (
    Array,
    Namespace,
    as_floats,
    detach,
    is_jax,
    is_torch,
    isfinite,
    namespace,
    solver_namespace,
)

IMPLEMENTATIONS = ("auto", "eager", "compile", "triton")


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
    impl : {"auto", "eager", "compile", "triton"}
        How to solve; all agree to rounding error.

        - "eager": array operations one by one. Inside torch.compile or jax.jit they become part of
          the caller's graph.
        - "compile" (torch): the same through torch.compile, compiled at the first call for a kind
          of pool (dtype, device, masks), not for a size or for values of gamma0 and tau.
        - "triton" (torch, on a GPU that Triton knows): one launch of a kernel for a pool of up to
          16,384 gaps, about ten for any larger one (about fifty outside mild settings). A loss of
          such a pool is one launch as well, and its gradient one elementwise step. If Triton is
          missing or fails, it warns once and solves as "eager" does.
        - "auto": "triton" for a torch tensor on such a GPU. "eager" for one on the CPU in a mild
          setting (gamma0 < 1.5 tau, and about gamma0² < 3 tau), and NumPy, which ends its passes
          when they are done, in any other. In a graph that torch.compile or torch.export traces,
          the operations of a mild setting become part of it, and any other solve is one operator.
          "eager" for all other arrays.
    group : torch.distributed.ProcessGroup or, for JAX, str, optional
        The ranks that share the pool (``torch.distributed.group.WORLD`` is all). Each rank gives
        its own gaps and context, as many as it has or none, and gets its own margins of the one
        problem over all of them. All ranks of the group call this together, with the same settings
        and dtype. Up to 131,072 gaps are gathered; of more only sums are exchanged, at each Newton
        pass. The ranks' numbers of gaps are read on the host: one synchronisation. Solved as
        "eager" does, whatever `impl` is. For JAX arrays inside shard_map: the name of a mesh axis,
        whose devices share the pool in the same way, without a synchronisation.

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
    xp, (gaps,) = _checks.floats(reward_gaps=reward_gaps)
    shared = group is not None
    _checks.pairs(shared, reward_gaps=gaps)
    size = check_pool(xp, "reward_gaps", gaps, mask, context, context_mask, shared)
    impl = choose_implementation(impl, gaps, size, gamma0, tau)
    return solve_by(impl, gaps, mask, context, context_mask, gamma0, tau, group)


def check_pool(
    xp: Namespace,
    name: str,
    gaps: Array,
    mask: Array | None,
    context: Array | None,
    context_mask: Array | None,
    may_be_empty: bool = False,
) -> int:
    """Check what comes beside the gaps, and return the size of the pool."""
    if mask is not None:
        _checks.mask("mask", mask, name, gaps, xp)
    if context is None:
        if context_mask is not None:
            raise ValueError("context_mask was given without a context")
        return int(gaps.shape[0])
    _checks.real(**{name: gaps, "context": context})
    _checks.pairs(may_be_empty, context=context)
    if context_mask is not None:
        _checks.mask("context_mask", context_mask, "context", context, xp)
    return int(gaps.shape[0] + context.shape[0])


def choose_implementation(impl: str, gaps: Array, size: int, gamma0: float, tau: float) -> str:
    """Return which of "eager", "compile", "triton" and "operator" solves a pool of a size."""
    _checks.choice("impl", impl, IMPLEMENTATIONS)
    if is_torch(gaps):
        from gamma_loss import _operators

        return _operators.choose(impl, gaps, size, gamma0, tau)
    if impl in ("compile", "triton"):
        raise ValueError(f"impl={impl!r} needs torch tensors, got {type(gaps).__module__} arrays")
    return "eager"


def solve_by(
    impl: str,
    gaps: Array,
    mask: Array | None,
    context: Array | None,
    context_mask: Array | None,
    gamma0: float,
    tau: float,
    group: Any = None,
) -> MarginSolution:
    """Solve a checked pool by the implementation chosen for it."""
    gaps = detach(gaps)
    if context is not None:
        context = namespace(context).astype(detach(context), gaps.dtype)
    pool = (gaps, mask, context, context_mask)
    if group is not None:
        values, in_pool, finite = assemble(*pool)
        shared = over_processes(gaps).solve(values, in_pool, gamma0, tau, group)
        margins, multiplier, residual = shared
        margins = deliver(margins, finite, mask, gaps.shape[0], gamma0)
        return MarginSolution(margins, multiplier, residual)
    if impl == "eager":
        return MarginSolution(*solve_pool(*pool, gamma0, tau))
    if impl == "compile":
        from gamma_loss import _compiled

        return MarginSolution(*_compiled.solve(*pool, gamma0, tau))
    from gamma_loss import _operators

    return MarginSolution(*_operators.solve(*pool, gamma0, tau, kernel=impl == "triton"))


def over_processes(array: Array) -> Any:
    """Return the module that knows groups for an array's library."""
    if is_jax(array):
        from gamma_loss import _mesh

        return _mesh
    from gamma_loss.torch import distributed

    return distributed


def solve_pool(
    gaps: Array,
    mask: Array | None,
    context: Array | None,
    context_mask: Array | None,
    gamma0: float,
    tau: float,
) -> tuple[Array, Array, Array]:
    """Solve with array-API operations, one by one."""
    pool, in_pool, finite = assemble(gaps, mask, context, context_mask)
    inside = as_weights(in_pool, pool, mask is not None or context_mask is not None)
    margins, multiplier, residual = _newton.solve(pool, inside, gamma0, tau)
    return deliver(margins, finite, mask, gaps.shape[0], gamma0), multiplier, residual


def assemble(
    gaps: Array, mask: Array | None, context: Array | None, context_mask: Array | None
) -> tuple[Array, Array, Array]:
    """Return the pool's gaps (0 for one left out), which are in it, and which are finite."""
    xp = solver_namespace(gaps)
    pool, in_pool = gaps, mask
    if context is not None:
        pool = xp.concat([gaps, context])
        if mask is not None or context_mask is not None:
            in_pool = xp.concat(
                [
                    xp.ones_like(array, dtype=xp.bool) if kept is None else kept
                    for array, kept in ((gaps, mask), (context, context_mask))
                ]
            )
    finite = isfinite(pool)
    in_pool = finite if in_pool is None else in_pool & finite
    return xp.where(in_pool, pool, xp.zeros_like(pool)), in_pool, finite


def as_weights(in_pool: Array, pool: Array, masked: bool) -> Array:
    """Return 1 for an entry inside and 0 for others.

    A pool that masks have emptied counts as one of equal gaps.
    """
    if masked:
        in_pool = in_pool | ~solver_namespace(pool).any(in_pool)
    return as_floats(in_pool, pool)


def deliver(
    margins: Array, finite: Array, mask: Array | None, pairs: int, gamma0: Array | float
) -> Array:
    """Return the batch's part of the pool's margins: NaN for a bad gap, gamma0 for a masked one."""
    xp = solver_namespace(margins)
    margins = xp.where(finite, margins, xp.full_like(margins, math.nan))[:pairs]
    if mask is None:
        return margins
    return xp.where(mask, margins, xp.ones_like(margins) * gamma0)

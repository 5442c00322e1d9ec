"""Which implementation solves a problem: one table, and the rules that choose from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gamma_loss import _checks, _pool, _solver
from gamma_loss._arrays import Array, is_jax, is_torch, solver_namespace, total
from gamma_loss._pool import Problem, Solution, as_part, assemble, deliver, weights_of
from gamma_loss._spread import GATHER_LIMIT, Parts

if TYPE_CHECKING:
    from gamma_loss._torch.distributed import Ranks

IMPLEMENTATIONS = ("auto", "eager", "compile", "triton")


def choose(impl: str, gaps: Array, problem: Problem) -> str:
    """Return the name in `TABLE` that an ``impl`` stands for.

    The rule of "auto" is in `gamma_loss.solve_margins`; docs/benchmarks.md has the figures behind.
    """
    _checks.choice("impl", impl, IMPLEMENTATIONS)
    if problem.group is not None:
        if impl not in ("auto", "eager"):
            raise ValueError(f"impl must be 'auto' or 'eager' with a group, got {impl!r}")
        return "in parts"
    if is_torch(gaps):
        from gamma_loss._torch import operators

        return operators.choose(impl, gaps, problem)
    if impl in ("compile", "triton"):
        raise ValueError(f"impl={impl!r} needs torch tensors, got {type(gaps).__module__} arrays")
    return "eager"


def solve(name: str, gaps: Array, problem: Problem) -> Solution:
    """Solve by the implementation of that name."""
    return TABLE[name](gaps, problem)


def join(group: Any, gaps: Array, **settings: Any) -> Parts | None:
    """Return a group as the parts of a pool, which have to agree on the settings."""
    if group is None:
        return None
    if is_jax(gaps):
        from gamma_loss._mesh import Devices

        return Devices(group)
    if not is_torch(gaps):
        raise TypeError(f"a group takes torch tensors, got {type(gaps).__name__}")
    return ranks_of(group, **settings)


def ranks_of(group: Any, **settings: Any) -> Ranks:
    """Return the ranks of a torch.distributed group."""
    from gamma_loss._torch.distributed import Ranks

    return Ranks(group, **settings)


def fail(group: Any, error: Exception, numbers: int = 1) -> None:
    """Tell the other ranks of a group, which wait for so many numbers, of an error."""
    if hasattr(group, "rank"):  # of torch.distributed; all devices of a mesh run one program
        ranks_of(group).exchange(*[0] * numbers, failed=error)


def _in_parts(gaps: Array, problem: Problem) -> Solution:
    """Gather the parts of a small pool; of a large one exchange sums only."""
    xp, parts = solver_namespace(gaps), problem.group
    gamma0, tau = problem.gamma0, problem.tau
    pool = as_part(assemble(gaps, problem.beside))
    if parts.size(pool.gaps, gamma0=gamma0, tau=tau) <= GATHER_LIMIT:
        # Those inside are finite, so NaN can say which are not.
        whole = assemble(parts.gather(xp.where(pool.inside, pool.gaps, float("nan"))))
        margins, *numbers = _solver.solve(whole.gaps, weights_of(whole), gamma0, tau)
        margins = parts.own(margins)
    else:
        (inside,) = parts.sums(total(xp.where(pool.inside, 1.0, 0 * pool.gaps)))
        weights = weights_of(pool, empty=inside == 0)
        margins, *numbers = _solver.solve(pool.gaps, weights, gamma0, tau, parts)
    return deliver(margins, gaps, problem.beside.mask, pool, problem.gamma0), *parts.agreed(
        *numbers
    )


def _host(gaps: Array, problem: Problem) -> Solution:
    from gamma_loss._torch import host

    return host.solve(gaps, problem)


def _compile(gaps: Array, problem: Problem) -> Solution:
    from gamma_loss._torch import compiled

    return compiled.solve(gaps, problem)


def _operator(gaps: Array, problem: Problem) -> Solution:
    from gamma_loss._torch import operators

    return operators.solve(gaps, problem, kernel=False)


def _triton(gaps: Array, problem: Problem) -> Solution:
    from gamma_loss._torch import operators

    return operators.solve(gaps, problem, kernel=True)


TABLE: dict[str, Callable[[Array, Problem], Solution]] = {
    "eager": _pool.solve,
    "host": _host,  # torch on the CPU, by NumPy
    "in parts": _in_parts,
    "compile": _compile,  # torch
    "operator": _operator,  # torch: an eager solve that a graph leaves whole
    "triton": _triton,  # torch, on a device that Triton knows
}

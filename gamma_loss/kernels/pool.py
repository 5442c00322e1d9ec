"""A pool of moderate size in one program, up to its losses and their gradients.

gamma0, a, beta and tilt come as float64 and are rounded to the pool's dtype T.
"""

import triton
import triton.language as tl

from gamma_loss.kernels.math import sigmoids
from gamma_loss.kernels.passes import (
    MOST,
    Memory,
    Part,
    advance,
    begin,
    deliver,
    finish,
    level_pass,
    mild_pass,
    problem_of,
    residual_of,
    survey,
    weigh,
)


@triton.jit
def _solve_mild(
    memory, part, problem, seen,
    PASSES: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return what is kept of the pairs, the change of ν that they are to follow, and ν."""
    nu = problem.a * seen.of_p / (seen.of_p + seen.of_q)
    for _ in range(PASSES - 1):
        memory, bottom, top = mild_pass(memory, part, problem, nu, BLOCK, SINGLE)
        nu = (top + problem.count * problem.gamma0) / bottom
    return memory, nu, nu


@triton.jit
def _solve_level(
    memory, part, problem, seen,
    EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return what is kept of the pairs, the change of ν that they are to follow, and λ."""
    state, turn = begin(problem, seen), 0
    while (state.done == 0) & (turn < MOST):
        memory, told = level_pass(memory, part, problem, state, turn, EPS, BLOCK, SINGLE, False)
        state = advance(state, problem, told, EPS)
        turn += 1
    return memory, state.d_nu, state.level.at


@triton.jit
def _deliver_all(
    logps, beside, outputs, memory, part, problem, at, log_mass, scale, n, beta, tilt,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    MILD: tl.constexpr, CENTERED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Write what there is of each pair; return the residual and the sum of losses."""
    total = tl.full((), 0.0, tl.float64)
    least = tl.full((), float("inf"), T)
    largest = -least
    tl.debug_barrier()
    for start in range(0, BLOCK if SINGLE else part.size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        margins, low, high = finish(memory, i, part.size, problem, at, log_mass, EPS, SINGLE, MILD)
        least, largest = tl.minimum(least, low), tl.maximum(largest, high)
        total += deliver(
            logps, beside, outputs, i, n, margins, scale, beta, problem.gamma0, tilt,
            T, CENTERED, REDUCTION,
        )  # fmt: skip
    return residual_of(least, largest, EPS, MILD), total


@triton.jit(do_not_specialize=["n", "m"])
def pool_kernel(
    logps, beside, outputs, memory, n, m,
    beta: tl.float64, gamma0: tl.float64, a: tl.float64, tilt: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    PASSES: tl.constexpr,  # of the mild iteration; 0 for the level's
    CENTERED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Solve a pool, and go on to a loss if there is one to write."""
    beta, gamma0 = tl.full((), beta, T), tl.full((), gamma0, T)
    a, tilt = tl.full((), a, T), tl.full((), tilt, T)
    MILD: tl.constexpr = PASSES > 0
    part = Part(0, BLOCK, n + m)
    if SINGLE:
        nothing = tl.zeros((BLOCK,), T)
        memory = Memory(nothing, nothing, nothing)
    memory, seen = survey(
        logps, beside, memory, part, n, m, beta, gamma0, a, T, BLOCK, SINGLE, MILD
    )
    problem, seen = problem_of(seen, part.size, gamma0, a)
    if MILD:
        memory, change, at = _solve_mild(memory, part, problem, seen, PASSES, BLOCK, SINGLE)
        nu = at
    else:
        memory, change, at = _solve_level(memory, part, problem, seen, EPS, BLOCK, SINGLE)
        nu = a * sigmoids(at)[0]
    memory, mass = weigh(memory, part, problem, change, BLOCK, SINGLE)
    log_mass = tl.log(mass / problem.count).to(T)

    scale, pairs = -beta, tl.maximum(seen.pairs, 1.0)
    if REDUCTION == "mean":
        scale = (scale / pairs).to(T)
    residual, total = _deliver_all(
        logps, beside, outputs, memory, part, problem, at, log_mass, scale, n, beta, tilt,
        T, EPS, BLOCK, SINGLE, MILD, CENTERED, REDUCTION,
    )  # fmt: skip
    tl.store(outputs.certificate, nu)
    tl.store(outputs.certificate + 1, residual)
    if outputs.loss is not None:
        if REDUCTION != "none":
            tl.store(outputs.loss, total / pairs if REDUCTION == "mean" else total)

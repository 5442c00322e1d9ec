"""A pool of moderate size in one program, up to its losses and their gradients."""

import triton
import triton.language as tl

from gamma_loss.kernels.level import MOST, advance, begin
from gamma_loss.kernels.math import log1p, sigmoids
from gamma_loss.kernels.passes import (
    Memory,
    Part,
    deliver,
    level_pass,
    mild_pass,
    problem_of,
    survey,
    weigh,
)

MILD_ROUNDING = tl.constexpr(16)  # machine epsilons by which a mild certificate may be wrong


@triton.jit
def _solve_mild(
    memory, part, problem, seen,
    PASSES: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Return what is kept of the pairs, ν, and log mean x."""
    nu = problem.a * seen.of_p / (seen.of_p + seen.of_q)
    for _ in range(PASSES - 1):
        memory, nu = mild_pass(memory, part, problem, nu, BLOCK, SINGLE)
    mass = weigh(memory, part, problem, nu, BLOCK, SINGLE)
    return memory, nu, tl.log(mass / problem.count).to(problem.a.dtype)


@triton.jit
def _solve_level(
    memory, part, problem, seen, EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr
):
    """Return what is kept of the pairs, and the last state."""
    state, turn = begin(problem, seen.of_p, seen.of_q, seen.least, seen.largest), 0
    while (state.done == 0) & (turn < MOST):
        memory, told = level_pass(memory, part, problem, state, turn, EPS, BLOCK, SINGLE, False)
        state = advance(problem, state, told, EPS)
        turn += 1
    return memory, state


@triton.jit(do_not_specialize=["n", "size"])
def pool_kernel(
    logps, beside, outputs, memory, n, size,
    beta: tl.float64, gamma0: tl.float64, a: tl.float64, tilt: tl.float64,  # rounded to T
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    PASSES: tl.constexpr,  # of the mild iteration; 0 for the level's
    CENTERED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Solve a pool, and go on to a loss if there is one to write."""
    beta, gamma0 = tl.full((), beta, T), tl.full((), gamma0, T)
    a, tilt = tl.full((), a, T), tl.full((), tilt, T)
    MILD: tl.constexpr = PASSES > 0
    part = Part(0, BLOCK, size)
    if SINGLE:
        nothing = tl.zeros((BLOCK,), T)
        memory = Memory(nothing, nothing, nothing)
    memory, seen = survey(logps, beside, memory, part, n, beta, gamma0, a, T, BLOCK, SINGLE, MILD)
    problem, seen = problem_of(seen, size, gamma0, a)
    if MILD:
        memory, nu, log_mass = _solve_mild(memory, part, problem, seen, PASSES, BLOCK, SINGLE)
        at, change = nu, nu
    else:
        memory, state = _solve_level(memory, part, problem, seen, EPS, BLOCK, SINGLE)
        at, change, log_mass = state.at, state.d_nu, state.log_mass
        nu = a * sigmoids(at)[0]

    scale, pairs = -beta, tl.maximum(seen.pairs, 1.0)
    if REDUCTION == "mean":
        scale = (scale / pairs).to(T)
    total, least, largest = deliver(
        logps, beside, outputs, memory, part, problem, at, change, log_mass, n, beta, scale, tilt,
        T, EPS, BLOCK, SINGLE, MILD, CENTERED, REDUCTION,
    )  # fmt: skip
    tl.store(outputs.certificate, nu)
    if MILD:
        tl.store(outputs.certificate + 1, 0.5 * (largest - least) + MILD_ROUNDING * EPS)
    else:
        residual = tl.where(state.done, log1p(2 * largest), float("inf"))
        tl.store(outputs.certificate + 1, residual)
    if outputs.loss is not None and REDUCTION != "none":
        tl.store(outputs.loss, total / pairs if REDUCTION == "mean" else total)

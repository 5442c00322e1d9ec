"""A large pool by many programs, each with a part of it.

Each launch reads what the one before has left: for every program, what it saw of its part, and the
state. So no program waits for another, and nothing is read back.
"""

import triton
import triton.language as tl

from gamma_loss.kernels.level import Level, Seen
from gamma_loss.kernels.math import sigmoids
from gamma_loss.kernels.passes import (
    Memory,
    Part,
    Problem,
    State,
    Survey,
    advance,
    begin,
    finish,
    level_pass,
    load,
    masked,
    member,
    mild_pass,
    problem_of,
    residual_of,
    survey,
    weigh,
)

STATE = tl.constexpr(11)  # numbers of a problem and a state


@triton.jit
def _put(pointer, numbers, STRIDE: tl.constexpr):
    for j in tl.static_range(len(numbers)):
        tl.store(pointer + j * STRIDE, numbers[j].to(tl.float64))


@triton.jit
def _all(partials, row: tl.constexpr, other: tl.constexpr, P: tl.constexpr):
    """Return what each of the programs has left in a row."""
    lane = tl.arange(0, P)
    return tl.load(partials + row * P + lane, mask=lane < tl.num_programs(0), other=other)


@triton.jit
def _sum(partials, row: tl.constexpr, P: tl.constexpr):
    return tl.sum(_all(partials, row, 0.0, P), 0)


@triton.jit
def _top(partials, row: tl.constexpr, P: tl.constexpr):
    return tl.max(_all(partials, row, float("-inf"), P), 0).to(tl.float32)


@triton.jit
def _part(size, BLOCK: tl.constexpr):
    return Part(tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK, size)


@triton.jit(do_not_specialize=["n", "m"])
def start_kernel(
    logps, beside, memory, partials, n, m, gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Assemble the pool, and leave what `survey` says of each part."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    part = _part(n + m, BLOCK)
    memory, seen = survey(
        logps, beside, memory, part, n, m, 1.0, gamma0, a, T, BLOCK, SINGLE=False, MILD=False
    )
    _put(partials + tl.program_id(0), seen, P)


@triton.jit
def _first(partials, size, gamma0, a, MILD: tl.constexpr, P: tl.constexpr):
    """Return the problem and the first state. For mild settings d_nu is ν, and all else unused."""
    T: tl.constexpr = gamma0.dtype
    count, of_p, of_q = _sum(partials, 0, P), _sum(partials, 1, P), _sum(partials, 2, P)
    least = tl.min(_all(partials, 4, float("inf"), P), 0).to(T)
    largest = tl.max(_all(partials, 5, float("-inf"), P), 0).to(T)
    seen = Survey(count, of_p, of_q, count, least, largest)
    problem, seen = problem_of(seen, size, gamma0, a)
    state = begin(problem, seen)
    if MILD:
        nu = (a * seen.of_p / (seen.of_p + seen.of_q)).to(T)
        state = State(state.level, nu, state.left, state.far, state.done)
    return problem, state


@triton.jit
def _next(partials, problem, state, EPS: tl.constexpr, MILD: tl.constexpr, P: tl.constexpr):
    T: tl.constexpr = problem.gamma0.dtype
    a, b = _sum(partials, 0, P), _sum(partials, 1, P)
    if MILD:
        nu = (b + problem.count * problem.gamma0) / a
        return State(state.level, nu.to(T), state.left, state.far, state.done)
    else:
        c, d = _top(partials, 2, P), _top(partials, 3, P)
        seen = Seen(a, b, c, d, _top(partials, 4, P), _top(partials, 5, P))
        return advance(state, problem, seen, EPS)


@triton.jit
def _saved(states, turn, gamma0, a):
    """Return the problem and the state of a turn."""
    T: tl.constexpr = gamma0.dtype
    at = states + STATE * turn
    most, count, empty = tl.load(at).to(T), tl.load(at + 1), tl.load(at + 2) != 0
    level, low = tl.load(at + 3).to(T), tl.load(at + 4).to(T)
    high, error = tl.load(at + 5).to(T), tl.load(at + 6).to(T)
    d_nu, left = tl.load(at + 7).to(T), tl.load(at + 8).to(T)
    far, done = tl.load(at + 9) != 0, tl.load(at + 10) != 0
    state = State(Level(level, low, high, error), d_nu, left, far, done)
    return Problem(gamma0, a, most, count, empty), state


@triton.jit
def _turn(
    partials, states, turn, size, gamma0, a,
    EPS: tl.constexpr, MILD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Return the problem and the state of this turn, and save them for the next."""
    if turn == 0:
        problem, state = _first(partials, size, gamma0, a, MILD, P)
    else:
        problem, state = _saved(states, turn - 1, gamma0, a)
        if state.done == 0:
            state = _next(partials, problem, state, EPS, MILD, P)
    if tl.program_id(0) == 0:
        at = states + STATE * turn
        _put(at, (problem.most, problem.count, problem.empty), 1)
        _put(at + 3, state.level, 1)
        _put(at + 7, (state.d_nu, state.left, state.far, state.done), 1)
    return problem, state


@triton.jit(do_not_specialize=["turn", "size"])
def step_kernel(
    memory, old, new, states, turn, size, gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    MILD: tl.constexpr,
):  # fmt: skip
    """Decide this turn's ν or level, and take a step there or let every block of pairs settle there."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    problem, state = _turn(old, states, turn, size, gamma0, a, EPS, MILD, P)
    part = _part(size, BLOCK)
    new += tl.program_id(0)
    if MILD:
        memory, bottom, top = mild_pass(memory, part, problem, state.d_nu, BLOCK, False)
        _put(new, (bottom, top), P)
    else:
        if state.done == 0:
            memory, seen = level_pass(
                memory, part, problem, state, turn, EPS, BLOCK, False, SETTLE=True
            )
            _put(new, seen, P)


@triton.jit(do_not_specialize=["turn", "size"])
def weigh_kernel(
    memory, old, new, states, turn, size, gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    MILD: tl.constexpr,
):  # fmt: skip
    """Let the pairs follow the last change."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    problem, state = _turn(old, states, turn, size, gamma0, a, EPS, MILD, P)
    memory, mass = weigh(memory, _part(size, BLOCK), problem, state.d_nu, BLOCK, False)
    tl.store(new + tl.program_id(0), mass)


@triton.jit(do_not_specialize=["turn", "n", "m"])
def finish_kernel(
    gaps_in, mask, margins_out, certificate, memory, old, new, states, turn, n, m,
    gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    MILD: tl.constexpr,
):  # fmt: skip
    """Write the margins and ν."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    problem, state = _saved(states, turn, gamma0, a)
    at, part = state.level.at, _part(n + m, BLOCK)
    log_mass = tl.log(_sum(old, 0, P) / problem.count).to(T)
    least = tl.full((), float("inf"), T)
    largest = -least
    for start in range(part.first, part.size, part.stride):
        i = start + tl.arange(0, BLOCK)
        margins, low, high = finish(memory, i, part.size, problem, at, log_mass, EPS, False, MILD)
        least, largest = tl.minimum(least, low), tl.maximum(largest, high)
        gaps, counted = load(gaps_in, i, i < n, T), member(mask, i, i < n)
        tl.store(margins_out + i, masked(margins, gaps, counted, gamma0), mask=i < n)
    _put(new + tl.program_id(0), (least, largest), P)
    if tl.program_id(0) == 0:
        tl.store(certificate, state.d_nu if MILD else a * sigmoids(at)[0])


@triton.jit
def certify_kernel(
    partials, certificate, programs, EPS: tl.constexpr, P: tl.constexpr, MILD: tl.constexpr
):
    """Write the certificate."""
    lane = tl.arange(0, P)
    least = tl.load(partials + lane, mask=lane < programs, other=float("inf"))
    largest = tl.load(partials + P + lane, mask=lane < programs, other=float("-inf"))
    tl.store(certificate + 1, residual_of(tl.min(least, 0), tl.max(largest, 0), EPS, MILD))

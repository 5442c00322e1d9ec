"""A large pool by many programs, each with a part of it, whatever the settings.

Each launch reads what the one before has left: for every program, what it saw of its part, and the
state. So no program waits for another, and nothing is read back.
"""

import triton
import triton.language as tl

from gamma_loss.kernels.level import Problem, Seen, State, advance, begin
from gamma_loss.kernels.math import log1p, sigmoids
from gamma_loss.kernels.passes import Part, Survey, deliver, level_pass, problem_of, survey

STATE = tl.constexpr(12)  # numbers of a problem and a state


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
def _top(partials, row: tl.constexpr, T: tl.constexpr, P: tl.constexpr):
    return tl.max(_all(partials, row, float("-inf"), P), 0).to(T)


@triton.jit
def _first(partials, size, gamma0, a, P: tl.constexpr):
    """Return the problem and the first state."""
    T: tl.constexpr = gamma0.dtype
    least = tl.min(_all(partials, 4, float("inf"), P), 0).to(T)
    count, of_p, of_q = _sum(partials, 0, P), _sum(partials, 2, P), _sum(partials, 3, P)
    seen = Survey(count, count, of_p, of_q, least, _top(partials, 5, T, P))
    problem, seen = problem_of(seen, size, gamma0, a)
    return problem, begin(problem, seen.of_p, seen.of_q, seen.least, seen.largest)


@triton.jit
def _next(partials, problem, state, EPS: tl.constexpr, P: tl.constexpr):
    reach, left = _top(partials, 2, tl.float32, P), _top(partials, 3, tl.float32, P)
    by_nu = (_top(partials, 4, tl.float32, P), _top(partials, 5, tl.float32, P))
    seen = Seen(_sum(partials, 0, P), _sum(partials, 1, P), reach, left, by_nu[0], by_nu[1])
    return advance(problem, state, seen, EPS)


@triton.jit
def _saved(at, gamma0, a):
    """Return a problem and a state that `_turn` has saved."""
    T: tl.constexpr = gamma0.dtype
    problem = Problem(gamma0, a, tl.load(at).to(T), tl.load(at + 1), tl.load(at + 2) != 0)
    level, low, high = tl.load(at + 3).to(T), tl.load(at + 4).to(T), tl.load(at + 5).to(T)
    error, d_nu, log_mass = tl.load(at + 6).to(T), tl.load(at + 7).to(T), tl.load(at + 8).to(T)
    left, far, done = tl.load(at + 9).to(T), tl.load(at + 10) != 0, tl.load(at + 11) != 0
    return problem, State(level, low, high, error, d_nu, log_mass, left, far, done)


@triton.jit
def _turn(partials, states, turn, size, gamma0, a, EPS: tl.constexpr, P: tl.constexpr):
    """Return the problem and the state of this turn, and save them for the next."""
    at = states + STATE * turn
    if turn == 0:
        problem, state = _first(partials, size, gamma0, a, P)
    else:
        problem, state = _saved(at - STATE, gamma0, a)
        if state.done == 0:
            state = _next(partials, problem, state, EPS, P)
    if tl.program_id(0) == 0:
        _put(at, (problem.most, problem.count, problem.empty), 1)
        _put(at + 3, state, 1)
    return problem, state


@triton.jit
def _part(size, BLOCK: tl.constexpr):
    return Part(tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK, size)


@triton.jit(do_not_specialize=["n", "size"])
def start_kernel(
    logps, beside, memory, new, n, size, gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Assemble the pool, and leave what `survey` says of each part."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    part = _part(size, BLOCK)
    _, seen = survey(logps, beside, memory, part, n, 1.0, gamma0, a, T, BLOCK, False, False)
    _put(new + tl.program_id(0), seen, P)


@triton.jit(do_not_specialize=["turn", "size"])
def step_kernel(
    memory, old, new, states, turn, size, gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Decide this turn's level, and let every block of pairs settle there."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    problem, state = _turn(old, states, turn, size, gamma0, a, EPS, P)
    if state.done == 0:
        part = _part(size, BLOCK)
        _, seen = level_pass(memory, part, problem, state, turn, EPS, BLOCK, False, SETTLE=True)
        _put(new + tl.program_id(0), seen, P)


@triton.jit(do_not_specialize=["n", "size"])
def finish_kernel(
    logps, beside, outputs, memory, new, state, n, size,
    gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write the margins and ν, from the last state."""
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    problem, state = _saved(state, gamma0, a)
    _, _, largest = deliver(
        logps, beside, outputs, memory, _part(size, BLOCK), problem,
        state.at, state.d_nu * state.done, state.log_mass, n, 1.0, 1.0, 0.0,
        T, EPS, BLOCK, False, False, False, "none",
    )  # fmt: skip
    tl.store(new + tl.program_id(0), tl.where(state.done, log1p(2 * largest), float("inf")))
    if tl.program_id(0) == 0:
        tl.store(outputs.certificate, a * sigmoids(state.at)[0])


@triton.jit
def certify_kernel(new, certificate, programs, P: tl.constexpr):
    """Write the certificate."""
    lane = tl.arange(0, P)
    tl.store(certificate + 1, tl.max(tl.load(new + lane, mask=lane < programs, other=0.0), 0))

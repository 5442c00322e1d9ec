"""The margin solve and the losses as Triton kernels.

`pool_kernel` does everything for a pool of moderate size in one program: it assembles the pool,
solves it, certifies the solution and, for a loss, goes on to losses, pair weights and gradients.
`start_kernel`, `step_kernel`, `finish_kernel` and `certify_kernel` solve a large pool with many
programs.

Mild settings (see `gamma_loss._newton`) take the same undamped arrowhead steps as there. For all
others, and in large pools, the two unknowns are nested: for a level λ, with ν = a σ(λ), every pair
is solved on its own, in registers, and one safeguarded Newton iteration finds the λ at which the
mean of x is 1. Both loops bisect where a step leaves its bracket or does not halve the last one,
and end at rounding error.

Of the hardware's functions only `exp` and `log` are used, so that the kernels run wherever Triton
does, its interpreter included. gamma0, a and beta come as float64 and are rounded to the pool's
dtype T.
"""

import triton
import triton.language as tl


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _sum2(a, b):
    return tl.reduce((a, b), 0, _add2)


@triton.jit
def _sigmoids(z):
    """σ(z) and σ(-z), each with a small relative error."""
    e = tl.exp(-tl.abs(z))
    large = 1 / (1 + e)
    small = e * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def _log1p(x):
    """Kahan's: what rounding does to 1 + x cancels in the quotient."""
    y = 1 + x
    near = y == 1
    return tl.where(near, x, tl.log(y) * (x / tl.where(near, 1.0, y - 1)))


@triton.jit
def _expm1(x):
    """Kahan's as well, and right where exp(x) is 0."""
    y = tl.exp(x)
    usable = (y != 1) & (y > 0.1) & (y < 10)
    log_y = tl.log(tl.where(usable, y, 2.0))
    return tl.where(usable, (y - 1) * (x / log_y), tl.where(y == 1, x, y - 1))


@triton.jit
def _rise(step, end, end_other, start, start_other):
    """σ(z + step) - σ(z) from the sigmoids (and those of minus z) at both ends."""
    scale = tl.where(step > 0, -end * start_other, end_other * start)
    return scale * _expm1(-tl.abs(step))


@triton.jit
def _load(pointer, at, mask, T: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0.0).to(T)


@triton.jit
def _member(mask, at, inside):
    if mask is None:
        return inside
    else:
        return inside & (tl.load(mask + at, mask=inside, other=0) != 0)


@triton.jit
def _finite(values):
    return tl.abs(values) < float("inf")  # and so not NaN


@triton.jit
def _pool(i, batch_gaps, mask, context, context_mask, n, m, T: tl.constexpr):
    """Return the gaps of entries ``i`` of batch and context, and which of them take part."""
    in_batch = i < n
    inside = _member(mask, i, in_batch)
    gaps = batch_gaps
    if context is not None:
        in_context = (i >= n) & (i < n + m)
        gaps = tl.where(in_batch, gaps, _load(context, i - n, in_context, T))
        inside |= _member(context_mask, i - n, in_context)
    inside &= _finite(gaps)
    return tl.where(inside, gaps, 0.0), inside


@triton.jit
def _closed_form_bracket(z_minus_level, start, start_other, at, at_other, gamma0, a, cap):
    """Bounds on u at a level: see `gamma_loss._newton._closed_form_bracket`."""
    left = -a * _rise(z_minus_level, start, start_other, at, at_other)
    ratio = -z_minus_level / gamma0
    moved = _log1p(tl.maximum(ratio, -0.99999))
    bound = tl.where((ratio > -0.9999) & (tl.abs(moved) < tl.abs(left)), moved, left)
    return tl.minimum(bound, 0.0), tl.minimum(tl.maximum(bound, 0.0), cap)


@triton.jit
def _pairs(u, gaps, inside, level, gamma0, a, cap, EPS: tl.constexpr):
    """Solve ``u + a (σ(γ0 e^u - g) - σ(level)) = 0`` for every pair; return u and its slope.

    Newton from the given u, inside brackets that every visit narrows.
    """
    at, at_other = _sigmoids(level)
    offset = gamma0 - gaps - level
    start, start_other = _sigmoids(gamma0 - gaps)
    low, high = _closed_form_bracket(offset, start, start_other, at, at_other, gamma0, a, cap)
    u = tl.minimum(tl.maximum(u, low), high)
    last = tl.zeros_like(u) + float("inf")
    d = tl.zeros_like(u) + 1
    active = 1
    k = 0
    while (active > 0) & (k < 100):
        x = tl.exp(u)
        z_minus_level = gamma0 * _expm1(u) + offset
        p, q = _sigmoids(level + z_minus_level)
        r = u + a * _rise(z_minus_level, p, q, at, at_other)
        d = 1 + a * gamma0 * x * p * q
        low, high = tl.where(r > 0, low, u), tl.where(r > 0, u, high)
        # Where the sigmoid dominates, its logit is closer to a line: Newton on that instead.
        rise = tl.minimum(tl.maximum(-r / a, -0.999 * p), 0.999 * q)
        logit_change = _log1p(rise / tl.maximum(p, 1e-37)) - _log1p(-rise / tl.maximum(q, 1e-37))
        slope = a * (p + rise) * (q - rise)
        d_logit = gamma0 * x * slope + 1
        steep = (d > 2) & (d_logit > 2)
        new = u + tl.where(steep, slope * logit_change / d_logit, -r / d)
        outside = (new < low) | (new > high)
        halve = (outside | (tl.abs(new - u) > 0.5 * last)) & (high > -40)  # below, r is a line
        middle = tl.maximum(0.5 * (low + high), -40.0)
        new = tl.where(halve, middle, new)
        last = tl.abs(new - u)
        # Done at the rounding error of r.
        noise = 1 + tl.abs(u) + a * p * q * (tl.abs(offset) + gamma0 * x)
        active = tl.max((inside & (last * d > 4 * EPS * noise)).to(tl.int32), 0)
        u = new
        k += 1
    return u, d


@triton.jit
def _next_level(level, low, high, last, mass, slope, a):
    """Safeguarded Newton step on log(mean x) = 0; mass is mean x and slope mean x / D.

    Returns the new level and what it has learned: its bracket and the length of its step.
    """
    low, high = tl.where(mass < 1, level, low), tl.where(mass < 1, high, level)
    p, q = _sigmoids(level)
    usable = (mass > 0) & (slope > 0)
    f = tl.log(tl.where(usable, mass, 1.0))
    d_sigma = -f * mass / (tl.where(usable, slope, 1.0) * a)
    d_sigma = tl.minimum(tl.maximum(d_sigma, -0.999 * p), 0.999 * q)
    new = level + _log1p(d_sigma / p) - _log1p(-d_sigma / q)
    halve = (usable == 0) | (new < low) | (new > high) | (tl.abs(new - level) > 0.5 * last)
    new = tl.where(halve, 0.5 * (low + high), new)
    return new, low, high, tl.abs(new - level)


@triton.jit
def _level_bracket(least, largest, count, gamma0, a):
    """Bounds on λ: see `gamma_loss._newton._level_bracket`.

    The second keeps λ from where all the mass is a single pair's, cut to the pool's size: there
    the mean of x is 1 at every level.
    """
    far = tl.log(1 + a) + 50.0  # beyond it a σ(λ) is 0 or a to well below rounding error
    low = tl.minimum(tl.maximum(gamma0 - largest, -far), far)
    high = tl.minimum(tl.maximum(gamma0 - least, -far), far)
    p, q = _sigmoids(gamma0 * count - largest)
    cap = tl.log(count) / a
    capped = tl.log(tl.maximum(p + cap, 1e-37)) - tl.log(tl.maximum(q - cap, 1e-37))
    return low, tl.maximum(tl.minimum(high, capped), low)


@triton.jit
def _first_level(p_sum, q_sum, low, high):
    """Take the Newton step from equal margins."""
    level = tl.log(tl.maximum(p_sum, 1e-37)) - tl.log(tl.maximum(q_sum, 1e-37))
    return tl.minimum(tl.maximum(level, low), high)


@triton.jit
def _mild_pairs(gaps, level, gamma0, a, PASSES: tl.constexpr):
    """Solve every pair at a level, as `_pairs` does, with undamped Newton from γ0."""
    at, _at_other = _sigmoids(level)
    u, d = tl.zeros_like(gaps), tl.zeros_like(gaps)
    for _ in range(PASSES):
        x = tl.exp(u)
        p, _q = _sigmoids(gamma0 * x - gaps)
        d = 1 + a * gamma0 * x * (p - p * p)
        u -= (u + a * (p - at)) / d
    return u, d


@triton.jit
def _settled(level, last, mass, EPS: tl.constexpr):
    """Whether the mean of x is 1 to rounding error, or λ can't move."""
    f = tl.log(tl.maximum(mass, 1e-37))
    return (tl.abs(f) <= 4 * EPS) | (last <= 2 * EPS * (1 + tl.abs(level)))


@triton.jit
def _v(u, gaps, gamma0, a):
    """Return log x + a σ(γ0 x - g), which the certificate is about."""
    p, _q = _sigmoids(gamma0 * tl.exp(u) - gaps)
    return u + a * p


@triton.jit
def _rewards(i, n, responses, references, beta, T: tl.constexpr):
    logps = _load(responses, i, i < n, T)
    if references is not None:
        logps -= _load(references, i, i < n, T)
    return beta * logps


@triton.jit
def _stored(state, i, size, empty):
    """Gaps that are NaN where an entry takes no part; all are equal where none does."""
    gaps = tl.load(state + i, mask=i < size, other=float("nan"))
    inside = gaps == gaps
    return tl.where(inside, gaps, 0.0), tl.where(empty, i < size, inside)


@triton.jit(do_not_specialize=["n", "m"])
def pool_kernel(
    # Inputs. `chosen` holds reward gaps if there is nothing rejected, else log-probabilities.
    chosen,
    rejected,
    reference_chosen,
    reference_rejected,
    mask,
    context,
    context_mask,
    # Outputs: the margins, or for a loss eight rows (see `gamma_loss._operators`); multiplier and
    # residual; the losses, or their sum or mean; which pairs count.
    rows,
    certificate,
    loss,
    mask_out,
    state,  # three numbers for each entry of the pool
    n,
    m,
    beta: tl.float64,
    gamma0: tl.float64,
    a: tl.float64,
    tilt: tl.float64,
    T: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSES: tl.constexpr,  # of the mild iteration; 0 for the nested one
    CENTERED: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Solve a pool in one program, and go on to a loss if there is one to write."""
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), T)
    beta, gamma0 = tl.full((), beta, T), tl.full((), gamma0, T)
    a, tilt = tl.full((), a, T), tl.full((), tilt, T)
    size = n + m
    state_u, state_slope = state + size, state + 2 * size

    # Assemble the pool, and take the sums of the first Newton step, from equal margins.
    entries, w_acc, wp_acc = zero, zero, zero
    least, largest = zero + float("inf"), zero - float("inf")
    for start in range(0, size, BLOCK):
        i = start + lane
        gaps = _load(chosen, i, i < n, T)
        if rejected is not None:
            gaps = _rewards(i, n, chosen, reference_chosen, beta, T)
            gaps -= _rewards(i, n, rejected, reference_rejected, beta, T)
        gaps, inside = _pool(i, gaps, mask, context, context_mask, n, m, T)
        tl.store(state + i, tl.where(inside, gaps, float("nan")), mask=i < size)
        p, q = _sigmoids(gamma0 - gaps)
        d = 1 + a * gamma0 * p * q
        w = tl.where(inside, 1 / d, 0.0)
        tl.store(state_u + i, -(a * p) / d, mask=i < size)
        tl.store(state_slope + i, 1 / d, mask=i < size)
        entries += tl.where(inside, 1.0, 0.0)
        w_acc += w
        wp_acc += w * p
        least = tl.minimum(least, tl.where(inside, gaps, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, gaps, float("-inf")))
    count = tl.sum(entries, 0)
    empty = count == 0
    count = tl.where(empty, size.to(T), count)
    w_sum, wp_sum = _sum2(w_acc, wp_acc)

    if PASSES > 0:
        # With v = u + a σ: u ← u - (v - ν) / D, kept as state_u + ν state_slope, so that each
        # step is one sweep over the pool.
        p_equal, _q_equal = _sigmoids(gamma0)  # of gaps that are all 0
        nu = a * tl.where(empty, p_equal, wp_sum / tl.where(empty, 1.0, w_sum))
        for _ in range(PASSES - 1):
            tl.debug_barrier()
            w_acc, wr_acc = zero, zero
            for start in range(0, size, BLOCK):
                i = start + lane
                gaps, inside = _stored(state, i, size, empty)
                u = _load(state_u, i, i < size, T) + nu * _load(state_slope, i, i < size, T)
                x = tl.exp(u)
                p, q = _sigmoids(gamma0 * x - gaps)
                v = u + a * p
                d = 1 + a * gamma0 * x * p * q
                w = tl.where(inside, x / d, 0.0)
                w_acc += w
                wr_acc += w * (v - d)
                tl.store(state_u + i, u - v / d, mask=i < size)
                tl.store(state_slope + i, 1 / d, mask=i < size)
            w_sum, wr_sum = _sum2(w_acc, wr_acc)
            nu = (wr_sum + count) / w_sum
        tl.debug_barrier()
        mass_acc = zero
        for start in range(0, size, BLOCK):
            i = start + lane
            gaps, inside = _stored(state, i, size, empty)
            u = _load(state_u, i, i < size, T) + nu * _load(state_slope, i, i < size, T)
            tl.store(state_u + i, u, mask=i < size)
            mass_acc += tl.where(inside, tl.exp(u), 0.0)
        mass = tl.sum(mass_acc, 0) / count
    else:
        low = tl.where(empty, 0.0, tl.min(least, 0))
        largest = tl.where(empty, 0.0, tl.max(largest, 0))
        low, high = _level_bracket(low, largest, count, gamma0, a)
        new = _first_level(wp_sum, w_sum - wp_sum, low, high)
        level, last, mass = new, high - low + 1, count
        cap = tl.log(count)
        active = 1
        k = 0
        while (active > 0) & (k < 100):
            level = new
            tl.debug_barrier()
            mass_acc, slope_acc = zero, zero
            for start in range(0, size, BLOCK):
                i = start + lane
                gaps, inside = _stored(state, i, size, empty)
                u = _load(state_u, i, i < size, T)
                u, d = _pairs(u, gaps, inside, level, gamma0, a, cap, EPS)
                tl.store(state_u + i, u, mask=i < size)
                x = tl.where(inside, tl.exp(u), 0.0)
                mass_acc += x
                slope_acc += x / d
            mass, slope = _sum2(mass_acc, slope_acc)
            mass, slope = mass / count, slope / count
            new, low, high, last = _next_level(level, low, high, last, mass, slope, a)
            active = tl.where(_settled(level, last, mass, EPS), 0, 1)
            k += 1
        p_level, _q_level = _sigmoids(level)
        nu = a * p_level

    # The budget exactly, the certificate, and what is asked for.
    tl.debug_barrier()
    log_mass = tl.log(mass)
    least, largest = zero + float("inf"), zero - float("inf")
    loss_acc, pairs_acc = zero, zero
    for start in range(0, size, BLOCK):
        i = start + lane
        in_batch = i < n
        gaps, inside = _stored(state, i, size, empty)
        u = _load(state_u, i, i < size, T) - log_mass
        v = _v(u, gaps, gamma0, a)
        least = tl.minimum(least, tl.where(inside, v, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, v, float("-inf")))

        counted = _member(mask, i, in_batch)
        gaps = _load(chosen, i, in_batch, T)
        chosen_rewards, rejected_rewards = gaps, tl.zeros_like(gaps)
        if rejected is not None:
            chosen_rewards = _rewards(i, n, chosen, reference_chosen, beta, T)
            rejected_rewards = _rewards(i, n, rejected, reference_rejected, beta, T)
            gaps = chosen_rewards - rejected_rewards
        margins = tl.where(_finite(gaps), gamma0 * tl.exp(u), float("nan"))
        margins = tl.where(counted, margins, gamma0)
        tl.store(rows + i, margins, mask=in_batch)
        if loss is not None:
            shifts = margins - gamma0
            s = tl.where(counted, gaps, 0.0) - (shifts if CENTERED else margins)
            losses = tl.where(counted, _softplus(-s) + tilt * s, 0.0)
            p, _q = _sigmoids(-s)
            weights = tl.where(counted, tl.where(s == s, p, s) - tilt, 0.0)
            tl.store(rows + n + i, shifts, mask=in_batch)
            tl.store(rows + 2 * n + i, gaps, mask=in_batch)
            tl.store(rows + 3 * n + i, weights, mask=in_batch)
            pairs_acc += tl.where(counted, 1.0, 0.0)
            loss_acc += losses
            if REDUCTION == "none":
                tl.store(loss + i, losses, mask=in_batch)
            tl.store(rows + 6 * n + i, chosen_rewards, mask=in_batch)
            tl.store(rows + 7 * n + i, rejected_rewards, mask=in_batch)
            tl.store(mask_out + i, counted, mask=in_batch)
    tl.store(certificate, nu)
    tl.store(certificate + 1, 0.5 * (tl.max(largest, 0) - tl.min(least, 0)))

    if loss is not None:
        # The gradient with respect to what is chosen, and to what is rejected.
        scale = -beta
        total, pairs = _sum2(loss_acc, pairs_acc)
        if REDUCTION == "mean":
            pairs = tl.maximum(pairs, 1.0)
            total /= pairs
            scale /= pairs
        if REDUCTION != "none":
            tl.store(loss, total)
        tl.debug_barrier()
        for start in range(0, n, BLOCK):
            i = start + lane
            slope = scale * _load(rows + 3 * n, i, i < n, T)
            tl.store(rows + 4 * n + i, slope, mask=i < n)
            tl.store(rows + 5 * n + i, -slope, mask=i < n)


@triton.jit
def _sum_of(partials, row: tl.constexpr, programs, P: tl.constexpr):
    lane = tl.arange(0, P)
    return tl.sum(tl.load(partials + row * P + lane, mask=lane < programs, other=0.0), 0)


@triton.jit(do_not_specialize=["n", "m"])
def start_kernel(
    gaps_in, mask, context, context_mask, partials, n, m,
    gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Leave in `partials`, for each program: entries, sums of w and w p, extremes of the gaps."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), T)
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    entries, w_acc, wp_acc = zero, zero, zero
    least, largest = zero + float("inf"), zero - float("inf")
    for start in range(program * BLOCK, n + m, programs * BLOCK):
        i = start + lane
        gaps = _load(gaps_in, i, i < n, T)
        gaps, inside = _pool(i, gaps, mask, context, context_mask, n, m, T)
        p, q = _sigmoids(gamma0 - gaps)
        w = tl.where(inside, 1 / (1 + a * gamma0 * p * q), 0.0)
        entries += tl.where(inside, 1.0, 0.0)
        w_acc += w
        wp_acc += w * p
        least = tl.minimum(least, tl.where(inside, gaps, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, gaps, float("-inf")))
    tl.store(partials + program, tl.sum(entries, 0))
    tl.store(partials + P + program, tl.sum(w_acc, 0))
    tl.store(partials + 2 * P + program, tl.sum(wp_acc, 0))
    tl.store(partials + 3 * P + program, tl.min(least, 0))
    tl.store(partials + 4 * P + program, tl.max(largest, 0))


@triton.jit
def _level_of_round(
    partials, state, turn, gamma0, a,
    T: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Return the level of a turn, and its whole state, from what the turn before left."""
    programs = tl.num_programs(0)
    lane = tl.arange(0, P)
    if turn == 0:
        count = _sum_of(partials, 0, programs, P)
        w_sum = _sum_of(partials, 1, programs, P)
        wp_sum = _sum_of(partials, 2, programs, P)
        least = tl.load(partials + 3 * P + lane, mask=lane < programs, other=float("inf"))
        largest = tl.load(partials + 4 * P + lane, mask=lane < programs, other=float("-inf"))
        empty = count == 0
        least = tl.where(empty, 0.0, tl.min(least, 0))
        largest = tl.where(empty, 0.0, tl.max(largest, 0))
        low, high = _level_bracket(least, largest, tl.maximum(count, 1.0), gamma0, a)
        level = _first_level(wp_sum, w_sum - wp_sum, low, high)
        last, done = high - low + 1, tl.where(empty, 1.0, 0.0).to(T)
    else:
        old = state + 8 * (turn - 1)
        level, low, high = tl.load(old), tl.load(old + 1), tl.load(old + 2)
        last, done, count = tl.load(old + 3), tl.load(old + 4), tl.load(old + 5)
        if done == 0:
            mass = _sum_of(partials, 0, programs, P) / count
            slope = _sum_of(partials, 1, programs, P) / count
            new, low, high, last = _next_level(level, low, high, last, mass, slope, a)
            done = tl.where(_settled(level, last, mass, EPS), 1.0, 0.0).to(T)
            level = new
    return level, low, high, last, done, count


@triton.jit(do_not_specialize=["turn", "n", "m"])
def step_kernel(
    gaps_in, mask, context, context_mask, old_partials, partials, state, turn, n, m,
    gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Decide this turn's level, and leave in `partials` the sums of x and x / D there."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    level, low, high, last, done, count = _level_of_round(
        old_partials, state, turn, gamma0, a, T, EPS, P
    )
    if program == 0:
        new = state + 8 * turn
        tl.store(new, level)
        tl.store(new + 1, low)
        tl.store(new + 2, high)
        tl.store(new + 3, last)
        tl.store(new + 4, done)
        tl.store(new + 5, count)
    if done == 0:
        lane = tl.arange(0, BLOCK)
        mass_acc, slope_acc = tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T)
        cap = tl.log(count)
        for start in range(program * BLOCK, n + m, programs * BLOCK):
            i = start + lane
            gaps = _load(gaps_in, i, i < n, T)
            gaps, inside = _pool(i, gaps, mask, context, context_mask, n, m, T)
            if PASSES > 0:
                u, d = _mild_pairs(gaps, level, gamma0, a, PASSES)
            else:
                u = tl.zeros_like(gaps)
                u, d = _pairs(u, gaps, inside, level, gamma0, a, cap, EPS)
            x = tl.where(inside, tl.exp(u), 0.0)
            mass_acc += x
            slope_acc += x / d
        mass, slope = _sum2(mass_acc, slope_acc)
        tl.store(partials + program, mass)
        tl.store(partials + P + program, slope)


@triton.jit(do_not_specialize=["turn", "n", "m"])
def finish_kernel(
    gaps_in, mask, context, context_mask, old_partials, partials, state, turn,
    margins_out, certificate, n, m,
    gamma0: tl.float64, a: tl.float64,
    T: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Write the margins and ν, and leave in `partials` the extremes of v."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    gamma0, a = tl.full((), gamma0, T), tl.full((), a, T)
    level, _low, _high, _last, _done, count = _level_of_round(
        old_partials, state, turn, gamma0, a, T, EPS, P
    )
    if program == 0:
        p_level, _q_level = _sigmoids(level)
        tl.store(certificate, a * p_level)
    lane = tl.arange(0, BLOCK)
    empty = count == 0
    cap = tl.log(tl.maximum(count, 1.0))
    least = tl.zeros((BLOCK,), T) + float("inf")
    largest = tl.zeros((BLOCK,), T) - float("inf")
    for start in range(program * BLOCK, n + m, programs * BLOCK):
        i = start + lane
        in_batch = i < n
        batch_gaps = _load(gaps_in, i, in_batch, T)
        gaps, inside = _pool(i, batch_gaps, mask, context, context_mask, n, m, T)
        if PASSES > 0:
            u, _d = _mild_pairs(gaps, level, gamma0, a, PASSES)
        else:
            u = tl.zeros_like(gaps)
            u, _d = _pairs(u, gaps, inside, level, gamma0, a, cap, EPS)
        u = tl.where(empty, 0.0, u)
        v = _v(u, gaps, gamma0, a)
        inside = tl.where(empty, i < n + m, inside)
        least = tl.minimum(least, tl.where(inside, v, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, v, float("-inf")))
        margins = tl.where(_finite(batch_gaps), gamma0 * tl.exp(u), float("nan"))
        margins = tl.where(_member(mask, i, in_batch), margins, gamma0)
        tl.store(margins_out + i, margins, mask=in_batch)
    tl.store(partials + program, tl.min(least, 0))
    tl.store(partials + P + program, tl.max(largest, 0))


@triton.jit
def certify_kernel(partials, certificate, programs, P: tl.constexpr):
    """Write the certificate, from the extremes of v."""
    lane = tl.arange(0, P)
    least = tl.load(partials + lane, mask=lane < programs, other=float("inf"))
    largest = tl.load(partials + P + lane, mask=lane < programs, other=float("-inf"))
    tl.store(certificate + 1, 0.5 * (tl.max(largest, 0) - tl.min(least, 0)))

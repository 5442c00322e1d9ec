"""Functions of blocks of lanes that Triton lacks. The hardware's exp and log are used."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """Return log(1 + x) by Kahan's way: the rounding of 1 + x cancels in the quotient."""
    y = 1 + x
    near = y == 1
    return tl.where(near, x, tl.log(y) * (x / tl.where(near, 1.0, y - 1)))


@triton.jit
def expm1(x):
    """Return exp(x) - 1, near 0 from its series, where the difference would cancel."""
    series = tl.zeros_like(x) + 1
    for k in tl.static_range(14 if x.dtype == tl.float64 else 8, 1, -1):
        series = 1 + x * (1.0 / k) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1)


@triton.jit
def sigmoid(x):
    """Return σ(x). Both its sides have a small relative error, and it never overflows to NaN."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def sigmoids(x):
    """Return σ(x) and σ(-x)."""
    return sigmoid(x), sigmoid(-x)


@triton.jit
def clip(value, low, high):
    """Return the value, or the bound that it is beyond."""
    return tl.minimum(tl.maximum(value, low), high)


# Whether Triton runs its kernels on the CPU, in Python.
INTERPRETED = tl.constexpr(type(log1p).__name__ == "InterpretedFunction")


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def sums2(a, b):
    """Return two sums, which the lanes exchange together."""
    if INTERPRETED:  # which would go from lane to lane in Python
        return tl.sum(a, 0), tl.sum(b, 0)
    else:
        return tl.reduce((a, b), 0, _add2)

"""Functions of blocks of lanes that Triton has none of. Of the hardware's, exp and log are used."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """Kahan's: what rounding does to 1 + x cancels in the quotient."""
    y = 1 + x
    near = y == 1
    return tl.where(near, x, tl.log(y) * (x / tl.where(near, 1.0, y - 1)))


@triton.jit
def expm1(x):
    """From its series near 0, where exp(x) - 1 would cancel."""
    series = tl.zeros_like(x) + 1
    for k in tl.static_range(14 if x.dtype == tl.float64 else 8, 1, -1):
        series = 1 + x * (1.0 / k) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1)


@triton.jit
def sigmoids(z):
    """σ(z) and σ(-z), each with a small relative error."""
    e = tl.exp(-tl.abs(z))
    large = 1 / (1 + e)
    small = e * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def sigmoid(z):
    """σ(z)."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1 + e)


@triton.jit
def softplus(z):
    """log(1 + exp(z))."""
    return tl.maximum(z, 0.0) + log1p(tl.exp(-tl.abs(z)))


@triton.jit
def clip(value, low, high):
    """Return the value, or the bound that it is beyond."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def is_finite(values):
    """Return where a value is finite, and so not NaN."""
    return tl.abs(values) < float("inf")


# Whether Triton runs its kernels on the CPU, in Python.
INTERPRETED = tl.constexpr(type(log1p).__name__ == "InterpretedFunction")


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add2_max4(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    tops = tl.maximum(a2, b2), tl.maximum(a3, b3), tl.maximum(a4, b4), tl.maximum(a5, b5)
    return a0 + b0, a1 + b1, tops[0], tops[1], tops[2], tops[3]


# Sums are float64, so that they may be added up over any number of blocks. All are taken at once:
# lanes exchange them in one go. The interpreter would go from lane to lane in Python.


@triton.jit
def sums2(a, b):
    """Two sums."""
    p, q = (tl.sum(a, 0), tl.sum(b, 0)) if INTERPRETED else tl.reduce((a, b), 0, _add2)
    return p.to(tl.float64), q.to(tl.float64)


@triton.jit
def sums2_tops4(a, b, c, d, e, f):
    """Two sums and four maxima. Of all but the first float32 is enough, and takes half as long."""
    b, c, d = b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    e, f = e.to(tl.float32), f.to(tl.float32)
    if INTERPRETED:
        p, q = sums2(a, b)
        return p, q, tl.max(c, 0), tl.max(d, 0), tl.max(e, 0), tl.max(f, 0)
    else:
        p, q, c, d, e, f = tl.reduce((a, b, c, d, e, f), 0, _add2_max4)
        return p.to(tl.float64), q.to(tl.float64), c, d, e, f

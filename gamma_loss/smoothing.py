"""Theorem 3.1: a per-pair margin is a per-pair label smoothing, and the other way round.

Write m for a reward gap, δ for a margin shift γ - γ0, ℓ(s) = -log σ(s) and p = σ(-m). As
ℓ(-m) = ℓ(m) + m, label smoothing only tilts the loss: cDPO's is ``ℓ(m) + ε m``, rDPO's
``ℓ(m) - k m`` with ``k = ε / (1 - 2ε)``. So a match with ℓ(m - δ), in value or in slope, is linear
in ε or in k. The paper's statement (Sun et al., arXiv:2506.03690) is the robust value match to
first order; docs/theory.md derives all forms.
"""

from __future__ import annotations

import math
from typing import Any

from gamma_loss import _checks
from gamma_loss._backend import Array


def label_smoothing_from_shift(
    reward_gaps: Array,
    shift: Array | float,
    *,
    kind: str = "robust",
    match: str = "value",
    order: str = "exact",
) -> Array:
    """Return the label smoothing ε that acts on a pair as a margin shift δ does: Theorem 3.1.

    The robust ε is ``k / (1 + 2k)``, where k is ``(ℓ(m) - ℓ(m - δ)) / m`` for a match in value and
    ``σ(δ - m) - σ(-m)`` in slope. The conservative ε is -k. Here ℓ(s) = -log σ(s).

    Parameters
    ----------
    reward_gaps : array of any shape
        m in reward units. Half precision is upcast to float32.
    shift : array of the same shape, or float
        δ = γ - γ0 in reward units, such as the ``shifts`` of `GammaLossAux`.
    kind : {"robust", "conservative"}
        rDPO's or cDPO's smoothing.
    match : {"value", "slope"}
        Whether the two losses agree in value or in their derivative with respect to the gap.
    order : {"exact", "first"}
        Exact, or to first order in δ (for the value match accurate where ``|δ| << |m|``).

    Returns
    -------
    array
        ε (dimensionless): positive where the pair is smoothed, negative where it is sharpened, and
        beyond [0, 0.5) for some large shifts. NaN where the gap or the shift is not finite, or ε is
        beyond the dtype's range, as for the robust kind with k = -1/2.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, dtype, library, shape or option, naming the argument.

    Notes
    -----
    As m → 0 the exact robust value match tends to 1/2. Other value matches grow like 1/m; at m = 0
    no smoothing changes the value, and they are NaN. All are 0 at δ = 0. The conservative slope
    match is finite everywhere.

    Examples
    --------
    A clear pair with a smaller margin than γ0 is smoothed; with a larger one it is sharpened.

    >>> import numpy as np
    >>> label_smoothing_from_shift(np.array([2.0, 2.0]), np.array([-0.5, 0.5])).round(4)
    array([ 0.0229, -0.0402])
    """
    _checks.choice("order", order, ("exact", "first"))
    m, delta, finite, xp = _arguments(reward_gaps, shift, "shift", kind, match)
    exact = order == "exact"
    with xp.ignore_fp_errors():
        p = xp.sigmoid(-m)
        if match == "slope":
            numerator = _slope_change(xp, m, delta) if exact else delta * p * xp.sigmoid(m)
            denominator = xp.ones_like(m)
        else:
            numerator = _value_change(xp, m, delta) if exact else -delta * p
            denominator = m
        if kind == "conservative":
            numerator = -numerator
        elif exact:
            denominator = denominator + 2 * numerator
        return _nan_unless(xp, finite, _ratio(xp, numerator, denominator))


def shift_from_label_smoothing(
    reward_gaps: Array, epsilon: Array | float, *, kind: str = "robust", match: str = "value"
) -> Array:
    """Return the margin shift δ that acts on a pair as label smoothing ε does.

    The inverse of `label_smoothing_from_shift` (exact) in δ, with its errors: in value
    ``e^δ = e^t (1 + e^m (1 - e^-t))`` with ``t = -k m``, in slope
    ``δ = log(1 + k / p) - log(1 - k / (1 - p))`` with p = σ(-m).

    Parameters
    ----------
    reward_gaps : array of any shape
        m in reward units. Half precision is upcast to float32.
    epsilon : array of the same shape, or float
        ε (dimensionless). Any number, since a sharpened pair has a negative one.
    kind, match
        As for `label_smoothing_from_shift`.

    Returns
    -------
    array
        δ in reward units. NaN where the gap or ε is not finite, and where there is no shift: for a
        value ℓ(m - δ) <= 0, a slope outside (-1, 0), or ε = 1/2 of the robust kind.

    Examples
    --------
    >>> import numpy as np
    >>> gaps = np.array([2.0, 2.0, -1.0])
    >>> shift = shift_from_label_smoothing(gaps, 0.05)
    >>> label_smoothing_from_shift(gaps, shift).round(12)
    array([0.05, 0.05, 0.05])
    >>> shift_from_label_smoothing(gaps, 0.05, match="slope").round(3)
    array([0.448, 0.448, 0.305])
    """
    m, epsilon, finite, xp = _arguments(reward_gaps, epsilon, "epsilon", kind, match)
    with xp.ignore_fp_errors():
        k = _ratio(xp, epsilon / 2, 0.5 - epsilon) if kind == "robust" else -epsilon
        if match == "slope":
            # logit(p + k) - logit(p), in two terms of one sign; undefined beyond |k| = 1.
            k = xp.minimum(xp.maximum(k, xp.full_like(k, -2.0)), xp.full_like(k, 2.0))
            shift = _log1p_exp(xp, k, xp.softplus(m)) - _log1p_exp(xp, -k, xp.softplus(-m))
        else:
            # ℓ(m - δ) = ℓ(m) + t is e^δ = 1 + (e^t - 1) / p, which cancels for small e^δ. Written
            # as e^t (1 + e^m (1 - e^-t)) it does not: both logarithms have the sign of t.
            t = -k * m
            share = xp.sign(t) * -xp.expm1(-xp.abs(t))
            shift = t + _log1p_exp(xp, share, m - xp.minimum(t, xp.zeros_like(t)))
        return _nan_unless(xp, finite, shift)


def _arguments(
    reward_gaps: Array, other: Array | float, name: str, kind: str, match: str
) -> tuple[Array, Array, Array, Any]:
    """Return both in one dtype, 0 where one is not finite, and where both are finite."""
    _checks.choice("kind", kind, ("robust", "conservative"))
    _checks.choice("match", match, ("value", "slope"))
    xp, (m,) = _checks.floats(reward_gaps=reward_gaps)
    other = _checks.number_or_array(name, other, "reward_gaps", m)
    if isinstance(other, float):
        other = xp.full_like(m, other)
    dtype = xp.result_type(m.dtype, other.dtype)
    finite, zero = xp.isfinite(m) & xp.isfinite(other), xp.zeros_like(m, dtype=dtype)
    m, other = (xp.where(finite, xp.astype(x, dtype), zero) for x in (m, other))
    return m, other, finite, xp


def _value_change(xp: Any, m: Array, delta: Array) -> Array:
    """ℓ(m) - ℓ(m - δ) = -log(1 - p + p e^δ), without cancellation nor overflow."""
    one = xp.ones_like(delta)
    small = xp.minimum(xp.maximum(delta, -one), one)
    near = -xp.log1p(xp.sigmoid(-m) * xp.expm1(small))
    far = -xp.logaddexp(-xp.softplus(-m), delta - xp.softplus(m))
    return xp.where(xp.abs(delta) <= 1, near, far)


def _slope_change(xp: Any, m: Array, delta: Array) -> Array:
    """σ(δ - m) - σ(-m), without cancellation: σ(high) σ(-low) (1 - e^-|δ|) with the sign of δ."""
    low, high = xp.minimum(delta - m, -m), xp.maximum(delta - m, -m)
    size = xp.sigmoid(high) * xp.sigmoid(-low) * -xp.expm1(-xp.abs(delta))
    return xp.where(delta > 0, size, -size)


def _ratio(xp: Any, numerator: Array, denominator: Array) -> Array:
    """Divide, with 0 / 0 = 0, and NaN where the quotient is beyond the dtype's range."""
    least = xp.finfo(numerator.dtype).smallest_normal
    none = xp.abs(denominator) <= xp.abs(numerator) * least
    quotient = numerator / xp.where(none, xp.ones_like(denominator), denominator)
    return _nan_unless(xp, ~none | (numerator == 0), quotient)


def _log1p_exp(xp: Any, s: Array, x: Array) -> Array:
    """log(1 + s e^x) for |s| <= 2, without overflow; NaN where there is no such logarithm."""
    one = xp.ones_like(x)
    largest = math.log(xp.finfo(x.dtype).max) - 1  # twice e^largest is still finite
    product = s * xp.exp(xp.minimum(x, largest * one))
    defined = product > -1
    near = xp.log1p(xp.where(defined, product, 0 * one))
    far = xp.softplus(x + xp.log(xp.where(s > 0, s, one)))
    return _nan_unless(xp, defined, xp.where((x > largest) & (s > 0), far, near))


def _nan_unless(xp: Any, condition: Array, values: Array) -> Array:
    """Return NaN where the condition is false; no NaN is made elsewhere, as jax_debug_nans asks."""
    infinity = xp.where(condition, xp.zeros_like(values), xp.full_like(values, float("inf")))
    return values + (infinity - infinity)

"""Checks of arguments: always on, and never a look at an array's values."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from gamma_loss._arrays import Array, Namespace, device, is_real_floating, is_torch, namespace


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return a finite hyperparameter as a Python float."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    number = float(value)
    if not (-math.inf < number < math.inf and above < number < below and number >= least):
        bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
        bounds += [f"< {below:g}"] * (below < math.inf)
        wanted = " and ".join(["finite", *bounds])
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


def whole_number(name: str, value: Any, *, least: int) -> int:
    """Return a Python integer that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def choice(name: str, value: str, options: tuple[str, ...]) -> None:
    """Refuse a value that is not among the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}")


def real(**arrays: Array) -> Namespace:
    """Check that the arrays are of one library, on one device, and hold real floats.

    Returns the library's namespace.
    """
    first_name, first = next(iter(arrays.items()))
    xp = _namespace(first_name, first)
    for name, array in arrays.items():
        _same_home(name, array, first_name, first, xp)
        if not is_real_floating(xp, array):
            raise TypeError(f"{name} must have a real floating dtype, got {array.dtype}")
    return xp


def floats(**arrays: Array) -> tuple[Namespace, list[Array]]:
    """Check arrays as `real` does, and return them as well, `upcast`."""
    xp = real(**arrays)
    return xp, [upcast(xp, array) for array in arrays.values()]


def upcast(xp: Namespace, array: Array) -> Array:
    """Return half precision as float32."""
    if is_torch(array):  # which tells sooner
        return array.float() if array.dtype.itemsize < 4 else array
    return xp.astype(array, xp.float32) if xp.finfo(array.dtype).bits < 32 else array


def pairs(may_be_empty: bool = False, /, **arrays: Array) -> None:
    """Check that the arrays are 1-D, of one shape, and not empty unless they may be."""
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"{name} must be 1-D, one entry a pair, got shape {_shape(array)}")
        if array.shape[0] == 0 and not may_be_empty:
            raise ValueError(f"{name} must hold at least one pair, got shape {_shape(array)}")
        if array.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {_shape(first)}, got {_shape(array)}"
            )


def mask(name: str, mask: Array, of_name: str, of: Array, xp: Namespace) -> None:
    """Check a boolean mask against the array it belongs to."""
    _same_home(name, mask, of_name, of, xp)
    if mask.dtype != xp.bool:
        raise TypeError(f"{name} must have a boolean dtype, got {mask.dtype}")
    if mask.shape != of.shape:
        raise ValueError(
            f"{name} must have the shape of {of_name}, {_shape(of)}, got {_shape(mask)}"
        )


def _namespace(name: str, array: Any) -> Namespace:
    try:
        return namespace(array)
    except TypeError:
        raise TypeError(
            f"{name} must be an array (torch, NumPy, JAX, ...), got {type(array).__name__}"
        ) from None


def _same_home(name: str, array: Any, of_name: str, of: Array, xp: Namespace) -> None:
    if type(array) is not type(of) and _namespace(name, array) is not xp:
        raise TypeError(
            f"{name} must be an array of the same library as {of_name}, "
            f"{type(of).__module__}.{type(of).__name__}, "
            f"got {type(array).__module__}.{type(array).__name__}"
        )
    if device(array) != device(of):
        raise ValueError(
            f"{name} must be on the device of {of_name}, {device(of)}, got {device(array)}"
        )


def _shape(array: Array) -> tuple[int, ...]:
    return tuple(array.shape)

"""Checks of arguments: always on, and never a look at an array's values."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from gamma_loss._arrays import (
    Array,
    Namespace,
    device,
    is_real_floating,
    is_torch,
    namespace,
    not_plain,
)

STEEPEST = 1e9  # γ0 / τ of a margin problem


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return a finite hyperparameter as a Python float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number, value = math.inf, f"{type(value).__name__} beyond floats"
    if not (-math.inf < number < math.inf and above < number < below and number >= least):
        bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
        bounds += [f"< {below:g}"] * (below < math.inf)
        wanted = " and ".join(["finite", *bounds])
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return a bool, and refuse what only counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def problem(gamma0: Any, tau: Any) -> tuple[float, float]:
    """Return the two settings of a margin problem.

    Within these bounds nothing that a solver computes of them leaves the range of float32: γ0 / τ,
    κ = γ0² / τ, the squares of margins, gaps / γ0. And log γ0 has as many digits behind the point
    as the certificate of a mild setting takes for granted.
    """
    gamma0, tau = number("gamma0", gamma0, least=0), number("tau", tau, above=0)
    if gamma0 and not 1e-14 <= gamma0 <= 1e12:
        raise ValueError(f"gamma0 must be 0 or from 1e-14 to 1e12, got {gamma0}")
    if gamma0 and not 1e-30 <= gamma0 / tau <= STEEPEST:
        raise ValueError(f"gamma0 / tau must be from 1e-30 to {STEEPEST:g}, got {gamma0} / {tau}")
    return gamma0, tau


def whole_number(name: str, value: Any, *, least: int) -> int:
    """Return a Python integer that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Refuse a value that is not among the options."""
    if not isinstance(value, str):  # an array would not even compare to one truth value
        raise TypeError(f"{name} must be one of {options}, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}")


def real(**arrays: Array) -> Namespace:
    """Check that the arrays are of one library, on one device, and hold real floats.

    Returns the library's namespace.
    """
    first_name, first = next(iter(arrays.items()))
    xp = _namespace(first_name, first)
    for name, array in arrays.items():
        _same_kind(name, array, first_name, first, xp)
        if not is_real_floating(xp, array):
            raise TypeError(
                f"{name} must have a real floating dtype of its library, got {array.dtype}"
            )
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
        _same_shape(name, array, first_name, first)


def mask(name: str, mask: Array, of_name: str, of: Array, xp: Namespace) -> None:
    """Check a boolean mask against the array it belongs to."""
    _same_kind(name, mask, of_name, of, xp)
    if mask.dtype != xp.bool:
        raise TypeError(f"{name} must have a boolean dtype, got {mask.dtype}")
    _same_shape(name, mask, of_name, of)


def number_or_array(name: str, value: Any, of_name: str, of: Array) -> float | Array:
    """Return a number, or an array of the shape of another one, `upcast`."""
    if isinstance(value, Real):
        return number(name, value)
    _, (_, array) = floats(**{of_name: of, name: value})
    _same_shape(name, array, of_name, of)
    return array


def _namespace(name: str, array: Any) -> Namespace:
    try:
        return namespace(array)
    except TypeError:
        raise TypeError(
            f"{name} must be an array (torch, NumPy, JAX, ...), got {type(array).__name__}"
        ) from None


def tensors(**arrays: Any) -> None:
    """Check that the arrays are torch's."""
    for name, array in arrays.items():
        if not is_torch(array):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(array).__name__}")
        _plain(name, array)


def on_host(name: str, values: Any) -> Any:
    """Return real numbers of any library, or a list of them, as a 1-D array of NumPy's."""
    import numpy as np

    _plain(name, values)
    if is_torch(values):  # which may be on a device, carry a gradient, or be of half precision
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except (RuntimeError, TypeError, ValueError) as error:  # such as lists of several lengths
        raise TypeError(f"{name} must hold real numbers: {error}") from None
    if array.dtype.kind == "b" or not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise TypeError(
            f"{name} must hold real numbers, got {type(values).__name__} of {array.dtype}"
        )
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, one entry a pair, got shape {array.shape}")
    return array


def _plain(name: str, array: Any) -> None:
    if what := not_plain(array):
        raise TypeError(f"{name} must be a plain array, got {what}")


def _same_shape(name: str, array: Array, of_name: str, of: Array) -> None:
    if array.shape != of.shape:
        raise ValueError(
            f"{name} must have the shape of {of_name}, {_shape(of)}, got {_shape(array)}"
        )


def _same_kind(name: str, array: Any, of_name: str, of: Array, xp: Namespace) -> None:
    if type(array) is not type(of) and _namespace(name, array) is not xp:
        raise TypeError(
            f"{name} must be an array of the same library as {of_name}, "
            f"{type(of).__module__}.{type(of).__name__}, "
            f"got {type(array).__module__}.{type(array).__name__}"
        )
    _plain(name, array)
    if device(array) != device(of):
        raise ValueError(
            f"{name} must be on the device of {of_name}, {device(of)}, got {device(array)}"
        )


def _shape(array: Array) -> tuple[int, ...]:
    return tuple(array.shape)

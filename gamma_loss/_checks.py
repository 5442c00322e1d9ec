"""Checks of arguments: always on, and never a look at an array's values."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

from gamma_loss._backend import Array, get_backend

MAX_A = 1e9  # γ0 / τ of a margin problem


def number(
    name: str, value: Any, *, above: float = -inf, least: float = -inf, below: float = inf
) -> float:
    """Return a finite hyperparameter as a Python float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number, value = inf, f"{type(value).__name__} beyond floats"
    if not (-inf < number < inf and above < number < below and number >= least):
        bounds = [f"> {above:g}"] * (above > -inf) + [f">= {least:g}"] * (least > -inf)
        bounds += [f"< {below:g}"] * (below < inf)
        wanted = " and ".join(["finite", *bounds])
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return number


def label_smoothing(value: Any) -> float:
    """Return a share of flipped labels."""
    return number("label_smoothing", value, least=0, below=0.5)


def flag(name: str, value: Any) -> bool:
    """Accept only True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def problem(gamma0: Any, tau: Any) -> tuple[float, float]:
    """Return the two settings of a margin problem, in the range where float32 can compute."""
    gamma0, tau = number("gamma0", gamma0, least=0), number("tau", tau, above=0)
    if gamma0 and not 1e-14 <= gamma0 <= 1e12:
        raise ValueError(f"gamma0 must be 0 or from 1e-14 to 1e12, got {gamma0}")
    if gamma0 and not 1e-30 <= gamma0 / tau <= MAX_A:
        raise ValueError(f"gamma0 / tau must be from 1e-30 to {MAX_A:g}, got {gamma0} / {tau}")
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


def floats(**arrays: Array) -> tuple[Any, list[Array]]:
    """Return the backend of arrays of real floats, and them, half precision as float32.

    They have to be of one library and on one device.
    """
    (first_name, first), *_ = arrays.items()
    xp, found = backend(first_name, first), []
    for name, array in arrays.items():
        if array is not first:
            same_home(name, array, first_name, first, xp)
        found.append(xp.as_floats(name, array))
    return xp, found


def pairs(may_be_empty: bool = False, /, **arrays: Array) -> None:
    """Check that the arrays are 1-D, of one shape, and not empty unless they may be."""
    (first_name, first), *_ = arrays.items()
    for name, array in arrays.items():
        shape = tuple(array.shape)
        if len(shape) != 1:
            raise ValueError(f"{name} must be 1-D, one entry a pair, got shape {shape}")
        if array.shape != first.shape:
            same_shape(name, array, first_name, first)
        if not may_be_empty and shape[0] == 0:
            raise ValueError(f"{name} must hold at least one pair, got shape {shape}")


def mask(name: str, mask: Array, of_name: str, of: Array, xp: Any) -> None:
    """Check a boolean mask against the array it belongs to."""
    same_home(name, mask, of_name, of, xp)
    plain(name, mask, xp)
    if mask.dtype != xp.bool:
        raise TypeError(f"{name} must have a boolean dtype, got {mask.dtype}")
    same_shape(name, mask, of_name, of)


def weights(weights: Array, of_name: str, of: Array, xp: Any) -> Array:
    """Return weights in the dtype of their gaps; values are checked where reading is free."""
    same_home("weights", weights, of_name, of, xp)
    weights = xp.as_floats("weights", weights)
    same_shape("weights", weights, of_name, of)
    weights = xp.astype(xp.detach(weights), of.dtype)
    if xp.is_host:
        right = (weights >= 0) & xp.isfinite(weights)
        if not xp.all(right):
            wrong = float(weights[~right][0])
            raise ValueError(
                f"weights must be finite and >= 0, got {wrong}: give a pair that is to take no "
                "part the weight 0"
            )
        return weights
    return weights + 0 * xp.sqrt(weights)  # NaN for what is refused above


def number_or_array(name: str, value: Any, of_name: str, of: Array) -> float | Array:
    """Return a number, or an array of the shape of another one, half precision as float32."""
    if isinstance(value, Real):
        return number(name, value)
    _, (_, array) = floats(**{of_name: of, name: value})
    same_shape(name, array, of_name, of)
    return array


def backend(name: str, array: Any) -> Any:
    """Return the backend of an argument."""
    try:
        return get_backend(array)
    except TypeError:
        kind = type(array)
        home = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise TypeError(
            f"{name} must be an array (torch, NumPy, JAX, ...), got {home}{kind.__name__}"
        ) from None


def tensors(**arrays: Any) -> None:
    """Check that the arrays are torch's."""
    import torch

    for name, array in arrays.items():
        if not isinstance(array, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(array).__name__}")
        plain(name, array, get_backend(array))


def to_numpy(name: str, values: Any) -> Any:
    """Return real numbers of any library, or a list of them, as a 1-D array of NumPy's."""
    import numpy as np

    if hasattr(values, "dtype"):
        xp = backend(name, values)
        plain(name, values, xp)
        if xp.library == "torch":  # on a device, with a gradient, or of half precision
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


def same_shape(name: str, array: Array, of_name: str, of: Array) -> None:
    """Check that two arrays have one shape."""
    if array.shape != of.shape:
        shapes = f"{tuple(of.shape)}, got {tuple(array.shape)}"
        raise ValueError(f"{name} must have the shape of {of_name}, {shapes}")


def same_home(name: str, array: Any, of_name: str, of: Array, xp: Any) -> None:
    """Check that two arrays are of one library and on one device."""
    if type(array) is not type(of) and backend(name, array).xp is not xp.xp:
        raise TypeError(
            f"{name} must be an array of the same library as {of_name}, "
            f"{type(of).__module__}.{type(of).__name__}, "
            f"got {type(array).__module__}.{type(array).__name__}"
        )
    device = xp.device(array)
    if device != xp.device(of):
        raise ValueError(
            f"{name} must be on the device of {of_name}, {xp.device(of)}, got {device}"
        )


def plain(name: str, array: Any, xp: Any) -> None:
    """Refuse an array that is masked, nested or sparse."""
    if kind := xp.unsupported_kind(array):
        raise TypeError(f"{name} must be a plain array, got {kind}")

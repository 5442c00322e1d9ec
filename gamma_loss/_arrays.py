"""The array library behind an argument, and the few operations that differ between libraries."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import types
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

# Arrays of any library that follows the array API standard; there is no common type to name yet.
Array: TypeAlias = Any
Namespace: TypeAlias = Any

_SHORT = 1024  # BLAS sums in some 32 lanes, so adds at most 32 times in a row
_CAP = 80.0  # float32 knows its exponential
_ROW = 256  # JAX sums so many in a row at most

State = TypeVar("State", bound=tuple[Any, ...])


def is_torch(array: object) -> bool:
    """Whether an array is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_numpy(array: object) -> bool:
    """Whether an array or a number is one of NumPy's; NumPy is not imported to find out."""
    if type(array).__module__ == "numpy":  # a tenth of the time
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(array, (numpy.ndarray, numpy.generic))


def is_jax(array: object) -> bool:
    """Whether an array is one of JAX's; JAX is not imported to find out."""
    jax = sys.modules.get("jax")
    # Not asked of a tensor: torch.compile traces no isinstance that a class has made its own.
    return jax is not None and not is_torch(array) and isinstance(array, jax.Array)


# By type: to find out takes longer than most operations on a few hundred gaps.
_namespaces: dict[type, Namespace] = {}


def namespace(array: object) -> Namespace:
    """Return the array API namespace of an array, or raise TypeError if it is not one."""
    if is_torch(array):
        # Not array_namespace(): its lru_cache makes torch.compile warn.
        import array_api_compat.torch

        return array_api_compat.torch
    known = _namespaces.get(type(array))
    if known is None:
        import array_api_compat

        known = _namespaces[type(array)] = array_api_compat.array_namespace(array)
    return known


def solver_namespace(array: Array) -> Namespace:
    """Return the namespace for inner loops over vectors of one dtype.

    For torch and NumPy it is not array-api-compat's, whose functions look at their arguments first.
    """
    if is_numpy(array):
        return _numpy()
    return sys.modules["torch"] if is_torch(array) else namespace(array)


@functools.cache
def _numpy() -> Namespace:
    """Return NumPy, with the standard's names in old versions, and reductions without a layer."""
    import array_api_compat.numpy
    import numpy

    everything = vars(array_api_compat.numpy) | vars(numpy)
    everything |= {"sum": numpy.add.reduce, "all": numpy.logical_and.reduce}
    everything |= {"max": numpy.maximum.reduce, "min": numpy.minimum.reduce}
    return types.SimpleNamespace(**everything)


def device(array: Array) -> Any:
    """Return an array's device, or None where that is no question.

    NumPy before 2.0 has no such attribute, and JAX checks devices itself and hides a tracer's.
    """
    if is_torch(array):
        return array.device
    return None if is_jax(array) else getattr(array, "device", None)


def not_plain(array: Array) -> str:
    """Say what an array is other than one number at each place, or return ""."""
    if not is_torch(array):
        return "a masked array" if hasattr(array, "mask") else ""
    if array.is_nested:
        return "a nested tensor"
    if hasattr(array, "get_mask"):
        return "a masked tensor"
    return "" if array.layout is sys.modules["torch"].strided else f"a {array.layout} tensor"


def is_real_floating(xp: Namespace, array: Array) -> bool:
    """Whether an array holds real floats that its library computes with."""
    if is_torch(array):  # its own answer takes a tenth of the time
        return bool(array.dtype.is_floating_point)
    if is_numpy(array):  # from 256 on types are not NumPy's, such as bfloat16 of ml_dtypes
        return bool(array.dtype.kind == "f" and array.dtype.num < 256)
    return bool(xp.isdtype(array.dtype, "real floating"))


def isfinite(array: Array) -> Array:
    """Where an array is finite."""
    if is_torch(array):
        return array - array == 0  # two operations, where torch.isfinite takes five
    return namespace(array).isfinite(array)


def quiet(array: Array) -> contextlib.AbstractContextManager[Any]:
    """Have NumPy not warn, in a ``with`` statement, of numbers that are not finite."""
    if is_torch(array):
        return contextlib.nullcontext()
    import numpy

    return numpy.errstate(over="ignore", invalid="ignore")


def detach(array: Array) -> Array:
    """Return the array as a constant for automatic differentiation."""
    if is_torch(array):
        return array.detach()
    if is_jax(array):
        return sys.modules["jax"].lax.stop_gradient(array)
    return array


class _Host:
    """The functions of a namespace that the level's algebra takes, on Python floats."""

    exp, expm1, log, log1p = math.exp, math.expm1, math.log, math.log1p
    abs, maximum, minimum = abs, max, min

    @staticmethod
    def where(condition: bool, value: float, other: float) -> float:
        return value if condition else other


HOST = _Host()


def is_free_to_read(array: Array) -> bool:
    """Whether a value can be looked at without waiting for a device and without a tracer's error.

    Then a loop ends when it is done, and single numbers are Python's, which are faster. With other
    libraries, which run one operation after the other, a wait is shorter than needless passes.
    """
    if is_torch(array):
        torch = sys.modules["torch"]
        return (
            array.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not is_transforming()
        )
    return not is_jax(array)


def is_transforming() -> bool:
    """Whether torch.func, forward mode or a dispatch mode is at work, or torch doesn't tell."""
    torch = sys.modules["torch"]
    tell = getattr(torch._C, "_are_functorch_transforms_active", None)
    if tell is None or bool(tell()):
        return True
    if torch.compiler.is_compiling():  # which is a mode itself, and can't read the rest
        return False
    level: int = torch.autograd.forward_ad._current_level
    modes: int = torch._C._len_torch_dispatch_stack()
    return level >= 0 or modes > 0


def repeat(
    times: int, step: Callable[[State], State], state: State, done: Callable[[State], Any]
) -> State:
    """Apply ``state = step(state)`` while not ``done(state)``, at most ``times`` times.

    A loop in the traced program for JAX. A done that is no Python bool is never looked at: what
    can't be read takes all the steps.
    """
    if is_jax(done(state)):
        loop = sys.modules["jax"].lax.while_loop
        _, state = loop(_condition(times, done), _body(step), (0, state))
        return state
    for _ in range(times):
        if done(state) is True:
            break
        state = step(state)
    return state


# The same functions each time: JAX compiles a loop anew for others.
@functools.lru_cache
def _condition(times: int, done: Callable[[Any], Array]) -> Callable[[Any], Array]:
    return lambda counted: (counted[0] < times) & ~done(counted[1])


@functools.lru_cache
def _body(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda counted: (counted[0] + 1, step(counted[1]))


@functools.cache
def jitted(function: Callable[..., Any], static: tuple[int, ...]) -> Callable[..., Any]:
    """Return a function of JAX arrays as one program, compiled for each shape.

    One by one its operations would take four times as long, and twice as long to compile.
    """
    program: Callable[..., Any] = sys.modules["jax"].jit(function, static_argnums=static)
    return program


def total(array: Array) -> Array:
    """Return the sum of a vector, with an error that does not grow with it.

    torch's own sum and NumPy's are in pairs. A compiler's are not, so it gets another one.
    """
    if is_numpy(array):
        return _numpy().sum(array)
    # Not -size % _ROW, which torch 2.6 compiles to C++'s remainder, a negative number.
    rows = (array.shape[0] + _ROW - 1) // _ROW
    rest = rows * _ROW - array.shape[0]
    if is_torch(array):
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling():
            if array.dtype == torch.float64:
                array = torch.nn.functional.pad(array, (0, rest)).reshape(rows, _ROW)
                array = torch.sum(array, 1)
            return torch.sum(array, dtype=torch.float64).to(array.dtype)
    elif is_jax(array) and rows > 1:
        jnp = sys.modules["jax"].numpy
        return total(jnp.sum(jnp.pad(array, (0, rest)).reshape(rows, _ROW), axis=1))
    return solver_namespace(array).sum(array)


def inner(v: Array, w: Array) -> Array:
    """Return Σ v w, with an error that does not grow with the vectors.

    For a few numbers by BLAS, in one operation where it is torch's. Not ``@``, which autocast runs
    in half precision.
    """
    torch = sys.modules["torch"] if is_torch(v) else None
    known = not torch.compiler.is_compiling() if torch else is_numpy(v)
    # The size last: in a graph it is a symbol, on which a comparison would be a guard.
    if known and v.shape[0] <= _SHORT:
        return solver_namespace(v).dot(v, w)
    return total(v * w)


def as_floats(mask: Array, like: Array) -> Array:
    """Return 1 where a mask is true and 0 elsewhere, in the dtype of another array."""
    if is_torch(mask):
        return mask.to(like.dtype)
    return mask.astype(like.dtype) if is_numpy(mask) else namespace(mask).astype(mask, like.dtype)


def softplus(xp: Namespace, x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    if is_numpy(x):  # of which logaddexp takes twice the time
        return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-abs(x)))
    return xp.logaddexp(x, xp.zeros_like(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow and with a small relative error on both sides."""
    if not is_numpy(x):
        if is_torch(x):
            return x.sigmoid()
        if is_jax(x):
            return sys.modules["jax"].nn.sigmoid(x)
    xp = solver_namespace(x)
    e = xp.exp(xp.minimum(x, _CAP))
    return e / (1 + e)


def sigmoids(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """`sigmoid` of x and of -x, for Python floats as well."""
    e = xp.exp(-abs(x))
    large = 1 / (1 + e)
    small = e * large
    return xp.where(x >= 0, large, small), xp.where(x >= 0, small, large)


def clip(xp: Namespace, value: Array, low: Array, high: Array) -> Array:
    """Return the value, or the bound that it is beyond."""
    return xp.minimum(xp.maximum(value, low), high)


def choose(condition: Any, value: Callable[[], Array], other: Callable[[], Array]) -> Array:
    """Compute the value or the other, or both where Python does not know which is wanted."""
    if isinstance(condition, bool):
        return value() if condition else other()
    first = value()
    return solver_namespace(first).where(condition, first, other())


def reader(like: Array, wait: bool = False) -> Callable[[Array], Array]:
    """Return `float` where single numbers are free to read, or worth a wait, else no change."""
    if is_free_to_read(like) or (wait and is_torch(like)):
        return float
    return lambda number: number


def signed(sign: Array, value: Array) -> Array:
    """Return the value times 1 or -1, without an operation where Python knows that it is 1."""
    if isinstance(sign, float):
        return value if sign > 0 else -value
    return sign * value


def numbers_namespace(value: Array) -> Namespace:
    """Return the namespace of a number, `HOST` for a Python float."""
    return HOST if isinstance(value, float) else solver_namespace(value)


def bits(array: Array) -> int:
    return int(solver_namespace(array).finfo(array.dtype).bits)


def epsilon(array: Array) -> float:
    """Return the machine epsilon of an array's dtype."""
    return float(solver_namespace(array).finfo(array.dtype).eps)

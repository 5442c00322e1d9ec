"""The array library behind an argument, and the few operations that differ between libraries."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

# Arrays of any library that follows the array API standard; there is no common type to name yet.
Array: TypeAlias = Any
Namespace: TypeAlias = Any

LARGE = 100_000  # entries of a vector

State = TypeVar("State", bound=tuple[Any, ...])


def is_torch(array: object) -> bool:
    """Whether an array is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_jax(array: object) -> bool:
    """Whether an array is one of JAX's; JAX is not imported to find out."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array)


def namespace(array: object) -> Namespace:
    """Return the array API namespace of an array, or raise TypeError if it is not one."""
    if is_torch(array):
        # Not array_namespace(): its lru_cache makes torch.compile warn.
        import array_api_compat.torch

        return array_api_compat.torch
    import array_api_compat

    return array_api_compat.array_namespace(array)


def solver_namespace(array: Array) -> Namespace:
    """Return the namespace for inner loops over arrays of one dtype.

    For torch that is torch itself: array-api-compat's functions are the same there, but each looks
    at the dtypes first, which takes longer than the operation on a few hundred gaps.
    """
    return sys.modules["torch"] if is_torch(array) else namespace(array)


def device(array: Array) -> Any:
    """Return an array's device, or None where that is no question.

    NumPy before 2.0 has no such attribute, and JAX checks devices itself and hides a tracer's.
    """
    if is_torch(array):
        return array.device
    return None if is_jax(array) else getattr(array, "device", None)


def is_real_floating(xp: Namespace, array: Array) -> bool:
    """Whether an array holds real floats."""
    if is_torch(array):  # its own answer takes a tenth of the time
        return bool(array.dtype.is_floating_point)
    return bool(xp.isdtype(array.dtype, "real floating"))


def isfinite(array: Array) -> Array:
    """Where an array is finite."""
    if is_torch(array):
        return array - array == 0  # two operations, where torch.isfinite takes five
    return namespace(array).isfinite(array)


def detach(array: Array) -> Array:
    """Return the array as a constant for automatic differentiation."""
    if is_torch(array):
        return array.detach()
    if is_jax(array):
        return sys.modules["jax"].lax.stop_gradient(array)
    return array


@functools.lru_cache
def _loop_body(step: Callable[[State], State]) -> Callable[[int, State], State]:
    """Return the same function each time: JAX compiles a loop anew for another one."""
    return lambda _, state: step(state)


def repeat(
    times: int,
    step: Callable[[State], State],
    state: State,
    settled: Callable[[State, State], Array],
) -> State:
    """Apply ``state = step(state)`` at most ``times`` times.

    A loop in the traced program for JAX, whose compile time would otherwise grow with ``times``;
    straight-line code elsewhere. Only NumPy's arrays can be looked at for free: for them it ends
    when two steps in a row have left the state ``settled(old, new)``.
    """
    if is_jax(state[0]):
        result: State = sys.modules["jax"].lax.fori_loop(0, times, _loop_body(step), state)
        return result
    numpy = sys.modules.get("numpy")
    look = numpy is not None and isinstance(state[0], numpy.ndarray)
    quiet = 0
    for _ in range(times):
        old, state = state, step(state)
        quiet = quiet + 1 if look and settled(old, state) else 0
        if quiet == 2:
            break
    return state


def dot_for(array: Array) -> Callable[[Array, Array], Array]:
    """Return the function that takes Σ v w of vectors like this one.

    In a large pool a sum in pairs, where BLAS with its few lanes would lose digits. A compiler's
    sum is in pairs anyway, and the size may be a symbol to it.
    """
    if is_torch(array) and sys.modules["torch"].compiler.is_compiling():
        return operator.matmul
    xp = solver_namespace(array)
    return (lambda v, w: xp.sum(v * w)) if array.shape[0] > LARGE else operator.matmul


def logistic_for(array: Array) -> Callable[[Array], Array]:
    """Return 1 / (1 + exp(-x)) in one operation where there is one, to a small *absolute* error."""
    if is_torch(array):
        return solver_namespace(array).sigmoid  # type: ignore[no-any-return]
    if is_jax(array):
        return sys.modules["jax"].nn.sigmoid  # type: ignore[no-any-return]
    tanh = namespace(array).tanh
    return lambda x: tanh(x * 0.5) * 0.5 + 0.5


def as_floats(mask: Array, like: Array) -> Array:
    """Return 1 where a mask is true and 0 elsewhere, in the dtype of another array."""
    if is_torch(mask):
        return mask.to(like.dtype)
    return namespace(mask).astype(mask, like.dtype)


def softplus(xp: Namespace, x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return xp.logaddexp(x, xp.zeros_like(x))


def sigmoid(xp: Namespace, x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow and with a small relative error on both sides."""
    return xp.exp(-softplus(xp, -x))

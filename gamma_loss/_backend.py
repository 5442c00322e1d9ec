"""One object for each array library, found once a call: the operations that differ between them.

A backend has the library's own functions under the standard's names (``exp``, ``where``, ...), so
that an operation costs no layer of ours. ``is_host`` says that reading a number costs nothing;
``can_read`` that it is possible; otherwise a loop runs inside the traced program.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

# Arrays of any library that follows the array API standard; there is no common type to name yet.
Array: TypeAlias = Any
Done: TypeAlias = Callable[[Any], Any]
Step: TypeAlias = Callable[[Any], Any]

_BLAS_LIMIT = 4096  # a longer dot product of BLAS adds too many terms in a row
_EPS = {4: 2.0**-23, 8: 2.0**-52}
_ROW = 256  # a compiler adds at most this many terms in a row
_FUNCTIONS = (
    "abs", "argsort", "astype", "concat", "exp", "expm1", "finfo", "full_like", "isdtype",
    "isfinite", "log", "log1p", "logaddexp", "max", "maximum", "mean", "min", "minimum",
    "nonzero", "ones_like", "result_type", "sign", "sqrt", "sum", "take", "tanh", "where", "zeros",
    "zeros_like",
)  # fmt: skip


class PythonMath:
    """The functions that the algebra on single numbers needs, on Python floats."""

    exp, expm1, log, log1p, tanh = math.exp, math.expm1, math.log, math.log1p, math.tanh
    abs, maximum, minimum = abs, max, min

    @staticmethod
    def where(condition: bool, value: float, other: float) -> float:
        return value if condition else other


PYTHON_MATH = PythonMath()


class Backend:
    """A library that array-api-compat knows, by the standard alone."""

    is_host = can_read = True
    is_traced = False
    steps_per_read = 1  # steps of a loop between two looks at its condition
    library = ""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self._take(xp, _FUNCTIONS)
        self.float32, self.float64, self.bool = xp.float32, xp.float64, xp.bool

    def _take(self, module: Any, names: tuple[str, ...]) -> None:
        """Bind functions of a module, but for those that a backend has its own of."""
        for name in names:
            if not hasattr(type(self), name) and hasattr(module, name):
                setattr(self, name, getattr(module, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.xp, name)

    def unsupported_kind(self, array: Array) -> str:
        """Name an unsupported kind of array (masked, nested, sparse), or return ""."""
        return "a masked array" if hasattr(array, "mask") else ""

    def device(self, array: Array) -> Any:
        """Return an array's device, or None for a library that checks devices itself."""
        return getattr(array, "device", None)

    def detach(self, array: Array) -> Array:
        """Return the array as a constant for automatic differentiation."""
        return array

    def ignore_fp_errors(self) -> contextlib.AbstractContextManager[Any]:
        """Keep NumPy from warning of overflow and of numbers that are not finite."""
        import numpy

        return numpy.errstate(over="ignore", invalid="ignore", divide="ignore")

    def is_real_floating(self, array: Array) -> bool:
        return bool(self.isdtype(array.dtype, "real floating"))

    def as_floats(self, name: str, array: Array) -> Array:
        """Return an array of real floats, half precision as float32, or raise TypeError."""
        if kind := self.unsupported_kind(array):
            raise TypeError(f"{name} must be a plain array, got {kind}")
        if not self.is_real_floating(array):
            raise TypeError(
                f"{name} must have a real floating dtype such as float32, got {array.dtype}"
            )
        return self.astype(array, self.float32) if self.finfo(array.dtype).bits < 32 else array

    def number(self, value: float, like: Array) -> Array:
        """Return a number as an array of shape () of an array's dtype and device."""
        return self.xp.asarray(value, dtype=like.dtype, device=self.device(like))

    def scalar(self, value: float, like: Array) -> Array:
        """Return a number in the form that the library computes with fastest."""
        return value

    def dot(self, v: Array, w: Array) -> Array:
        """Return Σ v w with an error that does not grow with the size."""
        return self.sum(v * w)

    def sigmoid(self, x: Array) -> Array:
        """Return 1 / (1 + exp(-x)): no overflow, and a small relative error on both sides."""
        return 1 / (1 + self.exp(-x))

    def softplus(self, x: Array) -> Array:
        """Return log(1 + exp(x)) = -log σ(-x), without overflow."""
        return self.maximum(x, self.zeros_like(x)) + self.log1p(self.exp(-self.abs(x)))

    def eps(self, array: Array) -> float:
        """Return the machine epsilon of an array's dtype."""
        return float(self.finfo(array.dtype).eps)

    def as_program(self, function: Callable[..., Any], constants: tuple[int, ...]) -> Any:
        """Return a function as one program of the library, which has programs, or as it is."""
        return function

    def repeat_until(self, done: Done, step: Step, state: Any, max_iter: int) -> Any:
        """Apply ``step`` until done, at most ``max_iter`` times."""
        for i in range(max_iter):
            if i % self.steps_per_read == 0 and done(state):
                break
            state = step(state)
        return state


class _NumPy(Backend):
    library = "numpy"

    def __init__(self) -> None:
        import array_api_compat.numpy
        import numpy

        super().__init__(array_api_compat.numpy)
        # NumPy's own functions: array-api-compat's look at their arguments first.
        self._take(numpy, _FUNCTIONS)
        self.sum, self.all = numpy.add.reduce, numpy.logical_and.reduce
        self.max, self.min = numpy.maximum.reduce, numpy.minimum.reduce
        self.asarray, self.blas_dot, self.ndarray = numpy.asarray, numpy.dot, numpy.ndarray
        self.astype = lambda array, dtype: array.astype(dtype, copy=False)

    def is_real_floating(self, array: Array) -> bool:
        # From 256 on types are not NumPy's, such as bfloat16 of ml_dtypes.
        return bool(array.dtype.kind == "f" and array.dtype.num < 256)

    def device(self, array: Array) -> Any:
        return None

    def as_floats(self, name: str, array: Array) -> Array:
        if type(array) is self.ndarray and array.dtype.char in "fd":
            return array
        return super().as_floats(name, array)

    def scalar(self, value: float, like: Array) -> Array:
        return self.asarray(value, like.dtype)

    number = scalar

    def dot(self, v: Array, w: Array) -> Array:
        return self.blas_dot(v, w) if v.shape[0] <= _BLAS_LIMIT else self.sum(v * w)

    def eps(self, array: Array) -> float:
        return _EPS[array.dtype.itemsize]


class _Torch(Backend):
    """Torch: operations one by one on the CPU."""

    library = "torch"

    def __init__(self) -> None:
        import array_api_compat.torch

        super().__init__(array_api_compat.torch)
        torch = sys.modules["torch"]
        # Torch's own functions: array-api-compat's look at their arguments first.
        self._take(torch, (
            "abs", "exp", "full_like", "log", "log1p", "max", "maximum", "mean", "min", "minimum",
            "ones_like", "sqrt", "sum", "tanh", "where", "zeros_like",
        ))  # fmt: skip
        # Above its threshold softplus(x) is x, to less than exp(-80).
        softplus = functools.partial(torch.nn.functional.softplus, threshold=80.0)
        vars(self).update(sigmoid=torch.sigmoid, softplus=softplus)
        self._floats, self._strided = (torch.float32, torch.float64), torch.strided
        self._plain = torch.Tensor, torch.nn.Parameter  # a subclass may be a masked tensor

    def is_real_floating(self, array: Array) -> bool:
        return bool(array.dtype.is_floating_point)

    def unsupported_kind(self, array: Array) -> str:
        if array.is_nested:
            return "a nested tensor"
        if hasattr(array, "get_mask"):
            return "a masked tensor"
        return "" if array.layout is self._strided else f"a {array.layout} tensor"

    def device(self, array: Array) -> Any:
        return array.device

    def detach(self, array: Array) -> Array:
        return array.detach() if array.requires_grad else array

    def ignore_fp_errors(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def as_floats(self, name: str, array: Array) -> Array:
        is_plain = type(array) in self._plain and array.layout is self._strided
        if is_plain and array.dtype in self._floats and not array.is_nested:
            return array
        return super().as_floats(name, array)

    def number(self, value: float, like: Array) -> Array:
        return like.new_full((), value)


class _TorchDevice(_Torch):
    """Torch on a device, where reading a number waits for all that runs before it."""

    is_host, steps_per_read = False, 4


class _TorchTraced(_Torch):
    """Torch inside torch.compile, torch.export or torch.func: no number can be read."""

    is_host = can_read = False
    is_traced = True

    def detach(self, array: Array) -> Array:
        return array.detach()  # which forward mode needs as well

    def sum(self, array: Array) -> Array:
        """Return a sum with an error that does not grow with the size: a compiler adds in a row."""
        torch = sys.modules["torch"]
        if array.ndim == 1 and array.dtype == torch.float64:
            # Never one row, which torch.export would make a constant.
            rows = torch.nn.functional.pad(array, (0, 2 * _ROW - 1)).unfold(0, _ROW, _ROW)
            array = torch.sum(rows, 1)
        return torch.sum(array, dtype=torch.float64).to(array.dtype)

    def repeat_until(self, done: Done, step: Step, state: Any, max_iter: int) -> Any:
        """Loop inside the graph, by torch's operator for loops."""
        torch = sys.modules["torch"]
        pytree, loop = torch.utils._pytree, torch._higher_order_ops.while_loop
        leaves, kind = pytree.tree_flatten(state)

        def go_on(count: Array, *leaves: Array) -> Array:
            return (count < max_iter) & ~done(pytree.tree_unflatten(leaves, kind))

        def body(count: Array, *leaves: Array) -> tuple[Array, ...]:
            new = pytree.tree_leaves(step(pytree.tree_unflatten(leaves, kind)))
            return (count + 1, *(each.clone() for each in new))  # no output may be an input

        first = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
        _, *leaves = loop(go_on, body, (first, *(each.clone() for each in leaves)))
        return pytree.tree_unflatten(leaves, kind)


class _Jax(Backend):
    library = "jax"
    is_host = can_read = False

    def __init__(self) -> None:
        jax = sys.modules["jax"]
        super().__init__(jax.numpy)
        self.jax = jax
        vars(self).update(sigmoid=jax.nn.sigmoid, softplus=jax.nn.softplus)

    @functools.cache  # noqa: B019 (there is one instance)
    def as_program(self, function: Callable[..., Any], constants: tuple[int, ...]) -> Any:
        return self.jax.jit(function, static_argnums=constants)

    def ignore_fp_errors(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def device(self, array: Array) -> Any:
        return None  # JAX checks devices itself, and a tracer has none

    def detach(self, array: Array) -> Array:
        return self.jax.lax.stop_gradient(array)

    def sum(self, array: Array) -> Array:
        rows = -(-array.shape[0] // _ROW) if array.ndim else 1
        if rows > 1:
            array = self.xp.pad(array, (0, rows * _ROW - array.shape[0])).reshape(rows, _ROW)
            return self.sum(self.xp.sum(array, axis=1))
        return self.xp.sum(array)

    def repeat_until(self, done: Done, step: Step, state: Any, max_iter: int) -> Any:
        _, state = self.jax.lax.while_loop(
            lambda counted: (counted[0] < max_iter) & ~done(counted[1]),
            lambda counted: (counted[0] + 1, step(counted[1])),
            (0, state),
        )
        return state


def _is_traced(torch: Any) -> bool:
    """Whether torch.compile, torch.func, forward mode or a dispatch mode sees each operation."""
    if torch.compiler.is_compiling():  # which is a mode itself, and cannot read the rest
        return True
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if active is None or active() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return bool(torch.autograd.forward_ad._current_level >= 0)


def _torch_kind(torch: Any, tensor: Any) -> type[Backend]:
    if _is_traced(torch) or tensor.device.type == "meta":
        return _TorchTraced
    return _Torch if tensor.device.type == "cpu" else _TorchDevice


_instances: dict[type, Backend] = {}  # by the type of an array
_torch_instances: dict[type, Backend] = {}  # by what can be read; Dynamo guards their number


def get_backend(array: object) -> Backend:
    """Return the backend of an array, or raise TypeError; no library is imported to find out."""
    torch = sys.modules.get("torch")
    is_torch = torch is not None and isinstance(array, torch.Tensor)
    kind = _torch_kind(torch, array) if is_torch else type(array)
    known = _torch_instances if is_torch else _instances
    backend = known.get(kind)
    if backend is None:
        _add(kind, array)
        backend = known[kind]
    return backend


def _add(kind: type, array: Any) -> None:
    jax, numpy = sys.modules.get("jax"), sys.modules.get("numpy")
    if issubclass(kind, _Torch):  # all at once, as nothing can be added while a graph is traced
        _torch_instances.update({each: each() for each in (_Torch, _TorchDevice, _TorchTraced)})
    elif jax is not None and isinstance(array, jax.Array):
        _instances[kind] = _Jax()
    elif numpy is not None and isinstance(array, (numpy.ndarray, numpy.generic)):
        _instances[kind] = _NumPy()
    else:
        import array_api_compat

        xp = array_api_compat.array_namespace(array)
        if not hasattr(xp, "bool"):  # MLX has most of the standard's names
            raise TypeError(f"{kind.__module__} does not follow the array API standard")
        _instances[kind] = Backend(xp)


def in_dynamo() -> bool:
    """Whether Dynamo traces this call, for torch.compile or for torch.export with strict=True."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()

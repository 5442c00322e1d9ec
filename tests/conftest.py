"""Shared fixtures: the array libraries that the package is tested on."""

import importlib
import os

import hypothesis
import numpy as np
import pytest

from gamma_loss import MarginSolution, _dispatch, solve_margins
from gamma_loss._pool import Beside, check

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Random examples on a developer's machine, the same ones every time where CI is to be repeatable.
hypothesis.settings.register_profile(
    "default", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("default")

try:
    import torch as _torch

    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the processor among them
        _torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    if not _torch.cuda.is_available():  # then Triton's kernels run in its interpreter
        os.environ["TRITON_INTERPRET"] = "1"
except ImportError:
    pass

LIBRARIES = ("numpy", "torch", "jax", "array_api_strict")


class Library:
    """Makes arrays of one library, and NumPy arrays out of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        module = pytest.importorskip(name, reason=f"{name} is not installed")
        if name == "numpy":  # for NumPy before 2.0, which has other names
            module = importlib.import_module("array_api_compat.numpy")
        if name == "jax":
            module.config.update("jax_enable_x64", True)
            module = importlib.import_module("jax.numpy")
        self.xp = module

    def array(self, values, dtype="float64"):
        values = np.asarray(values, dtype="bool" if dtype == "bool" else None)
        if self.name == "torch":
            return self.xp.tensor(values, dtype=getattr(self.xp, dtype))
        return self.xp.asarray(values, dtype=getattr(self.xp, dtype))

    @staticmethod
    def numpy(array):
        return np.asarray(array.detach() if hasattr(array, "detach") else array)


@pytest.fixture(scope="session", params=LIBRARIES)
def library(request) -> Library:
    return Library(request.param)


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def jax():
    return Library("jax") and importlib.import_module("jax")


class Solver:
    """`solve_margins` by one implementation, from NumPy arrays to NumPy arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "jax":
            self.jax = Library("jax").xp
        elif name != "numpy":
            self.torch = pytest.importorskip("torch")
        if name == "triton":
            pytest.importorskip("triton", minversion="3.5")

    def __call__(self, gaps, *, context=None, context_mask=None, mask=None, **settings):
        arrays = {"context": context, "context_mask": context_mask, "mask": mask}
        if self.name == "numpy":
            return solve_margins(np.asarray(gaps), **arrays, **settings)
        if self.name == "jax":  # in arrays of few sizes, as it compiles a loop for each
            size = len(gaps)
            gaps, mask = self.padded(gaps, mask)
            if context is not None:
                context, context_mask = self.padded(context, context_mask)
            solution = solve_margins(
                gaps, mask=mask, context=context, context_mask=context_mask, **settings
            )
            margins, *numbers = map(np.asarray, solution)
            return MarginSolution(margins[:size], *(number[()] for number in numbers))
        device = "cuda" if self.torch.cuda.is_available() else "cpu"
        arrays = {
            name: None if array is None else self.torch.tensor(np.asarray(array), device=device)
            for name, array in {"reward_gaps": np.asarray(gaps), **arrays}.items()
        }
        gaps = arrays.pop("reward_gaps")
        problem = check("reward_gaps", gaps, Beside(**arrays), group=None, **settings)
        name = _dispatch.choose(self.name, gaps, problem)
        if name == "host":  # NumPy's operations, where this is to be about torch's
            name = self.name if problem.gamma0 and problem.size > 1 else "eager"
        solution = _dispatch.solve(name, gaps, problem)
        return MarginSolution(*(np.asarray(array.cpu())[()] for array in solution))

    def padded(self, gaps, mask):
        rest = max(64, 1 << (len(gaps) - 1).bit_length()) - len(gaps)
        mask = np.ones(len(gaps), dtype=bool) if mask is None else mask
        return tuple(self.jax.asarray(np.pad(array, (0, rest))) for array in (gaps, mask))

    def settings(self, max_examples: int = 100):
        """As many random examples as a slow implementation can bear."""
        share = {"numpy": 1, "eager": 1, "jax": 1 / 5, "compile": 1 / 4, "triton": 1 / 25}[
            self.name
        ]
        return hypothesis.settings(max_examples=max(5, int(max_examples * share)))


# One worker gets all tests of "compile", so that it compiles everything once.
@pytest.fixture(
    scope="session",
    params=[
        "numpy",
        "eager",
        "jax",
        pytest.param("compile", marks=pytest.mark.xdist_group("compile")),
        "triton",
    ],
)
def solver(request) -> Solver:
    return Solver(request.param)

"""Shared fixtures: the array libraries that the package is tested on."""

import importlib
import os

import hypothesis
import numpy as np
import pytest

from gamma_loss import MarginSolution, solve_margins
from gamma_loss import _pool as problem
from gamma_loss._backend import get_backend

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

    def __call__(self, gaps, *, gamma0, tau, **arrays):
        gaps, size = np.asarray(gaps), len(gaps)
        arrays = {name: np.asarray(each) for name, each in arrays.items() if each is not None}
        settings = {"gamma0": gamma0, "tau": tau}
        if self.name == "numpy":
            return solve_margins(gaps, **arrays, **settings)
        if self.name == "jax":
            arrays = self.padded(reward_gaps=gaps, **arrays)
            margins, *numbers = map(np.asarray, solve_margins(**arrays, **settings))
            return MarginSolution(margins[:size], *(number[()] for number in numbers))
        device = "cuda" if self.torch.cuda.is_available() else "cpu"
        gaps, *others = (
            self.torch.tensor(each, device=device) for each in (gaps, *arrays.values())
        )
        arrays = dict(zip(arrays, others, strict=True))
        if self.name == "torch":  # by its own operations, where "auto" takes NumPy's
            xp, inputs = get_backend(gaps), problem.PoolInputs(**arrays)
            pool = problem.build_pool(xp, gaps, inputs)
            margins, *numbers = problem.solve_eagerly(xp, *pool, gamma0, tau)
            solution = (problem.scatter_margins(xp, margins, gaps, inputs, gamma0), *numbers)
        else:
            solution = solve_margins(gaps, impl=self.name, **arrays, **settings)
        return MarginSolution(*(np.asarray(array.cpu())[()] for array in solution))

    def padded(self, **arrays):
        """Arrays of few sizes, as JAX compiles a loop for each."""
        for name, mask in (("reward_gaps", "mask"), ("context", "context_mask")):
            if name in arrays:
                arrays.setdefault(mask, np.ones(len(arrays[name]), dtype=bool))

        def pad(array):
            rest = max(64, 1 << (len(array) - 1).bit_length()) - len(array)
            return self.jax.asarray(np.pad(array, (0, rest)))

        return {name: pad(array) for name, array in arrays.items()}

    def settings(self, max_examples: int = 100):
        """As many random examples as a slow implementation can bear."""
        share = {"jax": 1 / 5, "compile": 1 / 4, "triton": 1 / 25}.get(self.name, 1)
        return hypothesis.settings(max_examples=max(5, int(max_examples * share)))


# One worker gets all tests of "compile", so that it compiles everything once.
@pytest.fixture(
    scope="session",
    params=[
        "numpy",
        "auto",
        "torch",
        "jax",
        pytest.param("compile", marks=pytest.mark.xdist_group("compile")),
        "triton",
    ],
)
def solver(request) -> Solver:
    return Solver(request.param)

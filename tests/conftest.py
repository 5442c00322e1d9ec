"""Shared fixtures: the array libraries that the package is tested on."""

import importlib
import os

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Random examples on a developer's machine, the same ones every time where CI is to be repeatable.
hypothesis.settings.register_profile(
    "default", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("default")

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

"""Shared fixtures: the array libraries and the implementations that the package is tested on.

Tests call public names. The internals that they may call as well are few:
- `_solver`: its steps and its problem, with `_backend.get_backend`, which gives it a library;
- `kernels.launch` and `kernels.solve`: the kernel by itself;
- what a test sets: `_backend._torch_kind`, `_comm.GATHER_LIMIT`, `_compile`'s programs,
  `_operator._without_triton` and `launcher`, `streaming._MAX_READINGS`, `torch.logps`'s limits.
"""

import contextlib
import functools
import http.server
import importlib
import os
import shutil
import threading

import hypothesis
import numpy as np
import pytest

from gamma_loss import MarginSolution, _solver, solve_margins

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # for a mesh
# Inductor need not try whether the processor has the vectors that it says it has, nor compile
# headers beforehand: here both cost more than they save.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
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
    _torch = None


def pytest_configure(config):
    if _torch and _torch.__version__ < "2.7":  # which exports no loop
        config.addinivalue_line("filterwarnings", "ignore:Inductor cannot compile:RuntimeWarning")


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


IMPLEMENTATIONS = ("numpy", "auto", "torch", "jax", "array_api_strict", "compile", "triton")
SHARES = {"jax": 2, "compile": 2, "triton": 12}  # one in so many random problems, where it is slow
SIZES = 64, 2**10, 2**17  # of all pools in JAX, which compiles a program for each


class Solver:
    """`solve_margins` by one implementation, from NumPy arrays to NumPy arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_torch = name in ("auto", "torch", "compile", "triton")
        self.library = Library("torch" if self.is_torch else name)
        if name == "triton":
            pytest.importorskip("triton", minversion="3.5")

    def __call__(self, gaps, *, gamma0, tau, **arrays):
        arrays = {"reward_gaps": gaps, **arrays}
        arrays = {name: np.asarray(each) for name, each in arrays.items() if each is not None}
        if self.name == "jax":  # which compiles a program for each size
            arrays = padded(arrays)
        if self.name == "compile" and arrays["reward_gaps"].dtype == "float64":  # see `some`
            arrays.setdefault("weights", np.ones(len(gaps)))
        settings, make = {"gamma0": gamma0, "tau": tau}, self.library.xp.asarray
        if self.is_torch:
            device = "cuda" if self.library.xp.cuda.is_available() else "cpu"
            settings["impl"] = "auto" if self.name == "torch" else self.name
            make = functools.partial(self.library.xp.tensor, device=device)
        arrays = {name: make(each) for name, each in arrays.items()}
        if self.name == "torch":  # by its own operations, where "auto" takes NumPy's
            arrays["reward_gaps"] = arrays["reward_gaps"].as_subclass(own_tensor())
        solution = solve_margins(**arrays, **settings)
        if self.name == "torch":
            assert type(solution.margins) is own_tensor(), "NumPy has solved it"
        margins, *numbers = (np.asarray(each.cpu() if self.is_torch else each) for each in solution)
        return MarginSolution(margins[: len(gaps)], *(number[()] for number in numbers))

    def some(self, problems: list, share: int = 0) -> list:
        """As many of the problems (gaps, γ0, τ, ...) as it can bear.

        Inductor takes some 20 s for each program, of which a number of mild passes, a dtype, and
        weights or none are one each: four mild ones are left out, and each step is in two others.
        """
        if self.name == "compile":
            problems = [each for each in problems if _solver.mild_passes(*each[1:3], True) != 6]
        return problems[:: share or SHARES.get(self.name, 1)]


@functools.cache
def own_tensor():
    """A class of tensors that NumPy cannot stand for."""
    return type("OwnTensor", (importlib.import_module("torch").Tensor,), {})


def padded(arrays):
    for name, mask in (("reward_gaps", "mask"), ("context", "context_mask")):
        if name in arrays:
            arrays.setdefault(mask, np.ones(len(arrays[name]), dtype=bool))
    return {
        name: np.pad(each, (0, min(size for size in SIZES if size >= len(each)) - len(each)))
        for name, each in arrays.items()
    }


# One worker gets all tests of "compile", so that it compiles everything once.
@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=[pytest.mark.xdist_group(name)] if name == "compile" else [])
        for name in IMPLEMENTATIONS
    ],
)
def solver(request) -> Solver:
    return Solver(request.param)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs chromium")
    quiet = "no-sandbox disable-gpu disable-quic disable-background-networking disable-sync"
    with playwright.sync_playwright() as running:
        options = [f"--{option}" for option in quiet.split()]
        browser = running.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve():
    """Serve a folder of pages, and return its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with contextlib.ExitStack() as servers:

        def start(folder):
            handler = functools.partial(Quiet, directory=folder)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=servers.enter_context(server).serve_forever).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start

"""The Triton kernel by itself: its limits, its error bound, its steps and its compiled code.

Without a GPU it runs in Triton's interpreter. Accuracy over the domain is in test_margins.
"""

import ast
import os
import runpy
import subprocess
import sys

import numpy as np
import oracles
import pytest

from gamma_loss import solve_margins

MILD, STEEP = (4.0, 10.0), (4.0, 0.1)


@pytest.fixture
def launch(torch):
    pytest.importorskip("triton", minversion="3.5")
    from gamma_loss.kernels import launch

    return launch


@pytest.fixture
def kernel(launch, torch):
    """The kernel, from NumPy arrays to NumPy arrays: margins, ν and the error bound."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def kernel(gaps, gamma0, tau, dtype="float64", weights=None):
        gaps, weights = (
            None if each is None else torch.tensor(np.asarray(each, dtype), device=device)
            for each in (gaps, weights)
        )
        assert launch.fits(gaps, gamma0, tau)
        margins, numbers = launch.solve(gaps, weights, gamma0, tau)
        return margins.cpu().numpy(), *numbers.tolist()

    return kernel


def gaps_of(size, centre=0.0, seed=0):
    return centre + 3 * np.random.default_rng(seed).normal(size=size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("setting", [MILD, STEEP], ids=["mild", "steep"])
def test_pools_up_to_the_limit_are_solved_and_larger_ones_left(
    launch, torch, kernel, dtype, setting
):
    limit, eps = launch.LIMITS[getattr(torch, dtype)][setting == STEEP], np.finfo(dtype).eps
    for size in (1, 128, 129, limit):
        gaps = np.resize(gaps_of(min(size, 129)), size).astype(dtype)
        margins, nu, bound = kernel(gaps, *setting, dtype)
        exact, exact_nu = oracles.margins(gaps, *setting)
        assert oracles.error(margins, exact, exact_nu, gaps, *setting) <= 1
        assert np.mean(np.abs(margins - exact)) / setting[0] <= bound
        x = exact / setting[0]
        assert bound <= 50 * eps * np.mean(x * (1 + np.abs(np.log(x))))
        assert abs(nu - exact_nu) <= 8 * eps * (1 + setting[0] / setting[1])
    beyond = torch.zeros(limit + 1, dtype=getattr(torch, dtype))
    assert not launch.fits(beyond, *setting)
    margins = solve_margins(beyond, gamma0=setting[0], tau=setting[1], impl="triton").margins
    torch.testing.assert_close(margins, torch.full_like(margins, setting[0]))


@pytest.mark.parametrize("setting", [MILD, (3.0, 3.0), STEEP, (3.0, 0.5)])
def test_the_error_bound_holds_before_the_end_and_is_near_the_error(
    launch, kernel, monkeypatch, setting
):
    import triton.language as tl

    from gamma_loss.kernels import solve

    for dtype in ("float32", "float64"):
        ratios = []
        for steps in 1, 2:
            is_mild = launch.mild_passes(*setting, dtype == "float64") > 0
            monkeypatch.setattr(launch, "mild_passes", lambda *_, n=steps * is_mild: n)
            monkeypatch.setattr(solve, "MAX_ITER", tl.constexpr(steps))
            gaps = gaps_of(64).astype(dtype)
            margins, _, bound = kernel(gaps, *setting, dtype)
            off = np.abs(margins - oracles.margins(gaps, *setting)[0])
            ratios.append(float(np.mean(off)) / setting[0] / bound)
            monkeypatch.undo()
        assert 0.12 < max(ratios) <= 1  # so that a tenth of the bound would not hold


@pytest.mark.parametrize("setting", [MILD, STEEP, (1.0, 0.001)])
def test_entries_that_take_no_part_cost_no_pass(kernel, monkeypatch, setting):
    from gamma_loss.kernels import solve

    steps, step = [], solve.newton_step
    monkeypatch.setattr(solve, "newton_step", lambda *args: steps.append(1) or step(*args))
    gaps = np.array([-60.0, -61.0, -58.5])
    expected = kernel(gaps, *setting)
    alone, weights = len(steps), [1, 1, 0, 0, 1, 0, 1, 1, np.nan, -1]
    others = [-60.0, -61.0, 1e4, -1e300, np.nan, 7.0, np.inf, -58.5, 3.0, 4.0]
    margins, *numbers = kernel(others, *setting, weights=weights)
    assert len(steps) - alone <= alone
    np.testing.assert_allclose(margins[[0, 1, 7]], expected[0], rtol=1e-13)
    np.testing.assert_allclose(numbers, expected[1:], rtol=1e-13)
    assert np.isnan(margins[[4, 6]]).all()


def test_weights_of_any_size_and_strides(launch, torch, kernel):
    gaps, weights = gaps_of(20), 10.0 ** np.random.default_rng(1).uniform(-12, 0, 20)
    margins, nu, bound = kernel(gaps, *STEEP, weights=weights)
    expected = solve_margins(gaps, gamma0=STEEP[0], tau=STEEP[1], weights=weights)
    assert bound <= 1e-13
    np.testing.assert_allclose(margins, expected.margins, rtol=1e-12)
    assert nu == pytest.approx(expected.multiplier, rel=1e-13)
    rows = torch.tensor(np.stack([gaps, weights, -gaps], 1))
    found, _ = launch.solve(rows[:, 0], rows[:, 1], *STEEP)
    np.testing.assert_array_equal(found, margins)


KERNEL = """
import triton
import triton.language as tl
from gamma_loss.kernels import math

@triton.jit
def kernel(x, of_log, of_exp):
    i = tl.arange(0, 16)
    tl.store(of_log + i, math.log1p(tl.load(x + i)))
    tl.store(of_exp + i, math.expm1(tl.load(x + i)))
"""


def test_functions_that_triton_lacks_are_exact_near_0(launch, torch, tmp_path):
    if not launch.INTERPRETED:
        pytest.skip("on the CPU, in Triton's interpreter")
    (tmp_path / "a_kernel.py").write_text(KERNEL)
    kernel = runpy.run_path(str(tmp_path / "a_kernel.py"))["kernel"]
    for dtype, eps in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-23)):
        x = [1e-30, 1e-9, 1e-3, 0.1, 0.3, 0.49, 0.6, 0.9]
        x = torch.tensor([*x, *(-each for each in x)], dtype=dtype)
        logs, exps = torch.empty_like(x), torch.empty_like(x)
        kernel[(1,)](x, logs, exps)
        torch.testing.assert_close(logs, torch.log1p(x), rtol=8 * eps, atol=0)
        torch.testing.assert_close(exps, torch.expm1(x), rtol=8 * eps, atol=0)


# --- failures ---


def test_a_failed_launch_is_raised_and_the_next_call_launches_again(torch, launch, monkeypatch):
    from gamma_loss import _operator

    monkeypatch.setattr(_operator, "_without_triton", set())  # as if nothing had failed yet
    gaps, solve, results = torch.tensor(gaps_of(5)), launch.solve, []

    def launched(*arguments):
        results.append(solve(*arguments) if len(results) % 2 else errors[len(results) // 2])
        if isinstance(results[-1], Exception):
            raise results[-1]
        return results[-1]

    errors = torch.OutOfMemoryError("no memory is left"), RuntimeError("capture failed")
    monkeypatch.setattr(launch, "solve", launched)
    for error in errors:
        with pytest.raises(type(error), match=str(error)):
            solve_margins(gaps, gamma0=4.0, tau=0.1, impl="triton")
        solve_margins(gaps, gamma0=4.0, tau=0.1, impl="triton")
    assert len(results) == 4


# --- without a GPU, by Triton's compiler ---

AHEAD = """
import re, subprocess, tempfile, warnings
from pathlib import Path
import torch, triton
from gamma_loss import solve_margins
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

gaps = torch.tensor([1.0, -2.0, 3.0])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        found = solve_margins(gaps, gamma0=4.0, tau=0.1, impl="triton")
print([str(each.message) for each in caught])
torch.testing.assert_close(found, solve_margins(gaps, gamma0=4.0, tau=0.1))

triton.runtime.driver.set_active(object())  # compiling needs no driver
from gamma_loss.kernels import launch, solve

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
kernel = solve.solve_kernel
for dtype, limits in launch.LIMITS.items():
    for limit, tau in zip(limits, (10.0, 0.1)):
        passes = launch.mild_passes(4.0, tau, dtype == torch.float64)
        block, warps = launch.block_of(limit, dtype)
        types = dict.fromkeys(kernel.arg_names, "*fp64" if dtype == torch.float64 else "*fp32")
        types |= {"size": "i32", "gamma0": "fp64", "a": "fp64"}
        types |= dict.fromkeys(("PASSES", "BLOCK"), "constexpr")
        source = ASTSource(kernel, types, {"PASSES": passes, "BLOCK": block})
        target = GPUTarget("cuda", 90, 32)
        code = triton.compile(source, target=target, options={"num_warps": warps}).asm
        assert ("scf.while" in code["ttir"]) == (passes == 0)
        assert "scf.if" not in code["ttir"], "a branch at run time, see gamma_loss.kernels.solve"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code["cubin"])
            file.flush()
            command = [cuobjdump, "--dump-resource-usage", file.name]
            log = subprocess.run(command, capture_output=True, text=True).stdout
        print(dtype, passes, block, re.search(r"STACK:[0-9]+", log).group())
"""


@pytest.fixture(scope="module")
def ahead(torch):
    """What the script prints, with Triton's compiler in the place of its interpreter."""
    pytest.importorskip("triton", minversion="3.5")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_without_a_driver_one_warning_says_that_eager_solves(ahead):
    (warning,) = ast.literal_eval(ahead[0])
    assert warning.startswith("Triton can't be used on cpu, gamma_loss solves eagerly there: ")


def test_no_variant_spills_registers_or_branches_on_sm_90(ahead):
    """In the largest block and with weights, which hold most registers."""
    assert len(ahead) == 5
    assert [line for line in ahead[1:] if not line.endswith("STACK:0")] == []

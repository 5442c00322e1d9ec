"""The Triton kernels by themselves, against the solver for arrays in float64.

Without a GPU they run in Triton's interpreter, slowly: so pools are few.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import CORNERS, gamma0s, pools, taus

from gamma_loss import _solver
from gamma_loss._loss import Logps, LossSettings, Rows
from gamma_loss._pool import Beside

TOLERANCE = {"float64": 1e-13, "float32": 3e-6}
MILD, STEEP = (4.0, 10.0), (4.0, 0.1)
HARD = [(STEEP, 0.0), ((3.0, 0.5), 0.0), ((50.0, 1.0), 50.0)]  # settings, and a centre of gaps


@pytest.fixture
def launch(torch):
    pytest.importorskip("triton", minversion="3.5")
    from gamma_loss.kernels import launch

    return launch


@pytest.fixture
def tensor(torch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda values, dtype=None: torch.tensor(
        np.asarray(values), device=device, dtype=None if dtype is None else getattr(torch, dtype)
    )


@pytest.fixture
def solve(launch, tensor):
    """Solve a pool by kernels, and hold the solution to its certificate and the budget."""

    def solve(gaps, gamma0, tau, dtype, mask=None, context=None, context_mask=None):
        gaps = np.asarray(gaps, dtype=dtype)
        inside = np.isfinite(gaps) if mask is None else np.isfinite(gaps) & mask
        everything, all_inside = gaps, inside
        if context is not None:
            context = np.asarray(context, dtype=dtype)
            more = np.isfinite(context) if context_mask is None else context_mask
            everything = np.concatenate([gaps, context])
            all_inside = np.concatenate([inside, more & np.isfinite(context)])
        beside = Beside(*(None if x is None else tensor(x) for x in (mask, context, context_mask)))
        margins, certificate = launch.solve(tensor(gaps), beside, gamma0, tau)
        nu, residual = certificate.double().cpu().numpy()
        margins = margins.double().cpu().numpy()
        x = margins[inside] / gamma0
        expected, expected_nu, _ = _solver.solve(
            everything[all_inside].astype("float64"), None, gamma0, tau
        )
        expected = expected[: x.shape[0]] / gamma0
        error = np.abs(x - expected)
        assert np.max(error / (1 + expected)) <= TOLERANCE[dtype]
        assert abs(nu - expected_nu) <= TOLERANCE[dtype] * (1 + gamma0 / tau)
        # In sum no pair's error can be larger than the bound on the mean.
        assert np.sum(error) <= 2 * np.expm1(residual) * all_inside.sum() + 1e-14
        assert np.isfinite(residual)
        return margins, expected

    return solve


def gaps_of(size, centre=0.0, seed=0):
    return centre + 3 * np.random.default_rng(seed).normal(size=size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("setting", "centre"), HARD)
@pytest.mark.parametrize("size", [7, 256, 1000])
def test_hard_pools(solve, dtype, setting, centre, size):
    margins, x = solve(gaps_of(size, centre), *setting, dtype)
    assert np.ptp(x) > 0.1  # else there is nothing to solve
    rounding = 8 * np.finfo(dtype).eps
    assert abs(np.mean(margins) / setting[0] - 1) <= rounding


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("gaps", "gamma0", "tau"), CORNERS)
def test_corners_of_the_domain(solve, dtype, gaps, gamma0, tau):
    solve(gaps, gamma0, tau, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_anywhere(solve, dtype):
    @settings(max_examples=15)
    @given(gaps=pools(max_size=100), gamma0=gamma0s, tau=taus)
    def check(gaps, gamma0, tau):
        solve(gaps, gamma0, tau, dtype)

    check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("setting", [MILD, STEEP])
@pytest.mark.parametrize("size", [1, 128, 129, 513, 2049, 4096, 5000])
def test_sizes(solve, dtype, setting, size):
    solve(gaps_of(size), *setting, dtype)


@pytest.mark.parametrize("limit", [10_000, 1000])
@pytest.mark.parametrize(
    ("values", "counts", "gamma0", "tau"),
    [
        ([54.4243, 9991.3], [4090, 6], 51.3952, 1.42196),
        ([1.7, 9.0], [3000, 1096], 3.0, 3.0),
        ([0.3], [4096], 4.0, 0.1),
        ([1.0, -3.0, 9991.3], [2700, 1390, 6], 3.0, 0.5),
    ],
)
def test_errors_that_are_alike_do_not_add_up(
    solve, launch, monkeypatch, limit, values, counts, gamma0, tau
):
    monkeypatch.setattr(launch, "POOL_LIMIT", limit)
    solve(np.repeat(values, counts), gamma0, tau, "float32")


@pytest.mark.parametrize(
    ("dtype", "setting"), [("float32", MILD), ("float32", STEEP), ("float64", (3.0, 0.5))]
)
def test_a_pool_beyond_the_limit(launch, solve, dtype, setting):
    size = launch.POOL_LIMIT + 1000
    margins, _ = solve(gaps_of(size), *setting, dtype)
    assert abs(np.mean(margins) / setting[0] - 1) <= 8 * np.finfo(dtype).eps


def test_pairs_without_mass_do_not_hold_up_the_others(solve, launch, monkeypatch):
    # Here x underflows for some pairs, whose u is so large that it never rests.
    gaps = 100 + 10 * gaps_of(1200)
    solve(gaps, 100.0, 1e-3, "float32")
    monkeypatch.setattr(launch, "POOL_LIMIT", 1000)
    solve(gaps, 100.0, 1e-3, "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("setting", [MILD, STEEP])
@pytest.mark.parametrize("limit", [10_000, 1000])
@pytest.mark.parametrize("size", [20, 1500])
def test_masks_contexts_and_bad_gaps(solve, launch, monkeypatch, dtype, setting, limit, size):
    monkeypatch.setattr(launch, "POOL_LIMIT", limit)
    gaps, context = gaps_of(size), gaps_of(500, seed=1)
    gaps[3], gaps[4], gaps[5], context[6] = 300.0, np.nan, -np.inf, np.inf
    mask, context_mask = gaps_of(size, seed=2) > -2, gaps_of(500, seed=3) > -2
    mask[3:6] = True, True, False
    margins, _ = solve(gaps, *setting, dtype, mask, context, context_mask)
    assert np.isnan(margins[4])
    assert (margins[~mask] == np.float32(setting[0])).all()
    solve(gaps, *setting, dtype, context=context)


@pytest.mark.parametrize("setting", [MILD, STEEP])
@pytest.mark.parametrize("limit", [10_000, 1])
def test_an_empty_pool(launch, tensor, monkeypatch, setting, limit):
    monkeypatch.setattr(launch, "POOL_LIMIT", limit)
    gaps = gaps_of(20)
    gaps[4] = np.nan
    none = np.zeros(20, dtype=bool)
    beside = Beside(tensor(none), tensor(gaps), tensor(none))
    margins, certificate = launch.solve(tensor(gaps), beside, *setting)
    assert (margins == setting[0]).all()
    margins, certificate = launch.solve(tensor([np.nan, np.inf]), Beside(), *setting)
    assert margins.isnan().all()
    nu, residual = certificate.tolist()
    _, expected, _ = _solver.solve(np.zeros(2), None, *setting)
    assert nu == pytest.approx(float(expected), rel=1e-14)
    assert residual <= 1e-13


# --- losses ---


@pytest.fixture
def lose(launch, torch):
    def lose(logps, beside, loss_settings, dtype):
        n = logps.chosen.shape[0]
        shape = n if loss_settings.reduction == "none" else ()
        new = logps.chosen.new_empty
        from gamma_loss.kernels.outputs import Outputs

        outputs = Outputs(
            new(shape, dtype=dtype).fill_(torch.nan),
            new((len(Rows._fields), n), dtype=dtype).fill_(torch.nan),
            new(2, dtype=dtype).fill_(torch.nan),
            new(n, dtype=torch.bool),
        )
        launch.loss(logps, beside, loss_settings, outputs)
        return outputs.loss, Rows(*outputs.rows), outputs.mask

    return lose


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("setting", [MILD, STEEP])
@pytest.mark.parametrize("size", [9, 600])  # one block, and more than one
def test_losses_and_gradients(launch, torch, tensor, lose, reduction, setting, size):
    logps = Logps(*(tensor(gaps_of(size, seed=seed)) for seed in range(4)))
    mask, context = tensor(gaps_of(size, seed=5) > -2), tensor(gaps_of(7, seed=6))
    for centered, tilt, some in [(True, 0.0, logps), (False, 0.1, Logps(*logps[:2]))]:
        chosen, rejected = 0.3 * some.chosen, 0.3 * some.rejected
        if some.reference_chosen is not None:
            chosen, rejected = chosen - 0.3 * logps[2], rejected - 0.3 * logps[3]
        gaps = (chosen - rejected).requires_grad_()
        margins, _ = launch.solve(gaps.detach(), Beside(mask, context), *setting)
        s = gaps - (margins - setting[0] if centered else margins)
        losses = torch.where(mask, torch.nn.functional.softplus(-s) + tilt * s, 0.0)
        expected = {"mean": losses.sum() / mask.sum(), "sum": losses.sum(), "none": losses}
        (slopes,) = torch.autograd.grad(expected[reduction].sum(), gaps)
        loss_settings = LossSettings(0.3, *setting, tilt, centered, reduction)
        loss, rows, counted = lose(some, Beside(mask, context), loss_settings, torch.float64)
        torch.testing.assert_close(loss, expected[reduction].detach())
        assert (counted == mask).all()
        weights = torch.where(mask, torch.sigmoid(-s) - tilt, 0.0).detach()
        torch.testing.assert_close(
            rows,
            Rows(
                margins=margins,
                shifts=margins - setting[0],
                reward_gaps=gaps.detach(),
                pair_weights=weights,
                slopes=0.3 * slopes,
                chosen_rewards=chosen,
                rejected_rewards=rejected,
            ),
        )


@pytest.mark.parametrize("setting", [MILD, STEEP])
def test_half_precision_strides_and_a_bad_pair(launch, torch, tensor, lose, setting):
    some = tensor(gaps_of(24).reshape(6, 4), "bfloat16")
    some[2, 0] = torch.nan
    of = LossSettings(0.3, *setting, 0.0, True, "none")
    loss, rows, _ = lose(Logps(*some.T), Beside(), of, torch.float32)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    wide = Logps(*some.double().T)
    expected, expected_rows, _ = lose(wide, Beside(), of, torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close((loss, rows), (expected, expected_rows), **close)
    gaps = Logps(wide.chosen - wide.rejected - wide.reference_chosen + wide.reference_rejected)
    of = of._replace(beta=1.0)
    _, rows, _ = lose(Logps(0.3 * gaps.chosen), Beside(), of, torch.float64)
    torch.testing.assert_close(rows.margins, expected_rows.margins, equal_nan=True)


# --- ahead of time ---

COMPILE_AHEAD = """
import os, re, subprocess, tempfile
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gamma_loss._loss import Logps
from gamma_loss._pool import Beside
from gamma_loss.kernels import large, launch, pool
from gamma_loss.kernels.outputs import Outputs
from gamma_loss.kernels.passes import Memory

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


def usage(kernel, constants, types, warps):
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(n),): v for n, v in constants.items() if n in signature}
    for i, each in enumerate(signature.values()):
        if isinstance(each, tuple):
            constexprs |= {(i, j): None for j, one in enumerate(each) if one == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    target, options = GPUTarget("cuda", 90, 32), {"num_warps": warps}
    binary = triton.compile(source, target=target, options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        log = subprocess.run(command, capture_output=True, text=True).stdout
    return *re.search(r"REG:(\\d+)", log).groups(), *re.search(r"STACK:(\\d+)", log).groups()


for dtype in (torch.float32, torch.float64):
    double = dtype == torch.float64
    T, p, none = *((tl.float64, "*fp64") if double else (tl.float32, "*fp32")), "constexpr"
    shared = {"T": T, "EPS": torch.finfo(dtype).eps, "P": launch.PROGRAMS}
    types = {"logps": Logps(p, p, p, p), "beside": Beside("*i1", p, "*i1")}
    types |= {"outputs": Outputs(p, p, p, "*i1"), "memory": Memory(p, p, p), "certificate": p}
    types |= dict.fromkeys("old new state states".split(), "*fp64")
    types |= dict.fromkeys("n size turn programs".split(), "i32")
    types |= dict.fromkeys("beta gamma0 a tilt".split(), "fp64")
    for passes in (4 if double else 3, 0):
        for size in (1, 256, 512, 1024, 2048, 2304):
            block, warps = launch.block_of(size, dtype)
            more = {"BLOCK": block, "SINGLE": size <= block, "PASSES": passes}
            more |= {"CENTERED": True, "REDUCTION": "mean"}
            memory = {"memory": none} if size <= block else {}
            figures = usage(pool.pool_kernel, shared | more, types | memory, warps)
            print("pool", T, passes, block, warps, *figures)
    types |= {"logps": Logps(p, none, none, none), "outputs": Outputs(none, p, p, none)}
    for name in ("start", "step", "finish", "certify"):
        kernel = getattr(large, name + "_kernel")
        print(name, T, *usage(kernel, shared | {"BLOCK": launch.BLOCK}, types, launch.WARPS))
"""


def test_no_kernel_spills_registers_on_sm_90(torch):
    pytest.importorskip("triton", minversion="3.5")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_AHEAD], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 32
    spilling = {line for line in lines if not line.endswith(" 0")}  # spilt registers go on a stack
    # With Triton 3.8 three numbers, written once and read outside the loops.
    assert spilling <= {"pool fp64 0 128 4 96 16"}

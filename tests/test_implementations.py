"""impl="compile" and impl="triton": what only they promise. Accuracy is in test_margins."""

import functools
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from strategies import HARD, MILD

from gamma_loss import (
    gamma_dpo_loss,
    gamma_preference_loss,
    gamma_simpo_loss,
    preference_loss,
    solve_margins,
)
from gamma_loss._pool import NO_INPUTS, solve_eagerly


@pytest.fixture
def device(torch):
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton(torch):
    return pytest.importorskip("triton", minversion="3.5")


@pytest.fixture
def operators(torch, monkeypatch):
    """The module that chooses, as if nothing had failed yet."""
    from gamma_loss import _operator

    monkeypatch.setattr(_operator, "_without_triton", set())
    return _operator


def rows(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 3


def test_other_libraries_have_neither_compile_nor_triton(jax):
    for gaps in (np.array([1.0, 2.0]), jax.numpy.asarray([1.0, 2.0])):
        for impl in ("compile", "triton"):
            with pytest.raises(ValueError, match=f"impl='{impl}' needs torch tensors, got "):
                solve_margins(gaps, **MILD, impl=impl)
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'cuda'"):
        solve_margins(np.array([1.0]), **MILD, impl="cuda")


# --- what surrounds a call, and how large it is ---


@pytest.mark.parametrize("setting", [MILD, HARD])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("impl", ["eager", "compile", "triton"])
def test_autocast_changes_nothing(torch, triton, device, impl, dtype, setting):
    logps = [torch.tensor(row, device=device, dtype=torch.float32) for row in rows((4, 300))]
    logps[0].requires_grad_()

    def found():
        loss, aux = gamma_dpo_loss(*logps, beta=1.0, **setting, impl=impl)
        return loss, tuple(aux), torch.autograd.grad(loss, logps[0])

    expected = found()
    with torch.autocast(device, dtype=getattr(torch, dtype)):
        inside = found()
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)


@pytest.mark.parametrize("setting", [MILD, HARD])
@pytest.mark.parametrize("impl", ["eager", "compile"])
def test_a_default_device_leaves_no_trace(torch, compiled, impl, setting):
    gaps = torch.tensor(rows(9))
    with torch.device("meta"):
        first = solve_margins(gaps, **setting, impl=impl)
    assert first.margins.device == first.error_bound.device == gaps.device
    torch.testing.assert_close(solve_margins(gaps, **setting, impl=impl), first)


# --- the rule of "auto" ---


def test_auto_by_device_and_setting(torch, operators, monkeypatch):
    from gamma_loss import _compile
    from gamma_loss._backend import get_backend
    from gamma_loss._settings import loss_settings

    def choose(impl, gaps, setting):
        settings = loss_settings(**setting, centered=False, impl=impl)
        return operators.choose(get_backend(gaps), gaps, NO_INPUTS, settings)

    few, many, threads = torch.zeros(2), torch.zeros(10**6), torch.get_num_threads()
    try:
        for number, expected in ((1, operators.solve_via_numpy), (2, solve_eagerly)):
            torch.set_num_threads(number)
            for setting in (MILD, HARD, {"gamma0": 0.0, "tau": 10.0}):
                assert choose("auto", few, setting) is operators.solve_via_numpy
                assert choose("auto", many, setting) is expected
            assert choose("compile", few, MILD) is _compile.solve
            assert choose("compile", few, HARD) is _compile.solve
            assert choose("compile", many, MILD) is _compile.solve
            assert choose("compile", many, HARD) is expected
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(operators, "launcher", lambda device: object())
    assert choose("triton", few, HARD).keywords == {"kernel": True}


def test_what_does_not_exist_is_refused(torch):
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for impl in ("compile", "triton"):
            with pytest.raises(ValueError, match=rf"'auto' or 'eager' with a group, got '{impl}'"):
                solve_margins(torch.zeros(2), **MILD, impl=impl, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


# --- compile ---


@pytest.fixture
def compiled(torch):
    from gamma_loss import _compile

    return _compile


@pytest.fixture
def loads(compiled, monkeypatch):
    """The programs that are loaded or compiled, as if none had been."""
    names, build = [], compiled._build
    monkeypatch.setattr(compiled, "_programs", {})
    monkeypatch.setattr(
        compiled, "_build", lambda f, *args: names.append(f.__name__) or build(f, *args)
    )
    return names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([MILD, {"gamma0": 3.9, "tau": 10.0}, {"gamma0": 2.0, "tau": 10.0}], ["_mild"]),
        ([HARD, {"gamma0": 3.0, "tau": 0.5}], ["_init", "_step", "_terminate"]),
    ],
)
def test_one_program_serves_all_sizes_and_settings(torch, loads, settings, expected):
    for size in (2, 8, 256, 257, 2304, 9000):
        for setting in settings:
            gaps = torch.tensor(rows(size), dtype=torch.float32)
            solution = solve_margins(gaps, **setting, impl="compile")
            exact = solve_margins(gaps.double(), **setting)
            torch.testing.assert_close(solution.margins.double(), exact.margins, rtol=2e-5, atol=0)
            error = (solution.margins - exact.margins).abs().mean() / setting["gamma0"]
            assert error <= solution.error_bound < 1e-5
    assert loads == expected


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_compiled_programs_take_any_memory_layout(torch, setting):
    column = torch.tensor(rows((40, 3)), dtype=torch.float32)[:, 1]
    for gaps in (column, column.contiguous()[1:], column[:2]):  # the second starts at an odd place
        found = solve_margins(gaps, **setting, impl="compile").margins
        expected = solve_margins(gaps, **setting, impl="eager").margins
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_compiled_programs_take_weights_and_a_context(torch):
    gaps, weights, context = torch.tensor(rows((3, 40)), dtype=torch.float32)
    weights[5:8], gaps[9], context[3] = 0, torch.nan, torch.inf
    for size in (1, 2, 40):
        pool = {"weights": weights[:size].abs(), "context": context, "mask": gaps[:size] > -3}
        found = solve_margins(gaps[:size], **pool, **HARD, impl="compile").margins
        expected = solve_margins(gaps[:size], **pool, **HARD, impl="eager").margins
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_a_program_takes_few_steps(torch, compiled, monkeypatch):
    gaps = torch.tensor(rows(300) + 4, dtype=torch.float32)
    solve_margins(gaps, **HARD, impl="compile")
    calls, run = [], compiled._run
    monkeypatch.setattr(
        compiled, "_run", lambda f, *args: calls.append(f.__name__) or run(f, *args)
    )
    solve_margins(gaps, **HARD, impl="compile")
    assert calls[0] == "_init"
    assert calls[-1] == "_terminate"
    assert 3 < calls.count("_step") == len(calls) - 2 < 15


def test_a_program_is_kept_for_the_next_process(torch, compiled, loads, monkeypatch):
    gaps = torch.tensor(rows(20), dtype=torch.float32)
    expected = solve_margins(gaps, **MILD, impl="compile")

    def fails(*_):
        raise AssertionError("compiled")

    compiled._programs.clear()
    monkeypatch.setattr(compiled, "_export", fails)
    found = solve_margins(gaps, **MILD, impl="compile")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert loads == ["_mild"] * 2


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_torch_compile_takes_the_place_of_aot_inductor(
    torch, compiled, loads, monkeypatch, tmp_path, setting
):
    def fails(*_):
        raise NotImplementedError("no such device")

    monkeypatch.setattr(compiled, "_compile", fails)
    monkeypatch.setattr(compiled, "_path", lambda *_: tmp_path / "none.pt2")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    for size in (9, 300):
        gaps = torch.tensor(rows(size))
        found = solve_margins(gaps, **setting, impl="compile")
        torch.testing.assert_close(found.margins, solve_margins(gaps, **setting).margins)
    assert len(loads) == (1 if setting is MILD else 3)


def test_what_is_kept_from_inference_serves_training(torch, compiled):
    gaps = torch.tensor(rows(20), dtype=torch.float32)

    def loss():
        leaf = gaps.clone().requires_grad_()
        value, _ = gamma_preference_loss(leaf, gamma0=3.0, tau=10.0, impl="compile")
        return value, leaf

    compiled._scalars.cache_clear()
    with torch.inference_mode():
        expected, _ = loss()
    value, leaf = loss()
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_threads_share_one_compilation_and_call_at_once(torch, loads, setting):
    pools = [torch.tensor(rows(33 + 100 * i, i), dtype=torch.float32) for i in range(6)]
    expected = [solve_margins(gaps, **setting, impl="eager").margins for gaps in pools]
    results, start = [None] * 6, threading.Barrier(6)

    def solve(i):
        start.wait()
        results[i] = [
            solve_margins(pools[i], **setting, impl="compile").margins for _ in range(100)
        ]

    threads = [threading.Thread(target=solve, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == len(set(loads))
    for result, margins in zip(results, expected, strict=True):
        for each in result:
            torch.testing.assert_close(each, margins)


@pytest.mark.parametrize("setting", [MILD, HARD])
@pytest.mark.parametrize("impl", ["auto", "compile", "triton"])
def test_one_graph_in_the_callers_compile(torch, triton, device, setting, impl):
    torch.compiler.reset()
    captured = []

    def backend(module, inputs):
        captured.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def loss(*logps):
        value, aux = gamma_dpo_loss(*logps, beta=0.1, **setting, impl=impl)
        return value, aux.margins

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for seed in range(3):
        logps = [torch.tensor(row, device=device) for row in rows((4, 9), seed)]
        logps[0].requires_grad_()
        value, margins = compiled(*logps)
        expected, expected_margins = loss(*logps)
        torch.testing.assert_close((value, margins), (expected, expected_margins))
        (gradient,) = torch.autograd.grad(value, logps[:1])
        torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logps[:1]))
    assert len(captured) == 1
    assert len(list(captured[0].graph.nodes)) < 500


# --- triton ---


def both(torch, loss, *logps, **settings):
    """Loss, aux and gradients by eager and by triton."""
    results = []
    for impl in ("eager", "triton"):
        leaves = [logp.detach().clone().requires_grad_() for logp in logps]
        value, aux = loss(*leaves, **settings, impl=impl)
        factor = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)
        (value * factor.reshape(value.shape)).sum().backward()
        results.append((value.detach(), tuple(aux), [leaf.grad for leaf in leaves]))
    return results


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_loss_by_the_kernel_is_the_loss(torch, triton, device, reduction, dtype):
    def some(size, seed):
        return torch.tensor(rows(size, seed), dtype=getattr(torch, dtype), device=device)

    logps = [some(9, seed) for seed in range(4)]
    options = [
        {},
        {"centered": True, "context": some(7, 5)},
        {"centered": False, "label_smoothing": 0.1, "mask": some(9, 6) > -1},
        {
            "label_smoothing": 0.2,
            "robust": True,
            "mask": some(9, 7) > 0,
            "context": some(7, 8),
            "context_mask": some(7, 9) > 0,
        },
        {"mask": some(9, 6) > 100},
    ]
    for i, option in enumerate(options):
        setting = {**(HARD if i == 1 else MILD), "reduction": reduction, **option}
        for eager, fused in (
            both(torch, gamma_dpo_loss, *logps, beta=0.3, **setting),
            both(torch, gamma_simpo_loss, *logps[:2], beta=2.0, **setting),
            both(torch, gamma_preference_loss, logps[0], **setting),
        ):
            *aux, bound, multiplier, mask = eager[1]
            *fused_aux, fused_bound, fused_multiplier, fused_mask = fused[1]
            rounding = 100 * torch.finfo(bound.dtype).eps * (1 + setting["gamma0"])
            assert max(bound, fused_bound) <= rounding
            assert (mask == fused_mask).all()
            # A sum of 9 losses inherits the rounding of 9 margins.
            torch.testing.assert_close(
                (fused[0], fused_aux, fused_multiplier, fused[2]),
                (eager[0], aux, multiplier, eager[2]),
                rtol=rounding,
                atol=9 * rounding,
            )


def test_a_loss_by_the_kernel_takes_half_precision_and_strides(torch, triton, device):
    policy = torch.tensor(rows((6, 2)), device=device)
    reference = torch.tensor(rows((6, 2), 1), device=device).to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        eager, fused = both(
            torch, gamma_dpo_loss, *policy.to(dtype).T, *reference.T, beta=0.3, **MILD
        )
        assert fused[0].dtype == torch.float32
        assert fused[2][0].dtype == dtype
        torch.testing.assert_close(fused[0], eager[0])
        for gradient, expected in zip(fused[2], eager[2], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-4)


def test_a_loss_by_the_kernel_takes_the_widest_dtype(torch, triton, device):
    logps = [torch.tensor(row, device=device, dtype=torch.float32) for row in rows((3, 6))]
    logps.append(torch.tensor(rows(6, 1), device=device))
    eager, fused = both(torch, gamma_dpo_loss, *logps, beta=0.3, **MILD)
    assert fused[0].dtype == eager[0].dtype == torch.float64
    torch.testing.assert_close(fused[0], eager[0])


def test_a_bad_pair_shows_in_its_loss_and_nowhere_else(torch, triton, device):
    logps = torch.tensor(rows((2, 6)), device=device)
    logps[0, 2] = float("nan")
    eager, fused = both(torch, gamma_simpo_loss, *logps, beta=1.0, reduction="none", **MILD)
    assert fused[0].isnan().tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(fused, eager, equal_nan=True)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivatives_hold_the_margins(torch, triton, device, impl, reduction):
    logps = torch.tensor(rows((4, 6)), device=device).unbind()
    logps = [row.clone().requires_grad_() for row in logps]
    mask = torch.arange(6, device=device) != 2
    loss, aux = gamma_dpo_loss(
        *logps, beta=0.7, mask=mask, label_smoothing=0.1, reduction=reduction, impl=impl, **HARD
    )

    def plain(*logps):
        gaps = 0.7 * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
        losses = preference_loss(gaps, aux.shifts, label_smoothing=0.1) * mask
        return {"mean": losses.sum() / 5, "sum": losses.sum(), "none": losses}[reduction]

    policy = logps[:2]  # references are constants
    tangents = torch.tensor(rows((2, 6), 1), device=device).unbind()
    found = []
    for value in (loss, plain(*logps)):
        slopes = torch.autograd.grad(value, policy, torch.ones_like(value), create_graph=True)
        along = sum(
            (slope * tangent).sum() for slope, tangent in zip(slopes, tangents, strict=True)
        )
        found.append((slopes, torch.autograd.grad(along, policy)))
    assert max(each.abs().max() for each in found[1][1]) > 1e-3
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_every_output_is_written(torch, triton, device, monkeypatch, setting):
    gaps = torch.tensor(rows(300), device=device)
    mask = gaps > -2
    expected = gamma_preference_loss(gaps, mask=mask, context=gaps, **setting, impl="triton")
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else True)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    again = gamma_preference_loss(gaps, mask=mask, context=gaps, **setting, impl="triton")
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    solution = solve_margins(gaps, mask=mask, context=gaps, **setting, impl="triton")
    torch.testing.assert_close(solution.margins, expected[1].margins, rtol=0, atol=0)


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_a_pool_beyond_the_kernels_limit_is_solved_eagerly(
    torch, triton, device, monkeypatch, setting
):
    from gamma_loss.kernels import launch

    monkeypatch.setattr(launch, "fits", lambda *_: False)
    monkeypatch.setattr(launch, "solve", None)
    gaps = torch.tensor(rows(50), device=device)
    solution = solve_margins(gaps, **setting, impl="triton")
    torch.testing.assert_close(solution, solve_margins(gaps, **setting, impl="eager"))


def test_operators_are_what_they_say(torch, triton, device):
    check = pytest.importorskip("torch.library").opcheck
    gaps = torch.tensor(rows(5), device=device)
    mask = gaps > -1
    check(torch.ops.gamma_loss.solve, (gaps, mask.to(gaps.dtype), 4.0, 10.0, True))
    check(torch.ops.gamma_loss.solve, (gaps, None, 4.0, 0.1, False))


@pytest.mark.parametrize("impl", ["auto", "eager", "triton"])
def test_vmap_and_func_grad(torch, triton, device, impl):
    batch = torch.tensor(rows((3, 6)), device=device)
    mapped = torch.vmap(lambda gaps: solve_margins(gaps, **HARD, impl=impl))(batch)
    for i in range(3):
        expected = solve_margins(batch[i], **HARD, impl="eager")
        torch.testing.assert_close(mapped.margins[i], expected.margins, rtol=1e-10, atol=1e-10)
    gradient, (value, aux) = torch.func.grad_and_value(
        lambda gaps: gamma_preference_loss(gaps, **MILD, impl=impl), has_aux=True
    )(batch[0])
    torch.testing.assert_close(value, gamma_preference_loss(batch[0], **MILD)[0])
    torch.testing.assert_close(gradient, -aux.pair_weights / 6)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_export(torch, triton, device, impl):
    class Loss(torch.nn.Module):
        def forward(self, *logps):
            return gamma_dpo_loss(*logps, beta=0.1, **HARD, impl=impl)[0]

    logps = tuple(torch.tensor(row, device=device) for row in rows((4, 9)))
    exported = torch.export.export(Loss(), logps).module()
    torch.testing.assert_close(exported(*logps), Loss()(*logps))


def test_a_missing_triton_warns_once_and_eager_answers(torch, operators, monkeypatch):
    import gamma_loss.kernels

    monkeypatch.delattr(gamma_loss.kernels, "launch", raising=False)
    monkeypatch.setitem(sys.modules, "gamma_loss.kernels.launch", None)
    gaps = torch.tensor(rows(5))
    with pytest.warns(RuntimeWarning, match="Triton can't be used on cpu"):
        solution = solve_margins(gaps, **MILD, impl="triton")
    torch.testing.assert_close(solution, solve_margins(gaps, **MILD, impl="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_margins(gaps, **MILD, impl="triton")


# --- on a GPU ---


@pytest.fixture
def cuda(torch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


def kernels_launched(torch, call):
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profiler.events() if str(e.device_type).endswith("CUDA")]


@pytest.mark.gpu
def test_one_launch_forward_and_one_backward(torch, cuda):
    logps = [torch.randn(256, device=cuda, requires_grad=i < 2) for i in range(4)]
    context = torch.randn(2048, device=cuda)

    def forward():
        return gamma_dpo_loss(*logps, beta=0.1, **MILD, context=context)[0]

    assert len(kernels_launched(torch, forward)) == 1
    assert len(kernels_launched(torch, lambda: solve_margins(context, **MILD))) == 1
    loss = forward()
    one = torch.ones_like(loss)
    backward = kernels_launched(
        torch, lambda: torch.autograd.grad(loss, logps[:2], one, retain_graph=True)
    )
    assert len(backward) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("size", [256, 2304, 100_000])
@pytest.mark.parametrize("setting", [MILD, HARD])
def test_nothing_synchronises(torch, cuda, size, setting):
    gaps = torch.randn(size, device=cuda, requires_grad=True)
    gamma_preference_loss(gaps, **setting)[0].backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gamma_preference_loss(gaps, **setting)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [256, 2304, 100_000])
@pytest.mark.parametrize("setting", [MILD, HARD])
def test_a_cuda_graph_replays_with_new_values(torch, cuda, size, setting):
    gaps = torch.randn(size, device=cuda)
    mask = torch.ones(size, dtype=torch.bool, device=cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gamma_preference_loss(gaps, mask=mask, **setting)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, aux = gamma_preference_loss(gaps, mask=mask, **setting)
    for _ in range(3):
        gaps.normal_()
        mask.copy_(torch.rand(size, device=cuda) > 0.2)
        aux.margins.fill_(float("nan"))
        graph.replay()
        expected, expected_aux = gamma_preference_loss(gaps, mask=mask, **setting, impl="eager")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aux.margins, expected_aux.margins, rtol=2e-4, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 255, 257, 2304, 16_384, 16_385, 1_000_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("setting", [MILD, {"gamma0": 3.0, "tau": 3.0}, HARD])
def test_sizes_on_the_device(torch, cuda, size, dtype, setting):
    gaps = torch.tensor(rows(size), dtype=getattr(torch, dtype), device=cuda)
    solution = solve_margins(gaps, **setting, impl="triton")
    expected = solve_margins(gaps.cpu().double().numpy(), **setting).margins / setting["gamma0"]
    x = solution.margins.cpu().double().numpy() / setting["gamma0"]
    tolerance = 2e-4 if dtype == "float32" else 1e-10
    assert np.max(np.abs(x - expected) / (1 + expected)) <= tolerance


@pytest.mark.gpu
def test_no_races(torch, cuda):
    import shutil

    if not (tool := shutil.which("compute-sanitizer")):
        pytest.skip("needs compute-sanitizer")
    program = (
        "import torch; from gamma_loss import solve_margins\n"
        "for n in (256, 2304, 40_000):\n"
        "    for tau in (10.0, 0.1):\n"
        "        gaps = torch.randn(n, device='cuda')\n"
        "        solve_margins(gaps, gamma0=4.0, tau=tau)\n"
        "torch.cuda.synchronize()\n"
    )
    for check in ("racecheck", "memcheck"):
        done = subprocess.run(
            [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-c", program],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:]

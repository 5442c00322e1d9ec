"""impl="compile" and impl="triton": what only they promise. Accuracy is in test_margins."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from strategies import HARD, MILD

from gamma_loss import _solver, gamma_dpo_loss, gamma_preference_loss, solve_margins

SETTINGS = pytest.mark.parametrize("setting", [MILD, HARD], ids=["mild", "hard"])
BUILDS = pytest.mark.xdist_group("compile")  # with the tests of accuracy, which build the same


@pytest.fixture
def device(torch):
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton(torch):
    return pytest.importorskip("triton", minversion="3.5")


def rows(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 3


def test_other_libraries_have_neither_compile_nor_triton(jax):
    for gaps in (np.array([1.0, 2.0]), jax.numpy.asarray([1.0, 2.0])):
        for impl in ("compile", "triton"):
            with pytest.raises(ValueError, match=f"impl='{impl}' needs torch tensors, got "):
                solve_margins(gaps, **MILD, impl=impl)


@BUILDS
@pytest.mark.parametrize("impl", ["auto", "compile", "triton"])
def test_autocast_and_a_default_device_change_nothing(torch, triton, device, impl):
    logps = [torch.tensor(row, device=device, dtype=torch.float32) for row in rows((4, 300))]
    logps[0].requires_grad_()

    def found(setting):
        loss, aux = gamma_dpo_loss(*logps, beta=1.0, **setting, impl=impl)
        return loss, tuple(aux), torch.autograd.grad(loss, logps[0])

    for setting in (MILD, HARD):
        expected = found(setting)
        for context in (
            torch.autocast(device, dtype=torch.bfloat16),
            torch.autocast(device, dtype=torch.float16),
            torch.device("meta"),
        ):
            with context:
                torch.testing.assert_close(found(setting), expected, rtol=0, atol=0)


@BUILDS
def test_which_library_solves_on_the_cpu(torch, monkeypatch):
    """NumPy up to 65,536 gaps or with one thread, else torch; a program where one is faster."""
    used = set()
    pytest.importorskip("torch", minversion="2.7", reason="torch 2.6 exports no loop")
    for setting in (MILD, HARD):  # the two programs are traced now
        solve_margins(torch.tensor(rows(9), dtype=torch.float32), **setting, impl="compile")
    for name in ("newton_step", "solve_mild"):
        step = getattr(_solver, name)
        monkeypatch.setattr(
            _solver, name, lambda xp, *rest, f=step: used.add(xp.library) or f(xp, *rest)
        )

    threads = torch.get_num_threads()
    try:
        for number, of_many in ((1, {"numpy"}), (2, {"torch"})):
            torch.set_num_threads(number)
            for (impl, size, expected), setting in itertools.product(
                [
                    ("auto", 2, {"numpy"}),
                    ("eager", 65_536, {"numpy"}),
                    ("auto", 65_537, of_many),
                    ("compile", 2, set()),
                    ("compile", 65_537, set()),
                ],
                (MILD, HARD),
            ):
                used.clear()
                solve_margins(torch.tensor(rows(size), dtype=torch.float32), **setting, impl=impl)
                assert used == expected, (number, impl, size, setting)
    finally:
        torch.set_num_threads(threads)


# --- compile ---


@pytest.fixture
def programs(torch, monkeypatch):
    """The programs that are loaded or compiled, as if none had been."""
    from gamma_loss import _compile

    monkeypatch.setattr(_compile, "_programs", {})
    _compile._program.cache_clear()
    yield _compile._programs
    _compile._program.cache_clear()


@BUILDS
@SETTINGS
def test_one_program_serves_all_sizes_settings_and_layouts(torch, programs, setting):
    table = torch.tensor(rows((9000, 3)), dtype=torch.float32)
    column = table[:, 1]
    pools = [column[:size] for size in (2, 8, 257, 9000)] + [column.contiguous()[1:]]
    for gaps, factor in itertools.product(pools, (1, 0.9)):
        problem = setting | {"gamma0": factor * setting["gamma0"]}
        solution = solve_margins(gaps, **problem, impl="compile")
        exact = solve_margins(gaps.double(), **problem)
        torch.testing.assert_close(solution.margins.double(), exact.margins, rtol=2e-5, atol=0)
        error = (solution.margins - exact.margins).abs().mean() / problem["gamma0"]
        assert error <= solution.error_bound < 1e-5
    assert len(programs) == 1


@BUILDS
def test_a_program_is_kept_for_the_next_process(torch, programs, monkeypatch):
    from gamma_loss import _compile

    gaps = torch.tensor(rows(20), dtype=torch.float32)
    expected = solve_margins(gaps, **MILD, impl="compile")

    def fails(*_, **__):
        raise AssertionError("compiled")

    programs.clear()
    _compile._program.cache_clear()
    monkeypatch.setattr(torch.export, "export", fails)
    found = solve_margins(gaps, **MILD, impl="compile")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(programs) == 1


def test_where_inductor_fails_a_warning_says_so_once_and_eager_answers(
    torch, programs, monkeypatch, tmp_path
):
    def fails(*_, **__):
        raise NotImplementedError("no such device\nand more lines")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    gaps = torch.tensor(rows(9))
    with pytest.warns(RuntimeWarning, match="solves eagerly: NotImplementedError: no such device$"):
        found = solve_margins(gaps, **MILD, impl="compile")
    torch.testing.assert_close(found.margins, solve_margins(gaps, **MILD).margins)
    solve_margins(gaps + 1, **MILD, impl="compile")  # without another warning


@BUILDS
def test_what_is_kept_from_inference_serves_training(torch):
    leaf = torch.tensor(rows(20), dtype=torch.float32, requires_grad=True)
    options = {"gamma0": 2.987654321, "tau": 10.0, "impl": "compile"}  # of no other test
    with torch.inference_mode():
        expected, _ = gamma_preference_loss(leaf.clone(), **options)
    value, _ = gamma_preference_loss(leaf, **options)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert leaf.grad.abs().max() > 0


@BUILDS
def test_threads_share_one_compilation_and_call_at_once(torch, programs, monkeypatch):
    pytest.importorskip("torch", minversion="2.7", reason="torch 2.6 exports no loop")
    pools = [torch.tensor(rows(33 + 100 * i, i), dtype=torch.float32) for i in range(6)]
    expected = [solve_margins(gaps, **HARD, impl="eager").margins for gaps in pools]
    start, loads, load = threading.Barrier(6), [], torch._inductor.aoti_load_package
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path: loads.append(path) or load(path)
    )

    def solve(gaps):
        start.wait()
        return [solve_margins(gaps, **HARD, impl="compile").margins for _ in range(50)]

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(solve, pools))
    assert len(loads) == len(programs) == 1
    for result, margins in zip(results, expected, strict=True):
        for each in result:
            torch.testing.assert_close(each, margins)


# --- triton ---


def test_operators_are_what_they_say(torch, triton, device):
    check = pytest.importorskip("torch.library").opcheck
    gaps = torch.tensor(rows(5), device=device)
    mask = gaps > -1
    check(torch.ops.gamma_loss.solve, (gaps, mask.to(gaps.dtype), 4.0, 10.0, True))
    check(torch.ops.gamma_loss.solve, (gaps, None, 4.0, 0.1, False))


# --- on a GPU ---


@pytest.fixture
def cuda(torch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.mark.gpu
def test_a_solve_is_one_launch(torch, cuda):
    from torch.profiler import ProfilerActivity, profile

    gaps = torch.randn(2048, device=cuda)
    for setting in (MILD, HARD):
        solve_margins(gaps, **setting)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            solve_margins(gaps, **setting)
            torch.cuda.synchronize()
        assert sum(str(each.device_type).endswith("CUDA") for each in profiler.events()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("size", [256, 2304, 100_000])
@SETTINGS
def test_nothing_synchronises_and_a_cuda_graph_replays_with_new_values(torch, cuda, size, setting):
    leaf = torch.randn(size, device=cuda, requires_grad=True)
    gamma_preference_loss(leaf, **setting)[0].backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gamma_preference_loss(leaf, **setting)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    gaps, mask = leaf.detach(), torch.ones(size, dtype=torch.bool, device=cuda)
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

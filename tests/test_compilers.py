"""Tracing: torch.compile, torch.export, torch.vmap and JAX take the library as it is."""

import functools
import sys
import types

import numpy as np
import pytest
from strategies import HARD, MILD

from gamma_loss import (
    GammaDPOLoss,
    GammaPreferenceLoss,
    _solver,
    gamma_dpo_loss,
    gamma_preference_loss,
    metrics,
    solve_margins,
)


def rows(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 3


@pytest.fixture
def compiled(torch):
    """torch.compile with whole graphs, which are listed."""
    torch.compiler.reset()

    def compile(function, backend="aot_eager", **options):
        def listed(module, inputs):
            compile.graphs.append(module)
            return torch._dynamo.lookup_backend(backend)(module, inputs)

        return torch.compile(function, fullgraph=True, backend=listed, **options)

    compile.graphs = []
    return compile


SETTINGS = pytest.mark.parametrize("setting", [MILD, HARD], ids=["mild", "hard"])


def needs(impl):
    if impl == "triton":
        pytest.importorskip("triton", minversion="3.5")


@pytest.mark.parametrize(
    ("impl", "setting"), [("auto", MILD), ("compile", HARD), ("triton", HARD)]
)  # fmt: skip
def test_torch_compile_makes_one_small_graph_for_all_calls(torch, compiled, impl, setting):
    needs(impl)

    def loss(*logps, impl=impl):
        value, aux = gamma_dpo_loss(*logps, beta=0.1, impl=impl, **setting)
        return value, aux, metrics(aux)

    call = compiled(loss)
    for seed in range(2):
        logps = [torch.tensor(row, requires_grad=i < 2) for i, row in enumerate(rows((4, 9), seed))]
        found, expected = call(*logps), loss(*logps, impl="eager")
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found[0], logps[:2])
        torch.testing.assert_close(gradients, torch.autograd.grad(expected[0], logps[:2]))
    (graph,) = compiled.graphs
    assert len(list(graph.graph.nodes)) < 200  # one call of ours, and the metrics


@SETTINGS
def test_torch_compile_makes_one_graph_for_all_sizes(torch, compiled, setting):
    def loss(gaps, context, mask, weights):
        solution = solve_margins(gaps, context=context, mask=mask, **setting)
        arrays = {"context": context, "context_mask": mask, "weights": weights}
        return gamma_preference_loss(gaps, **arrays, **setting)[0], *solution

    call, counts = compiled(loss, dynamic=True), []
    for size in (5, 7, 300):
        gaps, context = torch.tensor(rows((2, size)))
        arrays = gaps, context, context > -1, context.abs()
        torch.testing.assert_close(call(*arrays), loss(*arrays))
        counts.append(len(compiled.graphs))
    assert counts == counts[:1] * 3  # Dynamo may trace the first call twice


def test_a_solve_takes_few_nodes_of_a_graph(torch):
    """A mild one is a few passes, any other is one operator."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gaps = torch.tensor(rows(9))
    for impl in ("auto", "eager", "compile"):
        for setting, most in ((HARD, 20), (MILD, 200)):
            traced = make_fx(functools.partial(solve_margins, impl=impl, **setting))(gaps)
            assert len(list(traced.graph.nodes)) < most


def test_a_tensor_is_not_asked_whether_it_is_jaxs(torch, monkeypatch):
    """torch.compile of 2.14 traces no isinstance that a class has made its own, as JAX's has."""

    class Asks(type):
        def __instancecheck__(cls, instance):
            raise AssertionError("asked")

    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(Array=Asks("Array", (), {})))
    torch.compiler.reset()
    assert solve_margins(torch.zeros(1), **MILD).margins == 4


def test_a_bad_setting_in_a_compiled_function_is_a_plain_error(torch):
    for call in (gamma_preference_loss, solve_margins):
        compiled = torch.compile(lambda gaps, call=call: call(gaps, gamma0=-1.0, tau=1.0))
        with pytest.raises(ValueError, match="gamma0 must be finite and >= 0, got -1"):
            compiled(torch.zeros(3))


@pytest.mark.parametrize(("backend", "sizes"), [("aot_eager", (5, 16, 7)), ("inductor", (5, 5))])
def test_a_module_with_a_queue_does_not_recompile(torch, compiled, backend, sizes):
    plain, module = (GammaDPOLoss(beta=0.1, **MILD, queue_size=12) for _ in range(2))
    call, counts = compiled(module, backend=backend, dynamic=backend == "aot_eager"), []
    for seed, size in enumerate(sizes):
        logps = torch.tensor(rows((4, size), seed), dtype=torch.float32).unbind()
        logps = [row.clone().requires_grad_() for row in logps]
        mask = logps[0] > -2
        found, expected = call(*logps, mask=mask)[0], plain(*logps, mask=mask)[0]
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(each, logps[:2]) for each in (found, expected))
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(module.queue.context(), plain.queue.context())
        counts.append(len(compiled.graphs))
    assert counts == counts[:1] * len(counts)  # Dynamo may trace the first call twice


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's, after a break
def test_a_loss_of_a_group_breaks_the_graph_and_is_the_same(torch):
    torch.compiler.reset()
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        gaps = torch.tensor(rows(9), requires_grad=True)
        options = {"queue_size": 12, "group": dist.group.WORLD}
        for setting in (MILD, HARD):
            plain, module = (GammaPreferenceLoss(**setting, **options).double() for _ in range(2))
            compiled = torch.compile(module, backend="aot_eager")
            for _ in range(2):
                found, expected = compiled(gaps)[0], plain(gaps)[0]
                torch.testing.assert_close(found, expected)
                gradients = (torch.autograd.grad(each, gaps) for each in (found, expected))
                torch.testing.assert_close(*gradients)
                torch.testing.assert_close(module.queue.context(), plain.queue.context())
    finally:
        dist.destroy_process_group()


def test_torch_compile_with_a_schedule_of_gamma0(torch):
    torch.compiler.reset()
    gaps = torch.tensor(rows(9))

    def loss(gaps, gamma0):
        loss, aux = gamma_preference_loss(gaps, gamma0=gamma0, tau=3.0)
        return loss, aux.margins

    with torch._dynamo.config.patch(specialize_float=True):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        for gamma0 in (1.0, 2.0, 30.0):
            torch.testing.assert_close(compiled(gaps, gamma0), loss(gaps, gamma0))
    # As a symbol a setting is a constant of its graph.
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gaps, 2.0), loss(gaps, 2.0))


def test_jax_compiles_one_program_for_a_shape_whatever_the_setting(jax):
    names = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda name, *_, **__: names.append(name))

    def programs(setting):
        names.clear()
        solve_margins(gaps, **setting)
        return sum("backend_compile" in name for name in names)

    try:
        for other, first, second, size in (
            (HARD, MILD, {"gamma0": 3.0, "tau": 10.0}, 23),
            (MILD, HARD, {"gamma0": 3.0, "tau": 0.5}, 29),
        ):
            gaps = jax.numpy.asarray(rows(size))
            programs(other)  # compiles what surrounds a solve, too
            assert programs(first) == 1
            assert programs(second) == 0
    finally:
        jax.monitoring.clear_event_listeners()


def test_other_libraries_end_their_loops(monkeypatch):
    """An array of the standard takes the passes that NumPy takes, not the most there can be."""
    steps, step = [], _solver.newton_step
    monkeypatch.setattr(_solver, "newton_step", lambda *args: steps.append(args) or step(*args))
    counts = []
    for xp in (np, pytest.importorskip("array_api_strict")):
        steps.clear()
        solve_margins(xp.asarray(rows(50) + 4), **HARD)
        counts.append(len(steps))
    assert 3 < counts[0] == counts[1] < 20


def test_jax_jit_and_vmap(jax):
    batch, mask = jax.numpy.asarray(rows((3, 8))), jax.numpy.asarray(rows((3, 8), 1) > -3)
    for setting in (MILD, HARD):

        def solve(gaps, mask, setting=setting):
            return solve_margins(gaps, mask=mask, **setting)

        jitted, mapped = jax.jit(solve), jax.jit(jax.vmap(solve))(batch, mask)
        for i in range(3):
            expected = solve(np.asarray(batch[i]), np.asarray(mask[i])).margins
            np.testing.assert_allclose(jitted(batch[i], mask[i]).margins, expected, rtol=1e-10)
            np.testing.assert_allclose(mapped.margins[i], expected, rtol=1e-10)
        assert jitted._cache_size() == 1


@pytest.mark.parametrize(
    ("impl", "setting", "strict"),
    [("auto", MILD, False), ("auto", HARD, True), ("auto", HARD, False), ("triton", HARD, False)],
    ids=["mild", "hard, strict", "hard", "triton"],
)
def test_torch_export_with_a_dynamic_batch(torch, impl, setting, strict):
    needs(impl)

    class Module(torch.nn.Module):
        def forward(self, logps, mask):
            loss, aux = gamma_dpo_loss(*logps, beta=0.1, mask=mask, impl=impl, **setting)
            return loss, *aux, *solve_margins(logps[0], impl=impl, **setting)

    def arguments(size):
        return torch.tensor(rows((4, size), size)).unbind(), torch.tensor(rows(size) > -2)

    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(
        Module(), arguments(9), dynamic_shapes=((batch,) * 4, batch), strict=strict
    ).module()
    for size in (2, 257) if impl == "triton" else (2, 256, 257):
        torch.testing.assert_close(exported(*arguments(size)), Module()(*arguments(size)))

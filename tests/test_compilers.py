"""Tracing: torch.compile, torch.vmap, jax.jit and jax.vmap take the library as it is."""

import itertools
import sys
import types

import numpy as np
import pytest
from strategies import HARD, MILD

from gamma_loss import (
    _backend,
    _solver,
    gamma_dpo_loss,
    gamma_preference_loss,
    metrics,
    solve_margins,
)


def rows(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 3


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_torch_compile_makes_one_graph_and_does_not_recompile(torch, setting):
    torch.compiler.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    def loss(*logps):
        value, aux = gamma_dpo_loss(*logps, beta=0.1, **setting)
        return value, aux, metrics(aux)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for seed in range(3):
        logps = [torch.tensor(row, requires_grad=i < 2) for i, row in enumerate(rows((4, 9), seed))]
        value, aux, logs = compiled(*logps)
        expected, expected_aux, expected_logs = loss(*logps)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(aux.margins, expected_aux.margins)
        torch.testing.assert_close(logs, expected_logs)
        gradients = torch.autograd.grad(value, logps[:2])
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, logps[:2]))
    assert len(graphs) == 1


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_torch_compile_makes_one_graph_for_all_sizes(torch, setting):
    torch.compiler.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    def loss(chosen, rejected):
        return gamma_preference_loss(chosen - rejected, context=rejected, **setting)[0]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for size in (5, 7, 300):
        logps = torch.tensor(rows((2, size)))
        torch.testing.assert_close(compiled(*logps), loss(*logps))
    assert len(graphs) == 1


def test_a_tensor_is_not_asked_whether_it_is_jaxs(torch, monkeypatch):
    """torch.compile of 2.14 traces no isinstance that a class has made its own, as JAX's has."""

    class Asks(type):
        def __instancecheck__(cls, instance):
            raise AssertionError("asked")

    class Array(metaclass=Asks):
        pass

    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(Array=Array))
    monkeypatch.setattr(_backend, "_instances", {})
    assert _backend.get_backend(torch.zeros(1)).library == "torch"
    with pytest.raises(AssertionError, match="asked"):
        _backend.get_backend(np.zeros(1))


def test_inductor_fuses_a_loss_with_its_solve_into_one_kernel(torch):
    run_and_get_code = pytest.importorskip("torch._inductor.utils").run_and_get_code
    logps = torch.tensor(rows((4, 50)), dtype=torch.float32)

    def loss(logps):
        return gamma_dpo_loss(*logps, beta=0.3, **MILD)

    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        found, (code,) = run_and_get_code(torch.compile(loss, fullgraph=True), logps)
    assert code.count("async_compile.cpp_pybinding(") == 1
    torch.testing.assert_close(found, loss(logps))


def guards(torch, function, *arguments):
    """Return how many guards Dynamo checks before each call of a compiled function."""

    def leaves(manager):
        pairs = getattr(manager, "get_key_value_managers", dict)().values()
        below = [*manager.get_child_managers(), *itertools.chain(*pairs)]
        return len(manager.get_leaf_guards()) + sum(map(leaves, filter(None, below)))

    torch.compiler.reset()
    torch.compile(function, fullgraph=True, backend="eager")(*arguments)
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(function)
    return leaves(entry.guard_manager.root)


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_a_graph_has_few_guards(torch, setting):
    logps = torch.tensor(rows((4, 9))).unbind()

    def dpo(*logps):
        gaps = 0.1 * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
        return -torch.nn.functional.logsigmoid(gaps).mean()

    def loss(*logps):
        return gamma_dpo_loss(*logps, beta=0.1, **setting)[0]

    assert guards(torch, loss, *logps) <= guards(torch, dpo, *logps) + 100
    gaps = logps[0]
    assert guards(torch, lambda gaps: solve_margins(gaps, **setting), gaps) <= 100


def test_a_bad_setting_in_a_compiled_function_is_a_plain_error(torch):
    for call in (gamma_preference_loss, solve_margins):
        compiled = torch.compile(lambda gaps, call=call: call(gaps, gamma0=-1.0, tau=1.0))
        with pytest.raises(ValueError, match="gamma0 must be finite and >= 0, got -1"):
            compiled(torch.zeros(3))


@pytest.mark.parametrize("name", ["context", "mask", "weights"])
@pytest.mark.parametrize("setting", [MILD, HARD])
def test_torch_compile_takes_the_optional_arrays(torch, setting, name):
    torch.compiler.reset()
    gaps = torch.tensor(rows(9))
    optional = {"context": gaps * 2, "mask": gaps > -1, "weights": gaps.abs()}[name]
    for function in (solve_margins, gamma_preference_loss):

        def call(gaps, optional, function=function):
            return tuple(function(gaps, **{name: optional}, **setting))

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(gaps, optional), call(gaps, optional))


def test_a_module_with_a_queue_does_not_recompile(torch):
    from gamma_loss.torch import GammaPreferenceLoss

    torch.compiler.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    plain, module = (GammaPreferenceLoss(**MILD, queue_size=32) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for seed, size in enumerate((5, 9, 16, 7)):
        gaps = torch.tensor(rows(size, seed), dtype=torch.float32)
        torch.testing.assert_close(compiled(gaps), plain(gaps))
        counts.append(len(graphs))
    torch.testing.assert_close(module.queue.context(), plain.queue.context())
    assert counts == counts[:1] * 4  # Dynamo may trace the first call twice


def test_torch_compile_with_a_schedule_of_gamma0(torch):
    torch.compiler.reset()
    gaps = torch.tensor(rows(9))

    def solve(gaps, gamma0):
        return solve_margins(gaps, gamma0=gamma0, tau=3.0).margins

    def loss(gaps, gamma0):
        return gamma_preference_loss(gaps, gamma0=gamma0, tau=3.0)[0]

    for function in (solve, loss):
        with torch._dynamo.config.patch(specialize_float=True):
            compiled = torch.compile(function, fullgraph=True, backend="eager")
            for gamma0 in (1.0, 2.0, 30.0):
                torch.testing.assert_close(compiled(gaps, gamma0), function(gaps, gamma0))
        # As a symbol a setting is a constant of its graph.
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(gaps, 2.0), function(gaps, 2.0))


@pytest.mark.parametrize(
    ("other", "first", "second", "size"),
    [
        (HARD, MILD, {"gamma0": 3.0, "tau": 10.0}, 23),
        (MILD, HARD, {"gamma0": 3.0, "tau": 0.5}, 29),
    ],
)
def test_jax_compiles_one_program_for_a_shape_whatever_the_setting(jax, other, first, second, size):
    names = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda name, *_, **__: names.append(name))

    def programs(setting):
        names.clear()
        solve_margins(gaps, **setting)
        return sum("backend_compile" in name for name in names)

    try:
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


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_torch_vmap(torch, setting):
    batch, mask = torch.tensor(rows((5, 8))), torch.tensor(rows((5, 8), 1) > -3)
    mapped = torch.vmap(lambda g, m: solve_margins(g, mask=m, **setting))(batch, mask)
    for i in range(5):
        expected = solve_margins(batch[i], mask=mask[i], **setting)
        torch.testing.assert_close(mapped.margins[i], expected.margins, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_jax_jit_and_vmap(jax, setting):
    batch, mask = jax.numpy.asarray(rows((5, 8))), jax.numpy.asarray(rows((5, 8), 1) > -3)

    def solve(gaps, mask):
        return solve_margins(gaps, mask=mask, **setting)

    jitted, mapped = jax.jit(solve), jax.jit(jax.vmap(solve))(batch, mask)
    for i in range(5):
        expected = np.asarray(
            solve_margins(np.asarray(batch[i]), mask=np.asarray(mask[i]), **setting).margins
        )
        np.testing.assert_allclose(jitted(batch[i], mask[i]).margins, expected, rtol=1e-10)
        np.testing.assert_allclose(mapped.margins[i], expected, rtol=1e-10)
    assert jitted._cache_size() == 1


def test_torch_func_grad_and_value_with_aux(torch):
    logps = [torch.tensor(row) for row in rows((4, 9))]

    def loss(chosen, *rest):
        return gamma_dpo_loss(chosen, *rest, beta=0.1, **MILD)

    gradient, (value, aux) = torch.func.grad_and_value(loss, has_aux=True)(*logps)
    expected, _ = loss(*logps)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, -0.1 * aux.pair_weights / 9)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("setting", [MILD, HARD])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("kind", ["solve", "loss"])
def test_torch_export_with_a_dynamic_batch(torch, kind, has_mask, setting, strict):
    class Module(torch.nn.Module):
        def forward(self, logps, mask=None):
            if kind == "solve":
                return tuple(solve_margins(logps[0], mask=mask, **setting))
            loss, aux = gamma_dpo_loss(*logps, beta=0.1, mask=mask, **setting)
            return loss, *aux

    def arguments(size):
        logps = torch.tensor(rows((4, size), size))
        return (logps.unbind(), *[torch.tensor(rows(size) > -2)] * has_mask)

    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = ((batch,) * 4, batch) if has_mask else ((batch,) * 4,)
    exported = torch.export.export(
        Module(), arguments(9), dynamic_shapes=shapes, strict=strict
    ).module()
    for size in (2, 8, 256, 257, 2304):
        torch.testing.assert_close(exported(*arguments(size)), Module()(*arguments(size)))

"""Tracing: torch.compile, torch.vmap, jax.jit and jax.vmap take the library as it is."""

import sys
import types

import numpy as np
import pytest
from strategies import HARD, MILD

from gamma_loss import (
    _arrays,
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
    assert not _arrays.is_jax(torch.zeros(1))
    with pytest.raises(AssertionError, match="asked"):
        _arrays.is_jax(np.zeros(1))


def test_torch_inductor_agrees(torch):
    gaps = torch.tensor(rows(50))
    compiled = torch.compile(lambda g: solve_margins(g, **MILD), fullgraph=True)
    torch.testing.assert_close(compiled(gaps).margins, solve_margins(gaps, **MILD).margins)


def test_torch_compile_with_a_schedule_of_gamma0(torch):
    torch.compiler.reset()
    gaps = torch.tensor(rows(9))

    def solve(gaps, gamma0):
        return solve_margins(gaps, gamma0=gamma0, tau=3.0).margins

    with torch._dynamo.config.patch(specialize_float=True):
        compiled = torch.compile(solve, fullgraph=True, backend="eager")
        for gamma0 in (1.0, 2.0, 30.0):
            torch.testing.assert_close(compiled(gaps, gamma0), solve(gaps, gamma0))


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
    passes, follow = [], _solver.follow
    monkeypatch.setattr(_solver, "follow", lambda *args: passes.append(args) or follow(*args))
    counts = []
    for xp in (np, pytest.importorskip("array_api_strict")):
        gaps, gamma0, a = map(xp.asarray, (rows(50) + 4, np.array(4.0), np.array(40.0)))
        passes.clear()
        _solver.iterate(_solver.begin(gaps, None, gamma0, a))
        counts.append(len(passes))
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


def test_torch_export(torch):
    class Loss(torch.nn.Module):
        def forward(self, *logps):
            return gamma_dpo_loss(*logps, beta=0.1, **MILD)

    logps = tuple(torch.tensor(row) for row in rows((4, 9)))
    exported = torch.export.export(Loss(), logps).module()
    torch.testing.assert_close(exported(*logps)[0], Loss()(*logps)[0])

"""One problem over the four devices of a JAX mesh against one device that holds all gaps."""

import functools

import numpy as np
import pytest
from ranks import pool
from strategies import HARD, MILD

from gamma_loss import _comm, gamma_preference_loss, solve_margins

jax = pytest.importorskip("jax")
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

try:
    from jax import shard_map
except ImportError:  # JAX before 0.6
    from jax.experimental.shard_map import shard_map

pytestmark = pytest.mark.xdist_group("mesh")  # so that each program is compiled once
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
AUX = "margins", "pair_weights", "multiplier", "error_bound"
GAPS, CONTEXT = pool(400), pool(80, seed=1)
ALL, NONE = np.ones(400, dtype=bool), np.zeros(80, dtype=bool)
MASKS = {  # of the pairs and of the context
    "": (ALL, NONE),
    "masked": (np.arange(400) % 3 != 0, NONE),
    "a device masked": (np.arange(400) >= 100, NONE),
    "all masked": (~ALL, NONE),
    "context": (ALL, np.arange(80) % 2 == 0),
}


@pytest.fixture(scope="module")
def over_devices(jax):
    """Makes a function one of shards of its arguments."""
    assert len(jax.devices()) == 4, "conftest.py asks for them"
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return lambda function, outputs: jax.jit(
        shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=outputs)
    )


def mean_loss(setting, gaps, mask=None, context=None, context_mask=None):
    loss, aux = gamma_preference_loss(
        gaps, mask=mask, context=context, context_mask=context_mask, group="data", **setting
    )
    return jax.lax.pmean(loss, "data"), {name: getattr(aux, name) for name in AUX}


@pytest.fixture(scope="module")
def program(over_devices):
    """Loss and aux of a setting, with the gradient, by gathering or by reducing."""

    @functools.cache  # as compiling takes longer than anything else
    def compiled(is_hard, limit):
        aux = dict(zip(AUX, (P("data"), P("data"), P(), P()), strict=True))
        run = over_devices(functools.partial(mean_loss, HARD if is_hard else MILD), (P(), aux))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_comm, "GATHER_LIMIT", limit)
            return jax.jit(jax.value_and_grad(run, has_aux=True)).lower(*arguments("")).compile()

    return compiled


def arguments(masks):
    mask, kept = MASKS[masks]
    return GAPS, mask, CONTEXT, kept


@pytest.mark.parametrize("limit", [2**17, 0], ids=["gather", "reduce"])
@pytest.mark.parametrize("is_hard", [False, True], ids=["mild", "hard"])
@pytest.mark.parametrize("masks", MASKS)
def test_sharded_equals_whole(program, masks, is_hard, limit):
    gaps, mask, context, kept = arguments(masks)
    (loss, found), gradient = program(is_hard, limit)(gaps, mask, context, kept)
    expected, aux = gamma_preference_loss(
        gaps, mask=mask, context=context, context_mask=kept, **(HARD if is_hard else MILD)
    )
    np.testing.assert_allclose(loss, expected, **CLOSE)
    for name in AUX[:3]:
        np.testing.assert_allclose(found[name], getattr(aux, name), **CLOSE)
    np.testing.assert_allclose(gradient, -aux.pair_weights / max(mask.sum(), 1), **CLOSE)
    assert found["error_bound"] <= 1e-10


def test_gradient_of_replicated_parameters(over_devices):
    data, weights = np.random.default_rng(2).normal(size=(40, 3)), np.array([1.0, -0.5, 0.3])

    def gradient(data):
        slopes = jax.grad(lambda weights: mean_loss(MILD, data @ weights)[0])(weights)
        return jax.lax.pmean(slopes, "data")

    _, aux = gamma_preference_loss(data @ weights, **MILD)
    found = over_devices(gradient, P())(data)
    np.testing.assert_allclose(found, -aux.pair_weights @ data / 40, **CLOSE)


def test_a_group_that_is_no_axis():
    with pytest.raises(TypeError, match="group must be the name of a mesh axis for JAX arrays"):
        solve_margins(jax.numpy.zeros(2), group=0, **MILD)

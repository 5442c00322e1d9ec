"""What four devices of a JAX mesh find, sharded. Writes an .npz; run in a process of its own."""

import functools
import json
import os
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gamma_loss import _comm, gamma_preference_loss

try:
    from jax import shard_map
except ImportError:  # JAX before 0.6
    from jax.experimental.shard_map import shard_map

jax.config.update("jax_enable_x64", True)
MESH = Mesh(np.array(jax.devices()), ("data",))
assert MESH.size == 4


def sharded(function, outputs):
    """The function, on shards of its arguments."""
    return jax.jit(shard_map(function, mesh=MESH, in_specs=P("data"), out_specs=outputs))


def loss(gaps, mask=None, context=None, context_mask=None, **settings):
    """The mean over all devices, and what is to be checked of aux."""
    value, aux = gamma_preference_loss(
        gaps, mask=mask, context=context, context_mask=context_mask, group="data", **settings
    )
    value = jax.lax.pmean(value, "data")
    return value, aux.margins, aux.pair_weights, aux.multiplier, aux.error_bound


@functools.cache  # as compiling takes longer than anything else
def compiled(gamma0, tau, limit):
    _comm.GATHER_LIMIT = limit
    outputs = (P(), P("data"), P("data"), P(), P())
    run = sharded(lambda *shards: loss(*shards, gamma0=gamma0, tau=tau), outputs)

    def value(*arguments):
        found = run(*arguments)
        return found[0], found

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def results(settings, limit, *arguments):
    (_, found), gradient = compiled(*settings.values(), limit)(*arguments)
    names = ("loss", "margins", "pair_weights", "multiplier", "error_bound", "gradient")
    return dict(zip(names, (*found, gradient), strict=True))


def of_parameters(data, weights):
    """The gradient of replicated parameters, taken inside shard_map."""

    def gradient(data):
        def value(weights):
            return loss(data @ weights, gamma0=4.0, tau=10.0)[0]

        return jax.lax.pmean(jax.grad(value)(weights), "data")

    return sharded(gradient, P())(data)


def main(given, out):
    given = json.loads(Path(given).read_text())
    found = {"parameters": np.asarray(of_parameters(*map(jnp.asarray, given.pop("parameters"))))}
    for name, (settings, limit, *arguments) in given.items():
        pieces = results(settings, limit, *map(jnp.asarray, arguments))
        found |= {f"{name}/{key}": np.asarray(value) for key, value in pieces.items()}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

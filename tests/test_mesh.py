"""One problem over the devices of a JAX mesh against one device that holds all gaps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks as work
from strategies import HARD, MILD

from gamma_loss import gamma_preference_loss, solve_margins

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.xdist_group("mesh")  # whose work is done once

SETTINGS, LIMITS = {"mild": MILD, "hard": HARD}, {"gather": 2**17, "reduce": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
WAYS = [f"{setting}, {way}" for setting in SETTINGS for way in LIMITS]
GAPS, CONTEXT = work.pool(400), work.pool(80, seed=1)
ALL, NONE = np.ones(400, dtype=bool), np.zeros(80, dtype=bool)
MASKS = {  # of the pairs and of the context
    "": (ALL, NONE),
    "masked": (np.arange(400) % 3 != 0, NONE),
    "a device masked": (np.arange(400) >= 100, NONE),
    "all masked": (~ALL, NONE),
    "context": (ALL, np.arange(80) % 2 == 0),
}
DATA, WEIGHTS = np.random.default_rng(2).normal(size=(40, 3)), np.array([1.0, -0.5, 0.3])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four devices find in each case."""
    folder = tmp_path_factory.mktemp("mesh")
    given = {"parameters": [DATA.tolist(), WEIGHTS.tolist()]}
    for way in WAYS:
        setting, limit = way.split(", ")
        for kind, (mask, kept) in MASKS.items():
            arrays = [array.tolist() for array in (GAPS, mask, CONTEXT, kept)]
            given[kind + way] = [SETTINGS[setting], LIMITS[limit], *arrays]
    (folder / "given.json").write_text(json.dumps(given))
    program = Path(__file__).with_name("mesh.py")
    done = subprocess.run(
        [sys.executable, program, folder / "given.json", folder / "found.npz"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(program.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npz")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MASKS)
def test_sharded_equals_whole(found, kind, way):
    (mask, kept), setting = MASKS[kind], SETTINGS[way.split(", ")[0]]
    loss, aux = gamma_preference_loss(
        GAPS, mask=mask, context=CONTEXT, context_mask=kept, **setting
    )
    name = kind + way
    np.testing.assert_allclose(found[f"{name}/loss"], loss, **CLOSE)
    np.testing.assert_allclose(found[f"{name}/margins"], aux.margins, **CLOSE)
    np.testing.assert_allclose(found[f"{name}/pair_weights"], aux.pair_weights, **CLOSE)
    np.testing.assert_allclose(found[f"{name}/multiplier"], aux.multiplier, **CLOSE)
    gradient = -aux.pair_weights / max(mask.sum(), 1)
    np.testing.assert_allclose(found[f"{name}/gradient"], gradient, **CLOSE)
    assert found[f"{name}/error_bound"] <= 1e-10


def test_gradient_of_replicated_parameters(found):
    _, aux = gamma_preference_loss(DATA @ WEIGHTS, **MILD)
    np.testing.assert_allclose(found["parameters"], -aux.pair_weights @ DATA / 40, **CLOSE)


def test_a_group_that_is_no_axis():
    with pytest.raises(TypeError, match="group must be the name of a mesh axis for JAX arrays"):
        solve_margins(jax.numpy.zeros(2), group=0, **MILD)

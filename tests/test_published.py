"""The benchmark's peer is the published algorithm, and fails where the design says it does."""

import json
from pathlib import Path

import numpy as np
import oracles
import pytest

torch = pytest.importorskip("torch")
from benchmarks.published import published_margins  # noqa: E402
from gamma_loss import PUBLISHED_SETTINGS  # noqa: E402

CASES = json.loads((Path(__file__).parent / "data" / "published_margins.json").read_text())["cases"]


def test_reproduces_the_published_outputs():
    for case in CASES:
        pool = torch.tensor(case["context"] + case["reward_gaps"], dtype=torch.float64)
        margins = published_margins(pool, case["gamma0"], case["tau"])[len(case["context"]) :]
        np.testing.assert_allclose(margins.numpy(), case["published_margins"], rtol=1e-13)


@pytest.mark.parametrize(("gamma0", "tau", "least"), [(0.05, 0.1, 1e-2), (4.0, 0.1, 1.0)])
def test_does_not_converge_outside_the_published_settings(gamma0, tau, least):
    gaps = torch.tensor(np.random.default_rng(0).normal(size=64) * 4)
    exact = oracles.margins(gaps.numpy(), gamma0, tau)[0].astype(float)
    for steps in (20,) if gamma0 < 1 else (20, 200, 2000):  # more steps do not help the second
        error = np.abs(published_margins(gaps, gamma0, tau, steps).numpy() - exact).max() / gamma0
        assert error > least


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_configuration_files_have_the_published_settings(name):
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).parents[1] / "docs" / "examples" / "published"
    settings = yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8"))
    assert {k: settings[k] for k in ("beta", "gamma0", "tau")} == PUBLISHED_SETTINGS[name]
    assert 6e-7 <= settings["learning_rate"] <= 1e-6

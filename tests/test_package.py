"""What importing the package does and does not do."""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import gamma_loss
from gamma_loss import PUBLISHED_SETTINGS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("used", [None, "numpy", "torch", "jax"])
def test_only_the_library_whose_arrays_arrive_is_imported(used):
    if used:
        pytest.importorskip(used)
    call = {
        None: "",
        "numpy": "import numpy as xp; a = xp.asarray([1.0, 2.0]);",
        "torch": "import torch; a = torch.tensor([1.0, 2.0]);",
        "jax": "import jax.numpy as xp; a = xp.asarray([1.0, 2.0]);",
    }[used]
    if used:
        call += "gamma_loss.gamma_preference_loss(a, gamma0=1.0, tau=1.0);"
    code = f"import sys, gamma_loss; {call} print([m for m in LIBRARIES if m in sys.modules])"
    code = code.replace(
        "LIBRARIES", "('torch', 'jax', 'cupy')" if used else "('numpy', 'torch', 'jax')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([used] if used not in (None, "numpy") else [])


def test_typed_and_versioned():
    assert (files(gamma_loss) / "py.typed").is_file()
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    assert "Unreleased" in changelog or gamma_loss.__version__ in changelog
    assert re.search(rf"^version: {re.escape(gamma_loss.__version__)}$", citation, re.MULTILINE)


def test_published_settings():
    ratios = {
        "mistral-7b-instruct": (2.5, 0.15, 10.0, 0.375),
        "llama-3-8b-instruct": (10.0, 0.4, 10.0, 4.0),
        "gemma-2-9b-it": (10.0, 0.5, 20.0, 5.0),
        "qwen-2.5-7b-instruct": (10.0, 0.3, 3.0, 3.0),
    }
    assert set(PUBLISHED_SETTINGS) == set(ratios)
    for name, (beta, _, tau, gamma0) in ratios.items():
        assert PUBLISHED_SETTINGS[name] == {"beta": beta, "gamma0": gamma0, "tau": tau}
    with pytest.raises(TypeError):
        PUBLISHED_SETTINGS["mistral-7b-instruct"]["tau"] = 1.0


def test_every_public_name_is_documented():
    for name in gamma_loss.__all__:
        if name != "PUBLISHED_SETTINGS":
            assert getattr(gamma_loss, name).__doc__

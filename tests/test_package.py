"""What importing the package does and does not do."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import gamma_loss
from gamma_loss import PUBLISHED_SETTINGS

ROOT = Path(__file__).parents[1]


USE = {
    "numpy": "import numpy as xp; a = xp.asarray([1.0, 2.0])",
    "torch": "import torch; a = torch.tensor([1.0, 2.0])",
    "jax": "import jax.numpy as xp; a = xp.asarray([1.0, 2.0])",
}


@pytest.mark.parametrize("used", USE)
def test_only_the_library_whose_arrays_arrive_is_imported(used):
    pytest.importorskip(used)
    code = f"""
import sys, gamma_loss
heavy = {{"numpy", "torch", "torch._dynamo", "jax", "cupy", "scipy", "matplotlib"}}
print(heavy & set(sys.modules))
{USE[used]}
before = set(sys.modules)
gamma_loss.gamma_preference_loss(a, gamma0=1.0, tau=1.0)
{"import gamma_loss.torch" if used == "torch" else ""}
print(heavy & set(sys.modules) - before - {{"numpy"}})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["set()", "set()"]


@pytest.mark.parametrize(
    ("module", "missing", "words"),
    [
        ("plots", "matplotlib.axes", r"gamma_loss.plots needs matplotlib: .*'gamma-loss\[plots\]'"),
        ("integrations.trl", "trl", r"needs TRL 1\.8 or later: pip install 'gamma-loss\[trl\]'"),
    ],
)
def test_an_extra_that_is_missing_is_named(monkeypatch, module, missing, words):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"gamma_loss.{module}", raising=False)
    with pytest.raises(ImportError, match=words):
        importlib.import_module(f"gamma_loss.{module}")


def imports(path):
    """The package's files that a file imports, at any depth, but for the type checker only."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gamma_loss"):
            for name in (node.module, *(f"{node.module}.{each.name}" for each in node.names)):
                yield ROOT.joinpath(*name.split(".")).with_suffix(".py")


def test_no_circle_of_imports():
    files = set((ROOT / "gamma_loss").rglob("*.py"))
    graph = {path: files.intersection(imports(path)) for path in files}
    assert sum(map(len, graph.values())) > len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle


def test_dir_lists_every_public_name():
    pytest.importorskip("torch")
    assert set(gamma_loss.__all__) <= set(dir(gamma_loss))


def test_typed_and_versioned():
    assert (files(gamma_loss) / "py.typed").is_file()
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    assert "Unreleased" in changelog or gamma_loss.__version__ in changelog
    assert re.search(rf"^version: {re.escape(gamma_loss.__version__)}$", citation, re.MULTILINE)


def test_published_settings():
    expected = {
        "mistral-7b-instruct": {"beta": 2.5, "gamma0": 0.375, "tau": 10.0},
        "llama-3-8b-instruct": {"beta": 10.0, "gamma0": 4.0, "tau": 10.0},
        "gemma-2-9b-it": {"beta": 10.0, "gamma0": 5.0, "tau": 20.0},
        "qwen-2.5-7b-instruct": {"beta": 10.0, "gamma0": 3.0, "tau": 3.0},
    }
    assert dict(PUBLISHED_SETTINGS) == expected
    with pytest.raises(TypeError):
        PUBLISHED_SETTINGS["mistral-7b-instruct"]["tau"] = 1.0
    with pytest.raises(KeyError, match="no published setting 'llama3': there are mistral-7b-"):
        PUBLISHED_SETTINGS["llama3"]
    assert PUBLISHED_SETTINGS.get("llama3") is None


def public_modules():
    """Every module whose ``__all__`` says what it offers, with those names; imports nothing."""
    for file in sorted((ROOT / "gamma_loss").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if found := re.search(r"^__all__ = (\[.*?\])", file.read_text("utf-8"), re.DOTALL | re.M):
            yield ".".join(p for p in parts if p != "__init__"), ast.literal_eval(found[1])


MODULES = dict(public_modules())


def test_the_api_reference_has_each_public_name_once_and_nothing_else():
    assert MODULES["gamma_loss"] == gamma_loss.__all__
    assert "gamma_loss.torch" in MODULES
    reference = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"^::: (.*)\.(\w+)$", reference, re.MULTILINE)
    names = [(module, name) for module, offered in MODULES.items() for name in offered]
    assert set(entries) <= set(names)
    # A name that two modules offer is described in one place.
    assert sorted(name for _, name in entries) == sorted({name for _, name in names})


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_complete_docstring(module):
    offered = pytest.importorskip(module, exc_type=ImportError)
    for name in MODULES[module]:
        value = getattr(offered, name)
        if not callable(value):
            continue
        parts = re.split(r"^(\w+)\n-{3,}\n", inspect.getdoc(value), flags=re.MULTILINE)[1:]
        found = dict(zip(parts[::2], parts[1::2], strict=True))  # of a NumPy-style docstring
        if isinstance(value, type) and issubclass(value, tuple):
            assert set(value._fields) <= named(found["Attributes"]), name
            continue
        assert own_parameters(value) <= named(found["Parameters"]), name
        assert ">>> " in found["Examples"], name
        assert found["Returns"] if inspect.isfunction(value) else True, name


def named(section):
    """The names before the colons of a section's entries."""
    heads = re.findall(r"^(?! )(.+?)(?: : .*)?$", section, re.MULTILINE)
    return {name.lstrip("*") for head in heads for name in head.split(", ")}


def own_parameters(value):
    """What a function or a class takes, without what a class inherits."""
    if dataclasses.is_dataclass(value):
        return set(inspect.get_annotations(value))
    if isinstance(value, type) and "__init__" not in vars(value):
        return set()
    return set(inspect.signature(value).parameters)

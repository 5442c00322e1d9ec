"""Nothing from outside runs unseen: pinned actions, least permissions, files that are only data.

What ruff's rules S3, S5 and S6 see (pickle, eval, shells, unsafe YAML) is left to them.
"""

import ast
import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
FOLDERS = ("gamma_loss", "benchmarks", "docs", "tests")
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def calls(code):
    """Every call in a text of Python: the name it has there, and its keywords that are literals."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords
                        if isinstance(k.value, ast.Constant)}  # fmt: skip
            yield ast.unparse(node.func), keywords


def unsafe(code):
    """The calls that would run what is in a file."""
    return [
        name
        for name, keywords in calls(code)
        if (name.endswith("torch.load") and keywords.get("weights_only") is not True)
        or keywords.get("allow_pickle") is True
        or keywords.get("trust_remote_code") is True
        or re.search(r"\b(c?[pP]ickle|dill|joblib|shelve)\.loads?$", name)
    ]


def sources():
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file, file.read_text("utf-8")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in FENCE.findall(file.read_text("utf-8")):
            yield file, block


def test_files_are_loaded_as_data():
    found = {(file.name, name) for file, code in sources() for name in unsafe(code)}
    own = {(f"test_{name}.py", "pickle.loads") for name in ("modules", "recipes")}
    assert found == own  # of bytes that they made themselves


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=maybe)",
        "np.load(f, allow_pickle=True)",
        "pickle.load(f)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_is_not_data_is_seen(code):
    assert unsafe(code)
    assert not unsafe("torch.load(f, weights_only=True), np.load(f), json.load(f)")


def test_workflows_are_found():
    assert WORKFLOWS or not (ROOT / ".github").exists()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit_and_say_their_version(file):
    uses = re.findall(r"^\s*(?:- )?uses: *(.*)$", file.read_text("utf-8"), re.MULTILINE)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_have_the_least_permissions(file):
    text = file.read_text("utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in text
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # what others write (titles, branch names) would be part of the shell's text
            assert "${{" not in step.get("run", "")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "clients").glob("*.txt")), ids=lambda f: f.stem
)
def test_a_clients_pins_name_one_version_each(file):
    pins = file.read_text("utf-8").splitlines()
    assert len(pins) > 10
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", pin)] == []

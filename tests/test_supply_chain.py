"""Nothing from outside runs unseen: pinned actions, least permissions, files that are only data.

What ruff's rules S3, S5 and S6 see (pickle, eval, shells, unsafe YAML) is left to them.
"""

import ast
import re

import pages
import pytest

yaml = pytest.importorskip("yaml")


def unsafe(code):
    """The calls that would run what is in a file."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {each.arg: ast.unparse(each.value) for each in node.keywords}
            loads = name.endswith("torch.load") and given.get("weights_only") != "True"
            if loads or "True" in (given.get("allow_pickle"), given.get("trust_remote_code")):
                yield name


def test_files_are_loaded_as_data():
    for code in (
        "torch.load(f)", "torch.load(f, weights_only=maybe)", "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ):  # fmt: skip
        assert list(unsafe(code)), code
    assert not list(unsafe("torch.load(f, weights_only=True), np.load(f), json.load(f)"))
    sources = [(file, file.read_text("utf-8"))
               for folder in ("gamma_loss", "benchmarks", "docs", "tests")
               for file in (pages.ROOT / folder).rglob("*.py")]  # fmt: skip
    for page in (pages.ROOT / "README.md", *(pages.ROOT / "docs").rglob("*.md")):
        sources += [(page, block) for block in pages.blocks(page)]
    assert not [(file, name) for file, code in sources for name in unsafe(code)]


def test_workflows_have_pinned_actions_and_the_least_permissions():
    workflows = list((pages.ROOT / ".github" / "workflows").glob("*.y*ml"))
    assert workflows or not (pages.ROOT / ".github").exists()
    for file in workflows:
        text = file.read_text("utf-8")
        uses = re.findall(r"^\s*(?:- )?uses: *(.*)$", text, re.MULTILINE)
        assert uses
        for action in uses:  # by commit, with the version beside it
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action
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


def test_a_clients_pins_name_one_version_each():
    for file in (pages.ROOT / "tests" / "clients").glob("*.txt"):
        pins = file.read_text("utf-8").splitlines()
        assert len(pins) > 10
        assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", pin)] == []

"""The pages' code runs, and the figures that are typed by hand are those of the results files."""

import doctest
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = sorted(p.stem for p in DOCS.glob("*.md") if BLOCK.search(p.read_text("utf-8")))
PAGES.remove("scoring")  # its blocks use each other's files: test_score_pairs.py


@pytest.fixture
def one_rank(monkeypatch):
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in {**alone, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_step_is_retried(monkeypatch):
    pytest.importorskip("torch")
    (code,) = (code for _, code in BLOCK.findall((DOCS / "queue.md").read_text("utf-8"))
               if "deepcopy" in code)  # fmt: skip
    names = {}
    exec(compile(code, "queue.md", "exec"), names)
    assert names["again"] == names["loss"]


def test_pages_with_code_are_found():
    assert {"choosing", "errors", "index", "queue", "quickstart", "theory"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, request):
    """A block to paste runs alone; a session with prompts goes on through its page."""
    text = (DOCS / f"{page}.md").read_text("utf-8")
    for library in ("torch", "jax"):
        if re.search(rf"^import {library}\b", text, re.MULTILINE):
            pytest.importorskip(library)
    names, parser = {}, doctest.DocTestParser()
    for kind, code in BLOCK.findall(text):
        if kind == "python":
            if code.startswith("# torchrun "):
                request.getfixturevalue("one_rank")
            exec(compile(code, f"{page}.md", "exec"), alone := {})
            names |= alone
        else:
            test = parser.get_doctest(code, names, page, f"{page}.md", 0)
            assert test.examples
            problems = []
            runner = doctest.DocTestRunner(verbose=False)
            failed = runner.run(test, out=problems.append, clear_globs=False).failed
            assert not failed, "".join(problems)
            names.update(test.globs)


def test_propositions_are_numbered_in_order_and_only_those_proven_are_cited():
    text = (DOCS / "theory.md").read_text("utf-8")
    proven = [int(n) for n in re.findall(r"^\*\*Proposition (\d+)\.\*\*", text, re.MULTILINE)]
    assert proven == list(range(1, len(proven) + 1))
    assert {int(n) for n in re.findall(r"Proposition (\d+)", text)} == set(proven)


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_puts_numbers_to_the_right_and_a_dash_where_there_is_none(figures):
    assert figures.table(["name", "µs"], [["a", "1,234 (2.0)"], ["b", None]]).splitlines() == [
        "| name | µs |",
        "| --- | --: |",
        "| a | 1,234 (2.0) |",
        "| b | – |",
    ]


def test_tables_have_the_numbers_of_the_results_files(figures):
    record = json.loads((ROOT / "benchmarks/results/solver_cpu.json").read_text("utf-8"))
    solvers = record["results"][0]["solvers"]
    auto, peer = solvers["auto"], solvers["published loop, compiled"]
    cell = figures.times(auto, peer)
    assert cell.startswith(f"{auto['hot'][1]:,.{int(auto['hot'][1] < 100)}f}, ")
    assert cell.endswith(f"({peer['hot'][1] / auto['hot'][1]:.2g}, "
                         f"{peer['cold'][1] / auto['cold'][1]:.2g})")  # fmt: skip
    assert f" {cell} " in figures.margin_solve("solver_cpu", False).splitlines()[2]


def test_every_figure_of_the_benchmarks_page_can_be_made(figures):
    jinja2 = pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    page = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text)
    assert page.render(vars(figures)).count("<svg") == 2


def test_benchmarks_page_has_no_table_typed_by_hand():
    """A cell that starts with a number would be one."""
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|")
             for cell in line.split("|")]  # fmt: skip
    assert not [cell for cell in cells if re.match(r"[-−+.]?\d", cell)]


def test_readme_repeats_what_is_measured(figures):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"<!-- speed -->\n{figures.readme_speed()}\n<!-- /speed -->" in readme


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        assert not re.search(
            r"pip install [^#\n]*[\"' ]gamma[-_]loss\b", page.read_text("utf-8")
        ), page


def test_the_error_messages_in_headings_are_those_that_are_raised():
    """Whose words the doctests of `test_code_of_a_page_runs` check."""
    _, *sections = re.split(r"^## ", (DOCS / "errors.md").read_text("utf-8"), flags=re.MULTILINE)
    assert len(sections) > 10
    for section in sections:
        heading = re.match(r"`(.*?)(?: ?\.\.\.)?`\n", section)[1]
        raised = section.partition("Traceback (most recent call last):")[2]
        assert heading in raised

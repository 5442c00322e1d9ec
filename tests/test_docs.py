"""The pages' code runs, and the figures that are typed by hand are those of the results files."""

import doctest
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pages
import pytest

from gamma_loss import solve_margins

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The blocks of the scoring page use each other's files: test_score_dataset.py.
PAGES = [p for p in (ROOT / "README.md", *DOCS.glob("*.md")) if p.stem not in ("queue", "scoring")]
PAGES = sorted(p for p in PAGES if pages.blocks(p, "(?:python|pycon)"))


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


def run(page):
    """Run a page's code; return the names of each block.

    A block to paste runs alone; a session with prompts goes on through its page.
    """
    names, found, text = {}, [], page.read_text("utf-8")
    for library in ("torch", "jax"):
        if re.search(rf"^import {library}\b", text, re.MULTILINE):
            pytest.importorskip(library)
    for code in pages.blocks(page, "(?:python|pycon)"):
        if code.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, names, page.name, page.name, 0)
            problems, runner = [], doctest.DocTestRunner(verbose=False)
            runner.run(test, out=problems.append, clear_globs=False)
            assert not problems, "".join(problems)
            names.update(test.globs)
        elif "integrations.trl" not in code:  # in test_trl_programs.py
            exec(compile(code, page.name, "exec"), alone := {})
            names |= alone
            found.append(alone)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_of_a_page_runs(page, one_rank):
    run(page)


def test_code_of_the_queue_page_gives_what_it_says(one_rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    retried, _, mesh, file, value = run(DOCS / "queue.md")
    assert retried["again"] == retried["loss"]
    assert mesh["margins"].mean() == pytest.approx(4.0, rel=1e-6)
    expected = solve_margins(file["gaps"].astype(float), gamma0=4.0, tau=10.0).margins
    np.testing.assert_allclose(np.load("margins.npy"), expected, rtol=1e-6)
    assert value["queue"].mask.sum() == 3


def test_the_changed_lines_of_a_dpo_loop_are_dpo_at_a_large_tau():
    torch = pytest.importorskip("torch")
    from gamma_loss import gamma_dpo_loss

    (diff,) = pages.blocks("README.md", "diff")
    before, after = ("\n".join(re.findall(rf"^[{s}](.*)", diff, re.MULTILINE)) for s in "-+")
    names = "chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps"
    torch.manual_seed(0)
    given = {name: 10 * torch.randn(16, dtype=torch.float64) for name in names}
    losses = []
    for lines in (before, after, after.replace("tau=2.3", "tau=1e12")):
        found = {"torch": torch, "gamma_dpo_loss": gamma_dpo_loss, "beta": 0.1, **given}
        exec(compile(lines, "README.md", "exec"), found)
        losses.append(float(found["loss"]))
    assert losses[2] == pytest.approx(losses[0], rel=1e-10)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        text = page.read_text("utf-8")
        assert not re.search(r"pip install [^#\n]*[\"' ]gamma[-_]loss\b", text), page


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_have_the_numbers_of_the_results_files(figures):
    record = json.loads((ROOT / "benchmarks/results/solver_cpu.json").read_text("utf-8"))
    solvers = record["results"][0]["solvers"]
    auto, peer = solvers["auto"], solvers["published loop, compiled"]
    cell = figures.times(auto, peer)
    hot, cold = (peer[state][1] / auto[state][1] for state in ("hot", "cold"))
    assert cell.startswith(f"{auto['hot'][1]:,.{int(auto['hot'][1] < 100)}f}, ")
    assert cell.endswith(f"({hot:.2g}, {cold:.2g})")
    assert f" {cell} " in figures.margin_solve("solver_cpu", False).splitlines()[2]


def test_benchmarks_page_has_no_table_typed_by_hand():
    """A cell that starts with a number would be one."""
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\| *[-−+.]?\d", row)]


def test_readme_repeats_what_is_measured(figures):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"<!-- speed -->\n{figures.readme_speed()}\n<!-- /speed -->" in readme

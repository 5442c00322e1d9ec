"""Writes the study's two pages, docs/reproduction.md and docs/reproduction_tables.md.

Of their prose nothing is written here: only what stands between two marks of a table's name, and
the figures, which the pages show with ``picture`` of docs/figures.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.noise_study import figures, plan, tables
from benchmarks.noise_study.outcomes import Results
from benchmarks.noise_study.plan import Records, Study

DOCS = Path(__file__).parents[2] / "docs"
TASKS = {
    "reproduction.md": {"verdict": tables.verdict, "references": tables.references},
    "reproduction_tables.md": {
        "status": tables.status,
        "kappa": tables.by_kappa,
        "over-kappa": tables.over_kappa,
        "gains": tables.gains,
        "calls": lambda results: tables.by_noise(results, plan.CALLS),
        "choices": tables.choices,
        "configurations": tables.configurations,
        "mean": lambda results: tables.overall(results, "test"),
        "ranking": lambda results: tables.overall(results, "ranking"),
        "accuracy": tables.accuracies,
        "tests": tables.differences,
        "selection": tables.selection,
        "weights": tables.weights,
        "suppression": tables.suppression,
        "detection": tables.detection,
        "cost": tables.costs,
        "loop": tables.loops,
        "ablation": tables.ablations,
        "grid": tables.grid,
    },
}
PEOPLE = {
    "reproduction.md": {"raters": tables.arms},
    "reproduction_tables.md": {
        "raters-status": tables.status,
        "raters-kappa": tables.over_kappa,
        "raters-accuracy": tables.accuracies,
    },
}
LANGUAGE = {
    "reproduction.md": {"language": tables.arms},
    "reproduction_tables.md": {
        "language-status": tables.status,
        "language-methods": tables.language,
    },
}
PAGES = {"tasks": TASKS, "raters": PEOPLE, "language": LANGUAGE}
FIGURES = {
    "verdict": figures.draw_verdict,
    "accuracy": figures.draw_accuracy,
    "rewards": figures.draw_rewards,
    "margins": figures.draw_margins,
    "weights": figures.draw_weights,
    "roc": figures.draw_roc,
    "grid": figures.draw_grid,
}


def write(study: Study, records: Records, docs: Path, name: str = "tasks") -> None:
    """Rewrite the pages' tables of a study, each between its two marks, and draw its figures."""
    results = Results(study, records)
    docs.mkdir(parents=True, exist_ok=True)
    for file, makers in PAGES[name].items():
        page = docs / file
        text = (page if page.exists() else DOCS / file).read_text(encoding="utf-8")
        for table, make in makers.items():
            marks = f"<!-- {table} -->\n", f"<!-- /{table} -->"
            pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
            filled = f"{marks[0]}\n{make(results)}\n\n{marks[1]}"
            text, count = re.subn(pattern, lambda _, filled=filled: filled, text, flags=re.DOTALL)
            if count != 1:
                raise ValueError(
                    f"{page} must have the marks of {table!r} once, has them {count} times"
                )
        page.write_text(text, encoding="utf-8")
    for figure, draw in FIGURES.items() if name == "tasks" else ():
        draw(results, docs / f"reproduction_{figure}.svg")

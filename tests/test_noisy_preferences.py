"""The main job runs, repeats itself, and names what is wrong with a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "noisy_preferences.py"
GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def table(done):
    """The rows of the closing table without their last column, the seconds."""
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1:-1] for row in rows if row and row[0] in ("DPO", "γ-DPO")}


def test_quick_run_twice(tmp_path):
    first = run("--quick", "--out", tmp_path / "picture.png", cwd=tmp_path)
    assert set(table(first)) == {"DPO", "γ-DPO"}
    assert all(len(row) == 5 for row in table(first).values())
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "γ-DPO" in first.stderr  # the progress bar
    again = run("--quick", cwd=tmp_path)
    assert table(again) == table(first)
    assert (tmp_path / "noisy_preferences.png").is_file()
    assert table(run("--quick", "--seed", 1, cwd=tmp_path)) != table(first)


def test_one_method_and_own_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [{**GOOD, "prompt": f"{i} + é =", "rejected": " no" * i} for i in range(1, 13)]
    file.write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    done = run("--quick", "--method", "gamma-dpo", "--pairs", file, cwd=tmp_path)
    assert set(table(done)) == {"γ-DPO"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object, got list"),
        ('{"prompt": "a", "chosen": "b"}', "'rejected' must be a string, got None"),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "'chosen' must be a string, got 3"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "'rejected' is empty"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path, line, complaint):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    done = run("--quick", "--pairs", file, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith(f"{file}:3: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    done = run("--quick", "--pairs", file, cwd=tmp_path)
    assert done.stderr.startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pairs", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--out", "missing/picture.png"], "no such folder"),
        (["--flip", "0.7"], "must be between 0 and 0.5, got 0.7"),
        (["--tau", "0"], "must be positive and finite, got 0"),
        (["--steps", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, complaint):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_too_few_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD))
    assert "need at least 10 pairs, got 1" in run("--pairs", file, cwd=tmp_path).stderr


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--flip", "--seed", "--steps", "--gamma0", "--tau", "--beta", "--lr",
                   "--method", "--out", "--pairs", "--quick"):  # fmt: skip
        assert option in done.stdout

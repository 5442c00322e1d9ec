"""The main job runs, repeats itself, and names what is wrong with a file."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "noisy_preferences.py"
GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the program as a shell would, but in this process, which has imported torch already."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # Python prints it when nothing catches the exit
            code, err = 1, err + code
        return subprocess.CompletedProcess(arguments, code or 0, out, err)

    return run


def table(done):
    """The rows of the closing table without their last column, the seconds."""
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1:-1] for row in rows if row and row[0] in ("DPO", "γ-DPO")}


def test_quick_run_twice_and_with_another_seed(tmp_path, run):
    first = subprocess.run(
        [sys.executable, PROGRAM, "--quick", "--out", "picture.png"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert set(table(first)) == {"DPO", "γ-DPO"}
    assert all(len(row) == 5 for row in table(first).values())
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not first.stderr  # a progress bar is for a terminal
    chosen, _, seen = first.stdout.partition("What was seen:")
    assert float(re.match("tau = (.*): on DPO's last gaps", chosen)[1]) > 0
    factor = float(re.search(r"those of DPO with (.*) times the beta", seen)[1])
    assert factor == pytest.approx(0.7, abs=0.05)  # on gaps of γ-DPO's own run
    assert "mean margin" in seen
    assert "no evidence" in seen
    again = run("--quick", "--out", "picture.svg")
    assert table(again) == table(first)
    assert "How hard pairs pull</text>" in (tmp_path / "picture.svg").read_text()
    other = run("--quick", "--method", "dpo", "--seed", 1)
    assert table(other)["DPO"] != table(first)["DPO"]


def test_one_method_and_own_pairs(tmp_path, run):
    file = tmp_path / "pairs.jsonl"
    pairs = [{**GOOD, "prompt": f"{i} + é =", "rejected": " no" * i} for i in range(1, 13)]
    file.write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    done = run("--quick", "--method", "gamma-dpo", "--tau", 2, "--pairs", file)
    (row,) = table(done).values()
    assert (row[2], row[4]) == ("-", "-")  # own labels stay as they are, so none is flipped ...
    done = run("--quick", "--method", "gamma-dpo", "--tau", 2, "--pairs", file, "--flip", 0.3)
    (row,) = table(done).values()
    assert float(row[2]) > 0  # ... unless it is asked for


def test_a_beta_factor_that_cannot_be_had(run):
    done = run("--quick", "--beta-factor", 1e-9)
    assert done.returncode == 2
    assert done.stderr.startswith("argument --beta-factor: beta_factor can be at least ")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object, got list"),
        ('{"prompt": "a", "chosen": "b"}', "'rejected' must be a string, got None"),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "'chosen' must be a string, got 3"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "'rejected' is empty"),
        ('{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', "surrogates not allowed"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path, run, line, complaint):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    done = run("--quick", "--pairs", file)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{file}:3: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_that_are_not_utf8(tmp_path, run):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    done = run("--quick", "--pairs", file)
    assert done.stderr.startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pairs", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--out", "missing/picture.png"], "no such folder"),
        (["--out", "picture.xyz"], "must end in one of .jpg, .pdf, .png, .svg, got picture.xyz"),
        (["--out", "picture"], "must end in one of .jpg, .pdf, .png, .svg, got picture"),
        (["--out", "folder.png"], "cannot write folder.png: Is a directory"),
        (["--out", "/proc/picture.png"], "cannot write /proc/picture.png: "),
        (["--flip", "0.7"], "must be between 0 and 0.5, got 0.7"),
        (["--tau", "0"], "must be positive and finite, got 0"),
        (["--steps", "x"], "invalid int value: 'x'"),
        (["--method", "gamma-dpo"], "gamma-dpo alone needs --tau: there are no gaps of DPO's"),
    ],
)
def test_bad_arguments(tmp_path, run, arguments, complaint):
    (tmp_path / "folder.png").mkdir()
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_picture_of_before_stays_until_there_is_another(tmp_path, run):
    (tmp_path / "old.png").write_text("of yesterday")
    assert run("--out", "old.png", "--pairs", "missing.jsonl").returncode == 2
    assert (tmp_path / "old.png").read_text() == "of yesterday"


def test_too_few_pairs(tmp_path, run):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD))
    assert "need at least 10 pairs, got 1" in run("--pairs", file).stderr


def test_help(run):
    done = run("--help")
    assert done.returncode == 0
    for option in ("--flip", "--seed", "--steps", "--gamma0", "--tau", "--beta-factor", "--lr",
                   "--method", "--out", "--pairs", "--quick"):  # fmt: skip
        assert option in done.stdout

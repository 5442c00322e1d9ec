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
        return subprocess.CompletedProcess(arguments, code or 0, out, err)

    return run


def table(done):
    """The rows of the closing table."""
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in ("DPO", "γ-DPO")}


def test_quick_run_twice_and_with_another_seed(tmp_path, run):
    first = subprocess.run(
        [sys.executable, PROGRAM, "--quick", "--out", "picture.png"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert set(table(first)) == {"DPO", "γ-DPO"}
    assert all(len(row) == 6 for row in table(first).values())
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert not first.stderr  # a progress bar is for a terminal
    assert first.stdout.startswith("Training a byte-level language model")
    assert "DPO and γ-DPO align it on 128 pairs, 26 of them with a flipped label." in first.stdout
    chosen, _, found = first.stdout.partition("Findings:")
    assert float(re.search("tau = (.*): on DPO's last gaps", chosen)[1]) > 0
    factor = float(re.search(r"- DPO with (.*) times the beta", found)[1])
    assert factor == pytest.approx(0.7, abs=0.05)  # on gaps of γ-DPO's own run
    assert re.search(r"mean margin is 4\.\d\d \(clean\), 3\.\d\d \(flipped\)", found)
    assert len(re.findall(r"^    \S.* \d\.\d\d$", found, re.MULTILINE)) == 3  # ratios of weights
    assert "no evidence" in found
    again = run("--quick", "--out", "picture.svg")
    assert table(again) == table(first)
    picture = (tmp_path / "picture.svg").read_text()
    assert "How hard pairs pull</text>" in picture
    assert "clean pairs</text>" in picture
    other = run("--quick", "--seed", 1)
    assert table(other)["DPO"] != table(first)["DPO"]


def own_pairs(count=40, **changed):
    rows = [{**GOOD, "prompt": f"{i} + é =", "rejected": " no" * i} for i in range(1, count + 1)]
    return [row | changed for row in rows]


@pytest.fixture
def saved(tmp_path):
    def saved(rows, name="pairs.jsonl"):
        file = tmp_path / name
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        return file

    return saved


def test_one_method_and_own_pairs(tmp_path, run, saved):
    file = saved(own_pairs())
    done = run("--quick", "--tau", 2, "--pairs", file, "--out", "own.svg")
    accuracy, low, _, high, weight = table(done)["γ-DPO"]
    assert 0 < float(low) < float(accuracy) <= float(high)
    assert float(weight) > 0
    assert "on 8 held-out pairs" in done.stdout
    for text in (done.stdout, (tmp_path / "own.svg").read_text()):
        assert "as labelled" in text  # nobody knows whether own labels are right
        assert "clean" not in text
    done = run("--quick", "--tau", 2, "--pairs", file, "--flip", 0.3)
    assert float(table(done)["γ-DPO"][-1]) > 0  # flipped pairs, as they were asked for


def test_the_interval_is_wilson_s():
    from noisy_preferences import accuracy_of, interval
    from scipy.stats import binomtest

    for right, count in ((27, 40), (31, 40), (40, 40), (0, 10), (480, 512)):
        limits = binomtest(right, count).proportion_ci(method="wilson")
        assert interval(right / count, count) == f"{limits.low:.3f} to {limits.high:.3f}"
    import torch

    assert accuracy_of(torch.tensor([0.0, 0.0, 1.0, -1.0])) == 0.5


def test_the_bar_ends_whole_and_shows_what_was_learned(monkeypatch, run):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, disable, **options):
            super().__init__(*arguments, disable=False, **options)
            bars.append(self)
            self.shown = []

        def set_postfix_str(self, text="", refresh=True):
            self.shown.append(text)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    done = run("--quick")
    assert done.returncode == 0
    for bar in bars[1:]:  # after that of the language model
        assert bar.n == bar.total == 12
        assert not bar.shown[0].endswith("0.000")


def test_long_texts_are_cut_and_counted(saved, capsys):
    from noisy_preferences import from_file

    same = {"prompt": "x" * 300, "chosen": "y" * 256 + "a", "rejected": "y" * 256 + "b"}
    assert len(from_file(saved([*own_pairs(), same])).flipped) == 40
    printed = capsys.readouterr().out
    assert "the model reads 256 bytes of a text. So 1 prompts lost their start" in printed
    assert "and 1 pairs the end of a response. 1 pairs were dropped" in printed


def test_messages_are_pairs_too(saved):
    import torch
    from noisy_preferences import from_file

    said = [
        {
            key: [{"role": role, "content": row[key]}]
            for key, role in (
                ("prompt", "user"),
                ("chosen", "assistant"),
                ("rejected", "assistant"),
            )
        }
        for row in own_pairs()
    ]
    inside = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in said]
    plain, *others = (from_file(saved(rows)) for rows in (own_pairs(), said, inside))
    assert all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("arguments", [("--beta-factor", 1e-9), ("--gamma0", 1e-7)])
def test_a_beta_factor_that_cannot_be_had(run, arguments):
    done = run("--quick", *arguments)
    assert len(table(done)) == 2  # the job goes on, and says so
    line = next(line for line in done.stdout.splitlines() if line.startswith("tau = "))
    assert "κ = γ0²/τ = 1, as no tau gives that --beta-factor: no tau gives beta_factor =" in line


def test_tied_pairs(run, saved, tmp_path):
    done = run("--quick", "--pairs", saved([GOOD] * 20))
    assert len(table(done)) == 2
    assert "as no tau gives that --beta-factor" in done.stdout
    assert (tmp_path / "noisy_preferences.png").exists()


def test_training_that_diverges_ends_at_once(tmp_path, monkeypatch):
    import noisy_preferences
    import torch

    monkeypatch.chdir(tmp_path)
    logps = noisy_preferences.all_response_logps
    broken = lambda *arguments: tuple(each * torch.nan for each in logps(*arguments))  # noqa: E731
    monkeypatch.setattr(noisy_preferences, "all_response_logps", broken)
    with pytest.raises(noisy_preferences.WrongInput, match="DPO diverged by step 2: lower --lr"):
        noisy_preferences.main(["--quick"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pairs", "missing"], "no such file: missing"),
        (["--pairs", "one.jsonl"], "one.jsonl: need at least 10 pairs, got 1"),
        (["--out", "missing/picture.png"], "cannot write in the folder"),
        (["--out", "picture.xyz"], "must end in one of .jpg, .pdf, .png, .svg, got picture.xyz"),
        (["--out", "picture"], "must end in one of .jpg, .pdf, .png, .svg, got picture"),
        (["--out", "folder.png"], "--out is a folder: "),
        (["--out", "/proc/picture.png"], "cannot write in the folder /proc: "),
        (["--flip", "0.7"], "must be from 0 to 0.5, got 0.7"),
        (["--tau", "0"], "must be positive and finite, got 0"),
        (["--tau", "1e-300"], "tau"),
        (["--steps", "x"], "invalid int value: 'x'"),
        (["--steps", "9" * 5000], "argument --steps: "),
        (["--seed", "1" + "0" * 30], "argument --seed: must be from 0 to 4294967295, got 1"),
        (["--lr", "1e6"], "argument --lr: must be from 1e-12 to 1, got 1e6"),
        (["--beta-factor", "2"], "argument --beta-factor: must be from 1e-12 to 0.999, got 2"),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path, run, arguments, complaint):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "one.jsonl").write_text(json.dumps(GOOD))
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("noisy_preferences.py: ")
    assert complaint in line
    assert len(line) < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "one.jsonl"]


def test_a_picture_of_before_stays_until_there_is_another(tmp_path, run):
    (tmp_path / "old.png").write_text("of yesterday")
    assert run("--out", "old.png", "--pairs", "missing.jsonl").returncode == 2
    assert (tmp_path / "old.png").read_text() == "of yesterday"


def test_help(run):
    done = run("--help")
    assert done.returncode == 0
    for option in ("--flip", "--seed", "--steps", "--gamma0", "--tau", "--beta-factor", "--lr",
                   "--out", "--pairs", "--quick"):  # fmt: skip
        assert option in done.stdout

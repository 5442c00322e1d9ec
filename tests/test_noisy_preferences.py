"""The main job runs, repeats itself, and names what is wrong with a file."""

import json
import re
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
tqdm = pytest.importorskip("tqdm").tqdm

import _common  # noqa: E402
import noisy_preferences as program  # noqa: E402

GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the program as a shell would, but in this process, which has imported torch already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["noisy_preferences.py"])

    def run(*arguments, draw=False):
        if not draw:  # which takes as long as the rest
            monkeypatch.setattr(program, "draw", lambda *_: None)
        capsys.readouterr()
        code = 0
        try:
            _common.run(program.main, list(map(str, arguments)))
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


@pytest.fixture
def saved(tmp_path):
    def saved(rows, name="pairs.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        return tmp_path / name

    return saved


def table(done):
    """The rows of the closing table."""
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in ("DPO", "γ-DPO")}


def own_pairs(count=40):
    """Pairs of which each response has another length."""
    return [{**GOOD, "prompt": f"{i} + é =", "rejected": " no" * i} for i in range(1, count + 1)]


def test_a_quick_run_repeats_itself_and_another_seed_is_another_run(tmp_path, run):
    first = run("--quick", "--out", "picture.png", draw=True)
    assert {name: len(row) for name, row in table(first).items()} == {"DPO": 6, "γ-DPO": 6}
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert not first.stderr  # a progress bar is for a terminal
    assert "DPO and γ-DPO align it on 128 pairs, 26 of them with a flipped label." in first.stdout
    chosen, _, found = first.stdout.partition("Findings:")
    assert float(re.search("tau = (.*): on DPO's last gaps", chosen)[1]) > 0
    factor = float(re.search(r"- DPO with (.*) times the beta", found)[1])
    assert factor == pytest.approx(0.7, abs=0.05)  # on gaps of γ-DPO's own run
    assert re.search(r"mean margin is 4\.\d\d \(clean\), 3\.\d\d \(flipped\)", found)
    assert len(re.findall(r"^    \S.* \d\.\d\d$", found, re.MULTILINE)) == 3  # ratios of weights
    short = ("--quick", "--steps", 2, "--tau", 2)
    again, same, other = (table(run(*short, *seed)) for seed in ((), (), ("--seed", 1)))
    assert again == same
    assert again["DPO"] != other["DPO"]


def test_recent_gaps_are_the_context_and_the_bar_shows_what_was_learned(monkeypatch, run):
    bars, calls = [], []

    def bar(*arguments, **options):
        bars.append(tqdm(*arguments, **options))
        return bars[-1]

    def loss(*logps, context, **settings):
        calls.append((context, *program_loss(*logps, context=context, **settings)[1:]))
        return program_loss(*logps, context=context, **settings)

    program_loss = program.gamma_dpo_loss
    monkeypatch.setattr(program, "tqdm", bar)
    monkeypatch.setattr(program, "gamma_dpo_loss", loss)
    monkeypatch.setattr(program, "RECENT_GAPS", 80)  # two batches and a half
    assert run("--quick", "--steps", 4).returncode == 0
    assert len(calls) == 2 * 4  # of DPO and of γ-DPO
    for run_of_one in (calls[:4], calls[4:]):
        assert run_of_one[0][0] is None
        earlier = torch.cat([aux.reward_gaps for _, aux in run_of_one[:3]])
        for seen, size in zip(run_of_one[1:], (32, 64, 96), strict=True):
            assert torch.equal(seen[0], earlier[:size][-80:])
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [10, 4, 4]
    assert all(not bar.postfix.endswith("0.000") for bar in bars[1:])


def test_own_pairs_are_as_labelled_and_flipped_on_demand(tmp_path, run, saved):
    file = saved(own_pairs())
    done = run("--quick", "--tau", 2, "--pairs", file, "--out", "own.svg", draw=True)
    accuracy, low, _, high, weight = table(done)["γ-DPO"]
    assert 0 < float(low) < float(accuracy) <= float(high)
    assert float(weight) > 0
    assert "on 8 held-out pairs" in done.stdout
    for text in (done.stdout, (tmp_path / "own.svg").read_text()):
        assert "as labelled" in text  # nobody knows whether own labels are right
        assert "clean" not in text
    done = run("--quick", "--steps", 2, "--tau", 2, "--pairs", file, "--flip", 0.3)
    assert float(table(done)["γ-DPO"][-1]) > 0  # flipped pairs, as they were asked for
    tied = run("--quick", "--steps", 2, "--pairs", saved([GOOD] * 20))
    assert "as no tau gives that --beta-factor" in tied.stdout


def test_a_flip_swaps_whole_responses_of_any_lengths(saved):
    pairs = program.from_file(saved(own_pairs()))
    lengths = pairs.in_response.sum(2).tolist()
    assert lengths == [[2, 3 * i] for i in range(1, 41)]
    found = program.flip_labels(pairs, 0.3, torch.Generator().manual_seed(0))
    assert found.flipped.sum() == 12
    for before, after in zip(pairs[:2], found[:2], strict=True):
        assert torch.equal(after[found.flipped], before[found.flipped].flip(1))
        assert torch.equal(after[~found.flipped], before[~found.flipped])


def test_accuracies_and_their_interval():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for right, count in ((27, 40), (40, 40), (0, 10), (480, 512)):
        limits = binomtest(right, count).proportion_ci(method="wilson")
        wanted = f"{limits.low:.3f} to {limits.high:.3f}"
        assert program.interval(right / count, count) == wanted
    assert program.accuracy_of(torch.tensor([0.0, 0.0, 1.0, -1.0])) == 0.5


def test_long_texts_are_cut_and_counted(saved, capsys):
    same = {"prompt": "x" * 300, "chosen": "y" * 256 + "a", "rejected": "y" * 256 + "b"}
    assert len(program.from_file(saved([*own_pairs(), same])).flipped) == 40
    printed = capsys.readouterr().out
    assert "the model reads 256 bytes of a text. So 1 prompts lost their start" in printed
    assert "and 1 pairs the end of a response. 1 pairs were dropped" in printed


def test_messages_are_pairs_too(saved):
    said = [
        {key: [{"role": "user", "content": text}] for key, text in row.items()}
        for row in own_pairs()
    ]
    inside = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in said]
    plain, *others = (program.from_file(saved(rows)) for rows in (own_pairs(), said, inside))
    assert all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True))


def test_a_beta_factor_that_no_tau_gives_is_said_and_replaced(capsys):
    gaps = torch.linspace(-2, 4, 50)
    for gamma0, factor in ((4.0, 1e-9), (1e-7, 0.7)):
        assert program.choose_tau(gaps, Namespace(gamma0=gamma0, beta_factor=factor)) == gamma0**2
        assert "κ = γ0²/τ = 1, as no tau gives that --beta-factor" in capsys.readouterr().out


def test_training_that_diverges_ends_at_once(run, monkeypatch):
    logps = program.all_response_logps
    broken = lambda *arguments: tuple(each * torch.nan for each in logps(*arguments))  # noqa: E731
    monkeypatch.setattr(program, "all_response_logps", broken)
    done = run("--quick")
    assert done.returncode == 2
    assert "DPO diverged by step 2: lower --lr" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pairs", "missing"], "no such file: missing"),
        (["--pairs", "one.jsonl"], "one.jsonl: need at least 10 pairs, got 1"),
        (["--out", "missing/picture.png"], "cannot write in the folder"),
        (["--out", "picture"], "must end in one of .jpg, .pdf, .png, .svg, got picture"),
        (["--out", "folder.png"], "--out is a folder: "),
        (["--flip", "0.7"], "must be from 0 to 0.5, got 0.7"),
        (["--tau", "0"], "must be positive and finite, got 0"),
        (["--tau", "1e-300"], "tau"),
        (["--steps", "9" * 5000], "argument --steps: "),
        (["--out", "old.png", "--pairs", "missing.jsonl"], "no such file: missing.jsonl"),
    ],
)
def test_a_wrong_argument_ends_in_one_line_and_changes_no_file(tmp_path, run, arguments, complaint):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").write_text("of yesterday")
    (tmp_path / "one.jsonl").write_text(json.dumps(GOOD))
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("noisy_preferences.py: ")
    assert complaint in line
    assert len(line) < 600
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "old.png", "one.jsonl"}
    assert (tmp_path / "old.png").read_text() == "of yesterday"

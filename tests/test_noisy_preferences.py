"""The main job runs, repeats itself, and names what is wrong with a file."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_lm
from programs import complaint, output, run, write

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import noisy_preferences as program  # noqa: E402

GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
# Pairs of which each response has another length.
OWN = [{**GOOD, "prompt": f"{i} + é =", "rejected": " no" * i} for i in range(1, 41)]
SHORT = ("--quick", "--steps", 2, "--tau", 2)
draw = program.draw


@pytest.fixture(autouse=True)
def _folder_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "draw", lambda *_: None)  # which takes as long as the rest


def table(printed):
    """The rows of the closing table."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in ("DPO", "γ-DPO")}


def test_a_quick_run_repeats_itself_and_another_seed_is_another_run(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(program, "draw", draw)
        done = run(program, "--quick", "--out", "picture.png")
    printed = done.stdout
    assert not done.stderr  # a progress bar is for a terminal
    assert {name: len(row) for name, row in table(printed).items()} == {"DPO": 6, "γ-DPO": 6}
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    assert "DPO and γ-DPO align it on 128 pairs, 26 of them with a flipped label." in printed
    chosen, _, found = printed.partition("Findings:")
    assert float(re.search("tau = (.*): on DPO's last gaps", chosen)[1]) > 0
    factor = float(re.search(r"- DPO with (.*) times the beta", found)[1])
    assert factor == pytest.approx(0.7, abs=0.05)  # on gaps of γ-DPO's own run
    assert re.search(r"mean margin is 4\.\d\d \(clean\), 3\.\d\d \(flipped\)", found)
    again, same, other = (table(output(program, *SHORT, *seed)) for seed in ((), (), ("--seed", 1)))
    assert again == same
    assert again["DPO"] != other["DPO"]


def test_recent_gaps_are_the_context(monkeypatch):
    calls = []

    def loss(*logps, context, original=program.gamma_dpo_loss, **settings):
        loss, aux = original(*logps, context=context, **settings)
        calls.append((context, aux.reward_gaps))
        return loss, aux

    monkeypatch.setattr(program, "gamma_dpo_loss", loss)
    monkeypatch.setattr(program, "RECENT_GAPS", 80)  # two batches and a half
    output(program, "--quick", "--steps", 4)
    assert len(calls) == 2 * 4  # of DPO and of γ-DPO
    for run_of_one in (calls[:4], calls[4:]):
        contexts, gaps = zip(*run_of_one, strict=True)
        assert contexts[0] is None
        for i in (1, 2, 3):
            assert torch.equal(contexts[i], torch.cat(gaps[:i])[-80:])


def test_own_pairs_are_as_labelled_and_flipped_on_demand(monkeypatch):
    command = (*SHORT, "--pairs", write(OWN))
    with monkeypatch.context() as patch:
        patch.setattr(program, "draw", draw)
        printed = output(program, *command, "--out", "own.svg")
    accuracy, low, _, high, weight = table(printed)["γ-DPO"]
    assert 0 < float(low) < float(accuracy) <= float(high)
    assert float(weight) > 0
    assert "on 8 held-out pairs" in printed
    for text in (printed, Path("own.svg").read_text()):
        assert "as labelled" in text  # nobody knows whether own labels are right
        assert "clean" not in text
    flipped = table(output(program, *command, "--flip", 0.3))
    assert float(flipped["γ-DPO"][-1]) > 0  # the mean weight of flipped pairs


def test_a_flip_swaps_whole_responses_of_any_lengths_from_texts_or_messages():
    pairs = program.from_file(Path(write(OWN)))
    lengths = pairs.in_response.sum(2).tolist()
    assert lengths == [[2, 3 * i] for i in range(1, 41)]
    said = program.from_file(Path(write([tiny_lm.messages(row) for row in OWN])))
    assert all(torch.equal(a, b) for a, b in zip(pairs, said, strict=True))
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


def test_long_texts_are_cut_and_counted(capsys):
    same = {"prompt": "x" * 300, "chosen": "y" * 256 + "a", "rejected": "y" * 256 + "b"}
    assert len(program.from_file(Path(write([*OWN, same]))).flipped) == 40
    printed = capsys.readouterr().out
    assert "the model reads 256 bytes of a text. So 1 prompts lost their start" in printed
    assert "and 1 pairs the end of a response. 1 pairs were dropped" in printed


def test_a_beta_factor_that_no_tau_gives_is_said_and_replaced(capsys):
    options = Namespace(gamma0=4.0, beta_factor=1e-9)
    assert program.choose_tau(torch.linspace(-2, 4, 50), options) == 16.0
    assert "κ = γ0²/τ = 1, as no tau gives that --beta-factor" in capsys.readouterr().out


def test_training_that_diverges_ends_at_once(monkeypatch):
    def broken(*arguments, original=program.all_response_logps):
        return tuple(each * torch.nan for each in original(*arguments))

    monkeypatch.setattr(program, "all_response_logps", broken)
    assert "DPO diverged by step 2: lower --lr" in complaint(program, "--quick")


def test_a_wrong_argument_ends_in_one_line_and_changes_no_file():
    Path("folder.png").mkdir()
    Path("old.png").write_text("of yesterday")
    Path("one.jsonl").write_text(json.dumps(GOOD))
    for command, words in [
        ("--pairs one.jsonl", "one.jsonl: need at least 10 pairs, got 1"),
        ("--out missing/picture.png", "cannot write in the folder"),
        ("--out picture", "must end in one of .jpg, .pdf, .png, .svg, got picture"),
        ("--out folder.png", "--out is a folder: "),
        ("--flip 0.7", "must be from 0 to 0.5, got 0.7"),
        ("--tau 1e-300", "tau"),
        ("--out old.png --pairs missing.jsonl", "no such file: missing.jsonl"),
    ]:
        assert words in complaint(program, *command.split())
    assert {path.name for path in Path().iterdir()} == {"folder.png", "old.png", "one.jsonl"}
    assert Path("old.png").read_text() == "of yesterday"

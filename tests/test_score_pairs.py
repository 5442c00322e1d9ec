"""score_dataset.py on a dataset of pairs: by a model, or by scores that the data have."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
from programs import complaint, output, run, write

from gamma_loss import gamma_dpo_loss, gamma_simpo_loss, solve_margins

pytest.importorskip("tqdm")

import _common
import _pairs
import score_dataset as program

PAGE = Path(program.__file__).parents[1] / "scoring.md"
SETTING = ("--gamma0", 0.3, "--tau", 0.1)
NAMES = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
RATED = [
    {**dict(zip(NAMES, (f"{i}?", "é yes", "no", *scores), strict=True)), "source": "x"}
    for i, scores in enumerate(np.random.default_rng(0).normal(1, 2, (40, 2)).round(3).tolist())
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_picture(monkeypatch):
    """The programs draw where matplotlib is installed, which takes as long as the rest."""
    monkeypatch.setattr(_pairs, "draw", lambda *_: None)


def scored(name="out.jsonl"):
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def column(rows, name):
    return np.array([row[name] for row in rows])


def test_given_scores():
    Path("pairs.jsonl").write_text("\n\n".join(map(json.dumps, RATED)))  # on the odd lines
    options = ("--beta", 2, "--gamma0", 1, "--tau", 0.5, "--out", "out.jsonl")
    told = output(program, "pairs.jsonl", *options)
    found = scored()
    assert [{name: row[name] for name in RATED[0]} for row in found] == RATED
    gaps = 2 * (column(RATED, "chosen_score") - column(RATED, "rejected_score"))
    margins = solve_margins(gaps, gamma0=1.0, tau=0.5).margins
    np.testing.assert_allclose(column(found, "gap"), gaps, rtol=1e-14)
    np.testing.assert_allclose(column(found, "target_margin"), margins, rtol=1e-12)
    expected = 1 / (1 + np.exp(gaps - margins))
    np.testing.assert_allclose(column(found, "pair_weight"), expected, rtol=1e-12)
    order = np.argsort(gaps)
    assert column(found, "rank")[order].tolist() == list(range(1, 41))
    assert column(found, "line").tolist() == list(range(1, 80, 2))
    lines = re.findall(r"^ *\d+ +(\d+) +-?\d", told, re.MULTILINE)
    assert [*map(int, lines)] == (2 * order[:10] + 1).tolist()
    for words in (f"{(gaps < 0).sum()} gaps are negative", "differences of the scores in the data",
                  "(Proposition 2)", "with gamma0 = 1, tau = 0.5",
                  f"Wrote {Path('out.jsonl').resolve()}"):  # fmt: skip
        assert words in told
    assert set(os.listdir()) <= {"pairs.jsonl", "out.jsonl", "out.png"}


@pytest.mark.usefixtures("no_picture")
def test_settings_are_chosen_and_said():
    told = output(program, write(RATED), "--out", "out.jsonl")
    gaps, margins = column(scored(), "gap"), column(scored(), "target_margin")
    gamma0 = max(np.median(gaps), 0) or gaps.std()
    assert f"with gamma0 = {gamma0:.3g}, tau = " in told
    assert margins.mean() == pytest.approx(gamma0)
    assert margins.std() == pytest.approx(gaps.std() / 4, rel=1e-3)
    table = told.partition("Settings for these gaps")[2]
    assert len([line for line in table.splitlines() if " to " in line and "left" in line]) == 3
    output(program, "pairs.jsonl", "--tau", 3, "--out", "out.jsonl")
    assert column(scored(), "target_margin").mean() == pytest.approx(gamma0)
    equal = [row | {"chosen_score": 1e-9 * i, "rejected_score": 50} for i, row in enumerate(RATED)]
    told = output(program, write(equal), "--gamma0", 2, "--out", "out.jsonl")
    assert "no tau gives margin_std" in told


@pytest.mark.usefixtures("no_picture")
def test_a_folder_of_splits_and_a_table_as_input_and_output(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list(RATED)
    data.to_csv("pairs.csv")
    datasets.DatasetDict(train=data, test=data.select(range(3))).save_to_disk("splits")
    output(program, write(RATED), "--out", "out.jsonl")
    output(program, "splits", "--out", "split.jsonl")
    assert scored("split.jsonl") == scored()
    output(program, "pairs.csv", "--out", "out.parquet")
    table = datasets.Dataset.from_parquet("out.parquet", cache_dir="cache")
    assert [dict(row) for row in table] == scored()
    assert "out.parquet.part" not in os.listdir()
    datasets.DatasetDict(a=data, b=data).save_to_disk("others")
    found = complaint(program, "others", "--out", "x.jsonl")
    assert found == "others: needs a split 'train', has a, b"


# --- by a model ---

PAIRS = tiny_lm.pairs(30)
LONG = ("--max-length", 64, "--out", "out.jsonl", *SETTING)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model after training and before, with one tokenizer."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("models")
    first = tiny_lm.build(folder / "sft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm.build(folder / "dpo"))
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * torch.randn_like(each))
    model.save_pretrained(folder / "dpo")
    return str(folder / "dpo"), first


def direct(name, row, side):
    """The log-probability of each token of a response, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(name) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    return tiny_lm.response_logps(model, tokenizer, row["prompt"], row[side] + "<eos>")


def test_log_probabilities_of_gamma_dpo(models):
    told = output(program, write(PAIRS), "--model", models[0], "--reference", models[1], *LONG,
                  "--batch-size", 5)  # fmt: skip
    assert "0 of 30 pairs were cut to 64 tokens." in told
    assert "how far training has moved the policy" in told
    found, logps = scored(), []
    for who, model in zip(("policy", "reference"), models, strict=True):
        for side in ("chosen", "rejected"):
            logps.append(column(found, f"{who}_{side}_logps"))
            some = [direct(model, PAIRS[i], side).sum().item() for i in (0, 7, 29)]
            assert logps[-1][[0, 7, 29]] == pytest.approx(some, rel=1e-5)
    _, aux = gamma_dpo_loss(*logps, beta=0.1, gamma0=0.3, tau=0.1)
    for name, values in (("gap", aux.reward_gaps), ("target_margin", aux.margins),
                         ("pair_weight", aux.pair_weights)):  # fmt: skip
        np.testing.assert_allclose(column(found, name), values, rtol=1e-9)
    # The output is an input of numbers, with other settings.
    output(program, "out.jsonl", "--beta", 0.1, *SETTING, "--centered", "--out", "again.npy")
    np.testing.assert_allclose(np.load("again.npy")["margin"], aux.margins, rtol=1e-6)


@pytest.mark.usefixtures("no_picture")
def test_log_probabilities_of_gamma_simpo(models):
    told = output(program, write(PAIRS), "--model", models[0], *LONG)
    assert "likelier by token" in told
    found = scored()
    logps = [column(found, f"policy_{side}_logps") for side in ("chosen", "rejected")]
    expected = direct(models[0], PAIRS[3], "chosen").mean().item()
    assert logps[0][3] == pytest.approx(expected, rel=1e-5)
    _, aux = gamma_simpo_loss(*logps, beta=2.5, gamma0=0.3, tau=0.1)
    np.testing.assert_allclose(column(found, "pair_weight"), aux.pair_weights, rtol=1e-9)
    assert "reference_chosen_logps" not in found[0]


@pytest.mark.usefixtures("no_picture")
def test_messages_go_through_the_chat_template(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write([tiny_lm.messages(row) for row in PAIRS])
    found = complaint(program, "pairs.jsonl", "--model", models[0], *LONG)
    assert "has no chat template, which messages need" in found
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained("chat")
    AutoModelForCausalLM.from_pretrained(models[0]).save_pretrained("chat")
    gaps = []
    for name in ("pairs.jsonl", write(PAIRS, "texts.jsonl")):  # the template makes the same texts
        output(program, name, "--model", "chat", *LONG)
        gaps.append(column(scored(), "gap"))
    np.testing.assert_allclose(*gaps, rtol=1e-6)


@pytest.mark.usefixtures("no_picture")
def test_long_texts_are_cut_and_counted(models):
    from transformers import AutoTokenizer

    long = {"prompt": "gap " * 40, "chosen": " pair" * 2, "rejected": " noise" * 40}
    options = ("--model", models[0], *SETTING, "--out", "out.jsonl", "--max-length", 32)
    told = output(program, write([*PAIRS, long]), *options)
    assert "1 of 31 pairs were cut to 32 tokens." in told
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    whole, start, is_cut = _pairs.encode(tokenizer, long, 10_000)
    assert not is_cut
    texts, kept, is_cut = _pairs.encode(tokenizer, long, 32)
    assert (kept, is_cut) == (16, True)
    assert texts[0][:kept] == texts[1][:kept] == whole[0][start - 16 : start]
    assert texts[0][kept:] == whole[0][start:]  # short enough
    assert texts[1][kept:] == whole[1][start : start + 16]
    row = {"prompt": "", "chosen": "gap", "rejected": "pair"}
    empty, start, _ = _pairs.encode(tokenizer, row, 32)
    assert (start, empty[0][0]) == (1, tokenizer.eos_token_id)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("done_before", [1, 4])  # the policy's blocks are three
def test_an_interrupted_run_goes_on(models, monkeypatch, done_before):
    monkeypatch.setattr(_pairs, "BLOCK", 10)
    command = (write(PAIRS), "--model", models[0], "--reference", models[1], *LONG)
    output(program, *command)
    whole = Path("out.jsonl").read_bytes()
    os.remove("out.jsonl")
    score, left = _pairs.score, [None] * done_before

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return score(*arguments)

    monkeypatch.setattr(_pairs, "score", interrupted)
    done = run(program, *command)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "score_dataset.py: interrupted"
    assert "out.jsonl" not in os.listdir()
    with Path("out.jsonl.progress").open("a") as file:
        file.write('{"cut": 0, "sco')  # of a run that was killed
    other = complaint(program, *command, "--max-length", 32)
    assert "out.jsonl.progress is of a run with other data, models or" in other
    left += [None] * (6 - done_before)
    output(program, *command)
    assert not left  # each block was scored once
    assert Path("out.jsonl").read_bytes() == whole
    assert "out.jsonl.progress" not in os.listdir()


def test_ctrl_c_leaves_no_half_of_an_output(monkeypatch):
    write(RATED)
    dumps, calls = json.dumps, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 60:  # 40 rows were checked, and 20 written
            raise KeyboardInterrupt
        return dumps(*arguments, **options)

    monkeypatch.setattr(_pairs.json, "dumps", interrupted)
    assert run(program, "pairs.jsonl", "--out", "out.jsonl").returncode == 130
    assert os.listdir() == ["pairs.jsonl"]


# --- what is refused ---


def test_wrong_data():
    for rows, words in [  # what makes a row no pair is tested in test_examples.py
        ([RATED[0], {**RATED[0], "chosen_score": None}],
         "pairs.jsonl:2: 'chosen_score' must be a finite"),
        ([RATED[0], {**RATED[0], "rejected_score": "1"}],
         "pairs.jsonl:2: 'rejected_score' must be a fin"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "on all rows, or --model"),
        ([RATED[0], {**RATED[0], "chosen": "no"}], "pairs.jsonl:2: chosen and rejected are the"),
        (RATED[:1], "pairs.jsonl: all gaps are "),
        ([], "pairs.jsonl: holds no pairs"),
    ]:  # fmt: skip
        assert words in complaint(program, write(rows), "--out", "out.jsonl")
        assert os.listdir() == ["pairs.jsonl"]


def test_wrong_arguments(monkeypatch):
    write(RATED)
    np.save("gaps.npy", np.arange(3.0))
    pairs, gaps, numbers = "pairs.jsonl", "gaps.npy", ("--gamma0", "1", "--tau", "1")
    for arguments, words in [
        (["missing.jsonl"], "no such file: missing.jsonl"),
        (["./missing"], "no such file or folder, or no permission to read it: ./missing"),
        ([pairs, "--reference", "a"], "--reference needs --model"),
        ([pairs, "--reference", "a", "--model", "a"], "are the same: every gap would be 0"),
        ([pairs, "--batch-size", "0"], "argument --batch-size: must be from 1 to"),
        ([pairs, "--tau", "-1"], "argument --tau: must be positive and finite, got -1"),
        ([pairs, "--out", "x.npy"], "--out must end in one of .jsonl, .parquet, got x.npy"),
        ([pairs, "--out", pairs], "--out must not be INPUT"),
        ([gaps, "--out", "x.npy"], "--gamma0 is needed for gaps.npy"),
        ([gaps, *numbers, "--model", "a"], "--model and --reference are"),
    ]:
        arguments += [] if "--out" in arguments else ["--out", "out.jsonl"]
        assert words in complaint(program, *arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of torchrun
    assert "pairs are scored by one process" in complaint(program, pairs, "--out", "out.jsonl")
    assert set(os.listdir()) == {pairs, gaps}


def test_wrong_models(models):
    from transformers import AutoTokenizer

    options = (write(PAIRS), "--out", "out.jsonl", "--model")
    found = complaint(program, *options, models[0])
    assert found == f"--max-length must be at most 64 for {models[0]}"
    assert "./no: cannot be loaded as a model: " in complaint(program, *options, "./no")
    other = AutoTokenizer.from_pretrained(models[0])
    other.add_tokens(["new"])
    other.save_pretrained("other")
    Path("other/config.json").write_bytes(Path(models[1], "config.json").read_bytes())
    options += (models[0], "--max-length", 64)
    found = complaint(program, *options, "--reference", "other")
    assert found.startswith("other: its tokenizer has other tokens than that of ")
    found = complaint(program, *options, "--model", "other")
    assert "other: cannot be loaded as a language model: " in found


# --- the page ---


def test_the_commands_and_blocks_of_the_page():
    text = PAGE.read_text("utf-8")
    for kind, code in re.findall(r"^```(python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(compile(code, "scoring.md", "exec"), {})
        elif "--model" not in code and "score_dataset.py" in code:
            printed = output(program, *code.split()[2:])
            (shown,) = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            shown, printed = (re.sub("bound .*", "", each) for each in (shown, printed))
            assert printed.startswith(shown)
    names = ("pairs", "scored", "clean", "weighted", "margins", "half_a", "half_b")
    rows = {name: scored(f"{name}.jsonl") for name in names}
    wrong = {row["prompt"] + row["chosen"] for row in rows["pairs"][::6]}
    least = sorted(rows["scored"], key=lambda row: row["rank"])[:30]
    assert sum(row["prompt"] + row["chosen"] in wrong for row in least) >= 25
    assert [row["rank"] > 30 for row in rows["scored"]].count(True) == len(rows["clean"]) == 270
    assert set(rows["clean"][0]) == {"prompt", "chosen", "rejected"}
    assert sorted({row["weight"] for row in rows["weighted"]}) == [0.0, 0.5, 1.0]
    assert min(row["margin"] for row in rows["margins"]) == 0
    assert rows["half_a"][1] == rows["pairs"][2]
    assert rows["half_b"][1] == rows["pairs"][3]
    for name in ("clean", "weighted", "margins"):
        assert len(list(_common.reader(f"{name}.jsonl")())) == len(rows[name])


def test_the_page_has_the_options_of_the_program_and_the_measured_numbers():
    text, code = PAGE.read_text("utf-8"), Path(program.__file__).read_text("utf-8")
    for option in re.findall(r"`(--[a-z0-9-]+)`", text):
        assert f'"{option}"' in code or option == "--bf16"
    results = PAGE.parents[1] / "benchmarks/results/suspects_cpu.json"
    measured = json.loads(results.read_text("utf-8"))
    rows = re.findall(
        r"^\| .* \| (0\.\d+) \((0\.\d+) to (0\.\d+)\) \| (\d+) \|$", text, re.MULTILINE
    )
    names = ("dpo_unseen", "dpo_seen", "reward_unseen", "untrained")
    for of, row in zip((measured[name] for name in names), rows, strict=True):
        areas = (f"{x + 1e-9:.3f}" for x in (of["auc"], *of["interval"]))
        assert row == (*areas, str(of["wrong_in_100"]))
    wrong, pairs = measured["wrong"], measured["pairs"]
    for words in [
        f"{wrong} of {pairs}",
        f"gave {pairs - measured['dpo_seen']['negative']} of them a positive",
        f"{measured['steps']} steps of {measured['batch']} pairs",
        f"{100 * wrong / pairs:.0f} of 100 is what guessing",
    ]:
        assert words in text

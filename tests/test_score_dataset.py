"""score_dataset.py: by a model, by scores that the data have, or by log-probabilities."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_lm
from programs import complaint, output, run, write

from gamma_loss import gamma_dpo_loss, gamma_simpo_loss, solve_margins

pytest.importorskip("tqdm")

import _common
import score_dataset as program

PAGE = Path(program.__file__).parents[1] / "scoring.md"
DRAW, SETTING = program.draw, ("--gamma0", 0.3, "--tau", 0.1)
NAMES = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
RATED = [
    {**dict(zip(NAMES, (f"{i}?", "é yes", "no", *scores), strict=True)), "source": "x"}
    for i, scores in enumerate(np.random.default_rng(0).normal(1, 2, (40, 2)).round(3).tolist())
]
PAIRS = tiny_lm.pairs(30)
LONG = ("--max-length", 64, "--out", "out.jsonl", *SETTING)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "draw", lambda *_: None)  # it takes as long as the rest


def scored(name="out.jsonl"):
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def column(rows, name):
    return np.array([row[name] for row in rows])


def test_given_scores(monkeypatch):
    monkeypatch.setattr(program, "draw", DRAW)
    Path("pairs.jsonl").write_text("\n\n".join(map(json.dumps, RATED)))  # on the odd lines
    options = ("--beta", 2, "--gamma0", 1, "--tau", 0.5, "--out", "out.jsonl")
    told = output(program, "pairs.jsonl", *options)
    found = scored()
    assert [{name: row[name] for name in RATED[0]} for row in found] == RATED
    gaps = 2 * (column(RATED, "chosen_score") - column(RATED, "rejected_score"))
    margins = solve_margins(gaps, gamma0=1.0, tau=0.5).margins
    weights, order = 1 / (1 + np.exp(gaps - margins)), np.argsort(gaps)
    for name, expected in ("gap", gaps), ("target_margin", margins), ("pair_weight", weights):
        np.testing.assert_allclose(column(found, name), expected, rtol=1e-12)
    assert column(found, "rank")[order].tolist() == list(range(1, 41))
    assert column(found, "line").tolist() == list(range(1, 80, 2))
    lines = re.findall(r"^ *\d+ +(\d+) +-?\d", told, re.MULTILINE)
    assert [*map(int, lines)] == (2 * order[:10] + 1).tolist()
    assert f"{(gaps < 0).sum()} gaps are negative" in told
    assert "differences of the scores in the data" in told
    pictures = ["out.png"] * bool(importlib.util.find_spec("matplotlib"))
    assert sorted(os.listdir()) == ["out.jsonl", *pictures, "pairs.jsonl"]


@pytest.mark.parametrize(("loss", "beta"), [(gamma_dpo_loss, 0.1), (gamma_simpo_loss, 2.5)])
def test_given_log_probabilities_are_scored_as_by_the_loss(loss, beta):
    names = program.BOTH if loss is gamma_dpo_loss else program.POLICY
    logps = np.random.default_rng(0).normal(-20, 3, (len(names), 40))
    rows = [row | dict(zip(names, values.tolist(), strict=True))
            for row, values in zip(RATED, logps.T, strict=True)]  # fmt: skip
    for given, used in ([], beta), (["--beta", 0.5], 0.5):
        output(program, write(rows), *given, *SETTING, "--out", "out.jsonl")
        _, aux = loss(*logps, beta=used, gamma0=0.3, tau=0.1)
        for name, values in (("gap", aux.reward_gaps), ("target_margin", aux.margins),
                             ("pair_weight", aux.pair_weights)):  # fmt: skip
            np.testing.assert_allclose(column(scored(), name), values, rtol=1e-9)


def test_settings_are_chosen_and_said():
    told = output(program, write(RATED), "--out", "out.jsonl")
    gaps, margins = column(scored(), "gap"), column(scored(), "target_margin")
    gamma0 = max(np.median(gaps), 0) or gaps.std()
    assert f"with gamma0 = {gamma0:.3g}, tau = " in told
    assert margins.mean() == pytest.approx(gamma0)
    assert margins.std() == pytest.approx(gaps.std() / 4, rel=1e-3)
    output(program, "pairs.jsonl", "--tau", 3, "--out", "out.jsonl")
    assert column(scored(), "target_margin").mean() == pytest.approx(gamma0)
    equal = [row | {"chosen_score": 1e-9 * i, "rejected_score": 50} for i, row in enumerate(RATED)]
    told = output(program, write(equal), "--gamma0", 2, "--out", "out.jsonl")
    assert "no tau gives margin_std" in told


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
    datasets.DatasetDict(a=data, b=data).save_to_disk("others")
    found = complaint(program, "others", "--out", "x.jsonl")
    assert found == "others: needs a split 'train', has a, b"


# --- by a model ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and its reference, with one tokenizer."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    return tiny_lm.build(folder / "dpo", initializer_range=0.4), tiny_lm.build(folder / "sft")


def direct(name, row, side):
    """The log-probability of each token of a response, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    return tiny_lm.response_logps(model, tokenizer, row["prompt"], row[side] + "<eos>")


def test_log_probabilities_of_policy_and_reference(models):
    told = output(program, write(PAIRS), "--model", models[0], "--reference", models[1], *LONG,
                  "--batch-size", 5)  # fmt: skip
    assert "0 of 30 pairs were cut to 64 tokens." in told
    assert "how far training has moved the policy" in told
    for who, model in zip(("policy", "reference"), models, strict=True):
        for side in ("chosen", "rejected"):
            logps = column(scored(), f"{who}_{side}_logps")
            some = [direct(model, PAIRS[i], side).sum().item() for i in (0, 7, 29)]
            assert logps[[0, 7, 29]] == pytest.approx(some, rel=1e-5)
    again = output(program, "out.jsonl", *SETTING, "--out", "again.jsonl")  # without a model
    assert again.splitlines()[:-1] == told.splitlines()[1:-1]
    assert Path("again.jsonl").read_bytes() == Path("out.jsonl").read_bytes()


def test_averaged_log_probabilities_of_a_model_alone(models):
    earlier = [row | dict.fromkeys(program.BOTH, 0.0) for row in PAIRS]
    assert "likelier by token" in output(program, write(earlier), "--model", models[0], *LONG)
    expected = direct(models[0], PAIRS[3], "chosen").mean().item()
    assert scored()[3]["policy_chosen_logps"] == pytest.approx(expected, rel=1e-5)
    assert "reference_chosen_logps" not in scored()[0]


def test_messages_go_through_the_chat_template(models):
    write([tiny_lm.messages(row) for row in PAIRS])
    found = complaint(program, "pairs.jsonl", "--model", models[0], *LONG)
    assert "has no chat template, which messages need" in found
    tokenizer = program.load_tokenizer(tiny_lm.build("chat"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained("chat")
    gaps = []
    for name in ("pairs.jsonl", write(PAIRS, "texts.jsonl")):  # the template makes the same texts
        output(program, name, "--model", "chat", *LONG)
        gaps.append(column(scored(), "gap"))
    np.testing.assert_allclose(*gaps, rtol=1e-6)


def test_long_texts_are_cut_and_counted(models):
    long = {"prompt": "gap " * 40, "chosen": " pair" * 2, "rejected": " noise" * 40}
    told = output(program, write([*PAIRS, long]), "--model", models[0], *LONG, "--max-length", 32)
    assert "1 of 31 pairs were cut to 32 tokens." in told
    tokenizer = program.load_tokenizer(models[0])
    whole, start, is_cut = program.encode(tokenizer, long, 10_000)
    assert not is_cut
    texts, kept, is_cut = program.encode(tokenizer, long, 32)
    assert (kept, is_cut) == (16, True)
    assert texts[0] == whole[0][start - 16 :]  # short enough
    assert texts[1] == whole[1][start - 16 : start + 16]
    row = {"prompt": "", "chosen": "gap", "rejected": "pair"}
    empty, start, _ = program.encode(tokenizer, row, 32)
    assert (start, empty[0][0]) == (1, tokenizer.eos_token_id)


def test_an_interrupted_run_goes_on(models, monkeypatch):
    monkeypatch.setattr(program, "BLOCK", 10)
    command = (write(PAIRS), "--model", models[0], "--reference", models[1], *LONG)
    with mock.patch.object(program, "write_rows", side_effect=KeyboardInterrupt):
        assert run(program, *command).returncode == 130
    progress, outputs = Path("out.jsonl.progress"), set()
    head, *blocks = progress.read_text().splitlines(keepends=True)
    other = complaint(program, *command, "--max-length", 32)
    assert "out.jsonl.progress is of a run with other data, models or" in other
    for done in (0, 1, 4):  # of three blocks of the policy and three of the reference
        progress.write_text("".join([head, *blocks[:done], blocks[done][:9]]))  # it was killed
        with mock.patch.object(program, "score", wraps=program.score) as score:
            output(program, *command)
        assert score.call_count == 6 - done
        outputs.add(Path("out.jsonl").read_bytes())
        assert not progress.exists()
    assert len(outputs) == 1


def test_an_interrupt_leaves_the_output_of_before(monkeypatch):
    write(RATED)
    Path("out.jsonl").write_text("of yesterday")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    assert run(program, "pairs.jsonl", "--out", "out.jsonl").returncode == 130
    assert Path("out.jsonl").read_text() == "of yesterday"
    assert sorted(os.listdir()) == ["out.jsonl", "pairs.jsonl"]


# --- what is refused ---


def test_wrong_data():
    logps = dict.fromkeys(program.POLICY, -1.0)
    for first, last, words in [  # what makes a row no pair is tested in test_examples.py
        (RATED[0], RATED[0] | {"rejected_score": "1"}, ":2: 'rejected_score' must be a finite num"),
        (RATED[0], PAIRS[0], "give chosen_score, rejected_score on all rows, or --model"),
        (RATED[0], RATED[0] | {"chosen": "no"}, ":2: chosen and rejected are the same"),
        (RATED[0], RATED[0], ": all gaps are "),
        (PAIRS[0] | logps, PAIRS[0] | {program.POLICY[0]: 1}, ":2: 'policy_rejected_logps' must"),
        (PAIRS[0] | logps, PAIRS[0] | dict.fromkeys(program.BOTH, -1.0), "are not comparable"),
        (RATED[0], RATED[0] | {"chosen_score": 1e308, "rejected_score": -7e307}, "gap of line 2 "),
    ]:
        found = complaint(program, write([first, last]), "--beta", 2, "--out", "out.jsonl")
        assert found.startswith("pairs.jsonl")
        assert words in found
        assert os.listdir() == ["pairs.jsonl"]


def test_wrong_arguments(monkeypatch):
    pairs = write(RATED)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    for arguments, words in [
        (["missing.jsonl"], "no such file or folder, or no permission to read it: missing.jsonl"),
        ([pairs, "--reference", "a"], "--reference needs --model"),
        ([pairs, "--reference", "a", "--model", "a"], "are the same: every gap would be 0"),
        ([pairs, "--batch-size", "0"], "argument --batch-size: must be from 1 to"),
        ([pairs, "--tau", "-1"], "argument --tau: must be positive and finite, got -1"),
        ([pairs, "--out", "x.npy"], "--out must end in one of .jsonl, .parquet, got x.npy"),
        ([pairs, "--out", "x.parquet"], "a .parquet output needs pyarrow: pip install pyarrow"),
        ([pairs, "--out", pairs], "--out must not be INPUT"),
    ]:
        assert words in complaint(program, "--out", "out.jsonl", *arguments)
    assert os.listdir() == [pairs]


def test_wrong_models(models):
    options = (write(PAIRS), "--out", "out.jsonl", "--model")
    found = complaint(program, *options, models[0])
    assert found == f"--max-length must be at most 64 for {models[0]}"
    assert "./no: cannot be loaded as a model: " in complaint(program, *options, "./no")
    tokenizer = program.load_tokenizer(tiny_lm.build("other"))
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained("other")
    os.remove("other/model.safetensors")
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
    assert {row["weight"] for row in rows["weighted"]} == {0.0, 0.5, 1.0}
    assert min(row["margin"] for row in rows["margins"]) == 0
    assert (rows["half_a"], rows["half_b"]) == (rows["pairs"][::2], rows["pairs"][1::2])
    for name in ("clean", "weighted", "margins"):
        assert len(list(_common.reader(f"{name}.jsonl")())) == len(rows[name])


def test_the_table_of_the_page_has_the_measured_numbers():
    text = PAGE.read_text("utf-8")
    results = PAGE.parents[1] / "benchmarks/results/suspects_cpu.json"
    measured = json.loads(results.read_text("utf-8"))
    rows = re.findall(
        r"^\| .* \| (0\.\d+) \((0\.\d+) to (0\.\d+)\) \| (\d+) \|$", text, re.MULTILINE
    )
    names = ("dpo_unseen", "dpo_seen", "reward_unseen", "untrained")
    for of, row in zip((measured[name] for name in names), rows, strict=True):
        areas = (f"{x + 1e-9:.3f}" for x in (of["auc"], *of["interval"]))
        assert row == (*areas, str(of["wrong_in_100"]))

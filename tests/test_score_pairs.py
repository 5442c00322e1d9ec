"""score_dataset.py on a dataset of pairs: by a model, or by scores that the data have."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gamma_loss import gamma_dpo_loss, gamma_simpo_loss, solve_margins

pytest.importorskip("tqdm")
FOLDER = Path(__file__).parents[1] / "docs" / "examples"
PROGRAM = FOLDER / "score_dataset.py"
SETTING = ("--gamma0", 0.3, "--tau", 0.1)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the program as a shell would, but in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


def complaint(done):
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].partition("score_dataset.py: ")[2]


def rated(count=40):
    scores = np.random.default_rng(0).normal(1, 2, (count, 2)).round(3)
    return [
        {"prompt": f"{i}?", "chosen": "é yes", "rejected": "no",
         "chosen_score": float(a), "rejected_score": float(b), "source": "x"}
        for i, (a, b) in enumerate(scores)
    ]  # fmt: skip


def save(rows, name="pairs.jsonl"):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return name


def scored(name="out.jsonl"):
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def column(rows, name):
    return np.array([row[name] for row in rows])


def test_given_scores(run):
    rows = rated()
    Path("pairs.jsonl").write_text("\n\n".join(map(json.dumps, rows)))  # on the odd lines
    done = run("pairs.jsonl", "--beta", 2, "--gamma0", 1, "--tau", 0.5, "--out", "out.jsonl")
    assert done.returncode == 0, done.stderr
    found = scored()
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    gaps = 2 * (column(rows, "chosen_score") - column(rows, "rejected_score"))
    margins = solve_margins(gaps, gamma0=1.0, tau=0.5).margins
    np.testing.assert_allclose(column(found, "gap"), gaps, rtol=1e-14)
    np.testing.assert_allclose(column(found, "target_margin"), margins, rtol=1e-12)
    expected = 1 / (1 + np.exp(gaps - margins))
    np.testing.assert_allclose(column(found, "pair_weight"), expected, rtol=1e-12)
    order = np.argsort(gaps)
    assert column(found, "rank")[order].tolist() == list(range(1, 41))
    assert column(found, "line").tolist() == list(range(1, 80, 2))
    told = re.findall(r"^ *\d+ +(\d+) +-?\d", done.stdout, re.MULTILINE)
    assert [*map(int, told)] == (2 * order[:10] + 1).tolist()
    assert f"{(gaps < 0).sum()} gaps are negative" in done.stdout
    assert "differences of the scores in the data" in done.stdout
    assert "(Proposition 2)" in done.stdout
    assert "with gamma0 = 1, tau = 0.5" in done.stdout
    assert f"Wrote {Path('out.jsonl').resolve()}" in done.stdout
    assert set(os.listdir()) <= {"pairs.jsonl", "out.jsonl", "out.png"}


def test_settings_are_chosen_and_said(run):
    save(rated())
    done = run("pairs.jsonl", "--out", "out.jsonl")
    gaps = column(scored(), "gap")
    assert done.returncode == 0
    gamma0 = max(np.median(gaps), 0) or gaps.std()
    assert f"with gamma0 = {gamma0:.3g}, tau = " in done.stdout
    margins = column(scored(), "target_margin")
    assert margins.mean() == pytest.approx(gamma0)
    assert margins.std() == pytest.approx(gaps.std() / 4, rel=1e-3)
    table = done.stdout.partition("Settings for these gaps")[2]
    assert len([line for line in table.splitlines() if " to " in line and "left" in line]) == 3
    assert run("pairs.jsonl", "--tau", 3, "--out", "out.jsonl").returncode == 0
    equal = [
        {**row, "chosen_score": 1e-9 * i, "rejected_score": 50} for i, row in enumerate(rated())
    ]
    save(equal)
    done = run("pairs.jsonl", "--gamma0", 2, "--out", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "no tau gives margin_std" in done.stdout


def test_other_formats_and_a_folder(run, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list(rated())
    data.to_csv("pairs.csv")
    data.to_parquet("pairs.parquet")
    datasets.DatasetDict(train=data, test=data.select(range(3))).save_to_disk("splits")
    save(rated())
    assert run("pairs.jsonl", "--out", "out.jsonl").returncode == 0
    expected = scored()
    for number, name in enumerate(("pairs.csv", "pairs.parquet", "splits")):
        done = run(name, "--out", f"out{number}.jsonl")
        assert done.returncode == 0, done.stderr
        assert [row | {"line": 0} for row in scored(f"out{number}.jsonl")] == [
            row | {"line": 0} for row in expected
        ]
        assert column(scored(f"out{number}.jsonl"), "line").tolist() == list(range(1, 41))
    assert run("pairs.csv", "--out", "out.parquet").returncode == 0
    table = datasets.Dataset.from_parquet("out.parquet", cache_dir="cache")
    assert table["gap"][:] == column(expected, "gap").tolist()
    assert "out.parquet.part" not in os.listdir()
    datasets.DatasetDict(a=data, b=data).save_to_disk("others")
    assert complaint(run("others", "--out", "x.jsonl")) == "others: needs a split 'train', has a, b"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with one tokenizer."""
    pytest.importorskip("transformers")
    import tiny_lm
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    first = tiny_lm.build(folder / "sft")
    model = AutoModelForCausalLM.from_pretrained(first)
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * torch.randn_like(each))
    model.save_pretrained(folder / "dpo")
    AutoTokenizer.from_pretrained(first).save_pretrained(folder / "dpo")
    return str(folder / "dpo"), first


def pairs(count=30):
    import tiny_lm

    return tiny_lm.pairs(count)


def direct(model, row, name):
    """The log-probability of a response with its end, and its tokens, one text at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    start = tokenizer(row["prompt"])["input_ids"]
    ids = torch.tensor([tokenizer(row["prompt"] + row[name] + "<eos>")["input_ids"]])
    assert ids[0, : len(start)].tolist() == start
    with torch.no_grad():
        logps = AutoModelForCausalLM.from_pretrained(model)(ids).logits.double().log_softmax(-1)
    logps = logps[0, :-1].gather(1, ids[0, 1:, None])[len(start) - 1 :]
    return logps.sum().item(), len(logps)


def test_log_probabilities_of_gamma_dpo(run, models):
    rows = pairs()
    save(rows)
    model, reference = models
    options = ("--model", model, "--reference", reference, "--batch-size", 5, *SETTING)
    done = run("pairs.jsonl", *options, "--max-length", 64, "--out", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "0 of 30 pairs were cut to 64 tokens." in done.stdout
    assert "how far training has moved the policy" in done.stdout
    found = scored()
    names = [f"{who}_{side}_logps" for who in ("policy", "reference")
             for side in ("chosen", "rejected")]  # fmt: skip
    logps = [column(found, name) for name in names]
    for i in (0, 7, 29):
        for values, which in zip(logps, (model, model, reference, reference), strict=True):
            side = "chosen" if values is logps[0] or values is logps[2] else "rejected"
            assert values[i] == pytest.approx(direct(which, rows[i], side)[0], rel=1e-5)
    _, aux = gamma_dpo_loss(*logps, beta=0.1, gamma0=0.3, tau=0.1)
    for name, field in (("gap", "reward_gaps"), ("target_margin", "margins"),
                        ("pair_weight", "pair_weights")):  # fmt: skip
        np.testing.assert_allclose(column(found, name), getattr(aux, field), rtol=1e-9)
    # The output is an input of numbers, with other settings.
    done = run("out.jsonl", "--beta", 0.1, *SETTING, "--centered", "--out", "again.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load("again.npy")["margin"], aux.margins, rtol=1e-6)


def test_log_probabilities_of_gamma_simpo(run, models):
    rows = pairs()
    save(rows)
    done = run(
        "pairs.jsonl", "--model", models[0], *SETTING, "--max-length", 64, "--out", "out.jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert "likelier by token" in done.stdout
    found = scored()
    logps = [column(found, f"policy_{side}_logps") for side in ("chosen", "rejected")]
    total, tokens = direct(models[0], rows[3], "chosen")
    assert logps[0][3] == pytest.approx(total / tokens, rel=1e-5)
    _, aux = gamma_simpo_loss(*logps, beta=2.5, gamma0=0.3, tau=0.1)
    np.testing.assert_allclose(column(found, "pair_weight"), aux.pair_weights, rtol=1e-9)
    assert "reference_chosen_logps" not in found[0]


def test_messages_go_through_the_chat_template(run, models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = pairs()
    said = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
         for name, text in row.items()} for row in rows
    ]  # fmt: skip
    save(said)
    options = ("--max-length", 64, *SETTING, "--out", "out.jsonl")
    assert "has no chat template, which messages need" in complaint(
        run("pairs.jsonl", "--model", models[0], *options)
    )
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained("chat")
    AutoModelForCausalLM.from_pretrained(models[0]).save_pretrained("chat")
    done = run("pairs.jsonl", "--model", "chat", *options)
    assert done.returncode == 0, done.stderr
    gaps = column(scored(), "gap")
    save(rows)  # of which this template makes the same texts
    assert run("pairs.jsonl", "--model", "chat", *options).returncode == 0
    np.testing.assert_allclose(column(scored(), "gap"), gaps, rtol=1e-6)


def test_long_texts_are_cut_and_counted(run, models):
    from _pairs import encode
    from transformers import AutoTokenizer

    long = {"prompt": "gap " * 40, "chosen": " pair" * 2, "rejected": " noise" * 40}
    save([*pairs(), long])
    done = run(
        "pairs.jsonl", "--model", models[0], "--max-length", 32, *SETTING, "--out", "o.jsonl"
    )
    assert "1 of 31 pairs were cut to 32 tokens." in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    whole, start, is_cut = encode(tokenizer, long, 10_000)
    assert not is_cut
    texts, kept, is_cut = encode(tokenizer, long, 32)
    assert is_cut
    assert kept == 16
    assert texts[0][:kept] == texts[1][:kept] == whole[0][start - 16 : start]
    assert texts[0][kept:] == whole[0][start:]  # short enough
    assert texts[1][kept:] == whole[1][start : start + 16]
    empty, start, _ = encode(tokenizer, {"prompt": "", "chosen": "gap", "rejected": "pair"}, 32)
    assert start == 1
    assert empty[0][0] == tokenizer.eos_token_id


@pytest.mark.parametrize("done_before", [1, 4])
def test_an_interrupted_run_goes_on(run, models, monkeypatch, done_before):
    import _pairs

    monkeypatch.setattr(_pairs, "BLOCK", 10)
    save(pairs())
    options = ("--model", models[0], "--reference", models[1], "--max-length", 64, *SETTING)
    assert run("pairs.jsonl", *options, "--out", "whole.jsonl").returncode == 0
    score, calls, stop = _pairs.score, [], done_before

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(_pairs, "score", interrupted)
    done = run("pairs.jsonl", *options, "--out", "out.jsonl")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "score_dataset.py: interrupted"
    assert "out.jsonl" not in os.listdir()
    with Path("out.jsonl.progress").open("a") as file:
        file.write('{"cut": 0, "sco')  # of a run that was killed
    other = run("pairs.jsonl", *options[:-4], "--max-length", 32, *SETTING, "--out", "out.jsonl")
    assert "out.jsonl.progress is of a run with other data, models or" in complaint(other)
    stop = 100
    calls.clear()
    assert run("pairs.jsonl", *options, "--out", "out.jsonl").returncode == 0
    assert len(calls) == 6 - done_before
    assert Path("out.jsonl").read_text() == Path("whole.jsonl").read_text()
    assert "out.jsonl.progress" not in os.listdir()


def test_ctrl_c_leaves_no_half_of_an_output(run, monkeypatch):
    import _pairs

    save(rated())
    dumps, calls = json.dumps, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 60:  # 40 rows were checked, and 20 written
            raise KeyboardInterrupt
        return dumps(*arguments, **options)

    monkeypatch.setattr(_pairs.json, "dumps", interrupted)
    done = run("pairs.jsonl", "--out", "out.jsonl")
    assert done.returncode == 130
    assert os.listdir() == ["pairs.jsonl"]


ROW = rated(1)[0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROW, {**ROW, "chosen_score": None}], "pairs.jsonl:2: 'chosen_score' must be a finite"),
        ([ROW, {**ROW, "rejected_score": "1"}], "pairs.jsonl:2: 'rejected_score' must be a fin"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "on all rows, or --model"),
        ([ROW, {**ROW, "chosen": "no"}], "pairs.jsonl:2: chosen and rejected are the same"),
        ([ROW], "pairs.jsonl: all gaps are "),
        ([], "pairs.jsonl: holds no pairs"),
    ],
)
def test_wrong_data(run, rows, words):
    save(rows)
    assert words in complaint(run("pairs.jsonl", "--out", "out.jsonl"))
    assert os.listdir() == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl"], "no such file: missing.jsonl"),
        (["./missing"], "no such file or folder, or no permission to read it: ./missing"),
        (["pairs.jsonl", "--reference", "a"], "--reference needs --model"),
        (["pairs.jsonl", "--reference", "a", "--model", "a"], "are the same: every gap would be 0"),
        (["pairs.jsonl", "--model", "./nowhere"], "./nowhere: cannot be loaded as a model: "),
        (["pairs.jsonl", "--batch-size", "0"], "argument --batch-size: must be from 1 to"),
        (["pairs.jsonl", "--tau", "-1"], "argument --tau: must be positive and finite, got -1"),
        (["pairs.jsonl", "--out", "x.npy"], "--out must end in one of .jsonl, .parquet, got x.npy"),
        (["pairs.jsonl", "--out", "pairs.jsonl"], "--out must not be INPUT"),
        (["gaps.npy", "--out", "x.npy"], "--gamma0 is needed for gaps.npy"),
        (
            ["gaps.npy", "--gamma0", "1", "--tau", "1", "--model", "a"],
            "--model and --reference are",
        ),
    ],
)
def test_wrong_arguments(run, arguments, words):
    if "./nowhere" in arguments:
        pytest.importorskip("transformers")
    save(rated())
    np.save("gaps.npy", np.arange(3.0))
    arguments = arguments if "--out" in arguments else [*arguments, "--out", "out.jsonl"]
    assert words in complaint(run(*arguments))
    assert set(os.listdir()) == {"pairs.jsonl", "gaps.npy"}


def test_wrong_models(run, models, tmp_path):
    from transformers import AutoTokenizer

    save(pairs())
    options = ("--model", models[0], "--out", "out.jsonl")
    assert complaint(run("pairs.jsonl", *options)) == (
        f"--max-length must be at most 64 for {models[0]}"
    )
    other = AutoTokenizer.from_pretrained(models[0])
    other.add_tokens(["new"])
    other.save_pretrained("other")
    (Path("other") / "config.json").write_bytes((Path(models[1]) / "config.json").read_bytes())
    done = run("pairs.jsonl", *options, "--max-length", 64, "--reference", "other")
    assert complaint(done).startswith("other: its tokenizer has other tokens than that of ")
    done = run("pairs.jsonl", "--model", "other", "--max-length", 64, "--out", "out.jsonl")
    assert "other: cannot be loaded as a language model: " in complaint(done)


def test_under_torchrun_pairs_are_refused(run, monkeypatch):
    save(rated())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "pairs are scored by one process" in complaint(run("pairs.jsonl", "--out", "out.jsonl"))


def test_the_commands_and_blocks_of_the_page(run):
    text = (FOLDER.parent / "scoring.md").read_text("utf-8")
    for kind, code in re.findall(r"^```(python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(compile(code, "scoring.md", "exec"), {})
        elif "--model" not in code and "score_dataset.py" in code:
            done = run(*code.split()[2:])
            assert done.returncode == 0, done.stderr
            (shown,) = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            shown, printed = (re.sub("bound .*", "", each) for each in (shown, done.stdout))
            assert printed.startswith(shown)
    rows = {name: scored(f"{name}.jsonl") for name in ("pairs", "scored", "clean", "weighted",
                                                       "margins", "half_a", "half_b")}  # fmt: skip
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
        assert len(list(reader_of(f"{name}.jsonl"))) == len(rows[name])


def reader_of(name):
    from _common import reader

    return reader(name)()


def test_the_page_has_the_options_of_the_program():
    text = (FOLDER.parent / "scoring.md").read_text("utf-8")
    program = PROGRAM.read_text("utf-8")
    for option in re.findall(r"`(--[a-z0-9-]+)`", text):
        assert f'"{option}"' in program or option == "--bf16"


def test_the_page_has_the_measured_numbers():
    root = FOLDER.parents[1]
    measured = json.loads((root / "benchmarks/results/suspects_cpu.json").read_text("utf-8"))
    text = (FOLDER.parent / "scoring.md").read_text("utf-8")
    rows = re.findall(
        r"^\| .* \| (0\.\d+) \((0\.\d+) to (0\.\d+)\) \| (\d+) \|$", text, re.MULTILINE
    )
    names = ("dpo_unseen", "dpo_seen", "reward_unseen", "untrained")
    for name, row in zip(names, rows, strict=True):
        of = measured[name]
        expected = (
            *(f"{x + 1e-9:.3f}" for x in (of["auc"], *of["interval"])),
            str(of["wrong_in_100"]),
        )
        assert row == expected
    assert f"{measured['wrong']} of {measured['pairs']}" in text
    assert f"gave {measured['pairs'] - measured['dpo_seen']['negative']} of them a positive" in text
    assert f"{measured['steps']} steps of {measured['batch']} pairs" in text
    assert f"{100 * measured['wrong'] / measured['pairs']:.0f} of 100 is what guessing" in text

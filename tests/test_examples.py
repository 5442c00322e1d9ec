"""The parts that the example programs share: input files, one-line errors, Ctrl-C."""

import codecs
import gzip
import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny_lm
from _common import WrongInput, load, read, texts, uninterrupted
from programs import run, write

GOOD = {"prompt": "2 + 2 =", "chosen": " four", "rejected": " five"}  # no numbers, for CSV
CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
LINE = json.dumps(GOOD).encode()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(content, name="pairs.jsonl"):
    """The error with which a file of this content is refused."""
    Path(name).write_bytes(content)
    with pytest.raises(WrongInput) as found:
        load(name)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_wrong_row_is_named_with_its_line():
    for line, words in [
        (b"{", "Expecting property name"),
        (b"[1]", "got list: each line must be a JSON object"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "a number of 5000 digits is too large"),
        ('{"prompt": "é"}'.encode("latin-1"), "can't decode byte 0xe9"),
        ({"prompt": "a", "chosen": "b"}, "it has prompt, chosen: rename its columns"),
        ({**GOOD, "chosen": 3}, "'chosen' must be text or messages, got 3"),
        ({**GOOD, "rejected": []}, "'rejected' is empty"),
        ({**GOOD, "rejected": " four"}, "chosen and rejected are the same: remove the pair"),
        ({**GOOD, "rejected": CHAT}, "chosen is text, rejected is messages: give one form"),
        ({"prompt": "a", "chosen": CHAT[1:], "rejected": CHAT[:1]}, "no prompt: chosen and reject"),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT},
         "'prompt' is messages, and text in the first row: all rows need one form"),
        ({**GOOD, "margin": True}, "'margin' must be a finite number, got True"),
        ({**GOOD, "weight": float("inf")}, "'weight' must be a finite number, got inf"),
        ({**GOOD, "margin": 1}, "'margin' is a finite number, and missing in the first row"),
    ]:  # fmt: skip
        line = json.dumps(line).encode() if isinstance(line, dict) else line
        problem = refusal(codecs.BOM_UTF8 + b"\n" + LINE + b"\n\n" + line + b"\n")
        assert problem.startswith("pairs.jsonl:4: ")
        assert words in problem


def test_a_file_of_another_kind_is_named_and_a_missing_one_not_looked_for_on_the_hub():
    for content, words in [
        (b"\n\n", "pairs.jsonl: holds no pairs"),
        (gzip.compress(LINE), "pairs.jsonl is compressed with gzip: unpack it first"),
        (LINE.decode().encode("utf-16"), "pairs.jsonl is UTF-16 text: save it as UTF-8"),
        (b"PAR1....", "pairs.jsonl is a Parquet file: name it .parquet"),
        (b"\x93NUMPY....", "pairs.jsonl is a NumPy array, not pairs: solve_margins_streaming"),
    ]:
        assert words in refusal(content)
    for name in ("no.jsonl", "./pairs", "data/of/mine", "/nowhere", "my/pairs.csv"):
        with pytest.raises(WrongInput, match=f"no such file or folder, .*: {name}"):
            load(name)


def test_the_forms_that_trl_takes_and_their_texts():
    file = Path("a")
    for row in [
        GOOD,
        {"chosen": "a b", "rejected": "a c", "score": 1.0},
        {"chosen": CHAT, "rejected": CHAT[:1]},
        {"prompt": "?", "chosen": CHAT, "rejected": CHAT[:1]},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[:1]},
        {**GOOD, "margin": 1, "weight": 0.5},
    ]:
        file.write_text(f"{json.dumps(row)}\n" * 2)
        assert list(read(file)) == [row] * 2
    inside = {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
    assert texts(inside) == ("2 + 2 = ", "4", "5")
    said = tiny_lm.messages(GOOD)
    inside = {key: said["prompt"] + said[key] for key in ("chosen", "rejected")}
    for row in (GOOD, said, inside):
        assert texts(row) == tuple(GOOD.values())


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_formats_that_datasets_reads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list([GOOD] * 3)
    data.to_csv("pairs.csv")
    data.to_parquet("pairs.parquet")
    data.to_json("pairs.json")
    data.save_to_disk("rows")
    datasets.DatasetDict(train=data, test=data).save_to_disk("splits")
    Path("pairs.jsonl").write_bytes(b"\xef\xbb\xbf\n" + Path("pairs.json").read_bytes())
    for name in ("pairs.csv", "pairs.parquet", "pairs.json", "pairs.jsonl", "rows", "splits"):
        assert [dict(row) for row in load(name)["train"]] == [GOOD] * 3
    assert set(load("splits")) == {"train", "test"}
    problem = refusal(b"", "pairs.csv")
    assert "pairs.csv: cannot be loaded as a dataset: EmptyDataError: No columns" in problem
    assert "(it reads .jsonl, .json, .csv, .parquet, .arrow, folders of save_to_disk" in problem
    datasets.Dataset.from_list([GOOD, {**GOOD, "chosen": None}]).to_parquet("pairs.parquet")
    with pytest.raises(WrongInput, match="split train, row 2: 'chosen' must be text"):
        load("pairs.parquet")


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a run in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_a_file_that_is_being_written(interruptible):
    done = []

    @uninterrupted()
    def save():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append("written")

    with pytest.raises(KeyboardInterrupt):
        save()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_a_program_with_one_line(interruptible, monkeypatch):
    tqdm = pytest.importorskip("tqdm").tqdm
    import score_dataset

    def bar(rows, **options):
        for row in tqdm(rows, **options | {"disable": False}):
            yield row
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(score_dataset, "tqdm", bar)
    rated = GOOD | {"chosen_score": 2, "rejected_score": 1}
    done = run(score_dataset, write([rated] * 3), "--out", "out.jsonl")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "score_dataset.py: interrupted"
    assert "Traceback" not in done.stderr
    assert os.listdir() == ["pairs.jsonl"]

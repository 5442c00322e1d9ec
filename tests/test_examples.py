"""The parts that the example programs share: input files, one-line errors, Ctrl-C."""

import codecs
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _common import WrongInput, json_lines, load, texts, uninterrupted

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
LINE = json.dumps(GOOD)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Load a file of this content; return the error."""
    monkeypatch.chdir(tmp_path)

    def refused(content, name="pairs.jsonl"):
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(WrongInput) as found:
            load(name)
        assert "\n" not in str(found.value)
        return str(found.value)

    return refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting property name"),
        ('{"prompt": ', "Expecting value: column 11"),
        ("[1]", "got list: each line must be a JSON object"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('{"prompt": ' + "9" * 5000 + "}", "a number of 5000 digits is too large"),
        (LINE.encode("utf-16-le"), "each line must be a JSON object"),
        ('{"prompt": "é"}'.encode("latin-1"), "can't decode byte 0xe9"),
        ('{"prompt": "a", "chosen": "b"}', "needs prompt, chosen and rejected, it has prompt, cho"),
        ('{"question": "a", "yes": "b"}', "it has question, yes: rename its columns"),
        ({**GOOD, "chosen": 3}, "'chosen' must be text or messages, got 3"),
        ({**GOOD, "chosen": None}, "'chosen' must be text or messages, got None"),
        ({**GOOD, "rejected": ""}, "'rejected' is empty"),
        ({**GOOD, "rejected": []}, "'rejected' is empty"),
        ({**GOOD, "rejected": " 4"}, "chosen and rejected are the same: remove the pair"),
        ({**GOOD, "rejected": CHAT}, "chosen is text, rejected is messages: give one form"),
        ({"prompt": "a", "chosen": CHAT[1:], "rejected": CHAT[:1]}, "no prompt: chosen and reject"),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, "'prompt' is missing, and text in the first row"),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT},
         "'prompt' is messages, and text in the first row: all rows need one form"),
        ({**GOOD, "margin": None}, "'margin' must be a finite number, got None"),
        ({**GOOD, "margin": "1"}, "'margin' must be a finite number, got '1'"),
        ({**GOOD, "margin": True}, "'margin' must be a finite number, got True"),
        ({**GOOD, "margin": float("nan")}, "'margin' must be a finite number, got nan"),
        ({**GOOD, "weight": float("inf")}, "'weight' must be a finite number, got inf"),
        ({**GOOD, "margin": 1}, "'margin' is a finite number, and missing in the first row"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_line(refused, line, words):
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line.encode() if isinstance(line, str) else line
    problem = refused(b"\xef\xbb\xbf\n" + LINE.encode() + b"\n\n" + line + b"\n")
    assert problem.startswith("pairs.jsonl:4: ")
    assert words in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "pairs.jsonl: holds no pairs"),
        ("\n\n", "pairs.jsonl: holds no pairs"),
        (
            gzip.compress(LINE.encode(), mtime=0),
            "pairs.jsonl is compressed with gzip: unpack it first",
        ),
        (LINE.encode("utf-16"), "pairs.jsonl is UTF-16 text: save it as UTF-8"),
        (codecs.BOM_UTF16_BE + LINE.encode("utf-16-be"), "pairs.jsonl is UTF-16 text"),
        (b"PAR1....", "pairs.jsonl is a Parquet file: name it .parquet"),
    ],
)
def test_files_of_another_kind(refused, content, words):
    assert words in refused(content)


def test_a_missing_file_is_not_looked_for_on_the_hub():
    for name in ("pairs.jsonl", "./pairs", "data/of/mine", "/nowhere", "my/pairs.csv"):
        with pytest.raises(WrongInput, match=f"no such file or folder, .*: {name}"):
            load(name)


def test_texts_of_messages_and_of_an_implicit_prompt():
    expected = ("2 + 2 =", " 4", " 5")
    assert texts(GOOD) == expected
    assert texts({key: GOOD["prompt"] + GOOD[key] for key in ("chosen", "rejected")}) == (
        "2 + 2 = ", "4", "5",
    )  # fmt: skip
    said = {key: [{"role": "user", "content": GOOD[key]}] for key in GOOD}
    assert texts(said) == expected
    assert texts({key: said["prompt"] + said[key] for key in ("chosen", "rejected")}) == expected


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_formats_that_datasets_reads(tmp_path, refused, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "2 + 2 =", "chosen": " four", "rejected": " five"}  # no numbers, for CSV
    data = datasets.Dataset.from_list([good] * 3)
    data.to_csv("pairs.csv")
    data.to_parquet("pairs.parquet")
    data.to_json("pairs.json")
    data.save_to_disk("rows")
    datasets.DatasetDict(train=data, test=data).save_to_disk("splits")
    Path("pairs.jsonl").write_bytes(b"\xef\xbb\xbf\n" + Path("pairs.json").read_bytes())
    for name in ("pairs.csv", "pairs.parquet", "pairs.json", "pairs.jsonl", "rows", "splits"):
        assert [dict(row) for row in load(name)["train"]] == [good] * 3
    assert set(load("splits")) == {"train", "test"}
    problem = refused("", "pairs.csv")
    assert "pairs.csv: cannot be loaded as a dataset: EmptyDataError: No columns" in problem
    assert "(it reads .jsonl, .json, .csv, .parquet, .arrow, folders of save_to_disk" in problem
    datasets.Dataset.from_list([GOOD, {**GOOD, "chosen": None}]).to_parquet("pairs.parquet")
    with pytest.raises(WrongInput, match="split train, row 2: 'chosen' must be text"):
        load("pairs.parquet")


def test_the_objects_of_a_file_with_their_places(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf\n {"a": 1}\r\n\n{"a": NaN}')
    (first, one), (second, two) = json_lines(tmp_path / "a")
    assert (first, one) == (f"{tmp_path}/a:2", {"a": 1})
    assert second.endswith(":4")
    assert two["a"] != two["a"]


def test_ctrl_c_waits_for_a_file_that_is_being_written():
    done = []

    @uninterrupted()
    def write():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append("written")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


INTERRUPTED = """
import os, signal, sys, runpy, threading
import numpy, torch, tqdm
class Bar(tqdm.tqdm):
    def update(self, n=1):
        super().update(n)
        os.kill(os.getpid(), signal.SIGINT)
    def __iter__(self):
        for item in super().__iter__():
            yield item
            os.kill(os.getpid(), signal.SIGINT)
tqdm.tqdm = Bar
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["noisy_preferences.py", "--quick", "--out", "out.png"],
        ["score_dataset.py", "gaps.npy", "--gamma0", "4", "--tau", "10", "--out", "out.npy"],
        ["score_dataset.py", "logps.jsonl", "--gamma0", "4", "--tau", "10", "--out", "out.npy",
         "--beta", "1"],
    ],
    ids=lambda arguments: arguments[1],
)  # fmt: skip
def test_ctrl_c_ends_a_program_with_one_line(tmp_path, arguments):
    for needed in ("torch", "tqdm", "matplotlib"):
        pytest.importorskip(needed)
    import numpy as np

    np.save(tmp_path / "gaps.npy", np.arange(10.0))
    row = {"policy_chosen_logps": -1.0, "policy_rejected_logps": -2.0}
    (tmp_path / "logps.jsonl").write_text(json.dumps(row) * 1 + "\n" + json.dumps(row))
    (tmp_path / arguments[-1]).write_text("of yesterday") if arguments[-1] == "out.png" else None
    path = os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER)])
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, FOLDER / arguments[0], *arguments[1:]],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == f"{arguments[0]}: interrupted"
    assert "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"gaps.npy", "logps.jsonl"}
    assert left <= {"out.png"}

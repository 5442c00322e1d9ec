"""The shared parts of this folder's programs: input files, whole outputs, one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

Row = dict[str, Any]
TEXTS, NUMBERS = ("prompt", "chosen", "rejected"), ("margin", "weight")
COLUMNS = TEXTS + NUMBERS
READERS = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (".jsonl", *READERS)
ENCODED = {
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"PAR1": "a Parquet file: name it .parquet",
    b"\x93NUMPY": "a NumPy array, not pairs: solve_margins_streaming takes gaps",
}


class WrongInput(Exception):
    """One line for the user: the mistake, and the way out."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise WrongInput(message)


def run(main: Callable[..., object], *arguments: object) -> None:
    """Run a program. Wrong input ends it with exit code 2, Ctrl-C with 130, each with one line."""
    try:
        main(*arguments)
        return
    except WrongInput as error:
        problem, code = str(error), 2
    except KeyboardInterrupt:
        problem, code = "interrupted", 130
    # The exception is gone, and with it the progress bars.
    line = " ".join(problem.split())
    line = line if len(line) < 600 else f"{line[:400]} ... {line[-100:]}"
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)


def number(kind: type, *limits: float) -> Callable[[str], Any]:
    """Make a type of argument: a number from one limit to another, or positive and finite."""
    low, high = limits or (sys.float_info.min, sys.float_info.max)

    def parse(text: str) -> Any:
        if not low <= (value := kind(text)) <= high:
            wanted = f"from {low} to {high}" if limits else "positive and finite"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def check_folder(folder: Path) -> None:
    """Refuse a folder that no file can be written to."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WrongInput(f"cannot write in the folder {folder}: {error.strerror}") from None


def check_output(out: Path, suffixes: Sequence[str]) -> Path:
    """Refuse a file that cannot be written, and return it without symbolic links."""
    if out.suffix.lower() not in suffixes:
        raise WrongInput(f"--out must end in one of {', '.join(suffixes)}, got {out}")
    out = out.resolve()
    if out.is_dir():
        raise WrongInput(f"--out is a folder: {out}")
    check_folder(out.parent)
    return out


def part_of(out: Path) -> Path:
    """Return the name that a file has until it is whole."""
    return out.with_name(f"{out.name}.part")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends."""
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield each JSON object of a file, after the place of its line."""

    def whole_number(text: str) -> int:
        if len(text) > 300:
            raise ValueError(f"a number of {len(text)} digits is too large")
        return int(text)

    with file.open("rb") as lines:
        for count, line in enumerate(lines, 1):
            if count == 1:
                for start, kind in ENCODED.items():
                    if line.startswith(start):
                        raise WrongInput(f"{file} is {kind}")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip().decode(), parse_int=whole_number)
                if not isinstance(row, dict):
                    raise ValueError(f"got {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                problem = str(error).replace("line 1 column", "column")
                raise WrongInput(
                    f"{file}:{count}: {problem}: each line must be a JSON object, in UTF-8"
                ) from None
            yield f"{file}:{count}", row


def load(name: str) -> dict[str, Any]:
    """Load the splits of a file, a folder or a name on the hub, with every pair checked."""
    path = Path(name)
    is_path = name.startswith((".", "/")) or name.count("/") > 1 or path.suffix in SUFFIXES
    if is_path and not os.access(name, os.R_OK):
        raise WrongInput(f"no such file or folder, or no permission to read it: {name}")
    by_line = path.is_file() and path.suffix not in READERS
    if by_line:
        for _ in checked(json_lines(path), name):
            pass
    try:
        import datasets
    except ImportError:
        raise WrongInput(f"{name}: needs the package datasets: pip install datasets") from None
    try:
        if path.is_file():
            data = datasets.load_dataset(READERS.get(path.suffix, "json"), data_files=name)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)  # written by save_to_disk
        else:
            data = datasets.load_dataset(name)
    except Exception as error:  # of the network or of any reader
        cause = error.__cause__ or error
        raise WrongInput(
            f"{name}: cannot be loaded as a dataset: {type(cause).__name__}: {cause} "
            f"(it reads {', '.join(SUFFIXES)}, folders of save_to_disk, and names on the hub)"
        ) from None
    data = data if isinstance(data, dict) else {"train": data}
    for split, rows in {}.items() if by_line else data.items():
        place = f"{name}, split {split}"
        for _ in checked(((f"{place}, row {i}", row) for i, row in enumerate(rows, 1)), place):
            pass
    return data


def read(file: Path) -> Iterable[Row]:
    """Return the pairs of a file or folder, checked. JSON lines need no `datasets`."""
    if file.is_file() and file.suffix not in READERS:
        return (row for _, row in checked(json_lines(file), str(file)))
    return itertools.chain.from_iterable(load(str(file)).values())


def reader(name: str) -> Callable[[], Iterator[tuple[str, Row]]]:
    """Return a function that yields the checked pairs of a file, folder or hub name, and places."""
    path = Path(name)
    if path.is_file() and path.suffix not in READERS:
        return lambda: checked(json_lines(path), name)
    data = load(name)
    if len(data) > 1 and "train" not in data:
        raise WrongInput(f"{name}: needs a split 'train', has {', '.join(data)}")
    split = "train" if "train" in data else next(iter(data))
    return lambda: (
        (f"{name}, split {split}, row {i}", row) for i, row in enumerate(data[split], 1)
    )


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model, before anything that takes long."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(model)
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise WrongInput(f"{model}: cannot be loaded as a model: {error}") from None


def check_template(model: str, tokenizer: Any, row: Row) -> None:
    """Refuse messages for a model without a chat template."""
    if kind_of(row["chosen"]) == "messages" and not tokenizer.chat_template:
        raise WrongInput(
            f"{model} has no chat template, which messages need: give prompt, chosen and rejected "
            "as text, or take a model with a chat template"
        )


def checked(rows: Iterable[tuple[str, Row]], source: str) -> Iterator[tuple[str, Row]]:
    """Yield pairs and their places; refuse a row that is no pair, or of another form."""
    first: dict[str, str] = {}
    for place, row in rows:
        if problem := wrong(row):
            raise WrongInput(f"{place}: {problem}")
        form = {name: kind_of(row[name]) if name in row else "missing" for name in COLUMNS}
        first = first or form
        for name in COLUMNS:
            if first[name] != form[name]:
                raise WrongInput(
                    f"{place}: {name!r} is {form[name]}, and {first[name]} in the first row: "
                    "all rows need one form"
                )
        yield place, row
    if not first:
        raise WrongInput(f"{source}: holds no pairs: it needs one row for each pair")


def kind_of(value: object) -> str:
    """Return the form of a value: text, messages, a finite number, or neither."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    ):
        return "messages"
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return "a finite number" if finite else "neither"


def wrong(row: Row) -> str | None:
    """Say why a row is no preference pair. TRL itself would train on some such rows."""
    keys = f"it has {', '.join(map(str, row))}: rename its columns"
    if not {"chosen", "rejected"} <= row.keys():
        return f"needs prompt, chosen and rejected, {keys}"
    for name in (name for name in COLUMNS if name in row):
        kinds = ("text", "messages") if name in TEXTS else ("a finite number",)
        if kind_of(row[name]) not in kinds:
            return f"{name!r} must be {' or '.join(kinds)}, got {row[name]!r:.80}"
        if name in ("chosen", "rejected") and not row[name]:
            return f"{name!r} is empty"
    chosen, rejected = row["chosen"], row["rejected"]
    if kind_of(chosen) != kind_of(rejected):
        return f"chosen is {kind_of(chosen)}, rejected is {kind_of(rejected)}: give one form"
    if chosen == rejected:
        return "chosen and rejected are the same: remove the pair"
    if prompt_inside(row) and chosen[:1] != rejected[:1]:
        return (
            "no prompt: chosen and rejected begin differently, and 'prompt' is not one of the "
            f"columns or not in their form; {keys}"
        )
    return None


def prompt_inside(row: Row) -> bool:
    """Return whether TRL looks for the prompt inside the responses."""
    return type(row.get("prompt")) is not type(row["chosen"])


def parts(row: Row) -> tuple[Any, Any, Any]:
    """Return prompt, chosen and rejected in the form of the row, without a shared start."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt_inside(row):
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        shared = same.index(False) if False in same else len(same)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return prompt, chosen, rejected


def texts(row: Row) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected as text. Of messages only the contents remain."""

    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        return "\n".join(str(message["content"]) for message in value)

    prompt, chosen, rejected = map(text, parts(row))
    return prompt, chosen, rejected

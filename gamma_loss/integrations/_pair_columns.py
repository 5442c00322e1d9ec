"""Numbers that preference data may give for each pair: the columns margin and weight."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from datasets import Dataset, IterableDataset

COLUMNS = {  # with the least number that is allowed
    "margin": (-1e30, "a finite number, in reward units"),
    "weight": (0.0, "a finite number that is not negative"),
}


class Stream(IterableDataset):
    """A stream whose `map` takes num_proc, which TRL's CPOTrainer gives to every dataset."""

    def map(self, *arguments: Any, num_proc: int | None = None, **options: Any) -> Any:
        """Return a mapped stream of the same kind; num_proc is for datasets in memory."""
        data = IterableDataset.map(self, *arguments, **options)
        data.__class__ = Stream
        return data


def check(data: Any, name: str) -> Any:
    """Return a dataset whose columns are checked; a stream is checked as it is read."""
    if isinstance(data, dict):
        return type(data)({k: check(each, f"{name}[{k!r}]") for k, each in data.items()})
    if not isinstance(data, Dataset | IterableDataset):
        return data
    found = data.column_names or list(next(iter(data), ()))
    for other in found:
        for column in difflib.get_close_matches(other.lower(), COLUMNS.keys() - found, cutoff=0.9):
            warnings.warn(
                f"the column {other!r} of {name} is not used: call it {column!r} if it holds the "
                f"{column}s of the pairs",
                stacklevel=4,
            )
    columns = [column for column in COLUMNS if column in found]
    if isinstance(data, IterableDataset):
        keywords = {"columns": columns, "name": name}
        return Stream.map(data, _check_row, with_indices=True, fn_kwargs=keywords)
    for column in columns:
        for index, value in enumerate(data.with_format(None)[column]):
            _number(column, value, index, name)
    return data


def _check_row(row: dict[str, Any], index: int, columns: list[str], name: str) -> dict[str, Any]:
    for column in COLUMNS:
        if column in columns:
            _number(column, row.get(column), index, name)
        elif column in row:
            _number(column, None, 0, name)  # the first row has no such column
    return row


def _number(column: str, value: Any, index: int, name: str) -> float:
    least, kind = COLUMNS[column]
    try:
        number = None if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not least <= number <= 1e30:  # beta divides it, in float32
        raise ValueError(
            f"the column {column!r} must hold {kind}, in every row or in none, "
            f"got {value!r:.80} in row {index} of {name}, counted from 0"
        )
    return number


def collate(collator: Any, rows: list[dict[str, Any]]) -> Any:
    """Return a collator's batch, with a tensor for each of these columns that a row has."""
    tensors = {}
    for column in COLUMNS:
        if any(column in row for row in rows):
            values = [_number(column, row.get(column), i, "a batch") for i, row in enumerate(rows)]
            tensors[column] = torch.tensor(values)
    batch = collator(rows)
    batch.update(tensors)
    return batch


def without(batch: Any) -> dict[str, Any]:
    """Return a batch without these columns."""
    return {name: value for name, value in batch.items() if name not in COLUMNS}

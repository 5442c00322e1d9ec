"""Score every pair of a preference dataset: its margin, pair weight and implied label smoothing.

The margins are those of one problem over the whole dataset, so they tell how a pair stands among
all others: ambiguous pairs, where the wrong labels hide, have small margins, large weights, and a
positive label smoothing (Theorem 3.1 of the paper) where they are ranked right.

    python score_dataset.py gaps.npy --gamma0 4 --tau 10 --out scores.npy
    python score_dataset.py logps.jsonl --beta 0.1 --gamma0 4 --tau 10 --out scores.parquet
    torchrun --nproc-per-node=8 score_dataset.py gaps.npy --gamma0 4 --tau 10 --out scores.npy

INPUT is a 1-D .npy file of reward gaps, which is memory-mapped, or a .jsonl file with one object a
line: policy_chosen_logps and policy_rejected_logps and, for γ-DPO, reference_chosen_logps and
reference_rejected_logps, numbers in nats, on all lines or on none.

A .npy output is one structured array with the float32 fields margin, pair_weight and
label_smoothing in the order of the input, NaN where a gap is not finite. A .parquet output has them
as columns, and under torchrun one file for each rank. All ranks need the same file system. Memory
does not grow with the dataset. An output has its name only once it is whole: until then it is
NAME.part, which a run that was killed leaves behind and the next one overwrites.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tokenize
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from gamma_loss import label_smoothing_from_shift, solve_margins_streaming

CHUNK = 2**20  # gaps in memory at a time
FIELDS = ("margin", "pair_weight", "label_smoothing")
ROW = np.dtype([(name, np.float32) for name in FIELDS])
LOGPS = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")


class WrongInput(Exception):
    """What is wrong with the input, and what to do, in one line."""


def complain(problem: object) -> None:
    """Say in one line what is wrong."""
    print("score_dataset.py:", " ".join(str(problem).split()), file=sys.stderr)


def stop(problem: object) -> NoReturn:
    """End with one line that says what is wrong."""
    complain(problem)
    sys.exit(2)


class Ranks:
    """This process among those that torchrun started, or alone."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.group: Any = None
        if self.count > 1:
            import torch.distributed as dist

            # A rank may wait for another that reads for hours.
            dist.init_process_group("gloo", timeout=timedelta(days=2))
            self.group = dist.group.WORLD

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all ranks at the end; where one has failed all end, and it says why."""
        problem, first = None, self.count  # the first rank with a problem
        try:
            yield
        except (WrongInput, OSError) as error:
            problem, first = error, self.rank
        if self.count > 1:
            import torch
            import torch.distributed as dist

            firsts = torch.tensor(first)
            dist.all_reduce(firsts, dist.ReduceOp.MIN)
            first = int(firsts)
        if first == self.rank:
            complain(problem)
        if first < self.count:
            self.close()
            sys.exit(2)

    def close(self) -> None:
        if self.count > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


class Gaps:
    """This rank's part of a file of gaps, in chunks, as often as it is asked for."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        self.file = file
        try:
            gaps = self.mapped()
        except (ValueError, OverflowError, tokenize.TokenError) as error:  # NumPy's for bad files
            raise WrongInput(
                f"{file}: no .npy file of numbers ({error}): write it with "
                "numpy.save, as a 1-D array of floats"
            ) from None
        if gaps.ndim != 1 or gaps.dtype.kind != "f" or not gaps.size:
            raise WrongInput(
                f"{file}: must hold gaps in a 1-D array of floats, got {gaps.dtype} {gaps.shape}"
            )
        self.size = gaps.shape[0]
        self.start, self.stop = (self.size * r // ranks.count for r in (ranks.rank, ranks.rank + 1))
        self.show, self.passes = ranks.rank == 0, 0

    def mapped(self) -> np.ndarray:
        return np.lib.format.open_memmap(self.file, mode="r")

    def __iter__(self) -> Iterator[np.ndarray]:
        self.passes += 1
        with tqdm(
            total=self.stop - self.start, desc=f"pass {self.passes}", unit=" gaps",
            unit_scale=True, disable=not self.show,
        ) as bar:  # fmt: skip
            for start in range(self.start, self.stop, CHUNK):
                # Mapped anew for each chunk: pages of a map that stays count as this process's.
                chunk = np.array(self.mapped()[start : min(start + CHUNK, self.stop)])
                yield chunk
                bar.update(chunk.size)


def gaps_of_logps(file: Path, beta: float, out: Path) -> None:
    """Write the gaps of a JSONL file of log-probabilities to a .npy file."""
    with file.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    if not count:
        raise WrongInput(f"{file}: no pairs: it needs one JSON object a line")
    names: tuple[str, ...] = ()  # that the first line has, and so must all
    with (
        file.open("rb") as lines,
        out.open("wb") as gaps,
        tqdm(lines, desc=file.name, unit=" lines") as bar,
    ):
        gaps.write(header(np.dtype(np.float64), count))
        buffer: list[float] = []
        for number, line in enumerate(bar, 1):
            if not line.strip():
                continue
            try:
                pair = json.loads(line)
                names = names or names_in(pair)
                buffer.append(beta * difference(pair, names))
            except (ValueError, OverflowError, RecursionError) as error:
                raise WrongInput(f"{file}:{number}: {error}") from None
            if len(buffer) == CHUNK:
                np.array(buffer).tofile(gaps)
                buffer.clear()
        np.array(buffer, dtype=np.float64).tofile(gaps)


def names_in(pair: Any) -> tuple[str, ...]:
    """Return the names of the log-probabilities of a pair: with those of the reference or not."""
    if not isinstance(pair, dict):
        raise ValueError(f"must be a JSON object, got {type(pair).__name__}")
    return LOGPS + REFERENCE if any(name in pair for name in REFERENCE) else LOGPS


def difference(pair: Any, names: tuple[str, ...]) -> float:
    """Return the log-ratio between chosen and rejected, in nats."""
    if names_in(pair) != names:
        have = "has no reference log-probabilities" if REFERENCE[0] in names else "has them"
        raise ValueError(
            f"{have}, unlike the first line: gaps with and without are not comparable, "
            "so give reference_*_logps on all lines or on none"
        )
    for name in names:
        if isinstance(pair.get(name), bool) or not isinstance(pair.get(name), float | int):
            raise ValueError(f"{name!r} must be a number, got {pair.get(name)!r:.80}")
    chosen, rejected, *reference = (float(pair[name]) for name in names)
    if not reference:
        return chosen - rejected
    return (chosen - reference[0]) - (rejected - reference[1])


def header(dtype: np.dtype, size: int) -> bytes:
    """Return what a .npy file of a 1-D array starts with."""
    out = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        out, {"descr": description, "fortran_order": False, "shape": (size,)}
    )
    return out.getvalue()


def part_of(file: Path) -> Path:
    """Return the name that a file has until it is whole."""
    return file.with_name(file.name + ".part")


def scores(rule: Any, gaps: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Return the rows of a chunk."""
    rows = np.full(gaps.shape, np.nan, ROW)
    finite = np.isfinite(gaps)
    gaps = gaps[finite].astype(np.float64)
    margins = rule.margins(gaps)
    shifts = margins - args.gamma0
    s = gaps - (shifts if args.centered else margins)
    smoothing = label_smoothing_from_shift(gaps, shifts, kind=args.kind)
    for name, values in zip(FIELDS, (margins, np.exp(-np.logaddexp(0, s)), smoothing), strict=True):
        rows[name][finite] = values
    return rows


def write_npy(out: Path, rule: Any, gaps: Gaps, ranks: Ranks, args: argparse.Namespace) -> None:
    """Have every rank write its rows where they belong in one file."""
    head = header(ROW, gaps.size)
    with open(os.open(out, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        if ranks.rank == 0:
            file.truncate(len(head) + gaps.size * ROW.itemsize)  # of what a killed run left as well
            file.write(head)
        file.seek(len(head) + gaps.start * ROW.itemsize)
        for chunk in gaps:
            file.write(scores(rule, chunk, args).tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_parquet(out: Path, rule: Any, gaps: Gaps, args: argparse.Namespace) -> None:
    """Have every rank write a file of its own."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.float32()) for name in FIELDS])
    with out.open("wb") as file:
        with parquet.ParquetWriter(file, schema) as writer:
            for chunk in gaps:
                rows = scores(rule, chunk, args)
                columns = [np.ascontiguousarray(rows[name]) for name in FIELDS]
                writer.write_table(pyarrow.table(columns, schema=schema))
        file.flush()
        os.fsync(file.fileno())


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help=".npy of gaps or .jsonl of log-probabilities")
    add("--out", type=Path, required=True, help=".npy or .parquet file to write")
    add("--gamma0", type=positive, required=True, help="mean margin, reward units")
    add("--tau", type=positive, required=True, help="weight of the KL term, nats")
    add("--beta", type=positive, help="reward units per nat, for a .jsonl file")
    add("--centered", action="store_true", help="weights of γ-DPO's loss instead of γ-SimPO's")
    add("--kind", choices=("robust", "conservative"), default="robust", help="of label smoothing")
    args = parser.parse_args()
    if not args.input.is_file():
        stop(f"no such file: {args.input}")
    if args.input.suffix not in (".npy", ".jsonl"):
        stop(f"INPUT must be a .npy or .jsonl file, got {args.input}")
    if args.input.suffix == ".jsonl" and args.beta is None:
        stop("--beta is needed for a .jsonl file")
    if args.input.suffix == ".npy" and args.beta is not None:
        stop("--beta is for a .jsonl file: gaps in a .npy file are in reward units already")
    if args.out.suffix not in (".npy", ".parquet"):
        stop(f"--out must name a .npy or .parquet file, got {args.out}")
    if not args.out.resolve().parent.is_dir():
        stop(f"argument --out: no such folder: {args.out.resolve().parent}")
    args.out = args.out.resolve()  # a link stays one
    if args.out.is_dir():
        stop(f"argument --out: is a folder: {args.out}")
    if not os.access(args.out.parent, os.W_OK):
        stop(f"argument --out: no permission to write in {args.out.parent}")
    if args.out == args.input.resolve():
        stop("--out must not be INPUT")
    if args.out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            stop("a .parquet output needs pyarrow: pip install pyarrow, or write .npy")
    return args


def main() -> None:
    args, ranks = arguments(), Ranks()
    file, out, npy = args.input, args.out, args.out.suffix == ".npy"
    if not npy and ranks.count > 1:
        out = out.with_name(f"{out.stem}-{ranks.rank:05d}-of-{ranks.count:05d}.parquet")
    with contextlib.ExitStack() as at_end:
        with ranks.together():
            if file.suffix == ".jsonl":
                file = part_of(args.out.with_name(args.out.name + ".gaps.npy"))
                if ranks.rank == 0:
                    at_end.callback(file.unlink, missing_ok=True)
                    gaps_of_logps(args.input, args.beta, file)
        with ranks.together():
            gaps = Gaps(file, ranks)
        with ranks.together():
            try:
                rule = solve_margins_streaming(
                    gaps, gamma0=args.gamma0, tau=args.tau, group=ranks.group
                )
            except ValueError:  # on all ranks alike
                raise WrongInput(
                    f"{args.input}: none of its {gaps.size} gaps is finite: look at how the "
                    "log-probabilities were made"
                ) from None
            except RuntimeError as error:  # of another rank
                raise WrongInput(error) from None
        with ranks.together():
            if ranks.rank == 0 or not npy:
                at_end.callback(part_of(out).unlink, missing_ok=True)
            if npy:
                write_npy(part_of(out), rule, gaps, ranks, args)
            else:
                write_parquet(part_of(out), rule, gaps, args)
        with ranks.together():  # now that all have written
            if ranks.rank == 0 or not npy:
                os.replace(part_of(out), out)
    if ranks.rank == 0:
        print(
            f"{rule.pairs} finite gaps of {gaps.size}, read {gaps.passes} times: "
            f"multiplier {rule.multiplier:.6g}, residual {rule.residual:.1e}"
        )
    ranks.close()


if __name__ == "__main__":
    main()

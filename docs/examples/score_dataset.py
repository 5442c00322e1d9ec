"""Score every pair of a preference dataset: its margin, pair weight and implied label smoothing.

The margins are those of one problem over the whole dataset, so they tell how a pair stands among
all others: ambiguous pairs, where the wrong labels hide, have small margins, large weights, and a
positive label smoothing (Theorem 3.1 of the paper) where they are ranked right.

    python score_dataset.py gaps.npy --gamma0 4 --tau 10 --out scores.npy
    python score_dataset.py logps.jsonl --beta 0.1 --gamma0 4 --tau 10 --out scores.parquet
    torchrun --nproc-per-node=8 score_dataset.py gaps.npy --gamma0 4 --tau 10 --out scores.npy

INPUT is a 1-D .npy file of reward gaps, which is memory-mapped, or a .jsonl file with one object a
line: policy_chosen_logps and policy_rejected_logps and, for γ-DPO, reference_chosen_logps and
reference_rejected_logps, numbers in nats.

A .npy output is one structured array with the float32 fields margin, pair_weight and
label_smoothing in the order of the input, NaN where a gap is not finite. A .parquet output has them
as columns, and under torchrun one file for each rank. All ranks need the same file system. Memory
does not grow with the dataset.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gamma_loss import label_smoothing_from_shift, solve_margins_streaming

CHUNK = 2**20  # gaps in memory at a time
FIELDS = ("margin", "pair_weight", "label_smoothing")
ROW = np.dtype([(name, np.float32) for name in FIELDS])
LOGPS = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")


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

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def close(self) -> None:
        if self.count > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


class Gaps:
    """This rank's part of a file of gaps, in chunks, as often as it is asked for."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        self.file = file
        gaps = self.mapped()
        if gaps.ndim != 1 or gaps.dtype.kind != "f":
            sys.exit(f"{file}: expected a 1-D array of floats, got {gaps.dtype} {gaps.shape}")
        self.size = gaps.shape[0]
        self.start, self.stop = (self.size * r // ranks.count for r in (ranks.rank, ranks.rank + 1))
        self.show, self.passes = ranks.rank == 0, 0

    def mapped(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

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
        sys.exit(f"{file}: no pairs")
    write_header(out, np.dtype(np.float64), count)
    with file.open("rb") as lines, out.open("ab") as gaps:
        buffer: list[float] = []
        for number, line in enumerate(tqdm(lines, desc=file.name, unit=" lines"), 1):
            if not line.strip():
                continue
            try:
                buffer.append(beta * difference(json.loads(line)))
            except ValueError as error:
                sys.exit(f"{file}:{number}: {error}")
            if len(buffer) == CHUNK:
                np.array(buffer).tofile(gaps)
                buffer.clear()
        np.array(buffer, dtype=np.float64).tofile(gaps)


def difference(pair: Any) -> float:
    """Return the log-ratio between chosen and rejected, in nats."""
    if not isinstance(pair, dict):
        raise ValueError(f"expected an object, got {type(pair).__name__}")
    names = LOGPS + REFERENCE if any(name in pair for name in REFERENCE) else LOGPS
    for name in names:
        if isinstance(pair.get(name), bool) or not isinstance(pair.get(name), float | int):
            raise ValueError(f"{name!r} must be a number, got {pair.get(name)!r}")
    chosen, rejected, *reference = (float(pair[name]) for name in names)
    if not reference:
        return chosen - rejected
    return (chosen - reference[0]) - (rejected - reference[1])


def write_header(file: Path, dtype: np.dtype, size: int) -> int:
    """Start a .npy file, and return the size of its header."""
    with file.open("wb") as out:
        description = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(
            out, {"descr": description, "fortran_order": False, "shape": (size,)}
        )
        return out.tell()


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
    if ranks.rank == 0:
        header = write_header(out, ROW, gaps.size)
        os.truncate(out, header + gaps.size * ROW.itemsize)
    ranks.wait()
    header = out.stat().st_size - gaps.size * ROW.itemsize
    with out.open("r+b") as file:
        file.seek(header + gaps.start * ROW.itemsize)
        for chunk in gaps:
            file.write(scores(rule, chunk, args).tobytes())


def write_parquet(out: Path, rule: Any, gaps: Gaps, ranks: Ranks, args: argparse.Namespace) -> None:
    """Have every rank write a file of its own."""
    import pyarrow
    from pyarrow import parquet

    if ranks.count > 1:
        out = out.with_name(f"{out.stem}-{ranks.rank:05d}-of-{ranks.count:05d}.parquet")
    schema = pyarrow.schema([(name, pyarrow.float32()) for name in FIELDS])
    with parquet.ParquetWriter(out, schema) as writer:
        for chunk in gaps:
            rows = scores(rule, chunk, args)
            columns = [np.ascontiguousarray(rows[name]) for name in FIELDS]
            writer.write_table(pyarrow.table(columns, schema=schema))


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
        parser.error(f"no such file: {args.input}")
    if args.input.suffix not in (".npy", ".jsonl"):
        parser.error(f"INPUT must be a .npy or .jsonl file, got {args.input}")
    if args.input.suffix == ".jsonl" and args.beta is None:
        parser.error("--beta is needed for a .jsonl file")
    if args.input.suffix == ".npy" and args.beta is not None:
        parser.error("--beta is for a .jsonl file: gaps in a .npy file are in reward units already")
    if args.out.suffix not in (".npy", ".parquet"):
        parser.error(f"--out must name a .npy or .parquet file, got {args.out}")
    if not args.out.resolve().parent.is_dir():
        parser.error(f"argument --out: no such folder: {args.out.resolve().parent}")
    if args.out.resolve() == args.input.resolve():
        parser.error("--out must not be INPUT")
    if args.out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            parser.error("a .parquet output needs pyarrow: pip install pyarrow, or write .npy")
    return args


def main() -> None:
    args, ranks = arguments(), Ranks()
    file = args.input
    with contextlib.ExitStack() as at_end:
        if file.suffix == ".jsonl":
            file = args.out.with_name(args.out.name + ".gaps.npy")
            if ranks.rank == 0:
                at_end.callback(file.unlink, missing_ok=True)
                gaps_of_logps(args.input, args.beta, file)
            ranks.wait()
        gaps = Gaps(file, ranks)
        rule = solve_margins_streaming(gaps, gamma0=args.gamma0, tau=args.tau, group=ranks.group)
        write = write_npy if args.out.suffix == ".npy" else write_parquet
        write(args.out, rule, gaps, ranks, args)
        ranks.wait()
    if ranks.rank == 0:
        print(
            f"{rule.pairs} finite gaps of {gaps.size}, read {gaps.passes} times: "
            f"multiplier {rule.multiplier:.6g}, residual {rule.residual:.1e}"
        )
    ranks.close()


if __name__ == "__main__":
    main()

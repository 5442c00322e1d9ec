"""Score every pair of a preference dataset: its gap, margin, pair weight and rank.

Pairs with small gaps are suspect: their labels may be wrong. The margins are those of one problem
over the whole dataset.

    python score_dataset.py pairs.jsonl --model ./dpo --reference ./sft --out scored.jsonl
    python score_dataset.py pairs.jsonl --model ./simpo --beta 2.5 --out scored.jsonl
    python score_dataset.py rated.jsonl --out scored.jsonl     # it has chosen_score, rejected_score
    python score_dataset.py gaps.npy --gamma0 4 --tau 10 --out scores.npy
    python score_dataset.py logps.jsonl --beta 0.1 --gamma0 4 --tau 10 --out scores.parquet
    torchrun --nproc-per-node=8 score_dataset.py gaps.npy --gamma0 4 --tau 10 --out scores.npy

INPUT is one of two kinds.

Pairs: a .jsonl, .json, .csv or .parquet file, a folder of save_to_disk or a name on the hub, with
prompt, chosen and rejected as text or messages. A model scores them, or chosen_score and
rejected_score on each row do. Summed log-probabilities less those of the reference give the gaps
of γ-DPO; without a reference averaged ones give those of γ-SimPO. The output, .jsonl or .parquet,
has each pair with its line, log-probabilities, gap, target_margin, pair_weight and rank (1 is the
smallest gap), and a picture beside it. A run that was stopped goes on where it was: it keeps
NAME.progress until the output is whole.

Numbers: a 1-D .npy file of gaps, which is memory-mapped, or a .jsonl file with policy_chosen_logps
and policy_rejected_logps on each line and, for γ-DPO, reference_chosen_logps and
reference_rejected_logps, in nats. A .npy output is one structured array with the float32 fields
margin, pair_weight and label_smoothing in the order of the input, NaN where a gap is not finite. A
.parquet output has them as columns, and under torchrun one file for each rank. All ranks need the
same file system. Memory does not grow with the dataset.

An output has its name only once it is whole: until then it is NAME.part.
"""

from __future__ import annotations

import contextlib
import io
import os
import tokenize
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    SUFFIXES,
    Parser,
    WrongInput,
    check_output,
    json_lines,
    number,
    part_of,
    run,
)  # fmt: skip
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
        if first < self.count:
            self.close()
            raise WrongInput(problem) if first == self.rank else SystemExit(2)

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
    count, names = 0, LOGPS
    with out.open("wb") as gaps, tqdm(json_lines(file), desc=file.name, unit=" lines") as pairs:
        gaps.write(header(np.dtype(np.float64), 0))
        buffer: list[float] = []
        for count, (place, pair) in enumerate(pairs, 1):
            with_reference = any(name in pair for name in REFERENCE)
            if count == 1 and with_reference:
                names = LOGPS + REFERENCE
            if with_reference != (len(names) == 4):
                have = "has them" if with_reference else "has no reference log-probabilities"
                raise WrongInput(
                    f"{place}: {have}, unlike the first line: gaps with and without are not "
                    "comparable, so give reference_*_logps on all lines or on none"
                )
            for name in names:
                value = pair.get(name)
                if isinstance(value, bool) or not isinstance(value, float | int):
                    raise WrongInput(f"{place}: {name!r} must be a number, got {value!r:.80}")
            chosen, rejected, *reference = (float(pair[name]) for name in names)
            chosen -= reference[0] if reference else 0.0
            rejected -= reference[1] if reference else 0.0
            buffer.append(beta * (chosen - rejected))
            if len(buffer) == CHUNK:
                gaps.write(np.array(buffer).tobytes())
                buffer.clear()
        if not count:
            raise WrongInput(f"{file}: no pairs: it needs one JSON object a line")
        gaps.write(np.array(buffer).tobytes())
        gaps.seek(0)
        gaps.write(header(np.dtype(np.float64), count))  # of the same length


def header(dtype: np.dtype, size: int) -> bytes:
    """Return the start of a .npy file of a 1-D array."""
    out = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        out, {"descr": description, "fortran_order": False, "shape": (size,)}
    )
    return out.getvalue()


def scores(rule: Any, gaps: np.ndarray, args: Namespace) -> np.ndarray:
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


def write_npy(out: Path, rule: Any, gaps: Gaps, ranks: Ranks, args: Namespace) -> None:
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


def write_parquet(out: Path, rule: Any, gaps: Gaps, args: Namespace) -> None:
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


def arguments() -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", metavar="INPUT", help="pairs, or .npy of gaps or .jsonl of log-probabilities")
    add("--out", type=Path, required=True, help=".npy, .parquet or .jsonl file to write")
    add("--model", help="the language model that scores pairs: hub name or folder")
    add("--reference", help="the model before DPO, for γ-DPO's gaps: hub name or folder")
    add("--batch-size", type=number(int, 1, 1e6), default=8, help="texts a model reads at once")
    add("--max-length", type=number(int, 8, 1e7), default=1024, help="tokens kept of a text")
    add("--gamma0", type=number(float), help="mean margin, reward units; of pairs: their median")
    add("--tau", type=number(float), help="weight of the KL term, nats; of pairs: chosen for them")
    add("--beta", type=number(float),
        help="reward units per nat, or per unit of a score; of pairs 0.1 with --reference, 2.5 "
             "with --model alone, 1 for scores")  # fmt: skip
    add("--centered", action="store_true", help="weights of γ-DPO's loss instead of γ-SimPO's")
    add("--kind", choices=("robust", "conservative"), default="robust", help="of label smoothing")
    args = parser.parse_args()
    file = Path(args.input)
    if file.suffix in (".npy", *SUFFIXES) and not file.is_file():
        parser.error(f"no such file: {args.input}")
    args.pairs = file.suffix != ".npy" and (args.model is not None or not has_logps(file))
    if args.pairs:
        check_pairs(args, parser)
    else:
        args.input = file
        check_numbers(args, parser)
    args.out = check_output(args.out, (".jsonl" if args.pairs else ".npy", ".parquet"))
    if args.out == file.resolve():
        parser.error("--out must not be INPUT")
    if args.out.suffix == ".parquet" and not find_spec("pyarrow"):
        parser.error("a .parquet output needs pyarrow: pip install pyarrow, or write "
                     f"{'.jsonl' if args.pairs else '.npy'}")  # fmt: skip
    return args


def has_logps(file: Path) -> bool:
    """Return whether a file is one of log-probabilities, by its first line."""
    first = next(json_lines(file), ("", {}))[1] if file.suffix == ".jsonl" else {}
    return "chosen_score" not in first and any(name in first for name in LOGPS + REFERENCE)


def check_numbers(args: Namespace, parser: Parser) -> None:
    """Refuse options that do not go with a file of numbers."""
    for name in ("gamma0", "tau"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed for {args.input}")
    is_npy = args.input.suffix == ".npy"
    if not is_npy and args.beta is None:
        parser.error("--beta is needed for a .jsonl file of log-probabilities")
    if is_npy and args.beta is not None:
        parser.error("--beta is for a .jsonl file: gaps in a .npy file are in reward units already")
    if args.model or args.reference:
        parser.error("--model and --reference are for a dataset of pairs: a .npy file has gaps")


def check_pairs(args: Namespace, parser: Parser) -> None:
    """Refuse options that do not go with pairs, and choose beta."""
    if args.reference and not args.model:
        parser.error("--reference needs --model, the policy that was trained from it")
    if args.model and args.model == args.reference:
        parser.error("--model and --reference are the same: every gap would be 0")
    if args.model and not (find_spec("transformers") and find_spec("torch")):
        parser.error("--model needs torch and transformers: pip install torch transformers")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("pairs are scored by one process: run without torchrun")
    if args.beta is None:
        args.beta = (0.1 if args.reference else 2.5) if args.model else 1.0


def main() -> None:
    args = arguments()
    if args.pairs:
        import _pairs

        _pairs.main(args)
    else:
        score_numbers(args, Ranks())


def score_numbers(args: Namespace, ranks: Ranks) -> None:
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
            f"multiplier {rule.multiplier:.6g}, error bound {rule.error_bound:.1e}"
        )
    ranks.close()


if __name__ == "__main__":
    run(main)

"""Score every pair of a preference dataset: its gap, margin, pair weight and rank.

Pairs with small gaps are suspect: their labels may be wrong. The margins are those of one problem
over the whole dataset.

    python score_dataset.py pairs.jsonl --model ./dpo --reference ./sft --out scored.jsonl
    python score_dataset.py pairs.jsonl --model ./simpo --beta 2.5 --out scored.jsonl
    python score_dataset.py rated.jsonl --out scored.jsonl   # it has chosen_score, rejected_score
    python score_dataset.py scored.jsonl --tau 5 --out again.jsonl   # of an earlier output

INPUT is a .jsonl, .json, .csv or .parquet file, a folder of save_to_disk or a name on the hub, with
prompt, chosen and rejected as text or messages. A model scores the pairs. Without --model the
log-probabilities of an earlier output give the gaps, or chosen_score and rejected_score on each
row. Summed log-probabilities less those of the reference give the gaps of γ-DPO; without a
reference averaged ones give those of γ-SimPO.

The output, .jsonl or .parquet, has each pair with its line, log-probabilities, gap, target_margin,
pair_weight and rank (1 is the smallest gap), and a picture beside it. It has its name only once it
is whole: until then it is NAME.part. A run that was stopped goes on where it was: it keeps
NAME.progress until the output is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _common import (
    Parser,
    Row,
    WrongInput,
    check_output,
    check_template,
    kind_of,
    load_tokenizer,
    number,
    part_of,
    parts,
    reader,
    run,
    uninterrupted,
)  # fmt: skip
from tqdm import tqdm

from gamma_loss import choose_settings, match_logistic, solve_margins

# Columns that gaps are made of.
SCORES = ("chosen_score", "rejected_score")
POLICY = ("policy_chosen_logps", "policy_rejected_logps")
BOTH = (*POLICY, "reference_chosen_logps", "reference_rejected_logps")
BETA = {SCORES: 1.0, POLICY: 2.5, BOTH: 0.1}
MEANING = {
    SCORES: "These gaps are differences of the scores in the data. A small gap says that the\n"
    "scorer disagrees with the label; the scorer may be wrong.",
    POLICY: "These gaps say which response the model finds likelier by token. Before preference\n"
    "training that is fluency, not quality. After training the model has learned from the\n"
    "labels that it has seen, even from wrong ones.",
    BOTH: "These gaps say how far training has moved the policy towards the label. A policy\n"
    "that has seen a pair has learned from its label, even a wrong one: score pairs with a\n"
    "policy that was trained on others. A policy before training has no gaps at all.",
}
RANKING = (
    "The ranking by margin is the ranking by gap (Proposition 2): margins tell nothing more\n"
    "about which labels are wrong."
)
BLOCK = 64  # pairs that are scored and kept at a time
SHARES = (0.1, 0.25, 0.5)  # of the gaps' standard deviation, for margins


def arguments() -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", metavar="INPUT", help="pairs: a file, a folder or a name on the hub")
    add("--out", type=Path, required=True, help=".jsonl or .parquet file to write")
    add("--model", help="the language model that scores pairs: hub name or folder")
    add("--reference", help="the model before DPO, for γ-DPO's gaps: hub name or folder")
    add("--batch-size", type=number(int, 1, 1e6), default=8, help="texts a model reads at once")
    add("--max-length", type=number(int, 8, 1e7), default=1024, help="tokens kept of a text")
    add("--gamma0", type=number(float), help="mean margin, reward units; else the median gap")
    add("--tau", type=number(float), help="weight of the KL term, nats; else chosen for the gaps")
    add("--beta", type=number(float),
        help="reward units per nat, or per unit of a score: 0.1 with a reference, 2.5 with a "
             "model alone, 1 for scores")  # fmt: skip
    args = parser.parse_args()
    if args.reference and not args.model:
        parser.error("--reference needs --model, the policy that was trained from it")
    if args.model and args.model == args.reference:
        parser.error("--model and --reference are the same: every gap would be 0")
    if args.model and not (find_spec("transformers") and find_spec("torch")):
        parser.error("--model needs torch and transformers: pip install torch transformers")
    args.out = check_output(args.out, (".jsonl", ".parquet"))
    if args.out == Path(args.input).resolve():
        parser.error("--out must not be INPUT")
    if args.out.suffix == ".parquet" and not find_spec("pyarrow"):
        parser.error("a .parquet output needs pyarrow: pip install pyarrow, or write .jsonl")
    return args


class Source(NamedTuple):
    """The checked data."""

    read: Callable[[], Iterator[tuple[str, Row]]]
    lines: list[int]
    columns: tuple[str, ...]  # that gaps are made of
    numbers: np.ndarray  # in these columns, if no model makes them
    digest: str


def columns_of(row: Row, args: Namespace) -> tuple[str, ...]:
    """Return the names of the columns that the gap of a row is made of."""
    if args.model:
        return BOTH if args.reference else POLICY
    if POLICY[0] in row:
        return BOTH if BOTH[2] in row else POLICY
    return SCORES


def check_pairs(args: Namespace) -> Source:
    """Check every pair."""
    lines, numbers, digest = [], [], hashlib.sha256()
    columns: tuple[str, ...] = ()
    read = reader(args.input)
    for place, row in tqdm(read(), desc="check", unit=" pairs", disable=None):
        lines.append(int(re.findall(r"\d+", place)[-1]))
        found = columns_of(row, args)
        columns = columns or found
        if found != columns:
            raise WrongInput(
                f"{place}: has {', '.join(found)}, and the first row has {', '.join(columns)}: "
                "their gaps are not comparable"
            )
        if not args.model:
            for name in columns:
                if kind_of(row.get(name)) != "a finite number":
                    raise WrongInput(
                        f"{place}: {name!r} must be a finite number, got {row.get(name)!r:.80}: "
                        f"give {', '.join(columns)} on all rows, or --model"
                    )
            numbers.append([float(row[name]) for name in columns])
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Source(read, lines, columns, np.array(numbers), digest.hexdigest())


def prepare(args: Namespace, source: Source) -> Any:
    """Refuse models that cannot be used, and return the tokenizer."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(args.model)
    check_template(args.model, tokenizer, next(source.read())[1])
    for name in filter(None, (args.model, args.reference)):
        if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise WrongInput(f"{name}: its tokenizer has other tokens than that of {args.model}")
        longest = getattr(AutoConfig.from_pretrained(name), "max_position_embeddings", None)
        if longest and args.max_length > longest:
            raise WrongInput(f"--max-length must be at most {longest} for {name}")
    return tokenizer


def encode(tokenizer: Any, row: Row, longest: int) -> tuple[list[list[int]], int, bool]:
    """Return the tokens of both texts, those of the prompt, and whether something was cut."""
    prompt, *responses = parts(row)

    def tokens(texts: tuple[Any, ...], is_prompt: bool = False) -> list[int]:
        if kind_of(responses[0]) == "text":
            end = "" if is_prompt else tokenizer.eos_token or ""
            text = "".join(texts)
            text += "" if text.endswith(end) else end
            return list(tokenizer(text)["input_ids"])
        messages = [message for text in texts for message in text]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    start = tokens((prompt,), is_prompt=True)
    wholes = [tokens((prompt, response)) for response in responses]
    same = [a == b == c for a, b, c in zip(start, *wholes, strict=False)]
    shared = same.index(False) if False in same else len(same)
    start, ends = wholes[0][:shared], [whole[shared:] for whole in wholes]
    if not start:  # a token before the first is needed to score it
        known = tokenizer.bos_token_id, tokenizer.eos_token_id, 0
        start = [next(token for token in known if token is not None)]
    most = max(map(len, ends))
    is_cut = len(start) + most > longest
    if is_cut:  # the prompt loses its start, down to half of the length, then responses their end
        most = min(most, max(longest // 2, longest - len(start)))
        start, ends = start[-(longest - most) :], [end[:most] for end in ends]
    return [start + end for end in ends], len(start), is_cut


def score(model: Any, pairs: list[tuple[list[list[int]], int, bool]], batch: int) -> np.ndarray:
    """Return summed log-probabilities and numbers of tokens of the responses, (pairs, 2, 2)."""
    import torch

    from gamma_loss import sequence_logps

    texts = [(text, start) for both, start, _ in pairs for text in both]
    result = np.zeros((len(texts), 2))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))  # little padding
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        ids = torch.zeros(len(some), max(len(texts[i][0]) for i in some), dtype=torch.long)
        present, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for j, i in enumerate(some):
            text, start = texts[i]
            ids[j, : len(text)], present[j, : len(text)] = torch.tensor(text), 1
            response[j, start : len(text)] = True
        ids, present, response = (each.to(model.device) for each in (ids, present, response))
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=present).logits
            result[some, 0] = sequence_logps(logits, ids, response).double().cpu().numpy()
        result[some, 1] = response.sum(1).cpu().numpy()
    return result.reshape(-1, 2, 2)


def load_model(name: str) -> Any:
    """Load a language model, in bfloat16 on a GPU and in float32 without one."""
    import torch
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if gpu else torch.float32
        )
    except (OSError, ValueError) as error:
        raise WrongInput(f"{name}: cannot be loaded as a language model: {error}") from None
    return model.to("cuda" if gpu else "cpu").eval()


def log_probabilities(args: Namespace, source: Source, tokenizer: Any) -> tuple[np.ndarray, int]:
    """Return the columns of log-probabilities, and how many pairs were cut. It can be resumed."""
    kept = args.out.with_name(args.out.name + ".progress")
    names = [args.model, args.reference] if args.reference else [args.model]
    head = {"data": source.digest, "models": names, "max_length": args.max_length}
    blocks = read_progress(kept, head)
    with kept.open("a", encoding="utf-8") as file:

        @uninterrupted()
        def write(line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if not blocks:
            write(head)
        count = -(-len(source.lines) // BLOCK)
        done = len(blocks)
        for stage, name in enumerate(names):
            skipped = min(max(done - stage * count, 0), count)
            if skipped == count:
                continue
            model = load_model(name)
            rows = islice((row for _, row in source.read()), skipped * BLOCK, None)
            with tqdm(
                total=len(source.lines), initial=skipped * BLOCK, desc=name[-30:], unit=" pairs",
                disable=None,
            ) as bar:  # fmt: skip
                while some := list(islice(rows, BLOCK)):
                    pairs = [encode(tokenizer, row, args.max_length) for row in some]
                    found = score(model, pairs, args.batch_size)
                    block = {"cut": sum(cut for *_, cut in pairs), "scores": found.tolist()}
                    write(block)
                    blocks.append(block)
                    bar.update(len(some))
            del model
    found = np.concatenate([np.array(block["scores"]) for block in blocks])
    logps, tokens = np.moveaxis(found.reshape(len(names), -1, 2, 2), -1, 0)
    if not args.reference:
        logps = logps / np.maximum(tokens, 1)  # of γ-SimPO: means over tokens
    return np.concatenate(logps, axis=1), sum(block["cut"] for block in blocks[:count])


def read_progress(kept: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the blocks that an earlier run scored, and cut off a line that is not whole."""
    if not kept.exists():
        return []
    whole = kept.read_bytes().rpartition(b"\n")[0]
    kept.write_bytes(whole + b"\n" if whole else b"")
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != head:
        raise WrongInput(
            f"{kept} is of a run with other data, models or --max-length: finish that run, or "
            "remove the file"
        )
    return lines[1:]


def choose(gaps: np.ndarray, args: Namespace) -> dict[str, float]:
    """Return gamma0 and tau: the given ones, or some at which the margins of these gaps differ."""
    given = {"gamma0": args.gamma0, "tau": args.tau}
    if args.tau is not None and args.gamma0 is not None:
        return given
    middle = float(np.median(gaps))
    gamma0 = args.gamma0 or (middle if middle > 0 else float(gaps.std()))
    if args.tau is not None:
        return {"gamma0": gamma0, "tau": args.tau}
    try:
        return choose_settings(gaps, gamma0=gamma0, margin_std=SHARES[1] * float(gaps.std()))
    except ValueError:  # this gamma0 allows no such margins
        return {"gamma0": gamma0, "tau": gamma0**2}


def advice(gaps: np.ndarray, gamma0: float, centered: bool) -> Iterator[str]:
    """Yield lines on what settings would do."""
    fits = find_spec("scipy") is not None
    yield f"\nSettings for these gaps, with gamma0 = {gamma0:.3g}:"
    yield f"{'tau':>9}   {'margins':14}" + "  acts like beta times" * fits
    for share in SHARES:
        try:
            found = choose_settings(gaps, gamma0=gamma0, margin_std=share * float(gaps.std()))
        except ValueError as error:
            yield f"        -   {str(error).partition('. Your gaps')[0]}"
            continue
        margins = solve_margins(gaps, **found).margins
        line = f"{found['tau']:9.3g}   {f'{margins.min():.3g} to {margins.max():.3g}':14}"
        if fits:
            match = match_logistic(gaps, **found, centered=centered)
            left = f"{match.unexplained:.1%} of the weights' variance left"
            line += f"  {match.beta_factor:.2f} ({left})"
        yield line


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give the name to write to; the file has its own name once it is whole."""
    part = part_of(out)
    try:
        yield part
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def write_rows(out: Path, rows: Iterator[Row]) -> None:
    """Write a .jsonl or .parquet file."""
    with whole(out) as part:
        if out.suffix == ".jsonl":
            with part.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(list(rows)), part)


def draw(out: Path, gaps: np.ndarray, margins: np.ndarray, gamma0: float) -> None:
    """Draw gaps and margins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from gamma_loss.plots import plot_margins, plot_reward_gaps

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plot_reward_gaps(gaps, ax=left, density=False)
    left.axvline(0, color="#777777", lw=1)
    plot_margins(gaps, margins, gamma0=gamma0, ax=right)
    with whole(out) as part:
        figure.savefig(part, format="png", dpi=150)
    plt.close(figure)


def main() -> None:
    """Score the pairs, write them with their ranks, and say which are suspect."""
    args = arguments()
    source = check_pairs(args)
    numbers, columns = source.numbers, {}
    if args.model:
        numbers, cut = log_probabilities(args, source, prepare(args, source))
        columns = dict(zip(source.columns, numbers.T, strict=True))
        print(f"{cut} of {len(source.lines)} pairs were cut to {args.max_length} tokens.")
    chosen, rejected, *reference = numbers.T
    with np.errstate(over="ignore"):  # it is refused below
        if reference:
            chosen, rejected = chosen - reference[0], rejected - reference[1]
        gaps = (args.beta or BETA[source.columns]) * (chosen - rejected)
    if not np.isfinite(gaps).all():
        line = source.lines[int(np.argmin(np.isfinite(gaps)))]
        raise WrongInput(f"{args.input}: the gap of line {line} is not finite")
    if np.ptp(gaps) == 0:
        raise WrongInput(
            f"{args.input}: all gaps are {gaps[0]:g}, so nothing can be ranked: an untrained "
            "policy is its reference, and equal scores say nothing"
        )
    settings = choose(gaps, args)
    margins, _, error_bound = solve_margins(gaps, **settings)
    centered, gamma0 = source.columns == BOTH, settings["gamma0"]
    weights = np.exp(-np.logaddexp(0, gaps - margins + gamma0 * centered))
    order = np.argsort(gaps, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(1, len(order) + 1)
    columns |= {"gap": gaps, "target_margin": margins, "pair_weight": weights, "rank": ranks}
    stale = BOTH if args.model else ()  # of another model
    rows = (
        {name: row[name] for name in row if name not in stale}
        | {"line": line}
        | {name: values[i].item() for name, values in columns.items()}
        for i, (line, (_, row)) in enumerate(zip(source.lines, source.read(), strict=True))
    )
    write_rows(args.out, rows)
    wrote = f"Wrote {args.out}"
    if find_spec("matplotlib"):
        picture = args.out.with_suffix(".png")
        draw(picture, gaps, margins, gamma0)
        wrote += f" and {picture}"
    args.out.with_name(args.out.name + ".progress").unlink(missing_ok=True)

    negative = int((gaps < 0).sum())
    print(
        f"{len(gaps)} pairs. Gaps from {gaps.min():.3g} to {gaps.max():.3g}, mean "
        f"{gaps.mean():.3g}, standard deviation {gaps.std():.3g}.\n"
        f"{negative} gaps are negative ({negative / len(gaps):.1%}).\n"
        f"Margins from {margins.min():.3g} to {margins.max():.3g} with gamma0 = {gamma0:.3g}, "
        f"tau = {settings['tau']:.3g} (error bound {error_bound:.1e}).\n"
        f"\nThe most suspect pairs, by the smallest gaps:\n rank    line      gap   margin   weight"
    )
    for i in order[:10]:
        shown = f"{gaps[i]:9.3g}{margins[i]:9.3g}{weights[i]:9.3f}"
        print(f"{ranks[i]:5d} {source.lines[i]:7d}{shown}")
    print(*advice(gaps, gamma0, centered), sep="\n")
    print(f"\n{MEANING[source.columns]}\n{RANKING}\n\n{wrote}")


if __name__ == "__main__":
    run(main)

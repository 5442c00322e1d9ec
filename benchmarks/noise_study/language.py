"""A language model as the policy: SmolLM2-135M, of which the last layers are trained.

The prompt asks for a sentence of a film review, the responses are two such sentences, and labels
are people's (`raters`). States before the trained layers are computed once for each text. All runs
under autocast in bfloat16, policy and reference alike, as models are trained; parameters, gradients
and the log-softmax are float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.noise_study import raters
from gamma_loss.torch import sequence_logps

PROMPT = "<|im_start|>user\nWrite one sentence of a film review.<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
TEXTS = 16  # whose logits are made at once


class Tail(nn.Module):
    """The last layers of a language model and its final norm. The head stays as it is."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = layers, norm


class Reviews(NamedTuple):
    """Texts as responses to the prompt, up to the layers that are trained."""

    model: Any  # whole, with the reference's layers
    tokenizer: Any
    tokens: Tensor  # (texts, longest), the prompt's first
    kept: Tensor  # (texts, longest), which are tokens of a response
    states: Tensor  # (texts, longest, width)
    half: bool  # whether matrices are multiplied in bfloat16

    def lengths(self) -> Tensor:
        """Return how many tokens each response has, its end among them."""
        return self.kept.sum(1)

    def reference(self, layers: int) -> Tail:
        """Return a copy of the last layers."""
        inner = self.model.model
        return copy.deepcopy(Tail(inner.layers[-layers:], inner.norm))

    def autocast(self) -> torch.autocast:
        """Return the context that all of the model runs in."""
        return torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.half)

    def logps(self, tail: nn.Module, pairs: Tensor) -> Tensor:
        """Return summed log-probabilities, (pairs, 2), of pairs of texts."""
        texts = pairs.flatten()
        order = self.lengths()[texts].argsort()  # parts of like length have little padding
        with self.autocast():
            parts = [self._logps(tail, part) for part in texts[order].split(TEXTS)]
        return torch.cat(parts)[order.argsort()].view(-1, 2)

    def _logps(self, tail: nn.Module, texts: Tensor) -> Tensor:
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
        for layer in tail.layers:
            hidden = layer(hidden, attention_mask=seen[None, None], position_embeddings=rotation)
        # A token is told by the one before it, a text's first by the prompt's last.
        used = slice(start - 1, longest)
        logits = self.model.lm_head(tail.norm(hidden[0])[index[:, used]])
        return sequence_logps(logits, self.tokens[texts, used], kept[:, used])

    @torch.no_grad()
    def sample(self, tail: nn.Module, count: int, longest: int) -> dict[str, float]:
        """Return the sentiment of what a policy writes, and its divergence from the reference.

        Both are means over ``count`` samples: the compound score of vaderSentiment 3.3.2, a list of
        words with rules, from -1 to 1; and log π − log π_ref in nats a response.
        """
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        inner, head = self.model.model, len(tail.layers)
        own = inner.layers, inner.norm
        prompt = self.tokenizer([PROMPT] * count, return_tensors="pt").to(self.model.device)
        try:
            inner.layers = nn.ModuleList([*own[0][:-head], *tail.layers])
            inner.norm = tail.norm
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
        return {
            "sentiment": round(sum(scores) / count, 4),
            "divergence": round(ratio.mean().item(), 4),
        }

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
    load: Callable[[], Any] = raters.language_model,
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

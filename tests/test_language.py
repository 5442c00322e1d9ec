"""The study's language model: log-probabilities of its last layers are those of the whole."""

import sys
import types

import pytest
import tiny_lm

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from benchmarks.noise_study import language  # noqa: E402

TEXTS = ["the margin", "one convex problem and a long noisy label", "rank", "fast exact queue"]


@pytest.fixture
def model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_lm.build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(folder, max_position_embeddings=256).eval()
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


@pytest.fixture
def reviews(model):
    return language.prepare(TEXTS, 1, "cpu", half=False, load=lambda: model)


def whole(model, tokenizer, text):
    """Sum over a response's tokens, one text alone and no shortcut."""
    tokens = tokenizer(language.PROMPT + text + language.END, return_tensors="pt")["input_ids"]
    start = len(tokenizer(language.PROMPT)["input_ids"])
    logps = model(tokens).logits[0].double().log_softmax(-1)
    return sum(logps[t - 1, tokens[0, t]] for t in range(start, tokens.shape[1]))


def test_log_probabilities_are_the_whole_models(model, reviews):
    pairs = torch.tensor([[0, 1], [2, 3], [1, 1]])
    tail = reviews.reference(1)
    expected = [[whole(*model, TEXTS[i]).item() for i in pair] for pair in pairs]
    for logps in (reviews.logps(tail, pairs), torch.no_grad()(reviews.logps)(tail, pairs)):
        torch.testing.assert_close(
            logps.double(), torch.tensor(expected).double(), rtol=1e-5, atol=0
        )
    tokens = [len(model[1](language.PROMPT + t + language.END)["input_ids"]) for t in TEXTS]
    prompt = len(model[1](language.PROMPT)["input_ids"])
    assert reviews.lengths().tolist() == [count - prompt for count in tokens]


def test_half_precision_is_near(model, reviews):
    half = language.prepare(TEXTS, 1, "cpu", load=lambda: model)
    pairs = torch.tensor([[0, 1], [2, 3]])
    exact, rounded = (each.logps(each.reference(1), pairs) for each in (reviews, half))
    assert rounded.dtype == torch.float32
    error = (rounded / exact - 1).abs().max()
    assert 0 < error < 2**-6  # bfloat16 has eight bits, some errors add up


def test_only_the_copy_is_trained(model, reviews):
    tail = reviews.reference(1).requires_grad_(True)
    reviews.logps(tail, torch.tensor([[0, 1]])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tail.parameters())
    assert all(p.grad is None for p in model[0].parameters())


def test_what_a_policy_writes(model, reviews, monkeypatch):
    class Analyser:
        def polarity_scores(self, text):
            return {"compound": 0.25}

    module = types.SimpleNamespace(SentimentIntensityAnalyzer=Analyser)
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    layers = list(model[0].model.layers)
    tail = reviews.reference(1)
    assert reviews.sample(tail, count=20, longest=8) == {"sentiment": 0.25, "divergence": 0.0}
    for parameter in tail.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    other = reviews.sample(tail, count=20, longest=8)
    assert other["divergence"] > 0.1
    assert list(model[0].model.layers) == layers  # the model is the reference again

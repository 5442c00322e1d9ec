"""One problem over many ranks: real gloo processes against one process that holds all gaps."""

import functools
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import ranks as work
from strategies import HARD, MILD

from gamma_loss import gamma_preference_loss, solve_margins

torch = pytest.importorskip("torch")

GATHER, REDUCE = 2**17, 0
SIZES_OF_16 = {  # uneven, with an empty rank wherever there are three
    1: [(16,)],
    2: [(8, 8), (16, 0), (3, 13)],
    3: [(5, 0, 11), (1, 14, 1)],
    5: [(1, 0, 7, 2, 6), (0, 0, 16, 0, 0)],
}
LIMITS = pytest.mark.parametrize("limit", [GATHER, REDUCE], ids=["gather", "reduce"])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = work.Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@functools.lru_cache(maxsize=4)
def whole(size, hard):
    """Margins, loss and its gradient in one process."""
    gaps = torch.tensor(work.pool(size), requires_grad=True)
    loss, aux = gamma_preference_loss(gaps, **(HARD if hard else MILD))
    loss.backward()
    return {
        "loss": loss.detach().numpy(),
        "gradient": gaps.grad.numpy(),
        "margins": aux.margins.numpy(),
        "multiplier": aux.multiplier.numpy(),
    }


def assert_equal_whole(shards, expected):
    count = len(shards)
    for name in ("margins", "gradient"):
        joined = np.concatenate([each[name] for each in shards])
        joined = joined / count if name == "gradient" else joined  # DDP's average
        np.testing.assert_allclose(joined, expected[name], **CLOSE)
    loss = sum(each["loss"] for each in shards) / count
    np.testing.assert_allclose(loss, expected["loss"], **CLOSE)
    for each in shards:
        np.testing.assert_allclose(each["multiplier"], expected["multiplier"], **CLOSE)
        assert each["error_bound"] == shards[0]["error_bound"] <= 1e-10


@LIMITS
@pytest.mark.parametrize("count", work.RANKS)
def test_sharded_equals_whole(ranks, count, limit):
    for sizes, setting in product(SIZES_OF_16[count], (MILD, HARD)):
        shards = ranks.run(count, work.sharded_loss, sizes, setting, gather_limit=limit)
        assert_equal_whole(shards, whole(16, setting is HARD))


@pytest.mark.parametrize(
    ("sizes", "hard"),
    [
        ((700_001, 299_999), False),
        ((90_000, 0, 60_000), True),
        ((23_456, 76_544, 1, 0, 49_999), True),
    ],
)
def test_sharded_equals_whole_above_the_limit(ranks, sizes, hard):
    shards = ranks.run(len(sizes), work.sharded_loss, sizes, HARD if hard else MILD)
    assert_equal_whole(shards, whole(sum(sizes), hard))


@LIMITS
def test_masks_weights_and_options(ranks, limit):
    """Weights of whole numbers are repeated pairs."""
    counts = np.array([2, 0, 1, 3, 1, 0, 2, 1])
    gaps, options = work.pool(8), {"label_smoothing": 0.1, "centered": True}
    mask = np.array([True] * 7 + [False])
    for sizes, setting in product(((3, 5), (0, 8)), (MILD, HARD)):
        shards = ranks.run(
            2, work.sharded_loss, sizes, setting, gaps, mask, options, counts / 2,
            gather_limit=limit,
        )  # fmt: skip
        kept = counts * mask
        loss, aux = gamma_preference_loss(np.repeat(gaps, kept), **setting, **options)
        margins, gradient = (
            np.concatenate([each[name] for each in shards]) for name in ("margins", "gradient")
        )
        np.testing.assert_allclose(np.repeat(margins, kept), aux.margins, **CLOSE)
        assert np.all(margins[kept == 0] == setting["gamma0"])
        np.testing.assert_allclose(sum(each["loss"] for each in shards) / 2, loss, **CLOSE)
        expected = np.repeat(gradient / 2 / np.maximum(kept, 1), kept)
        np.testing.assert_allclose(expected, -aux.pair_weights / kept.sum(), **CLOSE)
        assert not gradient[kept == 0].any()


@LIMITS
def test_a_rank_with_nan_leaves_the_others_right(ranks, limit):
    gaps, sizes = work.pool(16), (5, 6, 5)
    gaps[5:11] = np.nan
    for setting in (MILD, HARD):
        shards = ranks.run(3, work.sharded_loss, sizes, setting, gaps, gather_limit=limit)
        expected = solve_margins(np.concatenate([gaps[:5], gaps[11:]]), **setting).margins
        for each, margins in ((shards[0], expected[:5]), (shards[2], expected[5:])):
            np.testing.assert_allclose(each["margins"], margins, **CLOSE)
            assert np.isfinite(each["loss"])
            assert np.isfinite(each["gradient"]).all()
        assert np.isnan(shards[1]["margins"]).all()
        assert np.isnan(shards[1]["loss"])


@LIMITS
def test_no_gap_anywhere(ranks, limit):
    empty = ((0, 0, 0), np.zeros(0), None), ((2, 0, 1), np.zeros(3), np.zeros(3, dtype=bool))
    for (sizes, gaps, mask), gamma0 in product(empty, (0.0, 4.0, 20.0)):
        setting = {"gamma0": gamma0, "tau": 2.0}
        shards = ranks.run(3, work.sharded_loss, sizes, setting, gaps, mask, gather_limit=limit)
        for size, each in zip(sizes, shards, strict=True):
            assert each["loss"] == 0
            assert each["error_bound"] <= 1e-10
            assert np.isfinite(each["multiplier"])
            assert not each["gradient"].any()
            np.testing.assert_array_equal(each["margins"], np.full(size, gamma0))


def test_gaps_that_are_not_finite_cost_ranks_that_reduce_no_step(ranks):
    setting = {"gamma0": 1.0, "tau": 0.001}
    few, with_nan = (
        ranks.run(2, work.steps, work.sharded_loss, (1, size - 1), setting, gaps[:size],
                  gather_limit=REDUCE)
        for gaps in [np.array([-60.0, -61.0, np.nan])] for size in (2, 3)
    )  # fmt: skip
    assert with_nan == few
    assert max(few) <= 40


def test_other_reductions_are_over_the_ranks_own_pairs(ranks):
    sizes = (4, 12)
    losses, _ = gamma_preference_loss(work.pool(16), reduction="none", **MILD)
    for reduction in ("sum", "none"):
        shards = ranks.run(2, work.sharded_loss, sizes, MILD, None, None, {"reduction": reduction})
        for rank, each in enumerate(shards):
            expected = work.shard(losses, sizes, rank)
            expected = expected.sum() if reduction == "sum" else expected
            np.testing.assert_allclose(each["loss"], expected, **CLOSE)


@LIMITS
def test_the_contexts_of_all_ranks_join_the_pool(ranks, limit):
    gaps = [work.pool(3), work.pool(0), work.pool(4, seed=1)]
    context = [
        (work.pool(5, seed=2), None),
        (None, None),
        (work.pool(4, seed=3), np.array([True, False, True, True])),
    ]
    for setting in (MILD, HARD):
        margins = ranks.run(3, work.with_context, gaps, context, setting, gather_limit=limit)
        others = np.concatenate([context[0][0], context[2][0][context[2][1]]])
        expected = solve_margins(np.concatenate(gaps), context=others, **setting).margins
        np.testing.assert_allclose(np.concatenate(margins), expected, **CLOSE)


def test_every_rank_issues_the_same_collectives_and_only_small_ones_above_the_limit(ranks):
    gaps = work.pool(16)
    gaps[3:] = np.nan
    ways = (GATHER, {26}), (REDUCE, {2, 4})  # the sizes of the largest collective
    for (limit, sizes), setting in product(ways, (MILD, HARD)):
        logs = ranks.run(
            3, work.collectives, work.sharded_loss, (3, 0, 13), setting, gaps, gather_limit=limit
        )
        assert logs[0] == logs[1] == logs[2]
        assert max(size for _, size in logs[0]) in sizes


def test_few_collectives_outside_mild_settings(ranks):
    for gamma0, tau in ((4.0, 0.1), (3.0, 0.5), (50.0, 1.0)):
        gaps = gamma0 + work.pool(200, scale=max(gamma0 / 3, 1))
        setting = {"gamma0": gamma0, "tau": tau}
        assert np.std(solve_margins(gaps, **setting).margins) > gamma0 / 10
        for log in ranks.run(
            2, work.collectives, work.sharded_loss, (120, 80), setting, gaps, gather_limit=REDUCE
        ):
            assert len(log) <= 15 + 1  # one is the mean's


@pytest.mark.parametrize(
    ("way", "collectives", "sent"),
    # A header of two float64; then 8 gaps and weights in float32, or sums: two counts, three passes
    # (two each), the largest step, and the mass.
    [("gather", 2, 16 + 16 * 4), ("reduce", 7, 16 + (2 + 3 * 2 + 1 + 1) * 4)],
)
def test_the_benchmark_counts_collectives_and_bytes(ranks, way, collectives, sent):
    benchmark = pytest.importorskip("benchmarks.distributed", reason="tqdm is not installed")
    for found in ranks.run(2, benchmark.traffic, 16, way, "llama-3-8b-instruct"):
        assert found == {"collectives": collectives, "bytes": sent}


LOSS, MODULE = "gamma_preference_loss", "GammaPreferenceLoss"
STREAMING = "solve_margins_streaming"
SAME = "ValueError: all ranks of a group must have the same settings: "


OTHERS = [
    ("solve_margins", "tau", 10.0, 0.1),
    ("solve_margins", "dtype", "float64", "float32"),
    ("gamma_simpo_loss", "beta", 1.0, 2.0),
    (LOSS, "gamma0", 4.0, 0.0),
    (LOSS, "reduction", "mean", "sum"),
    (LOSS, "centered", False, True),
    (LOSS, "label_smoothing", 0.0, 0.1),
    (LOSS, "robust", False, True),
    (MODULE, "queue_size", 4, 8),
    (MODULE, "queue_size", 4, 0),
    (MODULE, "training", True, False),
    (MODULE, "centered", False, True),
    (STREAMING, "tau", 10.0, 0.1),
    (STREAMING, "gamma0", 4.0, 0.0),
]


@pytest.mark.parametrize("function", ["solve_margins", "gamma_simpo_loss", LOSS, MODULE, STREAMING])
def test_ranks_with_other_settings_are_told(ranks, function):
    setting = MILD | ({"beta": 1.0} if function == "gamma_simpo_loss" else {})
    gaps = [np.zeros(3)] if function == STREAMING else [1.0, 2.0, 3.0]
    for _, name, first, other in (each for each in OTHERS if each[0] == function):
        of_rank = [(gaps, setting | {name: value}) for value in (first, first, other)]
        prefix = "torch." if name == "dtype" else ""
        first, other = (prefix + x if isinstance(x, str) else x for x in (first, other))
        for error in ranks.run(3, work.refused, function, of_rank):
            assert error == f"{SAME}{name} is {first!r} on rank 0 and {other!r} on 2"
    assert ranks.run(3, work.refused, function, of_rank[:1] * 3) == [None] * 3  # it goes on
    of_rank = [([1.0], MILD), ([1.0], MILD | {"tau": 3.0, "reduction": "sum"})]
    for error in ranks.run(2, work.refused, LOSS, of_rank):  # all that differ are named
        words = "tau is 10.0 on rank 0 and 3.0 on 1, reduction is 'mean' on rank 0 and 'sum' on 1"
        assert words in error


WRONG = [
    ("solve_margins", [[1.0]], {}, "ValueError: reward_gaps must be 1-D"),
    ("solve_margins", [1.0], {"tau": -1.0}, "ValueError: tau must be"),
    ("solve_margins", [1.0], {"impl": "triton"}, "ValueError: impl must be"),
    ("solve_margins", [1.0], {"impl": "compile"}, "ValueError: impl must be"),
    (LOSS, [1.0], {"reduction": "max"}, "ValueError: reduction must be one of"),
    (LOSS, [1.0], {"label_smoothing": 0.7}, "ValueError: label_smoothing must be"),
    (MODULE, [1.0], {"gamma0": -1.0}, "ValueError: gamma0 must be"),
    (MODULE, [1.0], {"queue_size": -1}, "ValueError: queue_size must be"),
    (STREAMING, [np.zeros((2, 2))], {}, "ValueError: chunks must be 1-D"),
    (STREAMING, iter([]), {}, "TypeError: chunks must be readable"),
    (STREAMING, [np.zeros(2)], {"gamma0": -1.0}, "ValueError: gamma0 must be"),
    (STREAMING, work.FailsLater(), {}, "OSError: no disk"),
]


@pytest.mark.parametrize("name", ["solve_margins", LOSS, MODULE, STREAMING])
def test_an_error_of_one_rank_reaches_the_others(ranks, name):
    for function, gaps, options, message in (each for each in WRONG if each[0] == name):
        right = [np.array([-1.0, 3.0])] if function == STREAMING else [-1.0, 3.0]
        of_rank = [(right, MILD), (gaps, MILD | options), (right, MILD)]
        errors = ranks.run(3, work.refused, function, of_rank)
        assert errors[1].startswith(message)
        assert errors[0] == errors[2] == f"RuntimeError: rank 1 of the group failed: {errors[1]}"
        assert ranks.run(3, work.refused, function, of_rank[:1] * 3) == [None] * 3
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup, got s"):
        solve_margins(torch.zeros(2), group="world", **MILD)


def test_a_rank_that_dies_leaves_none_waiting(tmp_path):
    count = 3
    processes = work.Ranks(tmp_path)
    try:
        processes.run(5, work.refused, "solve_margins", [([1.0], MILD)] * 5)  # all have begun
        for pipe in processes.pipes[:count]:
            pipe.send((count, GATHER, work.outlived, ()))
        for pipe in processes.pipes[: count - 1]:
            assert pipe.poll(work.PATIENCE.seconds + 30)
            failed, error = pipe.recv()
            assert not failed, error
            assert "Error: " in error
    finally:
        processes.close()


@functools.lru_cache(maxsize=1)
def trained_in_one_process():
    weights, losses, queue = work.train(None, None, None, 20, MILD)
    assert len(queue) == 40
    assert losses[-1] < losses[0]
    return weights, losses, queue


# Rounding differences of 1e-16 a step, 20 steps, all numbers of order 1.
AFTER_20_STEPS = {"rtol": 0, "atol": 1e-12}


fully_shards = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of torch 2.6 needs a GPU"
)


@pytest.mark.parametrize(
    ("engine", "sizes"),
    [
        ("ddp", (6, 6)),
        ("ddp", (1, 0, 7, 1, 3)),
        pytest.param("fsdp", (12,), marks=fully_shards),
        pytest.param("fsdp", (1, 0, 7, 1, 3), marks=fully_shards),
    ],
)
def test_training_takes_the_steps_of_one_process(ranks, engine, sizes):
    weights, losses, queue = trained_in_one_process()
    results = ranks.run(len(sizes), work.train, engine, sizes, 20, MILD)
    mean_losses = np.mean([losses for _, losses, _ in results], axis=0)
    np.testing.assert_allclose(mean_losses, losses, **AFTER_20_STEPS)
    for their_weights, _, their_queue in results:
        np.testing.assert_allclose(their_weights, weights, **AFTER_20_STEPS)
        np.testing.assert_allclose(their_queue, queue, **AFTER_20_STEPS)
        np.testing.assert_array_equal(their_queue, results[0][2])


def test_metrics_of_a_rank_without_pairs(ranks):
    logs, _ = ranks.run(2, work.logs_of_no_pairs)
    assert np.isnan(logs.pop("gamma/min"))
    assert np.isnan(logs.pop("gamma/max"))
    assert logs.pop("gamma/error_bound") < 1e-5  # float32
    assert set(logs.values()) == {0.0}


def test_the_docs_examples(ranks):
    page = (Path(__file__).parents[1] / "docs" / "queue.md").read_text()
    blocks = re.findall(r"```python\n((?:#|import).*?)```", page, re.DOTALL)
    of_ddp, of_jax, of_mesh = (
        next(text for text in blocks if word in text)
        for word in ("DistributedDataParallel", "queue_init", "shard_map")
    )
    for queue in ranks.run(5, work.run_example, of_ddp):
        assert len(queue) == 5 * 2
    pytest.importorskip("jax")
    names = {}
    exec(compile(of_jax, "queue.md", "exec"), names)
    assert names["queue"].mask.sum() == 3
    names = {}
    exec(compile(of_mesh, "queue.md", "exec"), names)
    assert names["margins"].mean() == pytest.approx(4.0, rel=1e-6)

"""One problem over many ranks: real gloo processes against one process that holds all gaps."""

import functools
import multiprocessing
import re
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
SIZES_ABOVE_THE_LIMIT = [  # the hard setting takes 8 s a million, so most of it is on fewer
    ((1_000_000,), False),
    ((700_001, 299_999), False),
    ((600_000, 0, 400_000), False),
    ((123_456, 376_544, 1, 0, 499_999), False),
    ((150_000,), True),
    ((100_001, 49_999), True),
    ((90_000, 0, 60_000), True),
    ((123_456, 376_544, 1, 0, 499_999), True),
]
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


@pytest.mark.parametrize("limit", [GATHER, REDUCE])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("count", work.RANKS)
def test_sharded_equals_whole_for_16(ranks, count, hard, limit):
    for sizes in SIZES_OF_16[count]:
        setting = HARD if hard else MILD
        shards = ranks.run(count, work.sharded_loss, sizes, setting, gather_limit=limit)
        assert_equal_whole(shards, whole(16, hard))


@pytest.mark.parametrize(("sizes", "hard"), SIZES_ABOVE_THE_LIMIT)
def test_sharded_equals_whole_above_the_limit(ranks, sizes, hard):
    shards = ranks.run(len(sizes), work.sharded_loss, sizes, HARD if hard else MILD)
    assert_equal_whole(shards, whole(sum(sizes), hard))


@pytest.mark.parametrize("limit", [GATHER, REDUCE])
@pytest.mark.parametrize("setting", [MILD, HARD])
def test_a_rank_with_nan_leaves_the_others_right(ranks, setting, limit):
    gaps, sizes = work.pool(16), (5, 6, 5)
    gaps[5:11] = np.nan
    shards = ranks.run(3, work.sharded_loss, sizes, setting, gaps, gather_limit=limit)
    expected = solve_margins(np.concatenate([gaps[:5], gaps[11:]]), **setting).margins
    for each, margins in ((shards[0], expected[:5]), (shards[2], expected[5:])):
        np.testing.assert_allclose(each["margins"], margins, **CLOSE)
        assert np.isfinite(each["loss"])
        assert np.isfinite(each["gradient"]).all()
    assert np.isnan(shards[1]["margins"]).all()
    assert np.isnan(shards[1]["loss"])


@pytest.mark.parametrize("limit", [GATHER, REDUCE])
@pytest.mark.parametrize("sizes", [(6, 10), (0, 16)])
def test_masks_and_options(ranks, sizes, limit):
    gaps, mask = work.pool(16), np.arange(16) % 3 != 0
    options = {"label_smoothing": 0.1, "centered": True}
    shards = ranks.run(2, work.sharded_loss, sizes, HARD, gaps, mask, options, gather_limit=limit)
    leaf = torch.tensor(gaps, requires_grad=True)
    loss, aux = gamma_preference_loss(leaf, mask=torch.tensor(mask), **HARD, **options)
    loss.backward()
    expected = {
        "loss": loss.detach(),
        "gradient": leaf.grad,
        "margins": aux.margins,
        "multiplier": aux.multiplier,
    }
    assert_equal_whole(shards, expected)


@pytest.mark.parametrize("limit", [GATHER, REDUCE])
@pytest.mark.parametrize("hard", [False, True])
def test_whole_weights_are_repeated_pairs(ranks, hard, limit):
    counts, setting = np.array([2, 0, 1, 3, 1, 0, 2, 1]), HARD if hard else MILD
    gaps = work.pool(8)
    arguments = setting, gaps, None, None, counts / 2
    shards = ranks.run(2, work.sharded_loss, (3, 5), *arguments, gather_limit=limit)
    loss, aux = gamma_preference_loss(np.repeat(gaps, counts), **setting)
    margins = np.concatenate([each["margins"] for each in shards])
    np.testing.assert_allclose(np.repeat(margins, counts), aux.margins, **CLOSE)
    assert np.all(margins[counts == 0] == setting["gamma0"])
    np.testing.assert_allclose(sum(each["loss"] for each in shards) / 2, loss, **CLOSE)
    gradient = np.concatenate([each["gradient"] for each in shards]) / 2
    expected = np.repeat(gradient / np.maximum(counts, 1), counts)
    np.testing.assert_allclose(expected, -aux.pair_weights / counts.sum(), **CLOSE)
    assert not gradient[counts == 0].any()


def test_gaps_that_are_not_finite_cost_ranks_that_reduce_no_step(ranks):
    setting = {"gamma0": 1.0, "tau": 0.001}
    few, with_nan = (
        ranks.run(2, work.steps, work.sharded_loss, (1, size - 1), setting, gaps[:size],
                  gather_limit=REDUCE)
        for gaps in [np.array([-60.0, -61.0, np.nan])] for size in (2, 3)
    )  # fmt: skip
    assert with_nan == few
    assert max(few) <= 40


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_are_over_the_ranks_own_pairs(ranks, reduction):
    sizes = (4, 12)
    shards = ranks.run(2, work.sharded_loss, sizes, MILD, None, None, {"reduction": reduction})
    losses, _ = gamma_preference_loss(work.pool(16), reduction="none", **MILD)
    for rank, each in enumerate(shards):
        expected = work.shard(losses, sizes, rank)
        expected = expected.sum() if reduction == "sum" else expected
        np.testing.assert_allclose(each["loss"], expected, **CLOSE)


@pytest.mark.parametrize("limit", [GATHER, REDUCE])
@pytest.mark.parametrize("gamma0", [0.0, 4.0, 20.0])
def test_no_gap_anywhere(ranks, limit, gamma0):
    setting = {"gamma0": gamma0, "tau": 2.0}
    for sizes, gaps, mask in (
        ((0, 0, 0), np.zeros(0), None),
        ((2, 0, 1), np.zeros(3), np.zeros(3, dtype=bool)),
    ):
        for rank, each in enumerate(
            ranks.run(3, work.sharded_loss, sizes, setting, gaps, mask, gather_limit=limit)
        ):
            assert each["loss"] == 0
            assert each["error_bound"] <= 1e-10
            assert np.isfinite(each["multiplier"])
            assert not each["gradient"].any()
            np.testing.assert_array_equal(each["margins"], np.full(sizes[rank], gamma0))


@pytest.mark.parametrize("limit", [GATHER, REDUCE])
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


@pytest.mark.parametrize("setting", [MILD, HARD])
def test_every_rank_issues_the_same_collectives_and_only_small_ones_above_the_limit(ranks, setting):
    gaps = work.pool(16)
    gaps[3:] = np.nan
    for limit, sizes in ((GATHER, {26}), (REDUCE, {2, 4})):  # of a collective, at most
        logs = ranks.run(
            3, work.collectives, work.sharded_loss, (3, 0, 13), setting, gaps, gather_limit=limit
        )
        assert logs[0] == logs[1] == logs[2]
        assert max(size for _, size in logs[0]) in sizes


@pytest.mark.parametrize("setting", [(4.0, 0.1), (3.0, 0.5), (50.0, 1.0)])
def test_few_collectives_outside_mild_settings(ranks, setting):
    gamma0, tau = setting
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


@pytest.mark.parametrize(
    ("function", "name", "first", "other"),
    [
        ("solve_margins", "tau", 10.0, 0.1),
        ("solve_margins", "gamma0", 4.0, 0.0),
        ("solve_margins", "dtype", "float64", "float32"),
        ("gamma_simpo_loss", "beta", 1.0, 2.0),
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
    ],
)
def test_ranks_with_other_settings_are_told(ranks, function, name, first, other):
    setting = MILD | ({"beta": 1.0} if function == "gamma_simpo_loss" else {})
    gaps = [np.zeros(3)] if function == STREAMING else [1.0, 2.0, 3.0]
    of_rank = [(gaps, setting | {name: value}) for value in (first, first, other)]
    prefix = "torch." if name == "dtype" else ""
    first, other = (prefix + x if isinstance(x, str) else x for x in (first, other))
    for error in ranks.run(3, work.refused, function, of_rank):
        assert error == f"{SAME}{name} is {first!r} on rank 0 and {other!r} on 2"
    assert ranks.run(3, work.refused, function, of_rank[:1] * 3) == [None] * 3  # it goes on


def test_all_settings_that_differ_are_named(ranks):
    of_rank = [([1.0], MILD), ([1.0], MILD | {"tau": 3.0, "reduction": "sum"})]
    for error in ranks.run(2, work.refused, LOSS, of_rank):
        assert (
            "tau is 10.0 on rank 0 and 3.0 on 1, reduction is 'mean' on rank 0 and 'sum' on 1"
            in error
        )


WRONG = [
    ("solve_margins", [[1.0]], {}, "ValueError: reward_gaps must be 1-D"),
    ("solve_margins", [1.0], {"tau": -1.0}, "ValueError: tau must be"),
    ("solve_margins", [1.0], {"impl": "triton"}, "ValueError: impl must be"),
    (LOSS, [1.0], {"reduction": "max"}, "ValueError: reduction must be one of"),
    (LOSS, [1.0], {"label_smoothing": 0.7}, "ValueError: label_smoothing must be"),
    (MODULE, [1.0], {"gamma0": -1.0}, "ValueError: gamma0 must be"),
    (MODULE, [1.0], {"queue_size": -1}, "ValueError: queue_size must be"),
    (STREAMING, [np.zeros((2, 2))], {}, "ValueError: chunks must be 1-D"),
    (STREAMING, iter([]), {}, "TypeError: chunks must be readable"),
    (STREAMING, [np.zeros(2)], {"gamma0": -1.0}, "ValueError: gamma0 must be"),
    (STREAMING, work.FailsLater(), {}, "OSError: no disk"),
]


@pytest.mark.parametrize(("function", "gaps", "options", "message"), WRONG)
def test_an_error_of_one_rank_reaches_the_others(ranks, function, gaps, options, message):
    right = [np.array([-1.0, 3.0])] if function == STREAMING else [-1.0, 3.0]
    of_rank = [(right, MILD), (gaps, MILD | options), (right, MILD)]
    errors = ranks.run(3, work.refused, function, of_rank)
    assert errors[1].startswith(message)
    assert errors[0] == errors[2] == f"RuntimeError: rank 1 of the group failed: {errors[1]}"
    assert ranks.run(3, work.refused, function, of_rank[:1] * 3) == [None] * 3


@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_that_dies_leaves_none_waiting(tmp_path, count):
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


def test_wrong_groups():
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup, got s"):
        solve_margins(torch.zeros(2), group="world", **MILD)
    with pytest.raises(ValueError, match="reward_gaps must hold at least one pair"):
        solve_margins(torch.zeros(0), **MILD)


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


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=fully_shards)])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (4, 4, 4), (1, 0, 7, 1, 3)])
def test_training_takes_the_steps_of_one_process(ranks, sizes, engine):
    weights, losses, queue = trained_in_one_process()
    results = ranks.run(len(sizes), work.train, engine, sizes, 20, MILD)
    mean_losses = np.mean([losses for _, losses, _ in results], axis=0)
    np.testing.assert_allclose(mean_losses, losses, **AFTER_20_STEPS)
    for their_weights, _, their_queue in results:
        np.testing.assert_allclose(their_weights, weights, **AFTER_20_STEPS)
        np.testing.assert_allclose(their_queue, queue, **AFTER_20_STEPS)
        np.testing.assert_array_equal(their_queue, results[0][2])


def test_accelerate_has_the_losses_of_one_process(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(
            target=work.accelerated, args=(rank, str(tmp_path), 20, MILD, theirs), daemon=True
        )
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for ours, _ in pipes:
            assert ours.poll(120), "a process does not answer"
            failed, losses = ours.recv()
            assert not failed, losses
            np.testing.assert_allclose(losses, trained_in_one_process()[1], **AFTER_20_STEPS)
    finally:
        for process in processes:
            process.kill()
            process.join()


@fully_shards
def test_a_sharded_run_resumes_to_the_bit(ranks, tmp_path):
    task = (work.train, "fsdp", (4, 3, 5), 20, MILD, str(tmp_path))
    never_stopped, resumed = ranks.run(3, *task), ranks.run(3, *task, True)
    for (*curves, queue), (*their_curves, their_queue) in zip(never_stopped, resumed, strict=True):
        for curve, their_curve in zip(curves, their_curves, strict=True):
            np.testing.assert_array_equal(their_curve, curve[10:])
        np.testing.assert_array_equal(their_queue, queue)


def test_metrics_of_a_rank_without_pairs(ranks):
    logs, _ = ranks.run(2, work.logs_of_no_pairs)
    assert np.isnan(logs.pop("gamma/min"))
    assert np.isnan(logs.pop("gamma/max"))
    assert logs.pop("gamma/error_bound") < 1e-5  # float32
    assert set(logs.values()) == {0.0}


def test_the_docs_examples(ranks):
    page = (Path(__file__).parents[1] / "docs" / "queue.md").read_text()
    blocks = re.findall(r"```python\n((?:#|import).*?)```", page, re.DOTALL)

    def block(word):
        (found,) = (text for text in blocks if word in text)
        return found

    for queue in ranks.run(5, work.run_example, block("DistributedDataParallel")):
        assert len(queue) == 5 * 2
    pytest.importorskip("jax")
    names = {}
    exec(compile(block("queue_init"), "queue.md", "exec"), names)
    assert names["queue"].mask.sum() == 3
    names = {}
    exec(compile(block("shard_map"), "queue.md", "exec"), names)
    assert names["margins"].mean() == pytest.approx(4.0, rel=1e-6)

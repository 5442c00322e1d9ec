"""One problem over many ranks: real gloo processes against one process that holds all gaps."""

import functools
from itertools import product

import numpy as np
import pages
import pytest
import ranks as work
from strategies import HARD, MILD

from gamma_loss import solve_margins

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.xdist_group("ranks")  # which are started once

GATHER, REDUCE = 2**17, 0
LIMITS = pytest.mark.parametrize("limit", [GATHER, REDUCE], ids=["gather", "reduce"])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SIZES_OF_16 = {  # uneven, with an empty rank wherever there are three
    1: [(16,)],
    2: [(8, 8), (16, 0), (3, 13)],
    3: [(5, 0, 11), (1, 14, 1)],
    5: [(1, 0, 7, 2, 6), (0, 0, 16, 0, 0)],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = work.Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


def losses(ranks, of_rank, setting, limit=GATHER):
    return ranks.run(len(of_rank), work.shard_loss, of_rank, setting, gather_limit=limit)


def joined(found, name):
    return np.concatenate([each[name] for each in found])


def assert_equal_whole(found, whole):
    """The loss and gradient of one process are the averages over ranks, as DDP takes them."""
    count = len(found)
    for name in ("margins", "pair_weights"):
        np.testing.assert_allclose(joined(found, name), whole[name], **CLOSE)
    np.testing.assert_allclose(joined(found, "gradient") / count, whole["gradient"], **CLOSE)
    np.testing.assert_allclose(sum(each["loss"] for each in found) / count, whole["loss"], **CLOSE)
    for each in found:
        np.testing.assert_allclose(each["multiplier"], whole["multiplier"], **CLOSE)
        assert each["error_bound"] == found[0]["error_bound"] <= 1e-10


def assert_sharded_equals_whole(ranks, sizes, setting, limit=GATHER, **arrays):
    found = losses(ranks, work.shards(sizes, **arrays), setting, limit)
    assert_equal_whole(found, work.loss(arrays, setting))


@LIMITS
@pytest.mark.parametrize("count", work.RANKS)
def test_sharded_equals_whole(ranks, count, limit):
    for sizes, setting in product(SIZES_OF_16[count], (MILD, HARD)):
        assert_sharded_equals_whole(ranks, sizes, setting, limit, gaps=work.pool(16))


@pytest.mark.parametrize(
    ("sizes", "setting"), [((90_000, 0, 60_000), MILD), ((23_456, 76_544, 1, 0, 49_999), HARD)]
)
def test_sharded_equals_whole_above_the_limit(ranks, sizes, setting):
    assert_sharded_equals_whole(ranks, sizes, setting, gaps=work.pool(150_000))


@LIMITS
def test_masks_weights_and_options(ranks, limit):
    weights, mask = np.array([1.0, 0.0, 0.5, 1.5, 0.5, 0.0, 1.0, 0.5]), np.arange(8) < 7
    for sizes, setting in product(((3, 5), (0, 8)), (MILD, HARD)):
        setting = setting | {"label_smoothing": 0.1, "centered": True}
        assert_sharded_equals_whole(
            ranks, sizes, setting, limit, gaps=work.pool(8), mask=mask, weights=weights
        )


@LIMITS
def test_the_contexts_of_all_ranks_join_the_pool(ranks, limit):
    kept = np.array([True, False, True, True])
    of_rank = [
        {"gaps": work.pool(3), "context": work.pool(5, seed=2)},
        {"gaps": work.pool(0)},
        {"gaps": work.pool(4, seed=1), "context": work.pool(4, seed=3), "context_mask": kept},
    ]
    context = np.concatenate([of_rank[0]["context"], of_rank[2]["context"][kept]])
    whole = {"gaps": joined(of_rank, "gaps"), "context": context}
    for setting in (MILD, HARD):
        found = losses(ranks, of_rank, setting, limit)
        assert_equal_whole(found, work.loss(whole, setting))


@LIMITS
def test_a_rank_with_nan_leaves_the_others_right(ranks, limit):
    gaps = work.pool(16)
    gaps[5:11] = np.nan
    for setting in (MILD, HARD):
        first, nan, last = losses(ranks, work.shards((5, 6, 5), gaps=gaps), setting, limit)
        expected = solve_margins(gaps[np.isfinite(gaps)], **setting).margins
        np.testing.assert_allclose(joined([first, last], "margins"), expected, **CLOSE)
        assert np.isfinite([first["loss"], last["loss"]]).all()
        assert np.isfinite(joined([first, last], "gradient")).all()
        assert np.isnan([nan["loss"], *nan["margins"]]).all()


@LIMITS
def test_no_gap_anywhere(ranks, limit):
    for sizes, gamma0 in product(((0, 0, 0), (2, 0, 1)), (0.0, 4.0, 20.0)):
        zeros = np.zeros(sum(sizes))
        of_rank = work.shards(sizes, gaps=zeros, mask=zeros > 0)
        for size, each in zip(
            sizes, losses(ranks, of_rank, {"gamma0": gamma0, "tau": 2.0}, limit), strict=True
        ):
            assert each["loss"] == 0
            assert each["error_bound"] <= 1e-10
            assert np.isfinite(each["multiplier"])
            assert not each["gradient"].any()
            np.testing.assert_array_equal(each["margins"], np.full(size, gamma0))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_are_over_the_ranks_own_pairs(ranks, reduction):
    gaps, sizes = work.pool(16), (4, 12)
    whole = work.loss({"gaps": gaps}, MILD | {"reduction": "none"})["loss"]
    found = losses(ranks, work.shards(sizes, gaps=gaps), MILD | {"reduction": reduction})
    for each, part in zip(found, work.shards(sizes, losses=whole), strict=True):
        expected = part["losses"].sum() if reduction == "sum" else part["losses"]
        np.testing.assert_allclose(each["loss"], expected, **CLOSE)


# --- what is sent ---


@LIMITS
def test_ranks_issue_the_same_few_collectives_and_small_ones_above_the_limit(ranks, limit):
    most, largest = (3, 26) if limit else (16, 4)
    with_nan = np.where(np.arange(16) < 3, work.pool(16), np.nan)
    problems = [(with_nan, setting) for setting in (MILD, HARD)]
    for gamma0, tau in ((4.0, 0.1), (3.0, 0.5), (50.0, 1.0)):
        gaps = gamma0 + work.pool(16, scale=max(gamma0 / 3, 1))
        problems.append((gaps, {"gamma0": gamma0, "tau": tau}))
        assert np.std(solve_margins(gaps, **problems[-1][1]).margins) > gamma0 / 10
    for gaps, setting in problems:
        first, *others = ranks.run(
            3, work.calls, work.COLLECTIVES, work.shard_loss,
            work.shards((3, 0, 13), gaps=gaps), setting, gather_limit=limit,
        )  # fmt: skip
        assert others == [first, first]
        assert len(first) <= most
        assert max(numbers for _, numbers, _ in first) <= largest


def test_gaps_that_are_not_finite_cost_ranks_that_reduce_no_step(ranks):
    setting, gaps = {"gamma0": 1.0, "tau": 0.001}, np.array([-60.0, -61.0, np.nan])
    few, with_nan = (
        ranks.run(
            2, work.calls, ["gamma_loss._solver.newton_step"], work.shard_loss,
            work.shards((1, size - 1), gaps=gaps[:size]), setting, gather_limit=REDUCE,
        )
        for size in (2, 3)
    )  # fmt: skip
    assert list(map(len, with_nan)) == list(map(len, few))
    assert 1 <= max(map(len, few)) <= 40


# --- errors ---

LOSS, MODULE = "gamma_preference_loss", "GammaPreferenceLoss"
STREAMING = "solve_margins_streaming"
OTHERS = [  # a setting, its value on two ranks and on the third
    ("solve_margins", "tau", 10.0, 0.1),
    ("solve_margins", "dtype", "torch.float64", "torch.float32"),
    ("gamma_simpo_loss", "beta", 1.0, 2.0),
    (LOSS, "gamma0", 4.0, 0.0),
    (LOSS, "reduction", "mean", "sum"),
    (LOSS, "centered", False, True),
    (LOSS, "label_smoothing", 0.0, 0.1),
    (LOSS, "robust", False, True),
    (MODULE, "queue_size", 4, 8),
    (MODULE, "queue_size", 4, 0),
    (MODULE, "training", True, False),
    (STREAMING, "tau", 10.0, 0.1),
]


def test_ranks_with_other_settings_are_told(ranks):
    for function, name, first, other in OTHERS:
        setting = MILD | ({"beta": 1.0} if function == "gamma_simpo_loss" else {})
        gaps = [np.zeros(3)] if function == STREAMING else [1.0, 2.0, 3.0]
        of_rank = [(gaps, setting | {name: value}) for value in (first, first, other)]
        for error in ranks.run(3, work.refused, function, of_rank):
            assert error == (
                "ValueError: all ranks of a group must have the same settings: "
                f"{name} is {first!r} on rank 0 and {other!r} on 2"
            )
        assert ranks.run(3, work.refused, function, of_rank[:1] * 3) == [None] * 3  # it goes on


WRONG = [  # gaps and options of one of three ranks
    ("solve_margins", [[1.0]], {}, "ValueError: reward_gaps must be 1-D"),
    ("solve_margins", [1.0], {"tau": -1.0}, "ValueError: tau must be"),
    ("solve_margins", [1.0], {"impl": "compile"}, "ValueError: impl must be"),
    (LOSS, [1.0], {"reduction": "max"}, "ValueError: reduction must be one of"),
    (MODULE, [1.0], {"gamma0": -1.0}, "ValueError: gamma0 must be"),
    (MODULE, [1.0], {"queue_size": -1}, "ValueError: queue_size must be"),
    (STREAMING, [np.zeros((2, 2))], {}, "ValueError: chunks must be 1-D"),
    (STREAMING, iter([]), {}, "TypeError: chunks must be readable"),
    (STREAMING, [np.zeros(2)], {"gamma0": -1.0}, "ValueError: gamma0 must be"),
    (STREAMING, work.FailsLater(), {}, "OSError: no disk"),
]


def test_an_error_of_one_rank_reaches_the_others(ranks):
    for function, gaps, options, message in WRONG:
        right = [np.array([-1.0, 3.0])] if function == STREAMING else [-1.0, 3.0]
        of_rank = [(right, MILD), (gaps, MILD | options), (right, MILD)]
        errors = ranks.run(3, work.refused, function, of_rank)
        assert errors[1].startswith(message)
        assert errors[0] == errors[2] == f"RuntimeError: rank 1 of the group failed: {errors[1]}"
        assert ranks.run(3, work.refused, function, of_rank[:1] * 3) == [None] * 3


def test_a_group_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup, got s"):
        solve_margins(torch.zeros(2), group="world", **MILD)


def test_a_rank_that_dies_leaves_none_waiting(tmp_path):
    count, processes = 3, work.Ranks(tmp_path)
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


# --- training ---


@functools.cache
def trained_in_one_process():
    weights, losses, queue = work.train(None, None, None, 20, MILD)
    assert len(queue) == 40
    assert losses[-1] < losses[0]
    return weights, losses, queue


# Rounding differences of 1e-16 a step, 20 steps, all numbers of order 1.
AFTER_20_STEPS = {"rtol": 0, "atol": 1e-12}
FSDP = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of torch 2.6 needs a GPU"
)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=FSDP)])
def test_training_takes_the_steps_of_one_process(ranks, engine):
    weights, losses, queue = trained_in_one_process()
    results = ranks.run(5, work.train, engine, (1, 0, 7, 1, 3), 20, MILD)
    mean_losses = np.mean([losses for _, losses, _ in results], axis=0)
    np.testing.assert_allclose(mean_losses, losses, **AFTER_20_STEPS)
    for their_weights, _, their_queue in results:
        np.testing.assert_allclose(their_weights, weights, **AFTER_20_STEPS)
        np.testing.assert_allclose(their_queue, queue, **AFTER_20_STEPS)
        np.testing.assert_array_equal(their_queue, results[0][2])


def test_the_page_s_program_for_many_ranks(ranks):
    (code,) = (each for each in pages.blocks("docs/queue.md") if each.startswith("# torchrun"))
    for queue in ranks.run(5, work.run_example, code):
        assert len(queue) == 5 * 2

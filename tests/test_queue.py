"""The queue of recent gaps, as a value in every library and as a module of torch."""

import copy
import threading
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamma_loss import GapQueue, gamma_preference_loss, queue_init, queue_push

SETTING = {"gamma0": 4.0, "tau": 10.0}


def contents(state):
    gaps, mask = np.asarray(state.gaps), np.asarray(state.mask)
    assert np.all(gaps[~mask] == 0)
    assert np.all(np.diff(mask.astype(int)) >= 0), "empty slots come first"
    return gaps[mask].tolist()


batches = st.lists(
    st.lists(
        st.tuples(
            st.floats(width=32, allow_subnormal=False)
            | st.sampled_from([float("nan"), float("inf"), -float("inf")]),
            st.booleans() | st.none(),
        ),
        max_size=8,
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(batches, st.integers(1, 6))
def test_a_queue_is_a_deque_of_the_finite_unmasked_gaps(batches, capacity):
    state, expected = queue_init(np.zeros(0, dtype=np.float32), capacity), deque(maxlen=capacity)
    for batch in batches:
        gaps = np.array([gap for gap, _ in batch], dtype=np.float32)
        kept = [True if keep is None else keep for _, keep in batch]
        mask = None if all(kept) else np.array(kept)
        state = queue_push(state, gaps, mask)
        expected.extend(
            gap for gap, keep in zip(gaps.tolist(), kept, strict=True) if keep and np.isfinite(gap)
        )
        assert contents(state) == list(expected)


def test_the_same_in_every_library(library):
    state = queue_init(library.array([0.0]), 5)
    for gaps, mask in (
        ([1.0, np.nan, 2.0], [True, True, True]),
        ([3.0, 4.0], [False, True]),
        (list(range(10, 17)), [True] * 6 + [False]),
        ([np.inf], [True]),
    ):
        state = queue_push(state, library.array(gaps), library.array(mask, "bool"))
    assert contents(state) == [11.0, 12.0, 13.0, 14.0, 15.0]
    assert contents(queue_push(state, library.array([0.5], "float32")))[-1] == 0.5


def test_the_order_of_a_long_queue(library):
    rng = np.random.default_rng(0)
    state, expected = queue_init(library.array([0.0]), 700), deque(maxlen=700)
    for pairs in (500, 1000, 40):
        gaps, mask = rng.normal(size=pairs), rng.random(pairs) < 0.4
        state = queue_push(state, library.array(gaps), library.array(mask, "bool"))
        expected.extend(gaps[mask].tolist())
        assert contents(state) == list(expected)


def test_a_gap_beyond_the_queues_dtype_is_dropped():
    with np.errstate(over="ignore"):
        state = queue_push(queue_init(np.zeros(1, np.float32), 3), np.array([1e300, 1.0]))
    assert contents(state) == [1.0]


def test_in_jax_a_training_loop_can_carry_it(jax):
    batches = np.random.default_rng(0).normal(size=(7, 3))

    @jax.jit
    def run(batches):
        def step(state, gaps):
            loss, _ = gamma_preference_loss(
                gaps, context=state.gaps, context_mask=state.mask, **SETTING
            )
            return queue_push(state, gaps), loss

        return jax.lax.scan(step, queue_init(batches[0], 8), batches)

    state, losses = run(jax.numpy.asarray(batches))
    seen = batches.reshape(-1)
    assert contents(state) == seen[-8:].tolist()
    for i in range(7):  # the same without a queue of fixed shape
        expected, _ = gamma_preference_loss(
            batches[i], context=seen[max(0, 3 * i - 8) : 3 * i] if i else None, **SETTING
        )
        np.testing.assert_allclose(losses[i], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: queue_init(np.zeros(1), 0), ValueError, "capacity must be >= 1, got 0"),
        (lambda: queue_init(np.zeros(1), 2.0), TypeError, "capacity must be an int, got float"),
        (lambda: queue_init([0.0]), TypeError, "like must be an array"),
        (
            lambda: queue_push(queue_init(np.zeros(1), 2), np.zeros((1, 1))),
            ValueError,
            r"gaps must be 1-D, one entry a pair, got shape \(1, 1\)",
        ),
        (
            lambda: queue_push(queue_init(np.zeros(1), 2), np.zeros(2), np.ones(3, bool)),
            ValueError,
            "mask must have the shape of gaps",
        ),
    ],
)
def test_wrong_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_wrong_arguments_of_the_module(torch):
    with pytest.raises(ValueError, match="dtype must be one of"):
        GapQueue(dtype=torch.float16)
    with pytest.raises(TypeError, match="gaps must be an array of the same library"):
        GapQueue(2).push(np.zeros(1))
    with pytest.raises(ValueError, match="k must be at most the capacity, 2, got 3"):
        GapQueue(2).sample(3)


def test_module_and_value_are_one_queue(torch):
    queue, state = GapQueue(4), queue_init(torch.zeros(0), 4)
    assert queue.capacity == 4
    assert not queue.context().mask.any()
    for seed in range(3):
        gaps = torch.randn(3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        queue.push(gaps, gaps > -0.5)
        state = queue_push(state, gaps, gaps > -0.5)
        for ours, theirs in zip(queue.context(), state, strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.requires_grad
    before = queue.context()
    queue.push(torch.ones(4))
    assert not torch.equal(before.gaps, queue.gaps), "a context is a copy"


def test_state_dict_round_trip(torch, tmp_path):
    queue, other = GapQueue(4), GapQueue(4)
    queue.push(torch.tensor([1.0, 2.0, 3.0]))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    for each in (queue, other):
        each.push(torch.tensor([4.0, 5.0]))
        assert contents(each.context()) == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("capacity", "kept"), [(2, [3.0, 4.0]), (4, [2.0, 3.0, 4.0]), (6, [2.0, 3.0, 4.0])]
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_another_capacity_gives_the_newest_gaps_that_fit(
    torch, capacity, kept, assign
):
    saved = GapQueue(5)
    saved.push(torch.tensor([2.0, 3.0, 4.0]))
    model = torch.nn.ModuleDict({"queue": GapQueue(capacity)})
    model.load_state_dict(torch.nn.ModuleDict({"queue": saved}).state_dict(), assign=assign)
    assert model["queue"].capacity == capacity
    assert contents(model["queue"].context()) == kept
    model["queue"].push(torch.tensor([5.0]))
    assert contents(model["queue"].context()) == [*kept, 5.0][-capacity:]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_checkpoint_of_another_dtype_with_gaps_that_are_not_finite(torch, dtype, assign):
    model = torch.nn.ModuleDict({"queue": GapQueue(4)})
    gaps = torch.tensor([1.0, torch.nan, torch.inf, 2.0], dtype=getattr(torch, dtype))
    saved = {"queue.gaps": gaps, "queue.mask": torch.tensor([1, 1, 1, 1], dtype=torch.bool)}
    model.load_state_dict(dict(saved), assign=assign)
    queue = model["queue"]
    assert (queue.gaps.dtype, queue.mask.dtype) == (torch.float32, torch.bool)
    assert contents(queue.context()) == [1.0, 2.0]
    queue.push(torch.tensor([7e4]))  # beyond float16
    assert contents(queue.context()) == [1.0, 2.0, 7e4]
    assert gaps.isnan().any(), "the checkpoint is left as it is"


@pytest.mark.parametrize(
    ("gaps", "mask", "words"),
    [
        ([1.0, 2.0], [1.0, 0.0], r"queue\.mask must have a boolean dtype, got torch\.float32"),
        ([1.0, 2.0], [True], r"queue\.mask must have the shape of gaps, \(2,\), got \(1,\)"),
        ([1, 2], [True, True], r"queue\.gaps must have a real floating dtype"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_that_is_no_queue(torch, gaps, mask, words, assign):
    model = torch.nn.ModuleDict({"queue": GapQueue(2)})
    saved = {"queue.gaps": torch.tensor(gaps), "queue.mask": torch.tensor(mask)}
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict(saved, assign=assign)
    assert contents(model["queue"].context()) == []


def test_an_interrupt_anywhere_in_a_push_leaves_a_queue(torch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Interrupt(TorchDispatchMode):
        def __init__(self, left):
            super().__init__()
            self.left = left

        def __torch_dispatch__(self, operator, types, arguments=(), more=None):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return operator(*arguments, **(more or {}))

    for operations in range(100):
        queue = GapQueue(6)
        queue.push(torch.tensor([1.0, 2.0]))
        try:
            with Interrupt(operations):
                queue.push(torch.tensor([3.0, 4.0, 5.0]))
        except KeyboardInterrupt:
            left = queue.gaps[queue.mask].tolist()  # of which no one is an empty slot's
            assert left in ([1.0, 2.0], [4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0])
            queue.push(torch.tensor([6.0]))  # nothing is locked
            assert queue.gaps[queue.mask].tolist() == [*left, 6.0]
        else:
            assert operations > 5
            break


def test_threads_that_push_and_read(torch):
    queue, states, stop = GapQueue(2000), [], threading.Event()

    def read():
        while not stop.is_set():
            states.append(queue.context())

    def push(first):
        for i in range(100):
            queue.push(torch.full((3,), float(first + i)))

    reader = threading.Thread(target=read)
    pushers = [threading.Thread(target=push, args=(1000 * k,)) for k in (1, 2, 3)]
    for thread in (reader, *pushers):
        thread.start()
    for thread in pushers:
        thread.join()
    stop.set()
    reader.join()
    gaps = np.array(contents(queue)).reshape(-1, 3)
    assert np.all(gaps == gaps[:, :1])
    assert sorted(gaps[:, 0]) == [1000 * k + i for k in (1, 2, 3) for i in range(100)]
    assert all((state.gaps[state.mask] > 0).all() for state in states)
    assert all(state.mask.sum() % 3 == 0 for state in states)


def test_a_copy_is_a_queue_of_its_own(torch):
    queue = GapQueue(3)
    queue.push(torch.tensor([1.0, 2.0]))
    other = copy.deepcopy(queue)
    other.push(torch.tensor([3.0, 4.0]))
    assert contents(other) == [2.0, 3.0, 4.0]
    assert contents(queue.context()) == [1.0, 2.0]


def test_casts_and_moves(torch):
    queue = GapQueue(4)
    queue.push(torch.tensor([1.0001, 2.0]))
    for cast in (queue.half, queue.bfloat16, lambda: queue.to(torch.float16)):
        cast()
        assert queue.gaps.dtype == torch.float32
        assert contents(queue.context()) == [np.float32(1.0001), 2.0]
    queue.push(torch.tensor([3.0], dtype=torch.bfloat16))
    assert contents(queue.context()) == [np.float32(1.0001), 2.0, 3.0]
    assert queue.double().gaps.dtype == torch.float64
    assert queue.half().gaps.dtype == torch.float64
    moved = queue.to("meta")
    assert moved.gaps.device == moved.mask.device == torch.device("meta")
    moved.push(torch.zeros(3, device="meta"))


def test_sample(torch):
    def draw(queue, seed, k):
        return queue.sample(k, generator=torch.Generator().manual_seed(seed))

    queue = GapQueue(6)
    queue.push(torch.arange(1.0, 5.0))
    for seed in range(20):
        gaps, mask = draw(queue, seed, 3)
        assert mask.all()
        assert len(set(gaps.tolist()) & {1.0, 2.0, 3.0, 4.0}) == 3
        assert torch.equal(gaps, draw(queue, seed, 3).gaps)
    gaps, mask = draw(queue, 0, 6)
    assert mask.tolist() == [True] * 4 + [False] * 2
    assert sorted(gaps[:4].tolist()) == [1.0, 2.0, 3.0, 4.0]

    # Each of the 4 gaps is drawn first in a quarter of 2,000 draws: 5 standard deviations.
    generator = torch.Generator().manual_seed(1)
    first = torch.stack([queue.sample(1, generator=generator).gaps[0] for _ in range(2000)])
    counts = torch.bincount(first.long(), minlength=5)[1:]
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_torch_compile_makes_one_graph(torch, backend):
    torch.compiler.reset()
    queue, expected = GapQueue(8), GapQueue(8)

    def step(gaps, mask):
        queue.push(gaps, mask)
        return queue.context()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(5):
            gaps = torch.randn(3, generator=torch.Generator().manual_seed(seed))
            state = compiled(gaps, gaps > -1)
            expected.push(gaps, gaps > -1)
            assert contents(state) == contents(expected.context())


@pytest.mark.parametrize("kind", ["state", "module"])
def test_a_queue_is_a_context_with_its_own_mask(kind):
    torch = pytest.importorskip("torch")
    state = queue_push(queue_init(torch.zeros(0), 5), torch.tensor([3.0, -1.0]))
    queue = state
    if kind == "module":
        queue = GapQueue(5)
        queue.push(torch.tensor([3.0, -1.0]))
    gaps, setting = torch.tensor([0.5, 2.0]), {"gamma0": 4.0, "tau": 0.1}
    expected = gamma_preference_loss(gaps, context=state.gaps, context_mask=state.mask, **setting)
    unmasked = gamma_preference_loss(gaps, context=state.gaps, **setting)
    found = gamma_preference_loss(gaps, context=queue, **setting)
    torch.testing.assert_close(tuple(found[1]), tuple(expected[1]), rtol=0, atol=0)
    assert not torch.allclose(found[1].margins, unmasked[1].margins)
    with pytest.raises(ValueError, match="context_mask must be None for a queue as context"):
        gamma_preference_loss(gaps, context=queue, context_mask=state.mask, **setting)

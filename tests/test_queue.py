"""The queue of recent gaps, as a value in every library and as a module of torch."""

import copy
import threading
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamma_loss import GapQueue, gamma_preference_loss, queue_init, queue_push, solve_margins

SETTING = {"gamma0": 4.0, "tau": 10.0}


def contents(state):
    gaps, mask = np.asarray(state.gaps), np.asarray(state.mask)
    assert np.all(gaps[~mask] == 0)
    assert np.all(np.diff(mask.astype(int)) >= 0), "empty slots come first"
    return gaps[mask].tolist()


numbers = st.floats(width=32, allow_subnormal=False) | st.sampled_from([np.nan, np.inf, -np.inf])
batches = st.lists(st.lists(st.tuples(numbers, st.booleans()), max_size=8), max_size=6)


@settings(max_examples=60)
@given(batches, st.booleans(), st.integers(1, 6))
def test_a_queue_is_a_deque_of_the_finite_unmasked_gaps(batches, masked, capacity):
    state, expected = queue_init(np.zeros(0, dtype=np.float32), capacity), deque(maxlen=capacity)
    for batch in batches:
        gaps = np.array([gap for gap, _ in batch], dtype=np.float32)
        mask = np.array([keep for _, keep in batch], dtype=bool) if masked else None
        state = queue_push(state, gaps, mask)
        expected.extend(gaps[np.isfinite(gaps) & (mask if masked else True)].tolist())
        assert contents(state) == list(expected)


def test_a_long_queue_in_every_library_keeps_its_order(library):
    rng = np.random.default_rng(0)
    state, expected = queue_init(library.array([0.0]), 700), deque(maxlen=700)
    for _ in range(3):
        gaps, mask = rng.normal(size=1000), rng.random(1000) < 0.4
        state = queue_push(state, library.array(gaps), library.array(mask, "bool"))
        expected.extend(gaps[mask].tolist())
        assert contents(state) == list(expected)
    with np.errstate(over="ignore"):  # beyond the queue's dtype
        state = queue_init(library.array([0.0], "float32"), 3)
        assert contents(queue_push(state, library.array([1e300, 0.5]))) == [0.5]


def test_in_jax_a_training_loop_can_carry_it(jax):
    def step(state, gaps):
        loss, _ = gamma_preference_loss(gaps, context=state, **SETTING)
        return queue_push(state, gaps), loss

    @jax.jit
    def run(batches):
        return jax.lax.scan(step, queue_init(batches[0], 8), batches)

    batches = np.random.default_rng(0).normal(size=(7, 3))
    state, losses = run(jax.numpy.asarray(batches))
    assert contents(state) == batches.reshape(-1)[-8:].tolist()
    state = queue_init(batches[0], 8)
    for gaps, loss in zip(batches, losses, strict=True):  # the same in NumPy
        state, expected = step(state, gaps)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_module_and_value_are_one_queue_and_a_context_is_a_copy(torch):
    queue, state = GapQueue(4), queue_init(torch.zeros(0), 4)
    assert not queue.context().mask.any()
    for seed in range(3):
        gaps = torch.randn(3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        queue.push(gaps, gaps > -0.5)
        state = queue_push(state, gaps, gaps > -0.5)
        for ours, theirs in zip(queue.context(), state, strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.requires_grad
    before, other = queue.context(), copy.deepcopy(queue)
    queue.push(torch.ones(4))
    other.push(torch.tensor([3.0]))
    assert contents(before) == contents(state)
    assert contents(queue.context()) == [1.0] * 4


def restore(torch, capacity, saved, assign=False):
    """A queue in a module that takes a state_dict."""
    queue = GapQueue(capacity)
    torch.nn.ModuleDict({"queue": queue}).load_state_dict(dict(saved), assign=assign)
    return queue


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("capacity", [2, 5, 6])
def test_a_checkpoint_gives_the_newest_gaps_that_fit(torch, capacity, assign):
    saved = GapQueue(5)
    saved.push(torch.tensor([2.0, 3.0, 4.0]))
    state = torch.nn.ModuleDict({"queue": saved}).state_dict()
    queue = restore(torch, capacity, state, assign)
    assert queue.capacity == capacity
    assert contents(queue.context()) == [2.0, 3.0, 4.0][-capacity:]
    queue.push(torch.tensor([5.0]))
    assert contents(queue.context()) == [2.0, 3.0, 4.0, 5.0][-capacity:]
    assert contents(saved.context()) == [2.0, 3.0, 4.0], "the checkpoint is left as it is"


@pytest.mark.parametrize(("dtype", "assign"), [("float16", False), ("float64", True)])
def test_a_checkpoint_of_another_dtype_with_gaps_that_are_not_finite(torch, dtype, assign):
    gaps = torch.tensor([1.0, torch.nan, torch.inf, 2.0], dtype=getattr(torch, dtype))
    saved = {"queue.gaps": gaps, "queue.mask": torch.ones(4, dtype=torch.bool)}
    queue = restore(torch, 4, saved, assign)
    assert (queue.gaps.dtype, queue.mask.dtype) == (torch.float32, torch.bool)
    queue.push(torch.tensor([7e4]))  # beyond float16
    assert contents(queue.context()) == [1.0, 2.0, 7e4]


def test_a_checkpoint_that_is_no_queue_is_refused(torch):
    for gaps, mask, words in [
        ([1.0, 2.0], [1.0, 0.0], r"queue\.mask must have a boolean dtype, got torch\.float32"),
        ([1.0, 2.0], [True], r"queue\.mask must have the shape of gaps, \(2,\), got \(1,\)"),
        ([1, 2], [True, True], r"queue\.gaps must have a real floating dtype"),
    ]:
        saved = {"queue.gaps": torch.tensor(gaps), "queue.mask": torch.tensor(mask)}
        with pytest.raises(RuntimeError, match=words):
            restore(torch, 2, saved)


def test_an_interrupt_anywhere_in_a_push_leaves_a_queue(torch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Interrupt(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), more=None):
            if next(countdown) == 0:
                raise KeyboardInterrupt
            return operator(*arguments, **(more or {}))

    found = []
    for operations in range(100):
        queue, countdown = GapQueue(6), iter(range(operations, -1, -1))
        queue.push(torch.tensor([1.0, 2.0]))
        try:
            with Interrupt():
                queue.push(torch.tensor([3.0, 4.0, 5.0]))
            break
        except KeyboardInterrupt:
            found.append(queue.gaps[queue.mask].tolist())  # of which none is an empty slot's
            queue.push(torch.tensor([6.0]))  # nothing is locked
            assert queue.gaps[queue.mask].tolist() == [*found[-1], 6.0]
    assert len(found) > 5
    assert all(gaps in ([1.0, 2.0], [4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]) for gaps in found)


def test_threads_that_push_and_read(torch):
    queue, states = GapQueue(2000), []

    def push(first):
        for i in range(100):
            queue.push(torch.full((3,), float(first + i)))

    pushers = [threading.Thread(target=push, args=(1000 * k,)) for k in (1, 2, 3)]
    for thread in pushers:
        thread.start()
    while any(thread.is_alive() for thread in pushers):
        states.append(queue.context())
    gaps = np.array(contents(queue)).reshape(-1, 3)
    assert np.all(gaps == gaps[:, :1])
    assert sorted(gaps[:, 0]) == [1000 * k + i for k in (1, 2, 3) for i in range(100)]
    assert all((state.gaps[state.mask] > 0).all() for state in states)
    assert all(state.mask.sum() % 3 == 0 for state in states)


def test_casts_and_moves(torch):
    queue = GapQueue(4)
    queue.push(torch.tensor([1.0001, 2.0]))
    assert queue.half() is queue.to(torch.bfloat16) is queue
    assert queue.gaps.dtype == torch.float32
    queue.push(torch.tensor([3.0], dtype=torch.bfloat16))
    assert contents(queue.context()) == [np.float32(1.0001), 2.0, 3.0]
    assert queue.double().half().gaps.dtype == torch.float64
    moved = queue.to("meta")
    assert moved.gaps.device == moved.mask.device == torch.device("meta")
    moved.push(torch.zeros(3, device="meta"))


def test_a_sample_is_drawn_evenly_without_replacement(torch):
    generator, queue = torch.Generator().manual_seed(1), GapQueue(6)
    queue.push(torch.arange(1.0, 5.0))
    counts = torch.zeros(5)
    for _ in range(2000):
        gaps, mask = queue.sample(3, generator=generator)
        assert mask.all()
        assert len(set(gaps.tolist()) & {1.0, 2.0, 3.0, 4.0}) == 3
        counts[int(gaps[0])] += 1
    # Each of the 4 gaps is drawn first in a quarter of the draws: 5 standard deviations.
    assert (counts[1:] - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    gaps, mask = queue.sample(6, generator=generator)
    assert mask.tolist() == [True] * 4 + [False] * 2
    assert sorted(gaps[:4].tolist()) == [1.0, 2.0, 3.0, 4.0]
    one, same = (queue.sample(3, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.gaps, same.gaps)


def test_a_queue_is_a_context_with_its_own_mask(torch):
    recent, gaps = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    setting = {"gamma0": 4.0, "tau": 0.1}
    state, queue = queue_push(queue_init(torch.zeros(0), 5), recent), GapQueue(5)
    queue.push(recent)
    expected = solve_margins(gaps, context=recent, **setting).margins
    for either in (state, queue):
        _, aux = gamma_preference_loss(gaps, context=either, **setting)
        torch.testing.assert_close(aux.margins, expected)
    unmasked = solve_margins(gaps, context=state.gaps, **setting).margins
    assert not torch.allclose(expected, unmasked)

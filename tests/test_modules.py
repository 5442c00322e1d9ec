"""The losses as modules: their queue under training, evaluation and everything that runs twice."""

import copy
import inspect
import pickle
import re
import warnings

import numpy as np
import pytest

import gamma_loss
from gamma_loss import GammaDPOLoss, GammaPreferenceLoss, GammaSimPOLoss

SETTING = {"beta": 0.5, "gamma0": 2.0, "tau": 1.5}
TWINS = pytest.mark.parametrize(
    ("module", "function", "arrays", "setting"),
    [
        (GammaDPOLoss, gamma_loss.gamma_dpo_loss, 4, SETTING),
        (GammaSimPOLoss, gamma_loss.gamma_simpo_loss, 2, SETTING),
        (GammaPreferenceLoss, gamma_loss.gamma_preference_loss, 1, {"gamma0": 2.0, "tau": 1.5}),
    ],
)


def logps(torch, arrays=1, seed=0):
    rows = np.random.default_rng(seed).normal(size=(arrays, 3)) * 3
    return [torch.tensor(row, requires_grad=True) for row in rows]


def stored(module):
    gaps, mask = module.queue.context()
    return gaps[mask].tolist()


def preference_loss(queue_size=8):
    return GammaPreferenceLoss(gamma0=2.0, tau=1.5, queue_size=queue_size).double()


@TWINS
def test_arguments_and_defaults_are_the_functions(torch, module, function, arrays, setting):
    def keywords(of):
        parameters = inspect.signature(of).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    of_a_call = dict.fromkeys(["context", "context_mask", "mask", "weights"])
    assert of_a_call | keywords(module) == keywords(function) | {"queue_size": 2048}
    forward = list(inspect.signature(module.forward).parameters)[1:]
    assert forward == [*list(inspect.signature(function).parameters)[:arrays], "mask", "weights"]
    alone = module(**setting, queue_size=0)
    assert alone.queue is None
    assert not alone.state_dict()
    for seed in range(2):
        batch = logps(torch, arrays, seed)
        torch.testing.assert_close(alone(*batch), function(*batch, **setting))


@TWINS
def test_training_solves_over_queue_and_batch_then_pushes(torch, module, function, arrays, setting):
    """Of micro-batches each is pushed once; a gap of any weight is one gap in the queue."""
    setting = setting | {"label_smoothing": 0.1, "robust": True, "centered": True}
    loss_module = module(**setting, queue_size=7).double()
    seen = torch.zeros(0, dtype=torch.float64)
    for seed in range(4):
        batch, mask = logps(torch, arrays, seed), torch.tensor([True, seed != 2, True])
        given = {"mask": mask, "weights": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)}
        loss, aux = loss_module(*batch, **given)
        context = {"context": seen} if len(seen) else {}
        expected, expected_aux = function(*batch, **given, **context, **setting)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(aux, expected_aux, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(loss, batch[:2]), torch.autograd.grad(expected, batch[:2])
        )
        seen = torch.cat([seen, aux.reward_gaps[mask]])[-7:]
        assert stored(loss_module) == seen.tolist()


def test_evaluation_reads_and_never_writes(torch):
    loss_module = preference_loss()
    loss_module(*logps(torch))
    saved, (batch,) = stored(loss_module), logps(torch, seed=1)
    loss, _ = loss_module.eval()(batch)
    assert stored(loss_module) == saved
    assert torch.equal(loss_module.train()(batch)[0], loss), "training solves over the same pool"
    assert len(stored(loss_module)) == 6


def test_settings_can_follow_a_schedule(torch):
    loss_module, (batch,) = preference_loss(queue_size=0), logps(torch)
    loss_module.settings["gamma0"] = 3.0
    expected, _ = gamma_loss.gamma_preference_loss(batch, gamma0=3.0, tau=1.5)
    assert torch.equal(loss_module(batch)[0], expected)
    assert "gamma0=3.0" in repr(loss_module)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_pushes_once_and_changes_no_bit(torch, reentrant):
    plain, checkpointed, calls = preference_loss(), preference_loss(), []

    def run(batch):
        calls.append(1)
        return checkpointed(batch * 2)[0]

    for seed in range(4):
        (batch,), (same,) = logps(torch, seed=seed), logps(torch, seed=seed)
        plain(batch * 2)[0].backward()
        torch.utils.checkpoint.checkpoint(run, same, use_reentrant=reentrant).backward()
        assert torch.equal(same.grad, batch.grad)
        assert stored(checkpointed) == stored(plain)
    assert len(calls) == 2 * 4
    assert len(stored(plain)) == 8


# --- copies and checkpoints ---


def test_a_copy_keeps_the_group_and_has_a_queue_of_its_own(torch):
    distributed = torch.distributed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        loss_module = GammaDPOLoss(**SETTING, group=distributed.group.WORLD)
        loss_module(*logps(torch, 4))
        saved = pickle.dumps(loss_module)
        for copied in (copy.deepcopy(loss_module), pickle.loads(saved)):  # noqa: S301
            assert copied.group is loss_module.group
            assert copied.settings == loss_module.settings
            assert stored(copied) == stored(loss_module)
            copied(*logps(torch, 4, seed=1))
            assert len(stored(copied)) == 2 * len(stored(loss_module))
        other = GammaDPOLoss(**SETTING, group=distributed.new_group())
        assert copy.deepcopy(other).group is other.group
        with pytest.raises(TypeError, match="got another group: save its state_dict"):
            pickle.dumps(other)
    finally:
        distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match="init_process_group before it is unpickled"):
        pickle.loads(saved)  # noqa: S301


@pytest.mark.parametrize(("name", "value"), [("beta", 1.0), ("gamma0", 4.0)])
def test_a_saved_queue_is_loaded_where_its_gaps_have_the_same_units(torch, name, value):
    first = GammaDPOLoss(**SETTING)
    first(*logps(torch, 4))
    saved = torch.nn.ModuleList([first]).state_dict()
    same = GammaDPOLoss(**SETTING | {"tau": 9.0}).half()
    other, again = (GammaDPOLoss(**SETTING | {name: value}) for _ in range(2))
    torch.nn.ModuleList([same]).load_state_dict(saved)  # without a warning
    assert stored(same) == stored(first) != []
    words = rf"filled with .*{name} = {SETTING[name]:g}.* has .*{name} = {value:g}.* starts empty"
    with pytest.warns(UserWarning, match=words):
        torch.nn.ModuleList([other]).load_state_dict(saved)
    assert stored(other) == []
    assert "0.queue.mask" in saved, "the checkpoint is left as it is"
    again.load_state_dict(other.state_dict())  # whose gaps would be of the new units
    GammaDPOLoss(**SETTING, queue_size=0).load_state_dict(first.state_dict())
    first.settings["gamma0"] = 3.0  # as a schedule does: the units of the queue stay
    same.load_state_dict(first.state_dict())
    assert stored(same) == stored(first) != []


def test_tools_for_distributed_checkpoints_take_the_state(torch):
    """They look up each key of a state as an attribute."""
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    first, second = (torch.nn.ModuleList([GammaDPOLoss(**SETTING)]) for _ in range(2))
    first[0](*logps(torch, 4))
    state_dict.set_model_state_dict(second, state_dict.get_model_state_dict(first))
    assert stored(second[0]) == stored(first[0]) != []


# --- a run without effect ---


def warned(loss_module, batches, **given):
    """The number of each training forward that warned, and what it said."""
    found = []
    for number, batch in enumerate(batches, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_module(*batch, **given)
        found += [(number, str(each.message)) for each in caught]
    return found


@pytest.mark.parametrize("queue_size", [0, 64])
def test_a_run_in_which_nothing_happens_says_so_once_and_names_a_tau_that_helps(torch, queue_size):
    torch.manual_seed(0)
    batches = [[torch.randn(3) + x for x in (1.0, 0.0, 0.0, 0.0)] for _ in range(250)]
    setting = {"beta": 1.0, "gamma0": 2.0, "queue_size": queue_size}
    idle = GammaDPOLoss(tau=1e5, **setting)
    idle.eval()(*batches[0])  # an evaluation is no step
    ((number, message),) = warned(idle.train(), batches)
    assert number == 100
    assert "gamma0 = 2 and tau = 100000 this run is DPO to rounding" in message
    better = float(re.search(r"tau = ([\d.e+-]+) would", message)[1])
    size = queue_size or 3
    assert f"the last {size} gaps" in message
    pool = torch.cat([b[0] - b[2] - (b[1] - b[3]) for b in batches[:100]])[-size:]
    margins = gamma_loss.solve_margins(pool, gamma0=2.0, tau=better).margins
    assert float(margins.std(correction=0)) == pytest.approx(0.2, rel=0.1)
    assert warned(GammaDPOLoss(tau=better, **setting), batches) == []


def test_where_no_tau_helps_the_reason_is_said(torch):
    loss_module = GammaPreferenceLoss(gamma0=4.0, tau=1.0, queue_size=0)
    ((_, message),) = warned(loss_module, [[torch.ones(1)]] * 101)
    assert re.search("For the last 1 gaps.*: .*equal, and so are their margins", message)


def test_a_first_batch_without_pairs_is_said_and_a_hundred_are_an_error(torch):
    nothing = {"mask": torch.zeros(2, dtype=torch.bool)}
    loss_module, without = (
        GammaPreferenceLoss(gamma0=4.0, tau=1.0, queue_size=size) for size in (64, 0)
    )
    ((number, message),) = warned(loss_module, [[torch.randn(2)]] * 99, **nothing)
    assert number == 1
    assert "no pair of the first batch takes part" in message
    with pytest.raises(RuntimeError, match="no pair took part in a hundred steps of training"):
        loss_module(torch.randn(2), **nothing)
    # Without a queue it knows of the last batch only.
    assert len(warned(without, [[torch.randn(2)]] * 101, **nothing)) == 1

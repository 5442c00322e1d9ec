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
TWINS = [
    (GammaDPOLoss, gamma_loss.gamma_dpo_loss, 4, SETTING),
    (GammaSimPOLoss, gamma_loss.gamma_simpo_loss, 2, SETTING),
    (GammaPreferenceLoss, gamma_loss.gamma_preference_loss, 1, {"gamma0": 2.0, "tau": 1.5}),
]


def logps(torch, arrays, pairs=3, seed=0):
    rows = np.random.default_rng(seed).normal(size=(arrays, pairs)) * 3
    return [torch.tensor(row, requires_grad=True) for row in rows]


def stored(module):
    gaps, mask = module.queue.context()
    return gaps[mask].tolist()


def preference_loss(queue_size=8):
    return GammaPreferenceLoss(gamma0=2.0, tau=1.5, queue_size=queue_size).double()


@pytest.mark.parametrize(("module", "function", "arrays", "setting"), TWINS)
def test_the_defaults_are_the_functions(torch, module, function, arrays, setting):
    def keywords(of):
        parameters = inspect.signature(of).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    ours, theirs = keywords(module), keywords(function)
    assert ours.pop("queue_size") == 2048
    assert ours.pop("group") is theirs.pop("group") is None
    for name in ("context", "context_mask", "mask", "weights"):
        theirs.pop(name)
    assert ours == theirs
    forward = list(inspect.signature(module.forward).parameters)[1:]
    assert forward == [*list(inspect.signature(function).parameters)[:arrays], "mask", "weights"]


@pytest.mark.parametrize(("module", "function", "arrays", "setting"), TWINS)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "robust": True, "centered": True}]
)
def test_training_solves_over_queue_and_batch_then_pushes(
    torch, module, function, arrays, setting, options
):
    loss_module = module(**setting, **options, queue_size=7).double()
    seen = torch.zeros(0, dtype=torch.float64)
    for seed in range(4):
        batch = logps(torch, arrays, seed=seed)
        mask = torch.tensor([True, seed != 2, True])
        loss, aux = loss_module(*batch, mask=mask)
        context = {"context": seen} if len(seen) else {}
        expected, expected_aux = function(*batch, mask=mask, **context, **setting, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(aux, expected_aux, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(loss, batch[:2]), torch.autograd.grad(expected, batch[:2])
        )
        seen = torch.cat([seen, aux.reward_gaps[mask]])[-7:]
        assert stored(loss_module) == seen.tolist()


@pytest.mark.parametrize(("module", "function", "arrays", "setting"), TWINS)
def test_without_a_queue_it_is_the_function(torch, module, function, arrays, setting):
    loss_module = module(**setting, queue_size=0)
    assert loss_module.queue is None
    assert not loss_module.state_dict()
    for seed in range(2):
        batch = logps(torch, arrays, seed=seed)
        torch.testing.assert_close(loss_module(*batch), function(*batch, **setting))


def test_evaluation_reads_and_never_writes(torch):
    loss_module = preference_loss()
    loss_module(*logps(torch, 1, seed=0))
    saved = copy.deepcopy(loss_module.state_dict())
    loss_module.eval()
    (batch,) = logps(torch, 1, seed=1)
    loss, _ = loss_module(batch)
    assert torch.equal(loss_module.state_dict()["queue.gaps"], saved["queue.gaps"])
    assert torch.equal(loss_module.state_dict()["queue.mask"], saved["queue.mask"])
    loss_module.train()
    assert torch.equal(loss_module(batch)[0], loss), "training solves over the same pool"
    assert len(stored(loss_module)) == 6


def test_what_is_not_finite_is_seen_in_the_loss_and_not_stored(torch):
    loss_module = preference_loss()
    loss, _ = loss_module(torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64))
    assert not torch.isfinite(loss)
    assert stored(loss_module) == [1.0]
    loss, _ = loss_module(torch.tensor([2.0], dtype=torch.float64))
    assert torch.isfinite(loss)


def test_settings_can_follow_a_schedule(torch):
    loss_module, (batch,) = preference_loss(queue_size=0), logps(torch, 1)
    loss_module.settings["gamma0"] = 3.0
    expected, _ = gamma_loss.gamma_preference_loss(batch, gamma0=3.0, tau=1.5)
    assert torch.equal(loss_module(batch)[0], expected)
    assert "gamma0=3.0" in repr(loss_module)


def test_gradient_accumulation_pushes_each_micro_batch_once(torch):
    loss_module = preference_loss(queue_size=16)
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    pushed = []
    for seed in range(4):
        (batch,) = logps(torch, 1, seed=seed)
        loss, aux = loss_module(parameter * batch.detach())
        (loss / 4).backward()
        pushed += aux.reward_gaps.tolist()
    assert stored(loss_module) == pushed


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_pushes_once_and_changes_no_bit(torch, reentrant):
    plain, checkpointed = preference_loss(), preference_loss()
    for seed in range(4):
        gradients = []
        for loss_module in (plain, checkpointed):
            (batch,) = logps(torch, 1, seed=seed)
            calls = []

            def run(batch, loss_module=loss_module, calls=calls):
                calls.append(1)
                return loss_module(batch * 2)[0]

            if loss_module is plain:
                loss = run(batch)
            else:
                loss = torch.utils.checkpoint.checkpoint(run, batch, use_reentrant=reentrant)
            loss.backward()
            assert len(calls) == (1 if loss_module is plain else 2)
            gradients.append(batch.grad)
        assert torch.equal(*gradients)
        assert stored(plain) == stored(checkpointed)
    assert len(stored(plain)) == 8


def test_a_copy_keeps_the_group_and_has_a_queue_of_its_own(torch):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch is without distributed")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        loss_module = GammaDPOLoss(**SETTING, group=distributed.group.WORLD)
        loss_module(*logps(torch, 4))
        average = torch.optim.swa_utils.AveragedModel(loss_module)
        assert average.module.group is loss_module.group
        average.module(*logps(torch, 4, seed=1))
        assert len(stored(loss_module)) * 2 == len(stored(average.module))
        assert average.module.settings == loss_module.settings

        saved = pickle.dumps(loss_module)
        again = pickle.loads(saved)  # noqa: S301
        assert again.group is loss_module.group
        assert stored(again) == stored(loss_module)
        again(*logps(torch, 4, seed=1))
        assert len(stored(again)) == 2 * len(stored(loss_module))
        other = GammaDPOLoss(**SETTING, group=distributed.new_group())
        assert copy.copy(other).group is copy.deepcopy(other).group is other.group
        with pytest.raises(TypeError, match="got another group: save its state_dict"):
            pickle.dumps(other)
    finally:
        distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match="init_process_group before it is unpickled"):
        pickle.loads(saved)  # noqa: S301


def test_a_retried_step_starts_from_the_saved_state(torch):
    loss_module, never_failed = preference_loss(), preference_loss()
    for seed in range(3):
        (batch,) = logps(torch, 1, seed=seed)
        saved = copy.deepcopy(loss_module.state_dict())
        loss_module(batch)
        loss_module.load_state_dict(saved)  # the step failed later on
        again, _ = loss_module(batch)
        assert torch.equal(again, never_failed(batch)[0])
        assert stored(loss_module) == stored(never_failed)


@pytest.mark.parametrize("changed", [{"beta": 1.0}, {"gamma0": 4.0}])
def test_gaps_of_other_units_are_not_loaded(torch, tmp_path, changed):
    first = GammaDPOLoss(**SETTING)
    first(*logps(torch, 4))
    torch.save(torch.nn.ModuleList([first]).state_dict(), tmp_path / "loss.pt")
    saved = torch.load(tmp_path / "loss.pt", weights_only=True)
    same, other = GammaDPOLoss(**SETTING | {"tau": 9.0}).half(), GammaDPOLoss(**SETTING | changed)
    torch.nn.ModuleList([same]).load_state_dict(saved)  # without a warning
    assert stored(same) == stored(first)
    ((name, value),) = changed.items()
    words = rf"filled with .*{name} = {SETTING[name]:g}.* has .*{name} = {value:g}.* starts empty"
    with pytest.warns(UserWarning, match=words):
        torch.nn.ModuleList([other]).load_state_dict(saved)
    assert stored(other) == []
    again = GammaDPOLoss(**SETTING | changed)
    again.load_state_dict(other.state_dict())  # whose gaps would be of the new units
    assert "0.queue.mask" in saved, "the checkpoint is left as it is"


def test_tools_for_distributed_checkpoints_take_the_state(torch):
    """They look up each key of a state as an attribute."""
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    first, second = (torch.nn.ModuleList([GammaDPOLoss(**SETTING)]) for _ in range(2))
    first[0](*logps(torch, 4))
    state_dict.set_model_state_dict(second, state_dict.get_model_state_dict(first))
    assert stored(second[0]) == stored(first[0]) != []


def test_settings_that_a_schedule_changes_leave_the_saved_queue_as_it_is(torch):
    first, second = GammaDPOLoss(**SETTING), GammaDPOLoss(**SETTING)
    first.settings["gamma0"] = 3.0
    first(*logps(torch, 4))
    second.load_state_dict(first.state_dict())
    assert stored(second) == stored(first) != []


def test_a_loss_without_a_queue_loads_the_state_of_one_with_a_queue(torch):
    first, second = preference_loss(), preference_loss(queue_size=0)
    first(*logps(torch, 1))
    second.load_state_dict(first.state_dict())
    assert not second.state_dict()


def test_a_step_that_the_loss_scaler_skips_keeps_its_gaps(torch):
    loss_module = preference_loss(queue_size=16).float()
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pushed = []
    for seed, overflow in enumerate([False, True, False]):
        before = parameter.item()
        loss, aux = loss_module(parameter * logps(torch, 1, seed=seed)[0].detach().float())
        scaler.scale(loss).backward()
        if overflow:
            parameter.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (parameter.item() == before) is overflow
        pushed += aux.reward_gaps.tolist()
    assert stored(loss_module) == pushed


def test_two_losses_share_nothing(torch):
    first, second = preference_loss(), preference_loss()
    first(*logps(torch, 1, seed=0))
    first.settings["gamma0"] = 9.0
    assert stored(second) == []
    assert second.settings["gamma0"] == 2.0
    (batch,) = logps(torch, 1, seed=1)
    assert torch.equal(second(batch)[0], preference_loss()(batch)[0])
    assert first.state_dict()["queue.gaps"].data_ptr() != second.queue.gaps.data_ptr()
    twin = copy.deepcopy(first)
    twin(batch)
    assert len(stored(first)) == 3


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_torch_compile_makes_one_graph(torch, backend):
    torch.compiler.reset()
    mild = {"beta": 0.1, "gamma0": 4.0, "tau": 10.0}  # few passes, soon compiled
    compiled_module, eager_module = (GammaDPOLoss(**mild, queue_size=7) for _ in range(2))
    compiled = torch.compile(compiled_module, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            batch = [row.detach().float().requires_grad_() for row in logps(torch, 4, seed=seed)]
            loss, _ = compiled(*batch)
            expected, _ = eager_module(*batch)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(
                torch.autograd.grad(loss, batch[:2]), torch.autograd.grad(expected, batch[:2])
            )
            assert stored(compiled_module) == stored(eager_module)


def test_wrong_arguments(torch):
    with pytest.raises(ValueError, match="queue_size must be >= 0, got -1"):
        preference_loss(queue_size=-1)
    with pytest.raises(TypeError, match="queue_size must be an int, got NoneType"):
        preference_loss(queue_size=None)
    good = {"beta": 1.0, "gamma0": 1.0, "tau": 1.0}
    for bad, problem in (
        ({"beta": 0}, "beta must be finite and > 0, got 0"),
        ({"gamma0": -2.0}, "gamma0 must be finite and >= 0, got -2"),
        ({"tau": 1e-12}, "gamma0 / tau must be from 1e-30 to 1e[+]09, got 1.0 / 1e-12"),
        ({"centered": "no"}, "centered must be True or False, got 'no'"),
        ({"label_smoothing": 0.5, "robust": True}, "label_smoothing must be .*, got 0.5"),
        ({"reduction": "none of them"}, "reduction must be one of .*, got 'none of them'"),
        ({"impl": "cuda"}, "impl must be one of .*, got 'cuda'"),
    ):
        with pytest.raises((TypeError, ValueError), match=problem):  # before any call
            GammaDPOLoss(**good | bad)
    module = GammaDPOLoss(**good)
    module.settings["gamma0"] = -2.0  # as by a schedule
    with pytest.raises(ValueError, match="gamma0 must be finite and >= 0, got -2"):
        module(*logps(torch, 4))


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="has no attribute 'GammaFooLoss'"):
        gamma_loss.GammaFooLoss  # noqa: B018


def warned(loss_module, batches):
    """The number of the training forward that warned, and what it said."""
    found = []
    for number, batch in enumerate(batches, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_module(*batch)
        found += [(number, str(each.message)) for each in caught]
    return found


@pytest.mark.parametrize("queue_size", [0, 64])
def test_a_run_in_which_nothing_happens_says_so_once_and_names_a_tau_that_helps(torch, queue_size):
    torch.manual_seed(0)
    batches = [[torch.randn(3) + x for x in (1.0, 0.0, 0.0, 0.0)] for _ in range(250)]

    def module(tau):
        return GammaDPOLoss(beta=1.0, gamma0=2.0, tau=tau, queue_size=queue_size)

    idle = module(1e5)
    idle.eval()(*batches[0])  # an evaluation is no step
    ((number, message),) = warned(idle.train(), batches)
    assert number == 100
    assert "gamma0 = 2 and tau = 100000 this run is DPO to rounding" in message
    better = float(re.search(r"tau = ([\d.e+-]+) would", message)[1])
    size = int(re.search(r"the last (\d+) gaps", message)[1])
    assert size == (queue_size or 3)
    pool = torch.cat([b[0] - b[2] - (b[1] - b[3]) for b in batches[:100]])[-size:]
    margins = gamma_loss.solve_margins(pool, gamma0=2.0, tau=better).margins
    assert float(margins.std(correction=0)) == pytest.approx(0.2, rel=0.1)
    assert warned(module(better), batches) == []


@pytest.mark.parametrize(
    ("gamma0", "words"),
    [(0.0, "gamma0 must be finite and > 0"), (4.0, "all equal, and so are their margins")],
)
def test_where_no_tau_helps_the_reason_is_said(torch, gamma0, words):
    loss_module = GammaPreferenceLoss(gamma0=gamma0, tau=1.0, queue_size=0)
    ((_, message),) = warned(loss_module, [[torch.ones(1)]] * 101)
    assert "this run is a plain logistic loss to rounding. For the last 1 gaps" in message
    assert words in message


@pytest.mark.parametrize("queue_size", [0, 64])
def test_a_first_batch_in_which_no_pair_takes_part_is_said_and_a_hundred_are_an_error(
    torch, queue_size
):
    loss_module = GammaPreferenceLoss(gamma0=4.0, tau=1.0, queue_size=queue_size)
    gaps, nothing = torch.randn(2), torch.zeros(2, dtype=torch.bool)
    with pytest.warns(UserWarning, match="no pair of the first batch takes part"):
        loss_module(gaps, mask=nothing)
    for _ in range(98):
        loss_module(gaps, mask=nothing)  # not said again
    if queue_size:
        with pytest.raises(RuntimeError, match="no pair took part in a hundred steps of training"):
            loss_module(gaps, mask=nothing)
    else:  # which knows of the last batch only
        loss_module(gaps, mask=nothing)


def test_gaps_that_are_spread_warn_of_nothing(torch):
    gaps = torch.tensor([-2000.0, 2000.0])  # one margin is 0 to rounding
    assert warned(GammaPreferenceLoss(gamma0=40.0, tau=1e-2), [[gaps]] * 101) == []

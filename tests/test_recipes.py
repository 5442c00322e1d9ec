"""Every code block of docs/recipes runs, and does what its page says.

Frameworks that take a GPU to install are played by stand-ins: a few lines that call the page's code
as the named release does.
"""

import functools
import importlib
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from pages import PAGES, SETTING, code

from gamma_loss import gamma_dpo_loss, gamma_preference_loss, gamma_simpo_loss, solve_margins

torch = pytest.importorskip("torch")

ELSEWHERE = {"index", "trl"}  # without code, and with tests of its own
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # float32, a few operations apart


def run(page, edit=lambda text: text):
    """Execute the blocks of a page in one namespace, in order."""
    names = {"__name__": page}
    exec(compile(edit(code(page)), f"{page}.md", "exec"), names)
    return names


def stored(loss_fn):
    gaps, filled = loss_fn.queue.context()
    return gaps[filled]


@pytest.fixture(autouse=True)
def _somewhere_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stand_in(monkeypatch):
    """Make a module importable under a dotted name, with the names given."""

    def make(dotted, **names):
        parts = dotted.split(".")
        for i in range(1, len(parts) + 1):
            name, parent = ".".join(parts[:i]), ".".join(parts[: i - 1])
            if name in sys.modules and name != dotted:
                continue
            module = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            if parent:
                monkeypatch.setattr(sys.modules[parent], parts[i - 1], module, raising=False)
        vars(module).update(names)
        return module

    return make


@pytest.fixture
def saved_page(tmp_path, monkeypatch):
    """Save a page's code as the importable module that it tells to write."""

    def save(page, module):
        Path(tmp_path, f"{module}.py").write_text(code(page))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return save


def logps(pairs=6, seed=0, scale=10.0):
    """Four log-probabilities: of policy and reference, chosen and rejected."""
    torch.manual_seed(seed)
    policy = (torch.randn(2, pairs) * scale).requires_grad_()
    return policy, torch.randn(2, pairs) * scale


def test_every_page_has_a_test_and_is_in_the_index_with_the_version_that_was_run():
    index = (PAGES / "index.md").read_text()
    pages = {path.stem for path in PAGES.glob("*.md")} - ELSEWHERE
    assert pages == {name.removeprefix("test_") for name in globals() if name[5:] in pages}
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == pages | {"trl"}
    pins = (PAGES.parents[1] / "constraints.txt").read_text()
    claims = re.findall(r"([A-Za-z_]+) (\d+\.\d+\.\d+)", index)
    assert {"torch", "JAX", "Accelerate"} <= {name for name, _ in claims}
    for name, version in claims:
        name = name.lower().replace("_", "-")
        assert f"\n{name}==" not in pins or f"\n{name}=={version}" in pins, name
    record = json.loads((PAGES.parents[1] / "benchmarks/results/clients.json").read_text())
    rows = re.findall(r"\]\((\w+)\.md\) \| ([\d.]+) \|", index)
    found = {page: version for page, version in rows if page in record}
    assert found == {page: run["version"] for page, run in record.items() if page != "trl"}


# --- frameworks that run ---


def test_torch():
    names = run("torch")
    loss_fn = names["loss_fn"]
    assert len(stored(loss_fn)) == 3 * 64  # evaluation added none
    assert names["loss"] < math.log(2)  # that of equal policy and reference, where training starts
    assert names["logs"]["rewards/accuracies"] > 0.5
    assert names["checkpoint"]["loss"]["queue.mask"].sum() == 3 * 64

    four = names["four_logps"](*(names[name] for name in ("chosen", "rejected", "response")))
    context = loss_fn.queue.context()
    loss, _ = gamma_dpo_loss(
        *four, beta=0.1, **SETTING, context=context[0], context_mask=context[1]
    )
    torch.testing.assert_close(loss.detach(), names["loss"], **CLOSE)
    logps = names["policy"](names["chosen"])[:, 3:-1].double().log_softmax(-1)
    expected = logps.gather(2, names["chosen"][:, 4:, None]).sum((1, 2))
    torch.testing.assert_close(four[0].double(), expected, rtol=1e-5, atol=0)


def test_ddp(monkeypatch):
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    given = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code("ddp")], stderr=subprocess.PIPE, text=True,
            env=os.environ | given | {"RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_PORT": str(ports[0]), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    of_two = torch.load("checkpoint.pt", weights_only=True)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(ports[1])}
    for name, value in (given | alone).items():
        monkeypatch.setenv(name, value)
    run("ddp")
    of_one = torch.load("checkpoint.pt", weights_only=True)
    # Eight steps of sums of 32 numbers of size 1, rounded to float32.
    close = {"rtol": 0, "atol": 8 * 32 * 6e-8}
    for name, weight in of_one["model"].items():
        torch.testing.assert_close(of_two["model"][name], weight, **close)
    gaps = [  # a batch's gaps are in the order of ranks
        each["loss"]["queue.gaps"][-256:].view(8, 32).sort().values for each in (of_one, of_two)
    ]
    torch.testing.assert_close(*gaps, **close)
    assert of_two["loss"]["queue.mask"].sum() == 256


def test_jax():
    pytest.importorskip("jax")
    pytest.importorskip("optax", reason="optax is not installed")
    names = run("jax")
    losses = np.array(names["losses"])
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-4:].mean() < losses[4:8].mean() < losses[0]
    gaps, filled = map(np.asarray, names["queue"])
    assert filled.sum() == 5 * 64

    x, reference = names["x"][:16], names["reference_logps"][:, :16]
    _, aux = names["loss_fn"](names["params"], names["queue"], x, reference)
    pool = np.concatenate([np.asarray(aux.reward_gaps), gaps[filled]]).astype(float)
    np.testing.assert_allclose(aux.margins, solve_margins(pool, **SETTING).margins[:16], rtol=1e-5)


def loss_of(model, data):
    x, reference = data.dataset.tensors
    return gamma_dpo_loss(*model(x).T, *reference.T, beta=1.0, **SETTING)[0].item()


def test_accelerate():
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")
    try:
        names = run("accelerate")
        assert len(stored(names["loss_fn"])) == 3 * 64
        kept = names["loss_fn"].queue.gaps.clone()
        names["loss_fn"].queue.push(torch.ones(5))
        names["accelerator"].load_state("checkpoint")
        assert torch.equal(names["loss_fn"].queue.gaps, kept)
        torch.manual_seed(0)
        start = torch.nn.Linear(8, 2)  # as it was before training
        assert loss_of(names["model"], names["data"]) < loss_of(start, names["data"])
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's use of torch
def test_lightning(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    names = run("lightning")
    loss_fn = names["model"].loss_fn
    assert len(stored(loss_fn)) == 3 * 64  # none from the validation after each epoch
    assert torch.equal(names["resumed"].loss_fn.queue.gaps, loss_fn.queue.gaps)
    assert names["trainer"].callback_metrics["rewards/accuracies"] > 0.5
    torch.manual_seed(0)
    torch.randn(64, 8)  # drawn for the data, before the model
    start, data = names["PreferenceModel"](), names["data"]
    assert loss_of(names["resumed"].policy, data) < loss_of(start.policy, data)
    model, kept = names["model"], loss_fn.queue.gaps.clone()  # with a group, it goes to the loss
    dist = torch.distributed
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model.setup("fit")
        assert model.loss_fn.group is dist.group.WORLD
        assert torch.equal(model.loss_fn.queue.gaps, kept)
    finally:
        dist.destroy_process_group()


def test_liger():
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    names, text = {}, (PAGES / "liger.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):  # each runs alone
        exec(compile(block, "liger.md", "exec"), alone := {"__name__": "liger"})
        names |= alone
    hidden, weight, labels = (names[name] for name in ("hidden", "weight", "labels"))
    # Log-probabilities of size 20 in float32, rounded some ten times; gradients of size 0.1.
    logits_close = {"rtol": 1e-5, "atol": 10 * 20 * 6e-8}

    def averaged_logps(hidden, weight):
        logits = (hidden @ weight.T).log_softmax(-1)[:, 4:]
        return logits.gather(-1, labels[:, 4:, None]).squeeze(-1).mean(-1).view(2, -1)

    def same(loss, expected):
        value = expected(*averaged_logps(hidden, weight))
        torch.testing.assert_close(loss.detach(), value.detach(), **logits_close)
        ours, theirs = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, value))
        torch.testing.assert_close(ours, theirs, **logits_close)

    again = names["averaged_logps"](hidden, weight, labels, chunk=64).view(2, -1)

    def exact(*logps):
        return gamma_simpo_loss(*logps, **names["setting"])[0]

    same(exact(*again), exact)

    # After two pushes each pair is solved with the 16 gaps of the queue, and without its batch.
    queue = names["queue"]
    chosen, rejected = averaged_logps(hidden, weight).detach()
    gaps = names["setting"]["beta"] * (chosen - rejected)
    torch.testing.assert_close(queue.gaps[queue.mask], gaps.repeat(2), **logits_close)
    context = dict(zip(("context", "context_mask"), queue.context(), strict=True))

    def one_by_one(chosen, rejected):
        losses = [
            gamma_simpo_loss(*pair, **names["setting"], **context)[0]
            for pair in zip(chosen.split(1), rejected.split(1), strict=True)
        ]
        return torch.stack(losses).mean()

    fused = names["FusedGammaSimPO"].apply(hidden, weight, labels, *names["options"])[0]
    same(fused, one_by_one)

    rows = re.findall(r"^\| ([\d,]+) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 4
    for size, cells in rows:
        found = [
            names["largest_difference"](int(size.replace(",", "")), tau, behind)
            for tau in (10.0, 0.05)
            for behind in (0.0, 1.0)
        ]  # which the page rounds to one digit, so by a third at most
        assert [float(cell) for cell in cells.split("|")] == pytest.approx(found, rel=1 / 3)


def test_other_losses():
    names = run("other_losses")
    assert names["targets"].mean() == pytest.approx(5.0)
    assert names["margins"].mean() == pytest.approx(1.0)
    policy = names["chosen_logps"], names["rejected_logps"]
    added = ("beta_dpo", "orpo", "as_margin", "as_reference")
    for loss in ("ipo", "hinge", "r_dpo", "cpo", *added):
        assert all(
            grad.any() for grad in torch.autograd.grad(names[loss], policy, retain_graph=True)
        )

    gaps = names["length_gaps"].detach().double().numpy()
    shifted = gaps - (solve_margins(gaps, **SETTING).margins - 4.0)
    assert names["r_dpo"].item() == pytest.approx(np.logaddexp(0, -shifted).mean(), rel=1e-5)

    # With a large tau they are the plain losses.
    plain = run(
        "other_losses",
        lambda text: text.replace("= 0.1, 10.0", "= 0.1, 1e9").replace("tau=0.1", "tau=1e9"),
    )
    h = plain["log_ratios"]
    torch.testing.assert_close(plain["ipo"], ((h - 5.0) ** 2).mean(), **CLOSE)
    torch.testing.assert_close(plain["hinge"], torch.relu(1 - 0.1 * h).mean(), **CLOSE)
    lengths = plain["lengths_chosen"] - plain["lengths_rejected"]

    def logistic(gaps):
        return torch.nn.functional.softplus(-gaps).mean()

    torch.testing.assert_close(plain["r_dpo"], logistic(0.1 * h + 0.01 * lengths), **CLOSE)
    cpo = logistic(0.1 * (policy[0] - policy[1])) - policy[0].mean()
    torch.testing.assert_close(plain["cpo"], cpo, **CLOSE)
    beta = 0.1 * (1 + 0.5 * (h.mean() - 0.2))
    torch.testing.assert_close(plain["beta_dpo"], logistic(beta * h), **CLOSE)
    chosen, rejected = plain["mean_chosen"], plain["mean_rejected"]
    odds = (p.exp() / (1 - p.exp()) for p in (chosen, rejected))
    orpo = 0.1 * logistic(torch.log(next(odds) / next(odds))) - chosen.mean()
    torch.testing.assert_close(plain["orpo"], orpo, **CLOSE)
    d, z = chosen - rejected, (h - h.mean()) / h.std()
    torch.testing.assert_close(plain["as_margin"], logistic(2.5 * d - 1), **CLOSE)
    torch.testing.assert_close(plain["as_reference"], logistic(2.5 * (d - 0.1 * z) - 1), **CLOSE)


# --- frameworks that are played by a stand-in ---


def assert_is_gamma_dpo(call, *, loss_fn, evaluate, queue_of):
    """The adapter's loss, gradient and rewards are the function's; its queue follows the modes."""
    policy, reference = logps()
    loss, chosen, rejected = call(*policy, *reference)
    (gradient,) = torch.autograd.grad(loss, policy)
    expected, aux = loss_fn(*policy, *reference)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, policy)[0], **CLOSE)
    for ours, theirs in ((chosen, aux.chosen_rewards), (rejected, aux.rejected_rewards)):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert not ours.requires_grad
    assert torch.equal(queue_of(), aux.reward_gaps)

    policy, reference = logps(seed=1)
    context = aux.reward_gaps
    expected, aux = loss_fn(*policy, *reference, context=context)
    torch.testing.assert_close(evaluate(*policy, *reference)[0], expected.detach(), **CLOSE)
    assert torch.equal(queue_of(), context)
    torch.testing.assert_close(call(*policy, *reference)[0], expected, **CLOSE)
    assert torch.equal(queue_of(), torch.cat([context, aux.reward_gaps]))


def test_openrlhf(stand_in):
    module = stand_in("openrlhf.trainer.dpo_trainer")
    run("openrlhf")
    loss_fn = module.DPOLoss(0.1, 0.2, False)  # beta, label smoothing, IPO, as 0.11.0 calls it
    assert_is_gamma_dpo(
        loss_fn,
        loss_fn=functools.partial(gamma_dpo_loss, beta=0.1, label_smoothing=0.2, **SETTING),
        evaluate=torch.no_grad()(loss_fn),
        queue_of=lambda: stored(loss_fn.gamma_dpo),
    )
    with pytest.raises(ValueError, match="another loss"):
        module.DPOLoss(0.1, 0.0, True)


class Trainer:
    """What the pages use of the trainers of LLaMA-Factory 0.9.5 and ms-swift 4.6.0."""

    def __init__(self, loss_type):
        self.beta, self.label_smoothing, self.simpo_gamma = 0.1, 0.2, 4.0
        self.loss_type = loss_type
        self.model = torch.nn.Identity()
        self.accelerator = SimpleNamespace(device=torch.device("cpu"))

    def get_batch_loss_metrics(self, *logps):
        if hasattr(self, "compute_preference_loss"):  # of LLaMA-Factory
            losses, *rewards = self.compute_preference_loss(*logps)
        elif len(logps) == 2:
            losses, *rewards = self.cpo_loss(*logps)
        else:
            losses, *rewards = self.dpo_loss(*logps, self.loss_type, {})
        assert losses.shape == logps[0].shape  # others are added to them
        return losses.mean(), *rewards

    def evaluate(self, *logps):
        self.model.eval()
        with torch.no_grad():
            result = self.get_batch_loss_metrics(*logps)
        self.model.train()
        return result


def assert_are_gamma_dpo_and_simpo(dpo, simpo, *nothing):
    setting = {"beta": 0.1, "label_smoothing": 0.2, **SETTING}
    assert_is_gamma_dpo(
        dpo.get_batch_loss_metrics, loss_fn=functools.partial(gamma_dpo_loss, **setting),
        evaluate=dpo.evaluate, queue_of=lambda: stored(dpo.gamma_loss),
    )  # fmt: skip
    policy, _ = logps()
    loss, chosen, _ = simpo.get_batch_loss_metrics(*policy, *nothing)
    expected, aux = gamma_simpo_loss(*policy, **setting)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(chosen, aux.chosen_rewards, **CLOSE)


def test_llama_factory(stand_in):
    module = stand_in("llamafactory.train.dpo.trainer", CustomDPOTrainer=Trainer)
    stand_in("llamafactory.train.tuner", run_exp=None)
    run("llama_factory")
    made = module.CustomDPOTrainer
    assert_are_gamma_dpo_and_simpo(made("sigmoid"), made("simpo"), None, None)
    with pytest.raises(ValueError, match="pref_loss must be sigmoid or simpo, got orpo"):
        made("orpo")


def test_ms_swift(stand_in, saved_page):
    table = {}
    stand_in("swift.rlhf_trainers", DPOTrainer=Trainer, CPOTrainer=Trainer)
    stand_in("swift.trainers", TrainerFactory=SimpleNamespace(TRAINER_MAPPING=table))
    saved_page("ms_swift", "gamma_swift")
    page = importlib.import_module("gamma_swift")  # as --external_plugins does
    dpo, simpo = (getattr(page, table[key].removeprefix("gamma_swift.")) for key in ("dpo", "cpo"))
    assert_are_gamma_dpo_and_simpo(dpo("sigmoid"), simpo("simpo"))
    with pytest.raises(ValueError, match="loss_type must be sigmoid"):
        dpo("ipo").get_batch_loss_metrics(*logps()[0], *logps()[1])
    with pytest.raises(ValueError, match="loss_type simpo"):
        simpo("sigmoid")


def test_nemo_rl(stand_in, saved_page):
    class DPOLossFn:
        """The part of nemo_rl/algorithms/loss/loss_functions.py of 0.7.0 around the method."""

        def __init__(self, cfg):
            self.reference_policy_kl_penalty = cfg["reference_policy_kl_penalty"]

        def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
            kept, pairs = sample_mask[::2], global_valid_seqs / 2
            chosen, rejected = rewards[::2], rewards[1::2]
            losses = torch.nn.functional.softplus(-beta * (chosen - rejected))
            values = losses, chosen > rejected, chosen, rejected
            return tuple((value * kept).sum() / (pairs + 1e-8) for value in values)

        def __call__(self, rewards, sample_mask, global_valid_seqs):
            loss, accuracy, *_ = self._preference_loss(
                rewards, sample_mask, global_valid_seqs, self.reference_policy_kl_penalty
            )
            return loss, accuracy.item()

    stand_in("nemo_rl.algorithms.loss", DPOLossFn=DPOLossFn)
    saved_page("nemo_rl", "gamma_dpo")
    page = importlib.import_module("gamma_dpo")
    loss_fn = page.GammaDPOLossFn({"reference_policy_kl_penalty": 0.1})

    torch.manual_seed(0)
    rewards = (10 * torch.randn(2, 12)).requires_grad_()  # two micro-batches of six pairs
    mask = torch.ones(2, 12)
    mask[0, 2:4] = mask[1, 8:12] = 0.0
    valid = mask.sum()
    total, expected, context = 0, 0, None
    for rows, kept in zip(rewards, mask, strict=True):
        sent = pickle.loads(pickle.dumps(loss_fn))  # noqa: S301  what a worker gets
        with torch.no_grad():
            evaluated, accuracy = sent(rows, kept, valid)
        loss, _ = sent(rows, kept, valid)
        torch.testing.assert_close(evaluated, loss.detach(), **CLOSE)
        gaps = 0.1 * (rows[::2] - rows[1::2])
        each, aux = gamma_preference_loss(
            gaps, mask=kept[::2].bool(), centered=True, reduction="sum", context=context, **SETTING
        )
        assert accuracy == pytest.approx(((gaps > 0) * kept[::2]).sum().item() / (valid / 2).item())
        total, expected = total + loss, expected + each / 9
        new = aux.reward_gaps[aux.mask]
        context = new if context is None else torch.cat([context, new])
    torch.testing.assert_close(total, expected, **CLOSE)
    gradients = (torch.autograd.grad(value, rewards)[0] for value in (total, expected))
    torch.testing.assert_close(*gradients, **CLOSE)
    assert torch.equal(stored(page.gamma_dpo(torch.device("cpu"))), context)


def test_torchtune(saved_page):
    saved_page("torchtune", "gamma_torchtune")
    settings = yaml.safe_load(code("torchtune", "yaml"))["loss"]
    module, _, name = settings.pop("_component_").rpartition(".")
    loss_fn = getattr(importlib.import_module(module), name)(**settings)  # config.instantiate

    def call(*logps):
        losses, chosen, rejected = loss_fn.train()(*logps)
        return losses.mean(), chosen, rejected  # as recipes/lora_dpo_single_device.py does

    assert_is_gamma_dpo(
        call,
        loss_fn=functools.partial(gamma_dpo_loss, beta=0.1, **SETTING),
        evaluate=lambda *logps: loss_fn.eval()(*logps),
        queue_of=lambda: stored(loss_fn),
    )


def test_axolotl(stand_in, saved_page):
    class DPOTrainer:
        def __init__(self, model, ref_model=None, args=None, **kwargs):
            self.models, self.args, self.kwargs = (model, ref_model), vars(args).copy(), kwargs

    class AxolotlDPOTrainer(DPOTrainer):
        """The constructor of src/axolotl/core/trainers/dpo/trainer.py of 0.18.0."""

        def __init__(self, *args, dataset_tags=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.dataset_tags = dataset_tags

    class GammaDPOTrainer(DPOTrainer):  # TRL's tests are elsewhere
        pass

    simpo = type("GammaSimPOTrainer", (), {})
    stand_in("axolotl.core.trainers", AxolotlCPOTrainer=type("AxolotlCPOTrainer", (), {}))
    stand_in("axolotl.core.trainers.dpo.trainer", AxolotlDPOTrainer=AxolotlDPOTrainer)
    stand_in("gamma_loss.integrations.trl", GammaDPOTrainer=GammaDPOTrainer,
             GammaSimPOTrainer=simpo)  # fmt: skip
    saved_page("axolotl", "gamma_trainer")

    # src/axolotl/utils/import_helper.py and HFRLTrainerBuilder.build in core/builders/rl.py
    dotted = re.search(r"trainer_cls: (\S+)", code("axolotl", "yaml"))[1]
    module, name = dotted.rsplit(".", 1)
    trainer_cls = getattr(importlib.import_module(module), name)
    args = SimpleNamespace(beta=0.1)
    trainer = trainer_cls("model", "reference", args=args, train_dataset="pairs", callbacks=[])
    assert trainer.models == ("model", "reference")
    assert trainer.args == {"beta": 0.1, **SETTING, "centered": True, "queue_size": 2048}
    assert trainer.kwargs["train_dataset"] == "pairs"
    assert trainer_cls.__mro__.index(AxolotlDPOTrainer) < trainer_cls.__mro__.index(GammaDPOTrainer)

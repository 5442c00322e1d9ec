"""Every code block of docs/recipes runs, and does what its page says.

Frameworks that take a GPU to install are played by stand-ins: a few lines that call the page's code
as the named release does.
"""

import json
import math
import os
import pickle
import re
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import programs
import pytest
import yaml
from pages import PAGES, ROOT, SETTING, blocks, code

from gamma_loss import gamma_dpo_loss, gamma_preference_loss, gamma_simpo_loss, solve_margins

torch = pytest.importorskip("torch")

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)  # a few operations in float32


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Import the blocks of a page, in order, as a module of the name that the page gives it."""
    monkeypatch.chdir(tmp_path)

    def run(page, name=None, edit=str):
        module = ModuleType(name or f"page_{page}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(edit(code(page)), f"{page}.md", "exec"), vars(module))
        return module

    return run


@pytest.fixture
def stand_in(monkeypatch):
    """Make a module importable under a dotted name, with the names given."""

    def make(dotted, **names):
        monkeypatch.setitem(sys.modules, dotted, SimpleNamespace(**names))
        parent, _, name = dotted.rpartition(".")
        if parent:
            make(parent, **{name: sys.modules[dotted]})
        return sys.modules[dotted]

    return make


def stored(loss_fn):
    gaps, filled = loss_fn.queue.context()
    return gaps[filled]


def test_every_page_has_a_test_and_is_in_the_index_with_the_version_that_was_run():
    index = (PAGES / "index.md").read_text()
    pages = {path.stem for path in PAGES.glob("*.md")} - {"index"}
    assert {f"test_{page}" for page in pages - {"trl"}} <= set(globals())  # which has its own
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == pages
    pins = (ROOT / "constraints.txt").read_text()
    claims = re.findall(r"([A-Za-z_]+) (\d+\.\d+\.\d+)", index)
    assert {"torch", "JAX", "Accelerate"} <= {name for name, _ in claims}
    for name, version in claims:
        name = name.lower().replace("_", "-")
        assert f"\n{name}==" not in pins or f"\n{name}=={version}" in pins, name
    rows = dict(re.findall(r"\]\((\w+)\.md\) \| ([\d.]+) \|", index))
    record = json.loads((ROOT / "benchmarks/results/clients.json").read_text())
    for page in record.keys() - {"trl"}:
        assert rows[page] == record[page]["version"]


# --- frameworks that run ---


def test_torch(run):
    page = run("torch")
    loss_fn = page.loss_fn
    assert len(stored(loss_fn)) == 3 * 64  # evaluation added none
    assert page.loss < math.log(2)  # that of equal policy and reference, where training starts
    assert page.logs["rewards/accuracies"] > 0.5
    assert page.checkpoint["loss"]["queue.mask"].sum() == 3 * 64

    four = page.four_logps(page.chosen, page.rejected, page.response)
    loss, _ = gamma_dpo_loss(*four, beta=0.1, **SETTING, context=stored(loss_fn))
    close(loss.detach(), page.loss)
    logps = page.policy(page.chosen)[:, 3:-1].double().log_softmax(-1)
    expected = logps.gather(2, page.chosen[:, 4:, None]).sum((1, 2))
    torch.testing.assert_close(four[0].double(), expected, rtol=1e-5, atol=0)


def ddp(folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    exec(compile(code("ddp"), "ddp.md", "exec"), {})


def test_ddp(tmp_path):
    saved = []
    for ranks in (1, 2):
        programs.together(ranks, ddp, tmp_path)
        saved.append(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    # Eight steps of sums of 32 numbers of size 1, rounded to float32.
    rounding = {"rtol": 0, "atol": 8 * 32 * 6e-8}
    torch.testing.assert_close(*(each["model"] for each in saved), **rounding)
    gaps = [each["loss"]["queue.gaps"][-256:].view(8, 32) for each in saved]
    gaps = [each.sort().values for each in gaps]  # a batch's are in the order of ranks
    torch.testing.assert_close(*gaps, **rounding)
    assert [each["loss"]["queue.mask"].sum() for each in saved] == [256, 256]


def test_jax(run):
    pytest.importorskip("jax")
    pytest.importorskip("optax", reason="optax is not installed")
    page = run("jax")
    losses = np.array(page.losses)
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-4:].mean() < losses[4:8].mean() < losses[0]
    gaps, filled = map(np.asarray, page.queue)
    assert filled.sum() == 5 * 64

    batch = page.x[:16], page.reference_logps[:, :16]
    four = *page.policy(page.params, batch[0]), *batch[1]
    four = [np.asarray(each, dtype=float) for each in four]
    loss, aux = gamma_dpo_loss(*four, beta=1.0, **SETTING, context=gaps[filled].astype(float))
    *_, queue, logs = page.step(page.params, page.state, page.queue, *batch)
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["gamma/max"] == pytest.approx(aux.margins.max(), rel=1e-5)
    np.testing.assert_allclose(queue.gaps[-16:], aux.reward_gaps, rtol=1e-5, atol=1e-6)


def test_accelerate(run):
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")
    try:
        page = run("accelerate")
        assert len(stored(page.loss_fn)) == 3 * 64
        kept = page.loss_fn.queue.gaps.clone()
        page.loss_fn.queue.push(torch.ones(5))
        page.accelerator.load_state("checkpoint")
        assert torch.equal(page.loss_fn.queue.gaps, kept)
        assert page.loss < math.log(2)  # training begins at 0.75
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's use of torch
def test_lightning(run, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    page = run("lightning")
    kept = page.model.loss_fn.queue.gaps.clone()
    assert len(stored(page.model.loss_fn)) == 3 * 64  # none from the validation after each epoch
    assert torch.equal(page.resumed.loss_fn.queue.gaps, kept)
    assert page.trainer.callback_metrics["val_loss"] < 0.6  # 0.65 without training
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:  # with a group, it goes to the loss
        page.model.setup("fit")
        assert page.model.loss_fn.group is dist.group.WORLD
        assert torch.equal(page.model.loss_fn.queue.gaps, kept)
    finally:
        dist.destroy_process_group()


def test_liger():
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    names = {}
    for block in blocks("docs/recipes/liger.md"):  # each runs alone
        exec(compile(block, "liger.md", "exec"), alone := {"__name__": "liger"})
        names |= alone
    page = SimpleNamespace(**names)
    hidden, weight, labels = page.hidden, page.weight, page.labels
    # Log-probabilities of size 20 in float32, rounded some ten times; gradients of size 0.1.
    rounding = {"rtol": 1e-5, "atol": 10 * 20 * 6e-8}

    def averaged_logps(hidden, weight):
        logits = (hidden @ weight.T).log_softmax(-1)[:, 4:]
        return logits.gather(-1, labels[:, 4:, None]).squeeze(-1).mean(-1).view(2, -1)

    def same(loss, expected):
        value = expected(*averaged_logps(hidden, weight))
        ours, theirs = (
            (each.detach(), *torch.autograd.grad(each, (hidden, weight))) for each in (loss, value)
        )
        torch.testing.assert_close(ours, theirs, **rounding)

    def exact(*logps, **context):
        return gamma_simpo_loss(*logps, **page.setting, **context)[0]

    same(exact(*page.averaged_logps(hidden, weight, labels, chunk=64).view(2, -1)), exact)

    # After two pushes each pair is solved with the 16 gaps of the queue, and without its batch.
    chosen, rejected = averaged_logps(hidden, weight).detach()
    gaps = page.setting["beta"] * (chosen - rejected)
    torch.testing.assert_close(stored(page), gaps.repeat(2), **rounding)

    def one_by_one(*logps):
        pairs = zip(*(each.split(1) for each in logps), strict=True)
        return torch.stack([exact(*pair, context=stored(page)) for pair in pairs]).mean()

    same(page.FusedGammaSimPO.apply(hidden, weight, labels, *page.options)[0], one_by_one)

    rows = re.findall(r"^\| ([\d,]+) \|(.*)\|$", (PAGES / "liger.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for size, cells in rows:
        size = int(size.replace(",", ""))
        found = [page.largest_difference(size, tau, b) for tau in (10.0, 0.05) for b in (0.0, 1.0)]
        # The page rounds to one digit, so by a third at most.
        assert [float(cell) for cell in cells.split("|")] == pytest.approx(found, rel=1 / 3)


def test_other_losses(run):
    page = run("other_losses")
    assert page.targets.mean() == pytest.approx(5.0)
    assert page.margins.mean() == pytest.approx(1.0)
    gaps = page.length_gaps.detach().double().numpy()
    shifted = gaps - (solve_margins(gaps, **SETTING).margins - 4.0)
    assert page.r_dpo.item() == pytest.approx(np.logaddexp(0, -shifted).mean(), rel=1e-5)

    # With a large tau they are the plain losses.
    large = partial(re.sub, r"(= 0.1, 10.0|tau=0.1)", r"\g<1>e9")
    plain = run("other_losses", edit=large)
    policy, h = (plain.chosen_logps, plain.rejected_logps), plain.log_ratios
    lengths = plain.lengths_chosen - plain.lengths_rejected
    beta = 0.1 * (1 + 0.5 * (h.mean() - 0.2))
    chosen, rejected = plain.mean_chosen, plain.mean_rejected
    d, z = chosen - rejected, (h - h.mean()) / h.std()

    def logistic(gaps):
        return torch.nn.functional.softplus(-gaps).mean()

    for name, expected in {
        "ipo": ((h - 5.0) ** 2).mean(),
        "hinge": torch.relu(1 - 0.1 * h).mean(),
        "r_dpo": logistic(0.1 * h + 0.01 * lengths),
        "cpo": logistic(0.1 * (policy[0] - policy[1])) - policy[0].mean(),
        "beta_dpo": logistic(beta * h),
        "orpo": 0.1 * logistic(chosen.exp().logit() - rejected.exp().logit()) - chosen.mean(),
        "as_margin": logistic(2.5 * d - 1),
        "as_reference": logistic(2.5 * (d - 0.1 * z) - 1),
    }.items():
        close(getattr(plain, name), expected)
        logps = page.chosen_logps, page.rejected_logps
        gradients = torch.autograd.grad(getattr(page, name), logps, retain_graph=True)
        assert all(gradient.any() for gradient in gradients), name


# --- frameworks that are played by a stand-in ---


def logps(seed=0):
    """Four log-probabilities of six pairs: of policy and reference, chosen and rejected."""
    torch.manual_seed(seed)
    policy, reference = 10 * torch.randn(2, 2, 6)
    return *policy.requires_grad_(), *reference


def assert_is_gamma_dpo(call, evaluate, queue_of):
    """The adapter's loss, gradient and rewards are the function's; its queue follows the modes."""
    loss_fn = partial(gamma_dpo_loss, beta=0.1, label_smoothing=0.2, **SETTING)
    four = logps()
    loss, *rewards = call(*four)
    expected, aux = loss_fn(*four)
    close(loss, expected)
    close(*(torch.autograd.grad(each, four[:2]) for each in (loss, expected)))
    close(rewards, [aux.chosen_rewards, aux.rejected_rewards])
    assert not any(each.requires_grad for each in rewards)
    assert torch.equal(queue_of(), aux.reward_gaps)

    four, context = logps(seed=1), aux.reward_gaps
    expected, aux = loss_fn(*four, context=context)
    close(evaluate(*four)[0], expected.detach())
    assert torch.equal(queue_of(), context)
    close(call(*four)[0], expected)
    assert torch.equal(queue_of(), torch.cat([context, aux.reward_gaps]))


def test_openrlhf(run, stand_in):
    module = stand_in("openrlhf.trainer.dpo_trainer")
    run("openrlhf")
    loss_fn = module.DPOLoss(0.1, 0.2, False)  # beta, label smoothing, IPO, as 0.11.0 calls it
    assert_is_gamma_dpo(loss_fn, torch.no_grad()(loss_fn), lambda: stored(loss_fn.gamma_dpo))
    with pytest.raises(ValueError, match="another loss"):
        module.DPOLoss(0.1, 0.0, True)


class Trainer:
    """What the pages use of the trainers of LLaMA-Factory 0.9.5 and ms-swift 4.6.0."""

    def __init__(self, loss_type):
        self.beta, self.label_smoothing, self.simpo_gamma = 0.1, 0.2, 4.0
        self.loss_type, self.model = loss_type, torch.nn.Identity()
        self.accelerator = SimpleNamespace(device=torch.device("cpu"))

    def get_batch_loss_metrics(self, *logps):
        if hasattr(self, "compute_preference_loss"):  # of LLaMA-Factory
            without_reference = (None, None) if len(logps) == 2 else ()
            losses, *rewards = self.compute_preference_loss(*logps, *without_reference)
        elif len(logps) == 2:
            losses, *rewards = self.cpo_loss(*logps)
        else:
            losses, *rewards = self.dpo_loss(*logps, self.loss_type, {})
        assert losses.shape == logps[0].shape  # others are added to them
        return losses.mean(), *rewards

    @torch.no_grad()
    def evaluate(self, *logps):
        self.model.eval()
        result = self.get_batch_loss_metrics(*logps)
        self.model.train()
        return result


def assert_are_gamma_dpo_and_simpo(dpo, simpo):
    assert_is_gamma_dpo(dpo.get_batch_loss_metrics, dpo.evaluate, lambda: stored(dpo.gamma_loss))
    policy = logps()[:2]
    loss, *rewards = simpo.get_batch_loss_metrics(*policy)
    expected, aux = gamma_simpo_loss(*policy, beta=0.1, label_smoothing=0.2, **SETTING)
    close(loss, expected)
    close(rewards, [aux.chosen_rewards, aux.rejected_rewards])


def test_llama_factory(run, stand_in):
    stand_in("llamafactory.train.tuner", run_exp=None)
    module = stand_in("llamafactory.train.dpo.trainer", CustomDPOTrainer=Trainer)
    run("llama_factory")
    made = module.CustomDPOTrainer
    assert_are_gamma_dpo_and_simpo(made("sigmoid"), made("simpo"))
    with pytest.raises(ValueError, match="pref_loss must be sigmoid or simpo, got orpo"):
        made("orpo")


def test_ms_swift(run, stand_in):
    table = {}
    stand_in("swift.rlhf_trainers", DPOTrainer=Trainer, CPOTrainer=Trainer)
    stand_in("swift.trainers", TrainerFactory=SimpleNamespace(TRAINER_MAPPING=table))
    page = run("ms_swift", "gamma_swift")  # as --external_plugins does
    dpo, simpo = (getattr(page, table[key].removeprefix("gamma_swift.")) for key in ("dpo", "cpo"))
    assert_are_gamma_dpo_and_simpo(dpo("sigmoid"), simpo("simpo"))
    with pytest.raises(ValueError, match="loss_type must be sigmoid"):
        dpo("ipo").get_batch_loss_metrics(*logps())
    with pytest.raises(ValueError, match="loss_type simpo"):
        simpo("sigmoid")


class DPOLossFn:
    """The part of nemo_rl/algorithms/loss/loss_functions.py of 0.7.0 around the page's method."""

    def __init__(self, cfg):
        self.reference_policy_kl_penalty = cfg["reference_policy_kl_penalty"]

    def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
        return None, "accuracy"

    def __call__(self, *arguments):
        return self._preference_loss(*arguments, self.reference_policy_kl_penalty)


def test_nemo_rl(run, stand_in):
    stand_in("nemo_rl.algorithms.loss", DPOLossFn=DPOLossFn)
    page = run("nemo_rl", "gamma_dpo")
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
            evaluated, _ = sent(rows, kept, valid)
        loss, metric = sent(rows, kept, valid)
        assert metric == "accuracy"
        close(evaluated, loss.detach())
        gaps = 0.1 * (rows[::2] - rows[1::2])
        each, aux = gamma_preference_loss(
            gaps, mask=kept[::2].bool(), centered=True, reduction="sum", context=context, **SETTING
        )
        total, expected = total + loss, expected + each / 9
        new = aux.reward_gaps[aux.mask]
        context = new if context is None else torch.cat([context, new])
    close(total, expected)
    close(*(torch.autograd.grad(value, rewards) for value in (total, expected)))
    assert torch.equal(stored(page.gamma_dpo(torch.device("cpu"))), context)


def test_axolotl(run, stand_in):
    class Trainer:
        def __init__(self, *models, args=None, **options):
            self.given = models, vars(args), options

    names = ("AxolotlDPOTrainer", "AxolotlCPOTrainer", "GammaDPOTrainer", "GammaSimPOTrainer")
    classes = {name: type(name, (Trainer,), {}) for name in names}
    stand_in("axolotl.core.trainers.dpo.trainer", **classes)
    stand_in("axolotl.core.trainers", **classes)
    stand_in("gamma_loss.integrations.trl", **classes)  # which has tests of its own
    page = run("axolotl", "gamma_trainer")
    named = yaml.safe_load(code("axolotl", "yaml"))["trainer_cls"]
    dpo = getattr(page, named.removeprefix("gamma_trainer."))
    options = {"train_dataset": "pairs", "callbacks": []}
    for kind, bases, models, setting in [
        (dpo, names[::2], ("model", "reference"), {**SETTING, "centered": True}),
        (page.AxolotlGammaSimPOTrainer, names[1::2], ("model",), {"tau": 10.0, "centered": False}),
    ]:
        assert [base.__name__ for base in kind.__bases__] == [*bases]
        trainer = kind(*models, args=SimpleNamespace(beta=0.1), **options)
        setting |= {"beta": 0.1, "queue_size": 2048}
        assert trainer.given == (models, setting, options)

"""The trainers for TRL: against TRL's own, which γ-PO becomes as tau grows, and end to end."""

import importlib.util
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import tiny_lm

pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
torch = pytest.importorskip("torch")

import datasets  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from packaging.version import Version  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl import __version__ as TRL_VERSION  # noqa: E402

from gamma_loss import PUBLISHED_SETTINGS, gamma_dpo_loss  # noqa: E402
from gamma_loss.integrations.trl import (  # noqa: E402
    CPOConfig,
    CPOTrainer,
    GammaDPOConfig,
    GammaDPOTrainer,
    GammaSimPOConfig,
    GammaSimPOTrainer,
)

pytestmark = [
    # TRL's default of gradient_checkpointing and what it does with it, in transformers' new terms.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

DPO = (GammaDPOTrainer, GammaDPOConfig, {"beta": 0.5, "gamma0": 2.0})
SIMPO = (GammaSimPOTrainer, GammaSimPOConfig, {"beta": 2.0, "gamma0": 1.0})
FAMILIES = pytest.mark.parametrize("family", [DPO, SIMPO], ids=["dpo", "simpo"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))  # where what TRL computes of it is kept
    datasets.Dataset.from_list(tiny_lm.pairs(48)).save_to_disk(folder)
    return datasets.load_from_disk(folder)


@pytest.fixture
def make(model, data, tmp_path):
    """Build a trainer of a class with a config: one thread, SGD, a log at each step."""

    def make(
        trainer, config, *, model=model, peft=False, out="out", train_dataset=data,
        eval_dataset=None, **options,
    ):  # fmt: skip
        options = {
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 6,
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 48,
            "learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant",
            "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
            **options,
        }  # fmt: skip
        extra = {}
        if peft:
            lora = pytest.importorskip("peft").LoraConfig(r=4, task_type="CAUSAL_LM")
            extra["peft_config"] = lora
        transformers.set_seed(0)  # of the adapters
        return trainer(
            model,
            args=config(str(tmp_path / out), **options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=transformers.AutoProcessor.from_pretrained(model),
            **extra,
        )

    return make


def curve(trainer, name="loss"):
    return np.array([row[name] for row in trainer.state.log_history if name in row])


def stored(trainer):
    gaps, mask = trainer.gamma_loss.queue.context()
    return gaps[mask]


BOTH = [
    {},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"gradient_checkpointing": True},
    {"bf16": True},
    {"peft": True, "learning_rate": 0.2},
]
VARIANTS = [
    *((DPO, options) for options in BOTH),
    (DPO, {"precompute_ref_log_probs": True}),
    (DPO, {"loss_type": "robust", "label_smoothing": 0.1}),
    (DPO, {"loss_type": "sigmoid_norm", "learning_rate": 0.1}),
    (DPO, {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 0.7]}),
    *((SIMPO, options) for options in BOTH),
    (SIMPO, {"label_smoothing": 0.1, "cpo_alpha": 0.3}),
]


@pytest.mark.parametrize(
    ("family", "variant"), VARIANTS, ids=lambda x: str(x) if isinstance(x, dict) else x[0]._name
)
def test_with_a_large_tau_the_curve_is_trl_s_own(make, family, variant):
    trainer, config, settings = family
    if "bf16" in variant and family is DPO and Version(TRL_VERSION) < Version("1.15"):
        pytest.skip("TRL before 1.15 rounds the log-probability of each token to bfloat16")
    options = {"max_steps": 20, **variant}
    ours = make(trainer, config, **settings, tau=1e12, **options)
    if family is DPO:
        theirs = make(DPOTrainer, DPOConfig, beta=settings["beta"], **options)
    else:
        theirs = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": settings["gamma0"]}
        theirs = make(CPOTrainer, CPOConfig, beta=settings["beta"], **theirs | options)
    for peer in (ours, theirs):
        peer.train()

    assert len(curve(ours)) == 20
    assert np.ptp(curve(ours)) > 0.1  # there is something to compare
    names = [n for n, v in theirs.state.log_history[0].items() if isinstance(v, float)]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"} <= set(names)
    for name in names:
        # Float32 rounding, of log-probabilities of about 40 nats, through 20 steps of SGD.
        expected = curve(theirs, name)
        np.testing.assert_allclose(curve(ours, name), expected, rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(curve(ours, "gamma/mean"), settings["gamma0"], rtol=1e-6)
    # Every micro-batch was pushed once, however often its activations were computed.
    assert stored(ours).numel() == 80


def test_a_vision_model(make, tmp_path):
    rows = datasets.Dataset.from_list(tiny_lm.vision_pairs(16))
    targets = np.linspace(-1.0, 1.0, 16)
    options = {"model": tiny_lm.build_vision(tmp_path / "vision"), "train_dataset": rows}
    ours = make(GammaDPOTrainer, GammaDPOConfig, tau=1e12, **options)
    theirs = make(DPOTrainer, DPOConfig, **options)
    for peer in (ours, theirs):
        peer.train()
    assert np.ptp(curve(ours)) > 0.01
    np.testing.assert_allclose(curve(ours), curve(theirs), rtol=2e-5)
    options |= {"train_dataset": rows.add_column("margin", targets), "max_steps": 1}
    ours = make(GammaDPOTrainer, GammaDPOConfig, per_device_train_batch_size=16, **options)
    ours.train()
    np.testing.assert_allclose(
        sorted(stored(ours)), targets, atol=1e-5
    )  # -m, as policy = reference


def reference_logps(model, rows, average):
    """Log-probabilities of responses, one at a time, by log_softmax in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)

    def logp(prompt, response):
        length = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            each = torch.log_softmax(model(ids).logits.double(), -1)[0, :-1]
        each = each[torch.arange(ids.shape[1] - 1), ids[0, 1:]][length - 1 :]
        return float(each.mean() if average else each.sum())

    return np.array([[logp(r["prompt"], r[key]) for key in ("chosen", "rejected")] for r in rows]).T


FIRST_PRINCIPLES = {
    "dpo": (DPO, {}),
    "dpo precomputed": (DPO, {"precompute_ref_log_probs": True}),
    "dpo normalized": (DPO, {"length_normalize": True, "beta": 5.0}),
    "simpo": (SIMPO, {}),
}


@pytest.mark.parametrize("of_data", [False, True], ids=["plain", "margins of the data"])
@pytest.mark.parametrize(
    ("family", "options"), FIRST_PRINCIPLES.values(), ids=FIRST_PRINCIPLES.keys()
)
def test_the_loss_of_an_evaluation_from_first_principles(
    make, model, data, family, options, of_data
):
    trainer, config, settings = family
    settings = {**settings, **options}
    average = family is SIMPO or "length_normalize" in options
    targets = np.random.default_rng(0).normal(0.5, 1.0, len(data)) if of_data else np.zeros(48)
    rows = data.add_column("margin", targets) if of_data else data
    trained = make(
        trainer, config, **settings, tau=0.5, queue_size=16,
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    if family is DPO:  # the same rows, not prepared before; later TRL has no reference for them
        assert trained.evaluate(rows)["eval_loss"] == trained.evaluate()["eval_loss"]
    trained.train()
    context = stored(trained).numpy()
    logs = trained.evaluate()

    rewards = settings["beta"] * reference_logps(trained.model, data, average)
    if family is DPO:
        start = transformers.AutoModelForCausalLM.from_pretrained(model)
        rewards -= settings["beta"] * reference_logps(start, data, average)
    gaps = rewards[0] - rewards[1]
    pool = np.concatenate([gaps - targets, context])
    margins = oracles.margins(pool, settings["gamma0"], 0.5)[0][: gaps.size]
    wanted = targets + (margins - settings["gamma0"] if family is DPO else margins)
    assert len(context) == 16
    assert np.ptp(margins) > 0.5
    assert logs["eval_loss"] == pytest.approx(np.logaddexp(0, wanted - gaps).mean(), rel=1e-4)
    if "length_normalize" not in options:  # TRL's rewards are of sums
        assert logs["eval_rewards/margins"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert logs["eval_gamma/min"] == pytest.approx(margins.min(), rel=1e-4)
    assert logs["eval_gamma/max"] == pytest.approx(margins.max(), rel=1e-4)


@pytest.fixture
def spawned_workers():
    """Loaders' workers start afresh: JAX, which other tests load, warns of forks, and rightly."""
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(None, force=True)


@FAMILIES
@pytest.mark.usefixtures("spawned_workers")
def test_training_stores_gaps_less_the_margins_of_the_data(make, data, family):
    trainer, config, settings = family
    options = {"per_device_train_batch_size": 48, "max_steps": 1}
    targets = np.random.default_rng(1).normal(size=48)
    queues = []
    for workers, rows in enumerate((data, data.add_column("margin", targets))):
        options["dataloader_num_workers"] = workers
        trained = make(trainer, config, **settings, **options, train_dataset=rows)
        trained.train()
        queues.append(stored(trained).numpy())
    np.testing.assert_allclose(sorted(queues[0] - queues[1]), sorted(targets), atol=1e-5)


@FAMILIES
def test_margins_of_the_data_that_are_no_numbers(make, data, family):
    trainer, config, settings = family
    rows = data.add_column("margin", [1.0, *[None] * 47])
    message = r"the column 'margin' must hold numbers, in reward units, got \[.*None"
    with pytest.raises(TypeError, match=message):
        make(trainer, config, **settings, train_dataset=rows).train()


@pytest.mark.parametrize(
    ("family", "term"),
    [
        (DPO, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
        (SIMPO, {"cpo_alpha": 1.0}),
    ],
    ids=["dpo", "simpo"],
)
def test_the_sft_term_holds_up_the_chosen_responses(make, family, term):
    trainer, config, settings = family
    settings = {**settings, "max_steps": 40, "per_device_train_batch_size": 48}
    chosen = []
    for options in ({}, term):
        trained = make(trainer, config, **settings, **options)
        trained.train()
        chosen.append(curve(trained, "logps/chosen"))
    assert chosen[0][0] == pytest.approx(chosen[1][0])
    assert chosen[1][-1] - chosen[0][-1] > 0.1 * abs(chosen[0][0])


@FAMILIES
def test_evaluation_leaves_queue_and_training_alone(make, data, family):
    trainer, config, settings = family
    settings = {**settings, "tau": 0.5}
    quiet = make(trainer, config, **settings)
    watched = make(trainer, config, **settings, eval_dataset=data, eval_strategy="steps",
                   eval_steps=2)  # fmt: skip
    quiet.train()
    watched.train()
    assert len(curve(watched, "eval_loss")) == 3
    assert torch.equal(stored(watched), stored(quiet))
    np.testing.assert_array_equal(curve(watched), curve(quiet))


@FAMILIES
def test_a_resumed_run_equals_an_uninterrupted_one(make, family):
    trainer, config, settings = family
    settings = {**settings, "tau": 0.2, "save_strategy": "steps", "save_steps": 3}
    whole = make(trainer, config, **settings, out="whole")
    whole.train()
    resumed = make(trainer, config, **settings, out="resumed")
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert stored(whole).numel() == 24
    assert torch.equal(stored(resumed), stored(whole))
    np.testing.assert_array_equal(curve(resumed), curve(whole))  # the first part from its file
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name

    (checkpoint / "gamma_loss.pt").unlink()  # as in a checkpoint of TRL's own trainer
    without = make(trainer, config, **settings, out="without")
    with pytest.warns(UserWarning, match=r"no gamma_loss\.pt in .*the queue starts empty"):
        without.train(resume_from_checkpoint=str(checkpoint))
    assert stored(without).numel() == 12
    assert not np.array_equal(curve(without), curve(whole))


@pytest.fixture
def two_ranks(model, tmp_path):
    """Train in two processes; return what both report."""

    def two_ranks(trainer, options, resume=None, fsdp2=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        work = {"family": trainer.__name__, "model": model, "out": str(tmp_path)}
        work |= {"options": options, "resume": resume, "fsdp2": fsdp2}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(Path(__file__).with_name("trl_rank.py"))],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                | {"OMP_NUM_THREADS": "1", "WORK": json.dumps(work)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], outputs
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    return two_ranks


def assert_same_run(alone, history, queue):
    expected = [row for row in alone.state.log_history if "loss" in row]
    history = [row for row in history if "loss" in row]
    assert len(expected) == len(history) == 6
    for row, other in zip(expected, history, strict=True):
        for name in row:
            if name.startswith(("loss", "gamma/", "rewards/", "logps/")):
                assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-4), name
    np.testing.assert_allclose(sorted(queue), sorted(stored(alone)), atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_equal_one(make, two_ranks, family, fsdp2):
    trainer, config, settings = family
    settings = {**settings, "tau": 0.3, "gradient_accumulation_steps": 2}
    alone = make(trainer, config, **settings, per_device_train_batch_size=4)
    alone.train()
    result = two_ranks(trainer, settings, fsdp2=fsdp2)
    # One queue, the same on both ranks, with the gaps of both.
    assert result[0]["queue"] == result[1]["queue"]
    assert_same_run(alone, result[0]["history"], result[0]["queue"])


def test_under_fsdp2_policy_and_reference_round_alike(two_ranks):
    if Version(TRL_VERSION) < Version("1.15"):
        pytest.skip("TRL before 1.15 rounds the log-probability of each token to bfloat16")
    first = two_ranks(GammaDPOTrainer, {"bf16": True}, fsdp2=True)[0]["history"][0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == first["gamma/kl"] == 0.0


def test_resuming_with_another_number_of_processes(make, two_ranks, tmp_path):
    trainer, config, settings = DPO
    settings = {**settings, "tau": 0.3, "save_strategy": "steps", "save_steps": 3}
    alone = make(trainer, config, **settings)
    alone.train()
    from_one = two_ranks(trainer, settings, str(tmp_path / "out" / "checkpoint-3"))
    assert from_one[0]["queue"] == from_one[1]["queue"]
    assert_same_run(alone, from_one[0]["history"], from_one[0]["queue"])

    two_ranks(trainer, settings)
    resumed = make(trainer, config, **settings, out="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(alone, resumed.state.log_history, stored(resumed).tolist())


def test_a_response_truncated_to_nothing_takes_no_part_dpo(make):
    trainer = make(GammaDPOTrainer, GammaDPOConfig, beta=0.5, gamma0=2.0, tau=0.5)
    trainer.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    count = len(inputs["input_ids"]) // 2
    inputs["completion_mask"][count] = 0  # the first pair's rejected response
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), inputs)
        rest = {k: v[[i for i in range(2 * count) if i % count]] for k, v in inputs.items()}
        expected = trainer.compute_loss(trainer.model, rest)
    assert torch.isfinite(loss)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_response_truncated_to_nothing_takes_no_part_simpo(make):
    options = {"beta": 2.0, "max_steps": 4, "per_device_train_batch_size": 48}

    def run(trainer, config, **more):
        trainer = make(trainer, config, **options, **more)
        rows = trainer.train_dataset.to_list()
        for row in rows[:2]:
            row["chosen_labels"] = [-100] * len(row["chosen_labels"])  # all of it is prompt
        trainer.train_dataset = datasets.Dataset.from_list(rows)
        trainer.train()
        return trainer

    ours = run(GammaSimPOTrainer, GammaSimPOConfig, gamma0=1.0, tau=1.0)
    assert np.isfinite(curve(ours)).all()
    assert stored(ours).numel() == 4 * 46
    theirs = run(CPOTrainer, CPOConfig, loss_type="simpo", cpo_alpha=0.0)
    assert np.isnan(curve(theirs)).all() or (curve(theirs) == 0).all()  # why it matters


def test_config_says_gamma0_either_way(tmp_path):
    config = GammaSimPOConfig(str(tmp_path), beta=2.5, gamma_beta_ratio=0.2, use_cpu=True)
    assert (config.gamma0, config.simpo_gamma, config.tau) == (0.5, 0.5, 10.0)
    assert GammaSimPOConfig(**config.to_dict()).gamma0 == 0.5
    assert GammaDPOConfig(str(tmp_path), use_cpu=True).gamma0 == 4.0
    message = r"gamma0 must be beta \* gamma_beta_ratio = 0\.5 or left out .*, got 3\.0"
    with pytest.raises(ValueError, match=message):
        GammaSimPOConfig(str(tmp_path), beta=2.5, gamma0=3.0, gamma_beta_ratio=0.2, use_cpu=True)
    parser = transformers.HfArgumentParser(GammaDPOConfig)
    arguments = ["--output_dir", "x", "--gamma_beta_ratio", "30", "--tau", "3", "--use_cpu", "true"]
    (config,) = parser.parse_args_into_dataclasses(arguments)
    assert (config.gamma0, config.tau, config.queue_size) == (3.0, 3.0, 2048)


def test_trl_s_own_configs_do(make):
    settings = make(GammaDPOTrainer, DPOConfig, beta=0.3).gamma_loss.settings
    assert (settings["beta"], settings["gamma0"], settings["tau"]) == (0.3, 4.0, 10.0)
    simpo = make(GammaSimPOTrainer, CPOConfig, beta=2.0, loss_type="simpo", simpo_gamma=0.7)
    assert (simpo.gamma_loss.settings["gamma0"], simpo.gamma_loss.settings["tau"]) == (0.7, 10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, r"loss_type must hold exactly one of .* got \['ipo'\]"),
        ({"loss_type": ["sigmoid", "robust"]}, "loss_type must hold exactly one of"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type must be 'reverse_kl'"),
        ({"ld_alpha": 0.5}, "ld_alpha must be None for γ-DPO, got 0.5"),
        ({"use_weighting": True}, "use_weighting must be False"),
        ({"tau": -1.0}, "tau"),
    ],
)
def test_options_that_dpo_does_not_support(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(GammaDPOTrainer, GammaDPOConfig, **options)


def test_liger_s_loss_is_refused_with_a_way_out(make, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss_liger", None, raising=False)  # TRL before 1.15
    message = r"use_liger_kernel must be False .*\(fused_linear_cross_entropy=False\).* TRL 1\.15"
    with pytest.raises(ValueError, match=message):
        make(GammaDPOTrainer, GammaDPOConfig, use_liger_kernel=True)


@FAMILIES
def test_trackers_are_given_the_gamma_metrics(make, data, family):
    class Tracker(transformers.TrainerCallback):  # as report_to="tensorboard" adds one
        def on_log(self, args, state, control, logs=None, **_):
            names.update(logs)

    names = set()
    trainer, config, settings = family
    trainer = make(trainer, config, **settings, eval_dataset=data, max_steps=1)
    trainer.add_callback(Tracker())
    trainer.train()
    trainer.evaluate()
    assert {"gamma/kl", "gamma/min", "gamma/residual", "eval_gamma/kl"} <= names


@pytest.mark.parametrize("options", [{"loss_type": "hinge"}, {"alpha": 0.5}], ids=str)
def test_options_that_simpo_does_not_support(make, options):
    with pytest.raises(ValueError, match="for γ-SimPO, got"):
        make(GammaSimPOTrainer, GammaSimPOConfig, **options)


def test_the_model_card_cites_the_paper(make, tmp_path):
    trainer = make(GammaDPOTrainer, GammaDPOConfig, save_strategy="steps", save_steps=6)
    trainer.train()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "2506.03690" in card
    assert "γ-DPO" in card


def test_gamma_metrics_are_those_of_the_loss(make):
    trainer = make(GammaDPOTrainer, GammaDPOConfig, beta=0.5, gamma0=2.0, tau=0.5, queue_size=0)
    calls = []
    trainer.gamma_loss.register_forward_hook(
        lambda module, logps, kwargs, result: calls.append((logps, kwargs["mask"])),
        with_kwargs=True,
    )
    trainer.train()
    for (logps, mask), row in zip(calls, trainer.state.log_history, strict=False):
        loss, aux = gamma_dpo_loss(
            *(x.detach().double() for x in logps), beta=0.5, gamma0=2.0, tau=0.5, mask=mask
        )
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert row["gamma/max"] == pytest.approx(float(aux.margins.max()), rel=1e-5)
        weights = aux.pair_weights
        effective = float(weights.sum() ** 2 / (weights**2).sum())
        assert row["gamma/effective_pairs"] == pytest.approx(effective, rel=1e-5)


@FAMILIES
def test_a_run_in_which_nothing_happens_says_so_after_a_hundred_steps(make, family):
    trainer, config, settings = family
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = make(trainer, config, **settings, tau=1e9, max_steps=100, **options)
    with pytest.warns(UserWarning, match=r"this run is (DPO|SimPO) to rounding.* tau = ") as caught:
        trainer.train()
    (message,) = [str(each.message) for each in caught if "rounding" in str(each.message)]
    assert "For the last 200 gaps" in message


DOCS = Path(__file__).parents[1] / "docs"


def test_the_recipe_s_code_runs(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    text = (DOCS / "recipes" / "trl.md").read_text()
    assert text.count("Qwen/Qwen3-0.6B") == 3
    text = text.replace("Qwen/Qwen3-0.6B", model)
    text = text.replace("tau=", "use_cpu=True, bf16=False, report_to=[], max_steps=2, tau=")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "trl.md", "exec"), names)
        assert names["trainer"].state.global_step == 2
        assert stored(names["trainer"]).numel() > 0


def test_the_recipe_s_rows_train(make):
    text = (DOCS / "recipes" / "trl.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    rows = [json.loads(line) for line in block.splitlines()] * 4
    rows = datasets.Dataset.from_list(rows)
    trainer = make(GammaDPOTrainer, GammaDPOConfig, train_dataset=rows, max_steps=1)
    trainer.train()
    assert stored(trainer).tolist() == pytest.approx([-0.5] * 4)  # policy is reference: g = 0


def test_the_readme_s_code_runs(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(
        r"```python\n(from gamma_loss\.integrations.*?)```",
        (DOCS.parent / "README.md").read_text(), re.DOTALL,
    )  # fmt: skip
    block = block.replace("tau=", "use_cpu=True, bf16=False, report_to=[], max_steps=2, tau=")
    names = {"model": model, "pairs": data}
    exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a program under docs/examples as a module, somewhere to write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(path):
        name = Path(path).stem
        spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where its dataclass looks names up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def program(load):
    return load("trl_dpo.py")


@pytest.fixture
def complaint(capsys):
    """The line with which a program ends instead of training."""

    def complaint(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(*arguments)
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return errors.splitlines()[-1]  # after the progress of reading the data

    return complaint


def write(file, rows):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def seen(program, monkeypatch):
    """Replace the training: return the configuration that it would have had."""

    class Seen(Exception):
        pass

    def trainer(model, args, **kwargs):
        raise Seen(model, args)

    monkeypatch.setattr(program, "GammaDPOTrainer", trainer)

    def run(argv):
        with pytest.raises(Seen) as found:
            program.main(argv)
        return found.value.args

    return run


QUICK = ["--max_steps", "2", "--use_cpu", "true", "--dataloader_pin_memory", "false"]


def test_program_on_local_files_with_lora(program, model, capsys):
    pytest.importorskip("peft")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_lm.pairs(40)))
    arguments = ["--model", model, "--dataset", "pairs.jsonl", "--lora", "--output_dir", "out"]
    trainer = program.main([*arguments, *QUICK, "--bf16", "false", "--gamma0", "3"])
    assert sum(p.requires_grad for p in trainer.model.parameters()) > 0
    assert all("lora" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert Path("out", "adapter_model.safetensors").is_file()
    assert "(gamma0 3)" in capsys.readouterr().out


def test_program_without_arguments(program, capsys):
    trainer = program.main(QUICK)
    assert trainer.state.global_step == 2
    assert "held-out pairs: accuracy" in capsys.readouterr().out


def test_a_model_is_never_trained_with_the_settings_of_the_tiny_one(program, model, monkeypatch):
    write("pairs.jsonl", tiny_lm.pairs(40))
    Path("job.yaml").write_text(f"model: {model}\ndataset: pairs.jsonl\nbf16: false\n")
    run = seen(program, monkeypatch)
    for argv in (
        ["--model", model, "--dataset", "pairs.jsonl"],
        [f"--model={model}", "--dataset=pairs.jsonl"],
        ["--config", "job.yaml"],
        ["--config=job.yaml"],
    ):
        name, config = run([*argv, "--bf16", "false"])
        assert name == model
        assert config.learning_rate < 1e-4
        assert config.save_strategy != "no"
    assert run([])[1].learning_rate == 3e-3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mod", "x"], "not used by the HfArgumentParser: ['--mod', 'x']"),
        (["--conf=job.yaml"], "not used by the HfArgumentParser: ['--conf=job.yaml']"),
        (["./my-model"], "not used by the HfArgumentParser: ['./my-model']"),
        (["--config"], "--config needs the name of a YAML file"),
        (["--config=missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--config", "list.yaml"], " mapping"),  # in words of TRL's, which changed
        (["--config", "broken.yaml"], "while parsing"),
        (["--config", "half.yaml"], "--model is needed as well"),
        (["--model", "x", "--bf16", "false"], "--dataset is needed as well"),
        (["--model=", "--dataset=x", "--bf16", "false"], "--model is needed as well"),
        (["--dataset", "x", "--bf16", "false"], "--model is needed as well"),
    ],
)
def test_command_lines_that_say_too_little(program, complaint, argv, words):
    Path("list.yaml").write_text("- model\n")
    Path("broken.yaml").write_text("model: [\n")
    Path("half.yaml").write_text("dataset: pairs.jsonl\nbf16: false\n")
    assert words in complaint(program.main, argv)


CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
WRONG = [
    ([{"question": "a", "yes": "b", "no": "c"}], "needs the columns prompt, chosen and rejected, "
     "has question, yes, no: rename its columns"),
    ([{"question": "a", "chosen": "b", "rejected": "c"}], "row 1 has no prompt: chosen and rejected"
     " begin differently, and 'prompt' is not one of the columns or not in their form. It has "
     "question, chosen, rejected: rename its columns"),
    ([{"prompt": "a", "chosen": CHAT[1:], "rejected": CHAT[:1]}], "row 1 has no prompt"),
    ([{"prompt": "a", "chosen": "b", "rejected": 3}],
     "row 1: 'rejected' must be text or messages, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "words"), WRONG)
def test_data_of_another_form(program, complaint, model, rows, words):
    write("pairs.jsonl", rows * 40)
    argv = ["--model", model, "--dataset", "pairs.jsonl", "--bf16", "false"]
    assert f"pairs.jsonl, split train: {words}" in complaint(program.main, argv)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "cannot be loaded as a dataset"), ("", "cannot be loaded"),
                           ('{"chosen": "a", "rejected": "b"}', "cannot be loaded as a dataset")]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_files_that_are_no_dataset(program, complaint, model, content, words):
    Path("pairs.jsonl").write_text(content)
    argv = ["--model", model, "--dataset", "pairs.jsonl", "--bf16", "false"]
    assert words in complaint(program.main, argv)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "a b", "rejected": "a c", "score": 1.0},
        {"chosen": CHAT, "rejected": CHAT[:1]},
        {"prompt": "?", "chosen": CHAT, "rejected": CHAT[:1]},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
    ],
)  # fmt: skip
def test_data_in_the_forms_that_trl_takes(program, row):
    write("pairs.jsonl", [row] * 40)
    assert set(program.load_pairs("pairs.jsonl")) == {"train", "test"}


def test_a_folder_without_a_model(program, complaint):
    write("pairs.jsonl", tiny_lm.pairs(40))
    argv = ["--model", "./nothing", "--dataset", "pairs.jsonl", "--bf16", "false"]
    assert "./nothing: cannot be loaded as a model" in complaint(program.main, argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model_name_or_path is needed as well"),
        (["--model_name_or_path", "x"], "--dataset_name is needed as well"),
        (["--model_name", "x"], "not used by the HfArgumentParser: ['--model_name', 'x']"),
        (["--use_peft", "true"], "not used by the HfArgumentParser: ['--use_peft', 'true']"),
        (["--config=missing.yaml"], "No such file or directory: 'missing.yaml'"),
    ],
)
def test_command_lines_of_the_published_settings(load, complaint, monkeypatch, argv, words):
    load("trl_dpo.py")
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, "--bf16", "false"])
    line = complaint(load("published/train.py").main)
    assert line.startswith("train.py: ")
    assert words in line


@pytest.mark.parametrize(("rows", "words"), WRONG)
def test_data_of_another_form_for_the_published_settings(
    load, complaint, monkeypatch, model, rows, words
):
    load("trl_dpo.py")
    write("pairs.jsonl", rows * 40)
    argv = ["--model_name_or_path", model, "--dataset_name", "pairs.jsonl", "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    assert f"pairs.jsonl, split train: {words}" in complaint(load("published/train.py").main)


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_the_authors_settings_are_ready(name, model, tmp_path):
    """Their files parse as they are, and train where model, data and machine are ours."""
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("a share of all steps as warmup_steps needs transformers 5")
    folder = DOCS / "examples" / "published"
    settings = yaml.safe_load((folder / f"{name}.yaml").read_text())
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = tiny_lm.pairs(8)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = {
        "model_name_or_path": model, "dataset_name": str(data), "output_dir": str(tmp_path),
        "attn_implementation": "eager", "dtype": "float32", "bf16": False, "use_cpu": True,
        "max_steps": 1, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings | ours))
    done = subprocess.run(
        [sys.executable, str(folder / "train.py"), "--config", str(tmp_path / "settings.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    published = PUBLISHED_SETTINGS[name]
    assert {key: settings[key] for key in published} == published

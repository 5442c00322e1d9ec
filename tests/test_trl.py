"""The trainers for TRL: against TRL's own, which γ-PO becomes as tau grows, and end to end."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import tiny_lm

pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
torch = pytest.importorskip("torch")

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS / "examples" / "published"))

import datasets  # noqa: E402
import train as published  # noqa: E402
import transformers  # noqa: E402
import trl_dpo as program  # noqa: E402
import yaml  # noqa: E402
from packaging.version import Version  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl import __version__ as TRL_VERSION  # noqa: E402

from gamma_loss import PUBLISHED_SETTINGS  # noqa: E402
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
ROUNDS_TOKENS = Version(TRL_VERSION) < Version("1.15")  # their log-probabilities, to bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))  # where what TRL computes of it is kept
    datasets.Dataset.from_list(tiny_lm.pairs(48)).save_to_disk(folder)
    return datasets.load_from_disk(folder)


@pytest.fixture(scope="module")
def make(model, data, tmp_path_factory):
    """Build a trainer of a class with a config: one thread, SGD, a log at each step."""

    def make(
        trainer, config, *, model=model, peft=False, train_dataset=data, eval_dataset=None,
        ref_model=None, **options,
    ):  # fmt: skip
        options = {
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 6,
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 48,
            "learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant",
            "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
            **options,
        }  # fmt: skip
        extra = {} if ref_model is None else {"ref_model": ref_model}
        if peft:
            lora = pytest.importorskip("peft").LoraConfig(r=4, task_type="CAUSAL_LM")
            extra["peft_config"] = lora
        transformers.set_seed(0)  # of the adapters
        return trainer(
            model,
            args=config(str(tmp_path_factory.mktemp("out")), **options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=transformers.AutoProcessor.from_pretrained(model),
            **extra,
        )

    return make


@pytest.fixture
def trained(make):
    def trained(*arguments, **options):
        trainer = make(*arguments, **options)
        trainer.train()
        return trainer

    return trained


def curve(trainer, name="loss"):
    return np.array([row[name] for row in trainer.state.log_history if name in row])


def stored(trainer):
    gaps, mask = trainer.gamma_loss.queue.context()
    return gaps[mask]


# --- against TRL's own trainers, and from first principles ---

BOTH = [
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
     "gradient_checkpointing": True},
    {"bf16": True},
    {"peft": True, "learning_rate": 0.2},
]  # fmt: skip
VARIANTS = [
    *((DPO, options) for options in BOTH),
    (DPO, {"loss_type": "robust", "label_smoothing": 0.1, "precompute_ref_log_probs": True}),
    (DPO, {"loss_type": ["sft", "sigmoid_norm"], "loss_weights": [0.3, 0.7],
           "learning_rate": 0.1}),
    *((SIMPO, options) for options in BOTH),
    (SIMPO, {"label_smoothing": 0.1, "cpo_alpha": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "variant"), VARIANTS, ids=lambda x: str(x) if isinstance(x, dict) else x[0]._name
)
def test_with_a_large_tau_the_curve_is_trl_s_own(trained, family, variant):
    trainer, config, settings = family
    if "bf16" in variant and family is DPO and ROUNDS_TOKENS:
        pytest.skip("TRL before 1.15 rounds the log-probability of each token to bfloat16")
    options = {"max_steps": 20, **variant}
    ours = trained(trainer, config, **settings, tau=1e12, **options)
    if family is DPO:
        theirs = trained(DPOTrainer, DPOConfig, beta=settings["beta"], **options)
    else:
        theirs = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": settings["gamma0"]}
        theirs = trained(CPOTrainer, CPOConfig, beta=settings["beta"], **theirs | options)
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


def test_a_vision_model_trains_as_with_trl(trained, tmp_path):
    rows = datasets.Dataset.from_list(tiny_lm.vision_pairs(16))
    options = {"model": tiny_lm.build_vision(tmp_path / "vision"), "train_dataset": rows}
    theirs = trained(DPOTrainer, DPOConfig, max_steps=3, **options)
    rows = rows.add_column("margin", [0.0] * 16)
    options = {**options, "train_dataset": rows, "tau": 1e12}
    ours = trained(GammaDPOTrainer, GammaDPOConfig, max_steps=3, **options)
    assert np.ptp(curve(ours)) > 0.01
    np.testing.assert_allclose(curve(ours), curve(theirs), rtol=2e-5)


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


@pytest.mark.filterwarnings("ignore:.*compute_metrics.*:FutureWarning")  # of TRL 1.15
@pytest.mark.parametrize(
    ("family", "options"),
    [(DPO, {}), (DPO, {"precompute_ref_log_probs": True, "length_normalize": True, "beta": 5.0}),
     (SIMPO, {})],
    ids=["dpo", "dpo precomputed and normalized", "simpo"],
)  # fmt: skip
def test_the_loss_of_an_evaluation_from_first_principles(trained, model, data, family, options):
    trainer, config, settings = family
    settings = {**settings, **options}
    average = family is SIMPO or "length_normalize" in options
    targets = np.random.default_rng(0).normal(0.5, 1.0, len(data))
    rows = data.add_column("margin", targets)
    ours = trained(trainer, config, **settings, tau=0.5, queue_size=16, train_dataset=rows,
                   eval_dataset=rows)  # fmt: skip
    context = stored(ours).numpy()
    logs = ours.evaluate()
    if not options and family is DPO:  # the same rows, not prepared before
        assert ours.evaluate(rows)["eval_loss"] == logs["eval_loss"]
        ours.compute_metrics = lambda found: {"shape": found.predictions.shape}
        again = ours.evaluate()
        assert again["eval_loss"] == logs["eval_loss"]
        assert len(again["eval_shape"]) == 3  # of logits

    rewards = settings["beta"] * reference_logps(ours.model, data, average)
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
    weights = oracles.sigmoid(wanted - gaps)
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    assert logs["eval_gamma/effective_pairs"] == pytest.approx(effective, rel=1e-4)


@pytest.mark.parametrize(("family", "backend"), [(DPO, "eager"), (SIMPO, "aot_eager")])
@pytest.mark.filterwarnings("ignore")  # what compiling TRL's loss warns of
def test_a_compiled_model_trains_as_one_that_is_not(trained, family, backend):
    trainer, config, settings = family
    # Batches of one shape, so that there is one graph.
    settings = {**settings, "tau": 0.5, "max_steps": 2, "per_device_train_batch_size": 48}
    plain = trained(trainer, config, **settings)
    compiled = trained(trainer, config, **settings, torch_compile_backend=backend)
    assert compiled.args.torch_compile
    np.testing.assert_allclose(curve(compiled), curve(plain), rtol=1e-4)


def test_a_run_in_which_nothing_happens_says_so_after_a_hundred_steps(trained):
    trainer, config, settings = DPO
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "tau": 1e9}
    with pytest.warns(UserWarning, match=r"this run is DPO to rounding.* tau = ") as caught:
        trained(trainer, config, max_steps=100, **settings, **options)
    (message,) = [str(each.message) for each in caught if "rounding" in str(each.message)]
    assert "For the last 200 gaps" in message


# --- the columns margin and weight ---


@pytest.fixture
def spawned_workers():
    """Loaders' workers start afresh: JAX, which other tests load, warns of forks, and rightly."""
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(None, force=True)


@pytest.mark.usefixtures("spawned_workers")
def test_training_stores_gaps_less_the_margins_of_the_data(trained, data):
    options = {"per_device_train_batch_size": 48, "max_steps": 1}
    targets = np.random.default_rng(1).normal(size=48)
    queues = []
    for workers, rows in enumerate((data, data.add_column("margin", targets))):
        options["dataloader_num_workers"] = workers
        ours = trained(GammaDPOTrainer, GammaDPOConfig, **options, train_dataset=rows)
        queues.append(stored(ours).numpy())
    np.testing.assert_allclose(sorted(queues[0] - queues[1]), sorted(targets), atol=1e-5)


@FAMILIES
def test_numbers_of_the_data_are_checked_when_the_trainer_is_made(make, data, family):
    trainer, config, settings = family
    for column, value, shown in [
        ("margin", float("nan"), "nan"), ("margin", float("inf"), "inf"),
        ("margin", 1e39, r"1e\+39"), ("margin", None, "None"), ("margin", "1.0", "'1.0'"),
        ("margin", [1.0], r"\[1.0\]"), ("margin", True, "True"), ("weight", -1.0, "-1.0"),
        ("weight", float("nan"), "nan"),
    ]:  # fmt: skip
        first = 5 if isinstance(value, float | None) else 0
        values = [1.0] * 48 if first else [value] * 48
        values[first] = value
        rows = data.add_column(column, values)
        message = rf"column '{column}' must hold a finite number.*, got {shown} in row {first} of "
        with pytest.raises(ValueError, match=message + "train_dataset"):
            make(trainer, config, **settings, train_dataset=rows)
        with pytest.raises(ValueError, match=message + r"eval_dataset\['held out'\]"):
            make(trainer, config, **settings, eval_dataset={"all": data, "held out": rows})


@FAMILIES
def test_a_batch_that_was_not_checked_before_is_checked(make, family):
    trainer, config, settings = family
    ours = make(trainer, config, **settings)
    rows = ours.train_dataset.to_list()[:4]
    for some in ([{}, {}, {"margin": 1.0}, {}], [{"weight": 1.0}, {"weight": 1.0}, {}, {}]):
        mixed = [row | more for row, more in zip(rows, some, strict=True)]
        with pytest.raises(ValueError, match=r"column '\w+' .* got None in row . of a batch"):
            ours.data_collator(mixed)


def stream(rows):
    """Rows as they come, whose columns are not known before."""
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@FAMILIES
def test_a_stream_trains_as_the_dataset_does_and_every_row_is_checked(trained, data, family):
    trainer, config, settings = family
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(data)]
    alone = trained(trainer, config, **settings, train_dataset=datasets.Dataset.from_list(rows),
                    train_sampling_strategy="sequential")  # fmt: skip
    streamed = trained(trainer, config, **settings, train_dataset=stream(rows),
                       eval_dataset=stream(rows))  # fmt: skip
    np.testing.assert_allclose(curve(streamed), curve(alone), rtol=1e-6)
    np.testing.assert_allclose(stored(streamed), stored(alone), rtol=1e-6)
    assert np.isfinite(streamed.evaluate()["eval_loss"])
    for with_margin, without in ((range(1), 1), (range(1, 48), 0)):
        rows = [row | ({"margin": 0.5} if i in with_margin else {}) for i, row in enumerate(data)]
        message = rf"column 'margin' .* in every row or in none, got None in row {without} of train"
        with pytest.raises(ValueError, match=message):
            trained(trainer, config, **settings, train_dataset=stream(rows))


def test_a_column_with_a_misspelt_name_is_named(make, data):
    rows = data.add_column("Margins", [0.0] * 48).add_column("height", [1] * 48)
    words = "the column 'Margins' of train_dataset is not used: call it 'margin' if"
    with pytest.warns(UserWarning, match=words):
        make(GammaDPOTrainer, GammaDPOConfig, train_dataset=rows)
    rows = rows.rename_column("Margins", "weights")
    with pytest.warns(UserWarning, match="'weights' of eval_dataset is not used: call it 'weight'"):
        make(GammaDPOTrainer, GammaDPOConfig, eval_dataset=stream(rows))


# --- truncation ---


def long_prompts(data, count):
    """The pairs, of which the last ones have a prompt that fills `max_length`.

    Before TRL 1.15 `CPOTrainer` truncates by the length of the longer response.
    """
    rows = data.to_list()
    for row in rows[-count:]:
        row.update(prompt=" ".join([row["prompt"]] * 40), chosen=row["chosen"] * 40)
    return datasets.Dataset.from_list(rows)


@FAMILIES
@pytest.mark.filterwarnings("ignore:3 of the 8 pairs of train_dataset are left out")
@pytest.mark.filterwarnings("ignore:no pair of the first batch")  # TRL 1.8 keeps them for γ-DPO
def test_a_step_s_loss_is_that_of_its_pairs_however_they_are_split(trained, data, family):
    trainer, config, settings = family
    weights = [1.0, 0.0, 2.0, *[1.0] * 5]  # of the five pairs that are left, one has no weight
    rows = long_prompts(data.select(range(8)), 3).add_column("weight", weights)
    twice = data.select([0, 2, 2, 3, 4])  # a pair of weight 2 is two equal ones
    found = []
    for size, some in ((8, rows), (3, rows), (1, rows), (8, twice)):
        ours = trained(
            trainer, config, **settings, tau=1e12, train_dataset=some, max_steps=1, max_length=60,
            per_device_train_batch_size=size, gradient_accumulation_steps=-(-8 // size),
        )  # fmt: skip
        found += [[*curve(ours), *curve(ours, "grad_norm")]]
        if len(found) == 1:
            assert curve(ours, "gamma/pairs") == pytest.approx(4 / len(ours.train_dataset))
    np.testing.assert_allclose(found, [found[0]] * 4, rtol=1e-4)


def test_a_response_truncated_to_nothing_takes_no_part(trained, data):
    ours = trained(GammaDPOTrainer, GammaDPOConfig, beta=0.5, gamma0=2.0, tau=0.5, max_steps=3)
    inputs = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))
    count = len(inputs["input_ids"]) // 2
    inputs["completion_mask"][count] = 0  # the first pair's rejected response
    with torch.no_grad():
        loss = ours.compute_loss(ours.model.eval(), inputs)
        rest = {k: v[[i for i in range(2 * count) if i % count]] for k, v in inputs.items()}
        expected = ours.compute_loss(ours.model, rest)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    options = {"max_steps": 2, "per_device_train_batch_size": 48, "max_length": 60}
    rows = long_prompts(data, 2)
    with pytest.warns(UserWarning, match="2 of the 48 pairs of train_dataset are left out: .* 60"):
        ours = trained(GammaSimPOTrainer, GammaSimPOConfig, train_dataset=rows, **options)
    assert np.isfinite(curve(ours)).all()
    assert stored(ours).numel() == 2 * 46


@FAMILIES
def test_where_no_pair_takes_part_it_is_said(make, data, family):
    trainer, config, settings = family
    ours = make(trainer, config, **settings, max_steps=1)
    rows = ours.train_dataset.to_list()
    for row in rows:  # as a collator of one's own may leave them
        if family is DPO:
            row["chosen_ids"] = []
        else:
            row["chosen_labels"] = [-100] * len(row["chosen_labels"])
    ours.train_dataset = datasets.Dataset.from_list(rows)
    with pytest.warns(UserWarning, match="no pair of the first batch takes part"):
        ours.train()
    assert curve(ours, "gamma/pairs") == curve(ours) == 0
    if family is DPO and Version(TRL_VERSION) < Version("1.9"):
        return  # TRL 1.8 keeps long prompts in DPO's data
    options = {**settings, "max_length": 60}
    words = "48 of the 48 pairs of {} are left out: .*_length = 60 .* Increase max_length"
    with pytest.raises(ValueError, match=words.format("train_dataset")):
        make(trainer, config, **options, train_dataset=long_prompts(data, 48))
    with pytest.warns(UserWarning, match=words.format("eval_dataset") + ".* reports no loss"):
        evaluated = make(trainer, config, **options, eval_dataset=long_prompts(data, 48),
                         eval_strategy="steps", eval_steps=6)  # fmt: skip
    evaluated.train()
    assert not [name for row in evaluated.state.log_history for name in row if "eval_loss" in name]


# --- the queue: evaluation, checkpoints, processes ---


@FAMILIES
def test_evaluation_leaves_queue_and_training_alone(trained, data, family):
    trainer, config, settings = family
    settings = {**settings, "tau": 0.5, "max_steps": 4}
    quiet = trained(trainer, config, **settings)
    watched = trained(trainer, config, **settings, eval_dataset=data, eval_strategy="steps",
                      eval_steps=2)  # fmt: skip
    assert len(curve(watched, "eval_loss")) == 2
    assert torch.equal(stored(watched), stored(quiet))
    np.testing.assert_array_equal(curve(watched), curve(quiet))


SAVED = {"tau": 0.2, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module", params=[DPO, SIMPO], ids=["dpo", "simpo"])
def whole(request, make):
    """A family, an uninterrupted run of 6 steps, and its checkpoint after 3."""
    trainer, config, settings = request.param
    ours = make(trainer, config, **settings, **SAVED)
    ours.train()
    checkpoint = Path(ours.args.output_dir, "checkpoint-3")
    return SimpleNamespace(family=request.param, trainer=ours, checkpoint=str(checkpoint))


def resumed(make, whole, **changed):
    trainer, config, settings = whole.family
    ours = make(trainer, config, **settings | SAVED | changed)
    ours.train(resume_from_checkpoint=whole.checkpoint)
    return ours


def test_a_resumed_run_equals_an_uninterrupted_one(make, whole, monkeypatch):
    ours = resumed(make, whole)
    assert stored(whole.trainer).numel() == 24
    assert torch.equal(stored(ours), stored(whole.trainer))
    np.testing.assert_array_equal(curve(ours), curve(whole.trainer))  # the first part from its file
    for name, value in whole.trainer.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name
    card = (Path(whole.trainer.args.output_dir) / "README.md").read_text()
    assert "2506.03690" in card  # the paper
    assert whole.trainer._name in card
    file = Path(whole.checkpoint, "gamma_loss.pt")
    file.rename(file.with_suffix(".away"))  # as in a checkpoint of TRL's own trainer
    try:
        with pytest.warns(UserWarning, match=r"no gamma_loss\.pt in .*the queue starts empty"):
            without = resumed(make, whole)
    finally:
        file.with_suffix(".away").rename(file)
    assert stored(without).numel() == 12
    assert not np.array_equal(curve(without), curve(whole.trainer))


def test_a_queue_in_other_units_is_emptied_and_one_of_another_size_keeps_the_newest(make, whole):
    for changed in ({"beta": 1.0}, {"gamma0": 3.0}, {"length_normalize": True}):
        name = next(iter(changed))
        if whole.family is SIMPO and name == "length_normalize":
            continue  # γ-SimPO always averages
        with pytest.warns(UserWarning, match=f"filled with .*{name} = .*starts empty"):
            ours = resumed(make, whole, max_steps=4, **changed)
        assert stored(ours).numel() == 4  # of step 4
    kept = stored(whole.trainer)[:12]
    assert torch.equal(stored(resumed(make, whole, max_steps=4, queue_size=8))[:4], kept[-4:])
    assert resumed(make, whole, max_steps=4, queue_size=0).gamma_loss.queue is None
    trainer, config, settings = whole.family
    without = make(trainer, config, **settings | SAVED, queue_size=0, max_steps=3)
    without.train()
    checkpoint = str(Path(without.args.output_dir, "checkpoint-3"))
    later = SimpleNamespace(family=whole.family, checkpoint=checkpoint)
    assert stored(resumed(make, later, max_steps=4)).numel() == 4


@FAMILIES
def test_the_queue_goes_back_with_the_model(trained, make, data, model, family):
    trainer, config, settings = family
    settings = {**settings, "tau": 0.2, "learning_rate": 0.5, "eval_dataset": data}
    best = trained(
        trainer, config, **settings, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_only_model=True, load_best_model_at_end=True, max_steps=4,
        metric_for_best_model="rewards/margins", greater_is_better=False,
    )  # fmt: skip
    margins, losses = (curve(best, f"eval_{name}") for name in ("rewards/margins", "loss"))
    assert margins.argmin() < len(margins) - 1
    assert best.evaluate()["eval_loss"] == losses[margins.argmin()]
    assert stored(best).numel() == 4 * (margins.argmin() + 1)

    best.save_model()
    start = transformers.AutoModelForCausalLM.from_pretrained(model)
    reference = {"ref_model": start} if family is DPO else {}
    again = make(trainer, config, **settings, model=best.args.output_dir, **reference)
    assert again.evaluate()["eval_loss"] == losses[margins.argmin()]
    if family is DPO:  # whose gaps are to another reference without that
        other = make(trainer, config, **settings, model=best.args.output_dir)
        assert not stored(other).numel()


RANKS = {"tau": 0.3, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
JOBS = {  # the family, its options, whether one process saved what is resumed, and FSDP2
    "dpo": (DPO, RANKS, False, False),
    "simpo": (SIMPO, RANKS, False, False),
    "resumed": (DPO, RANKS, True, False),
    "dpo sharded": (DPO, RANKS | {"save_strategy": "no"}, False, True),
    "simpo sharded": (SIMPO, RANKS | {"save_strategy": "no"}, False, True),
    "bf16 sharded": (DPO, {"bf16": True, "max_steps": 1}, False, True),
}


@pytest.fixture(scope="module")
def ranks(make, model, tmp_path_factory):
    """What one process trained, and what two of each job report, for which they start once."""
    alone, folder = {}, tmp_path_factory.mktemp("ranks")
    for trainer, config, settings in (DPO, SIMPO):
        alone[trainer] = make(trainer, config, **settings, **RANKS)
        alone[trainer].train()
    checkpoint = str(Path(alone[GammaDPOTrainer].args.output_dir, "checkpoint-3"))
    jobs = [
        {"name": name, "family": trainer.__name__, "options": settings | options, "fsdp2": fsdp2,
         "out": str(folder / name), "resume": checkpoint if resume else None}
        for name, ((trainer, _, settings), options, resume, fsdp2) in JOBS.items()
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = json.dumps({"model": model, "out": str(folder), "jobs": jobs})
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("trl_rank.py"))],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "WORK": work}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(alone=alone, of_two=found, folder=folder)


def assert_same_run(alone, history, queue):
    expected = [row for row in alone.state.log_history if "loss" in row]
    history = [row for row in history if "loss" in row]
    assert len(expected) == len(history) == 6
    for row, other in zip(expected, history, strict=True):
        for name in row:
            if name.startswith(("loss", "gamma/", "rewards/", "logps/")):
                assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-4), name
    np.testing.assert_allclose(sorted(queue), sorted(stored(alone)), atol=1e-4)


@pytest.mark.xdist_group("trl ranks")
@pytest.mark.parametrize("name", [name for name in JOBS if "bf16" not in name])
def test_two_ranks_equal_one(ranks, name):
    first, second = (found[name] for found in ranks.of_two)
    assert first["queue"] == second["queue"]  # one queue, with the gaps of both
    assert_same_run(ranks.alone[JOBS[name][0][0]], first["history"], first["queue"])


@pytest.mark.xdist_group("trl ranks")
def test_one_process_resumes_what_two_began(ranks, make):
    trainer, config, settings = DPO
    ours = make(trainer, config, **settings, **RANKS)
    ours.train(resume_from_checkpoint=str(ranks.folder / "dpo" / "checkpoint-3"))
    assert_same_run(ranks.alone[trainer], ours.state.log_history, stored(ours).tolist())


@pytest.mark.xdist_group("trl ranks")
@pytest.mark.skipif(ROUNDS_TOKENS, reason="TRL before 1.15 rounds each token to bfloat16")
def test_under_fsdp2_policy_and_reference_round_alike(ranks):
    first = ranks.of_two[0]["bf16 sharded"]["history"][0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == first["gamma/kl"] == 0.0


# --- configurations ---


def test_a_config_takes_gamma0_either_way_and_trl_s_own_will_do(make, tmp_path):
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
    settings = make(GammaDPOTrainer, DPOConfig, beta=0.3).gamma_loss.settings
    assert (settings["beta"], settings["gamma0"], settings["tau"]) == (0.3, 4.0, 10.0)
    simpo = make(GammaSimPOTrainer, CPOConfig, beta=2.0, loss_type="simpo", simpo_gamma=0.7)
    assert (simpo.gamma_loss.settings["gamma0"], simpo.gamma_loss.settings["tau"]) == (0.7, 10.0)


@FAMILIES
def test_a_config_checks_its_numbers(tmp_path, family):
    for options, error, words in [
        ({"gamma_beta_ratio": "0.5"}, TypeError, "gamma_beta_ratio must be a Python number"),
        ({"gamma_beta_ratio": -1.0}, ValueError, "gamma_beta_ratio must be finite and >= 0"),
        ({"gamma_beta_ratio": 1.0, "beta": "1"}, TypeError, "beta must be a Python number"),
        ({"queue_size": -1}, ValueError, "queue_size must be >= 0, got -1"),
    ]:
        with pytest.raises(error, match=words):
            family[1](str(tmp_path), use_cpu=True, **options)


def test_options_that_would_change_the_loss_are_refused(make, monkeypatch):
    for options, message in [
        ({"loss_type": "ipo"}, r"loss_type must hold exactly one of .* got \['ipo'\]"),
        ({"loss_type": ["sigmoid", "robust"]}, "loss_type must hold exactly one of"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type must be 'reverse_kl'"),
        ({"ld_alpha": 0.5}, "ld_alpha must be None for γ-DPO, got 0.5"),
        ({"use_weighting": True}, "use_weighting must be False"),
        ({"tau": -1.0}, "tau"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(GammaDPOTrainer, GammaDPOConfig, **options)
    for options in ({"loss_type": "hinge"}, {"alpha": 0.5}):
        with pytest.raises(ValueError, match="for γ-SimPO, got"):
            make(GammaSimPOTrainer, GammaSimPOConfig, **options)
    monkeypatch.setattr(DPOTrainer, "_compute_loss_liger", None, raising=False)  # TRL before 1.15
    message = r"use_liger_kernel must be False .*\(fused_linear_cross_entropy=False\).* TRL 1\.15"
    with pytest.raises(ValueError, match=message):
        make(GammaDPOTrainer, GammaDPOConfig, use_liger_kernel=True)


# --- pages and programs ---

TINY = "use_cpu=True, bf16=False, report_to=[], max_steps=2, tau="


def test_the_code_of_recipe_and_readme_runs(model, data, make, tmp_path, monkeypatch):
    """Each block alone, but for what is on the hub and for what only a GPU can do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    text = (DOCS / "recipes" / "trl.md").read_text()
    readme = (DOCS.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text + readme, re.DOTALL)
    blocks = [block for block in blocks if "integrations.trl" in block]
    assert len(blocks) == text.count("```python") + 1
    for block in blocks:
        names = {}
        block = block.replace("Qwen/Qwen3-0.6B", model).replace("tau=", TINY)
        exec(compile(block, "trl.md", "exec"), names)
        assert names["trainer"].state.global_step == 2
        assert stored(names["trainer"]).numel() > 0
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    rows = datasets.Dataset.from_list([json.loads(line) for line in block.splitlines()] * 4)
    trainer = make(GammaDPOTrainer, GammaDPOConfig, train_dataset=rows, max_steps=1)
    trainer.train()
    assert stored(trainer).tolist() == pytest.approx([-0.5] * 4)  # policy is reference: g = 0


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Somewhere to write, and the name of a program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py"])


@pytest.fixture
def complaint(shell, capsys):
    """The line with which a program ends instead of training."""

    def complaint(program, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            program.run(program.main, argv)
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert not {"Traceback", "usage"} & set(errors.split())
        return errors.splitlines()[-1]  # after the progress of reading the data

    return complaint


def write(file, rows):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
QUICK = ["--max_steps", "2", "--use_cpu", "true", "--dataloader_pin_memory", "false"]
FILES = ["--dataset", "pairs.jsonl", "--bf16", "false", "--output_dir", "out"]


def test_the_program_trains_on_local_files_and_without_arguments(shell, model, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(program, "local_pairs", partial(program.local_pairs, count=300))
    write("pairs.jsonl", tiny_lm.pairs(40))
    trainer = program.main(["--model", model, "--lora", *FILES, *QUICK, "--gamma0", "3"])
    assert sum(p.requires_grad for p in trainer.model.parameters()) > 0
    assert all("lora" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert Path("out", "adapter_model.safetensors").is_file()
    assert "(gamma0 3)" in capsys.readouterr().out
    assert program.main(QUICK).state.global_step == 2
    assert "held-out pairs: accuracy" in capsys.readouterr().out


def test_a_model_is_never_trained_with_the_settings_of_the_tiny_one(shell, model, monkeypatch):
    seen = []
    monkeypatch.setattr(program, "GammaDPOTrainer", lambda *model, **kwargs: 1 / 0)
    monkeypatch.setattr(
        program, "prepare", lambda *some, prepare=program.prepare, **more: (
            seen.append(prepare(*some, **more)) or seen[-1]
        ),
    )  # fmt: skip
    write("pairs.jsonl", tiny_lm.pairs(40))
    Path("job.yaml").write_text(f"model: {model}\ndataset: pairs.jsonl\nbf16: false\n")
    for argv in ([f"--model={model}", *FILES], ["--config", "job.yaml"], ["--config=job.yaml"], []):
        with pytest.raises(ZeroDivisionError):
            program.main(argv)
    for options, config, *_ in seen[:3]:
        assert options.model == model
        assert config.learning_rate < 1e-4
        assert config.save_strategy != "no"
    assert seen[3][1].learning_rate == 3e-3


@pytest.mark.parametrize("program", [program, published], ids=["trl_dpo", "published"])
def test_wrong_input_ends_in_one_line(complaint, model, monkeypatch, program):
    Path("list.yaml").write_text("- model\n")
    Path("broken.yaml").write_text("model: [\n")
    Path("half.yaml").write_text("bf16: false\n")
    names = ("--model", "--dataset")
    if program is published:
        names = ("--model_name_or_path", "--dataset_name")
    for argv, words in [
        (["--mod", "x"], "not used by the HfArgumentParser: ['--mod', 'x']"),
        (["./my-model"], "not used by the HfArgumentParser: ['./my-model']"),
        (["--config"], "--config needs the name of a YAML file"),
        (["--config=missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--config", "list.yaml"], " mapping"),  # in words of TRL's, which changed
        (["--config", "broken.yaml"], "while parsing"),
        (["--config", "half.yaml"], f"{names[0]} is needed"),
        ([f"{names[0]}=", f"{names[1]}=x", "--bf16", "false"], f"{names[0]} is needed"),
        ([names[0], "x", "--bf16", "false"], f"{names[1]} is needed"),
    ]:
        assert words in complaint(program, argv)
    argv = [names[0], model, names[1], "pairs.jsonl", *FILES[2:]]
    same = {"chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "."}]}
    for rows, words in [  # most of their words are tested in test_examples.py
        ([{"question": "a", "chosen": "b", "rejected": "c"}], "pairs.jsonl:1: no prompt: chosen "),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "pairs.jsonl: needs at least 2 pairs"),
        ([], "pairs.jsonl: holds no pairs"),
        ([same] * 9, f"{model} has no chat template, which messages need: give prompt, chosen and"),
    ]:
        write("pairs.jsonl", rows)
        assert words in complaint(program, argv)
    write("pairs.jsonl", tiny_lm.pairs(40))
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    for options, words in [
        (["--bf16", "true"], "doesn't support bf16"),
        (["--bf16", "true", names[0], "./nothing"], "./nothing: cannot be"),  # of more use
        (["--output_dir", "/proc/out"], "/proc/out"),
        (["--output_dir", "pairs.jsonl"], "File exists: 'pairs.jsonl'"),
        (["--seed", "4294967296"], "--seed must be from 0 to 2**32 - 1, got 4294967296"),
        (["--gamma0", "-1"], "gamma0"),
        ([names[0], "./nothing"], "./nothing: cannot be loaded as a model"),
    ]:
        assert words in complaint(program, [*argv, *options])


def test_ctrl_c_leaves_whole_checkpoints(shell, model, capsys, monkeypatch):
    write("pairs.jsonl", tiny_lm.pairs(40))
    save = GammaDPOTrainer._save_checkpoint

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, *arguments, **options)

    monkeypatch.setattr(program.GammaDPOTrainer, "_save_checkpoint", interrupted)
    argv = ["--model", model, *FILES, *QUICK, "--save_steps", "1", "--report_to", "none"]
    with pytest.raises(SystemExit) as ended:
        program.run(program.main, argv)
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")
    (checkpoint,) = Path("out").glob("checkpoint-*")
    assert {"model.safetensors", "trainer_state.json"} <= {p.name for p in checkpoint.iterdir()}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="a share of all steps as warmup_steps needs transformers 5",
)
def test_the_authors_settings_are_ready(shell, model, monkeypatch):
    """Their files parse as they are, and train where model, data and machine are ours."""
    for split in ("train", "test"):
        Path("data").mkdir(exist_ok=True)
        write(f"data/{split}.jsonl", tiny_lm.pairs(8))
    ours = {
        "model_name_or_path": model, "dataset_name": "./data", "output_dir": "out",
        "attn_implementation": "eager", "dtype": "float32", "bf16": False, "use_cpu": True,
        "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    steps = []
    monkeypatch.setattr(published, "train", lambda own, _: steps.append(own.train().global_step))
    for name, wanted in PUBLISHED_SETTINGS.items():
        settings = yaml.safe_load((DOCS / f"examples/published/{name}.yaml").read_text())
        assert {key: settings[key] for key in wanted} == wanted
        Path("settings.yaml").write_text(yaml.safe_dump(settings | ours))
        published.main(["--config", "settings.yaml"])
    assert steps == [1] * 4
    # As a program it finds its parts, of which pytest's path has one folder.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "examples" not in path])
    for name in ("_common", "trl_dpo"):
        monkeypatch.delitem(sys.modules, name)
    assert runpy.run_path(published.__file__)["main"]

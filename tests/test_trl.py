"""The trainers for TRL: against TRL's own, which γ-PO becomes as tau grows, and end to end."""

import importlib.util
import json
import multiprocessing
import os
import re
import signal
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
        eval_dataset=None, ref_model=None, **options,
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
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")  # what compiling TRL's loss warns of
def test_a_compiled_model_trains_as_one_that_is_not(make, family, backend):
    trainer, config, settings = family
    plain = make(trainer, config, **settings, tau=0.5)
    compiled = make(trainer, config, **settings, tau=0.5, torch_compile_backend=backend)
    assert compiled.args.torch_compile
    for each in (plain, compiled):
        each.train()
    np.testing.assert_allclose(curve(compiled), curve(plain), rtol=1e-4)


def test_references_are_constants(make, model, monkeypatch):
    """Even those of a trainer that computes them with a gradient."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)

    def compute_ref_log_probs(self, *arguments):
        logps = compute(self, *arguments)
        return [x + 0 * next(reference.parameters()).sum() for x in logps]

    compute = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", compute_ref_log_probs)
    make(GammaDPOTrainer, GammaDPOConfig, ref_model=reference, max_steps=1).train()
    assert all(parameter.grad is None for parameter in reference.parameters())


FAULTY = [
    ("margin", float("nan"), "nan"), ("margin", float("inf"), "inf"), ("margin", 1e39, r"1e\+39"),
    ("margin", None, "None"), ("margin", "1.0", "'1.0'"), ("margin", "inf", "'inf'"),
    ("margin", [1.0], r"\[1.0\]"), ("margin", True, "True"), ("weight", -1.0, "-1.0"),
    ("weight", float("nan"), "nan"),
]  # fmt: skip


@FAMILIES
@pytest.mark.parametrize(("column", "value", "shown"), FAULTY)
def test_numbers_of_the_data_are_checked_when_the_trainer_is_made(
    make, data, family, column, value, shown
):
    trainer, config, settings = family
    values = [1.0] * 48 if isinstance(value, float | None) else [value] * 48
    first = values.index(value) if value in values else 5
    values[first] = value
    rows = data.add_column(column, values)
    message = rf"column '{column}' must hold a finite number.*, got {shown} in row {first} of "
    with pytest.raises(ValueError, match=message + "train_dataset"):
        make(trainer, config, **settings, train_dataset=rows)
    with pytest.raises(ValueError, match=message + r"eval_dataset\['held out'\]"):
        make(trainer, config, **settings, eval_dataset={"all": data, "held out": rows})


@FAMILIES
@pytest.mark.parametrize("column", ["margin", "weight"])
def test_a_batch_that_was_not_checked_before_is_checked(make, data, family, column):
    trainer, config, settings = family
    trained = make(trainer, config, **settings)
    rows = trained.train_dataset.to_list()[:4]
    for some in ([{}, {}, {column: 1.0}, {}], [{column: 1.0}, {column: 1.0}, {}, {}]):
        mixed = [row | more for row, more in zip(rows, some, strict=True)]
        with pytest.raises(ValueError, match=f"column '{column}' .* got None in row . of a batch"):
            trained.data_collator(mixed)


def stream(rows):
    """Rows as they come, whose columns are not known before."""
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@FAMILIES
def test_a_stream_trains_as_the_dataset_does(make, data, family):
    trainer, config, settings = family
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(data)]
    alone = make(trainer, config, **settings, train_dataset=datasets.Dataset.from_list(rows),
                 train_sampling_strategy="sequential")  # fmt: skip
    streamed = make(trainer, config, **settings, train_dataset=stream(rows),
                    eval_dataset=stream(rows))  # fmt: skip
    for each in (alone, streamed):
        each.train()
    np.testing.assert_allclose(curve(streamed), curve(alone), rtol=1e-6)
    np.testing.assert_allclose(stored(streamed), stored(alone), rtol=1e-6)
    assert np.isfinite(streamed.evaluate()["eval_loss"])


@FAMILIES
@pytest.mark.parametrize("with_margin", [range(1), range(1, 48), range(16), [17]], ids=str)
def test_a_stream_of_which_only_some_rows_have_a_margin(make, data, family, with_margin):
    trainer, config, settings = family
    rows = [row | ({"margin": 0.5} if i in with_margin else {}) for i, row in enumerate(data)]
    without = next(i for i in range(48) if i not in with_margin)
    message = rf"column 'margin' .* in every row or in none, got None in row {without} of train"
    with pytest.raises(ValueError, match=message):
        make(trainer, config, **settings, train_dataset=stream(rows)).train()


@FAMILIES
def test_a_column_with_a_misspelt_name_is_named(make, data, family):
    trainer, config, settings = family
    rows = data.add_column("Margins", [0.0] * 48).add_column("height", [1] * 48)
    words = "the column 'Margins' of train_dataset is not used: call it 'margin' if"
    with pytest.warns(UserWarning, match=words):
        make(trainer, config, **settings, train_dataset=rows)
    rows = rows.rename_column("Margins", "weights")
    with pytest.warns(UserWarning, match="'weights' of eval_dataset is not used: call it 'weight'"):
        make(trainer, config, **settings, eval_dataset=stream(rows))


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


@FAMILIES
def test_the_queue_goes_back_with_the_model(make, data, model, family):
    trainer, config, settings = family
    settings = {**settings, "tau": 0.2, "learning_rate": 0.5, "eval_dataset": data}
    best = make(
        trainer, config, **settings, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_only_model=True, load_best_model_at_end=True,
        metric_for_best_model="rewards/margins", greater_is_better=False,
    )  # fmt: skip
    best.train()
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


@FAMILIES
@pytest.mark.parametrize("changed", [{"beta": 1.0}, {"gamma0": 3.0}, {"length_normalize": True}])
def test_resuming_in_other_units_starts_with_an_empty_queue(make, family, changed):
    trainer, config, settings = family
    if family is SIMPO and "length_normalize" in changed:
        pytest.skip("γ-SimPO always averages")
    settings = {**settings, "save_strategy": "steps", "save_steps": 3}
    make(trainer, config, **settings).train()
    resumed = make(trainer, config, **settings | changed, out="resumed")
    checkpoint = Path(resumed.args.output_dir).with_name("out") / "checkpoint-3"
    with pytest.warns(UserWarning, match=f"filled with .*{next(iter(changed))} = .*starts empty"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert stored(resumed).numel() == 12  # of the steps 4 to 6


@FAMILIES
@pytest.mark.parametrize("sizes", [(2048, 8), (8, 2048), (2048, 0), (0, 2048)], ids=str)
def test_resuming_with_another_size_of_the_queue(make, family, sizes):
    trainer, config, settings = family
    before, after = sizes
    settings = {**settings, "tau": 1e12, "save_strategy": "steps", "save_steps": 3}
    whole = make(trainer, config, **settings, out="whole")  # of which tau keeps the queue out
    whole.train()
    make(trainer, config, **settings, queue_size=before).train()
    resumed = make(trainer, config, **settings, queue_size=after, out="resumed")
    checkpoint = Path(resumed.args.output_dir).with_name("out") / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    np.testing.assert_array_equal(curve(resumed), curve(whole))
    if after:
        old, new = stored(whole).split(12)
        expected = torch.cat([old[12 - min(before, 12) :], new])[-after:]
        torch.testing.assert_close(stored(resumed), expected)


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


def long_prompts(data, count):
    """The pairs, of which the last ones have a prompt that fills `max_length`.

    Before TRL 1.15 `CPOTrainer` truncates by the length of the longer response.
    """
    rows = data.to_list()
    for row in rows[-count:]:
        row.update(prompt=" ".join([row["prompt"]] * 40), chosen=row["chosen"] * 40)
    return datasets.Dataset.from_list(rows)


def test_a_response_truncated_to_nothing_takes_no_part_simpo(make, data):
    options = {"beta": 2.0, "max_steps": 4, "per_device_train_batch_size": 48, "max_length": 60}
    rows = long_prompts(data, 2)
    with pytest.warns(UserWarning, match="2 of the 48 pairs of train_dataset are left out: .* 60"):
        ours = make(GammaSimPOTrainer, GammaSimPOConfig, gamma0=1.0, train_dataset=rows, **options)
    ours.train()
    assert np.isfinite(curve(ours)).all()
    assert stored(ours).numel() == 4 * 46
    options |= {"loss_type": "simpo", "cpo_alpha": 0.0}
    theirs = make(CPOTrainer, CPOConfig, train_dataset=rows, **options)
    theirs.train()
    assert np.isnan(curve(theirs)).all() or (curve(theirs) == 0).all()  # why it matters


@FAMILIES
@pytest.mark.filterwarnings("ignore:3 of the 8 pairs of train_dataset are left out")
@pytest.mark.filterwarnings("ignore:no pair of the first batch")  # TRL 1.8 keeps them for γ-DPO
def test_the_loss_of_a_step_is_that_of_its_pairs_however_they_are_split(make, data, family):
    trainer, config, settings = family
    rows = long_prompts(data.select(range(8)), 3).add_column("weight", [1.0, 0.0, *[1.0] * 6])
    losses, norms = [], []
    for size in (8, 4, 3, 2, 1):  # of the five pairs that are left, one has no weight
        trained = make(
            trainer, config, **settings, tau=1e12, train_dataset=rows, max_steps=1, max_length=60,
            per_device_train_batch_size=size, gradient_accumulation_steps=-(-8 // size),
        )  # fmt: skip
        trained.train()
        losses += [*curve(trained)]
        norms += [*curve(trained, "grad_norm")]
        if size == 8:
            left = len(trained.train_dataset)
            assert curve(trained, "gamma/pairs") == pytest.approx(4 / left)
    assert len(losses) == 5
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


@FAMILIES
def test_weights_of_the_data(make, data, family):
    """The loss is the weighted mean, and a pair of weight 2 counts as two equal pairs."""
    trainer, config, settings = family
    options = {**settings, "max_steps": 1, "per_device_train_batch_size": 16}
    weights, rows = [1.0, 2.0] * 4, data.select(range(8))
    twice = rows.select(sorted([*range(8), *range(1, 8, 2)]))
    first = {}
    for name, some in {"weighted": rows.add_column("weight", weights), "twice": twice}.items():
        trained = make(trainer, config, **options, tau=0.3, train_dataset=some)
        trained.train()
        first[name] = trained.state.log_history[0]
    for name in ("loss", "grad_norm", "gamma/min", "gamma/max"):
        assert first["weighted"][name] == pytest.approx(first["twice"][name], rel=1e-4), name
    losses, norms = [], []
    for size in (8, 3, 1):
        trained = make(
            trainer, config, **settings, tau=1e12, max_steps=1, per_device_train_batch_size=size,
            train_dataset=rows.add_column("weight", weights),
            gradient_accumulation_steps=-(-8 // size),
        )  # fmt: skip
        trained.train()
        losses += [*curve(trained)]
        norms += [*curve(trained, "grad_norm")]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


@FAMILIES
def test_data_of_which_truncation_leaves_nothing(make, data, family):
    trainer, config, settings = family
    if family is DPO and Version(TRL_VERSION) < Version("1.9"):
        pytest.skip("TRL 1.8 keeps long prompts in DPO's data")
    options = {**settings, "max_length": 60}
    words = "48 of the 48 pairs of {} are left out: .*_length = 60 .* Increase max_length"
    with pytest.raises(ValueError, match=words.format("train_dataset")):
        make(trainer, config, **options, train_dataset=long_prompts(data, 48))
    with pytest.warns(UserWarning, match=words.format("eval_dataset") + ".* reports no loss"):
        trained = make(trainer, config, **options, eval_dataset=long_prompts(data, 48),
                       eval_strategy="steps", eval_steps=6)  # fmt: skip
    trained.train()
    assert not [name for row in trained.state.log_history for name in row if "eval_loss" in name]


@FAMILIES
def test_a_first_batch_in_which_no_pair_takes_part_warns(make, data, family):
    trainer, config, settings = family
    trained = make(trainer, config, **settings, max_steps=1)
    rows = trained.train_dataset.to_list()
    for row in rows:  # as a collator of one's own may leave them
        if family is DPO:
            row["chosen_ids"] = []
        else:
            row["chosen_labels"] = [-100] * len(row["chosen_labels"])
    trained.train_dataset = datasets.Dataset.from_list(rows)
    with pytest.warns(UserWarning, match="no pair of the first batch takes part"):
        trained.train()
    assert curve(trained, "gamma/pairs") == curve(trained) == 0


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


@FAMILIES
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gamma_beta_ratio": "0.5"}, TypeError, "gamma_beta_ratio must be a Python number"),
        ({"gamma_beta_ratio": -1.0}, ValueError, "gamma_beta_ratio must be finite and >= 0"),
        ({"gamma_beta_ratio": 1.0, "beta": "1"}, TypeError, "beta must be a Python number"),
        ({"queue_size": -1}, ValueError, "queue_size must be >= 0, got -1"),
    ],
)  # fmt: skip
def test_a_config_checks_its_numbers(tmp_path, family, options, error, words):
    with pytest.raises(error, match=words):
        family[1](str(tmp_path), use_cpu=True, **options)


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
    assert {"gamma/kl", "gamma/min", "gamma/error_bound", "eval_gamma/kl"} <= names


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
        lambda module, logps, kwargs, result: calls.append((logps, kwargs["weights"])),
        with_kwargs=True,
    )
    trainer.train()
    for (logps, given), row in zip(calls, trainer.state.log_history, strict=False):
        loss, aux = gamma_dpo_loss(
            *(x.detach().double() for x in logps), beta=0.5, gamma0=2.0, tau=0.5, weights=given
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
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names = {}  # each block runs alone
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
    """Alone, but for what is on the hub and for what only a GPU can do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    (block,) = re.findall(
        r"```python\n((?:(?!```).)*integrations\.trl.*?)```",
        (DOCS.parent / "README.md").read_text(), re.DOTALL,
    )  # fmt: skip
    assert "without a GPU also bf16=False" in block
    block = block.replace("tau=", "use_cpu=True, bf16=False, report_to=[], max_steps=2, tau=")
    names = {}
    exec(compile(block.replace("Qwen/Qwen3-0.6B", model), "README.md", "exec"), names)
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

    def complaint(program, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            program.run(program.main, argv)
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert "usage" not in errors
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


CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
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
        (["--config", "half.yaml"], "--model is needed"),
        (["--model", "x", "--bf16", "false"], "--dataset is needed"),
        (["--model=", "--dataset=x", "--bf16", "false"], "--model is needed"),
        (["--dataset", "x", "--bf16", "false"], "--model is needed"),
    ],
)
def test_command_lines_that_say_too_little(program, complaint, argv, words):
    Path("list.yaml").write_text("- model\n")
    Path("broken.yaml").write_text("model: [\n")
    Path("half.yaml").write_text("dataset: pairs.jsonl\nbf16: false\n")
    assert words in complaint(program, argv)


# Their words are tested in test_examples.py.
WRONG = [
    ([{"question": "a", "chosen": "b", "rejected": "c"}], "pairs.jsonl:1: no prompt: chosen and "
     "rejected begin differently, and 'prompt' is not one of the columns or not in their form; it "
     "has question, chosen, rejected: rename its columns"),
    ([*tiny_lm.pairs(7), {"prompt": "a", "chosen": "b", "rejected": "c", "margin": None}],
     "pairs.jsonl:8: 'margin' must be a finite number, got None"),  # and no line of a shuffle
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "pairs.jsonl: needs at least 2 pairs"),
    ([], "pairs.jsonl: holds no pairs"),
]  # fmt: skip


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("rows", "words"), WRONG, ids=lambda x: str(x)[:30])
def test_data_of_another_form(load, program, complaint, model, rows, words, published):
    write("pairs.jsonl", rows)
    names = ("model_name_or_path", "dataset_name") if published else ("model", "dataset")
    argv = [f"--{names[0]}", model, f"--{names[1]}", "pairs.jsonl", "--bf16", "false"]
    program = load("published/train.py") if published else program
    assert words in complaint(program, [*argv, "--output_dir", "out"])


def test_messages_without_a_chat_template(program, complaint, model):
    write("pairs.jsonl", [{"chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "."}]}] * 9)
    argv = ["--model", model, "--dataset", "pairs.jsonl", "--bf16", "false"]
    line = complaint(program, [*argv, "--output_dir", "out"])
    assert f"{model} has no chat template, which messages need: give prompt, chosen and" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output_dir", "/proc/out"], "/proc/out"),
        (["--output_dir", "pairs.jsonl"], "File exists: 'pairs.jsonl'"),
        (["--seed", "4294967296"], "--seed must be from 0 to 2**32 - 1, got 4294967296"),
        (["--gamma0", "-1"], "gamma0"),
    ],
)
def test_options_that_cannot_be(program, complaint, model, options, words):
    write("pairs.jsonl", tiny_lm.pairs(40))
    argv = ["--model", model, "--dataset", "pairs.jsonl", "--bf16", "false", "--output_dir", "out"]
    assert words in complaint(program, [*argv, *options])


def test_bfloat16_is_the_last_thing_to_be_refused(program, complaint, model, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    argv = ["--model", model, "--dataset", "pairs.jsonl", "--output_dir", "out"]
    assert "no such file" in complaint(program, argv)
    write("pairs.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert "pairs.jsonl:1: needs prompt" in complaint(program, argv)
    assert "not used by the HfArgumentParser: ['--oops']" in complaint(program, [*argv, "--oops"])
    write("pairs.jsonl", tiny_lm.pairs(40))
    line = complaint(program, argv)
    assert "doesn't support bf16" in line
    assert line.endswith("With --bf16 false it trains in float32")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "a b", "rejected": "a c", "score": 1.0},
        {"chosen": CHAT, "rejected": CHAT[:1]},
        {"prompt": "?", "chosen": CHAT, "rejected": CHAT[:1]},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[:1]},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "weight": 0.5},
    ],
)  # fmt: skip
def test_data_in_the_forms_that_trl_takes(program, row):
    write("pairs.jsonl", [row] * 40)
    data = program.load_pairs("pairs.jsonl")
    assert {name: len(rows) for name, rows in data.items()} == {"train": 38, "test": 2}


def test_a_folder_without_a_model(program, complaint):
    write("pairs.jsonl", tiny_lm.pairs(40))
    argv = ["--model", "./nothing", "--dataset", "pairs.jsonl", "--bf16", "false"]
    assert "./nothing: cannot be loaded as a model" in complaint(
        program, [*argv, "--output_dir", "out"]
    )


def test_ctrl_c_leaves_whole_checkpoints(program, model, capsys, monkeypatch):
    write("pairs.jsonl", tiny_lm.pairs(40))
    save = GammaDPOTrainer._save_checkpoint

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, *arguments, **options)

    monkeypatch.setattr(program.GammaDPOTrainer, "_save_checkpoint", interrupted)
    argv = ["--model", model, "--dataset", "pairs.jsonl", "--bf16", "false", "--output_dir", "out"]
    with pytest.raises(SystemExit) as ended:
        program.run(program.main, [*argv, *QUICK, "--save_steps", "1", "--report_to", "none"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")
    (checkpoint,) = Path("out").glob("checkpoint-*")
    assert {"model.safetensors", "trainer_state.json"} <= {p.name for p in checkpoint.iterdir()}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model_name_or_path is needed"),
        (["--model_name_or_path", "x"], "--dataset_name is needed"),
        (["--model_name", "x"], "not used by the HfArgumentParser: ['--model_name', 'x']"),
        (["--use_peft", "true"], "not used by the HfArgumentParser: ['--use_peft', 'true']"),
        (["--config=missing.yaml"], "No such file or directory: 'missing.yaml'"),
    ],
)
def test_command_lines_of_the_published_settings(load, complaint, monkeypatch, argv, words):
    load("trl_dpo.py")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    line = complaint(load("published/train.py"), [*argv, "--bf16", "false"])
    assert line.startswith("train.py: ")
    assert words in line


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

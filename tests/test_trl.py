"""The trainers for TRL: against TRL's own, which γ-PO becomes as tau grows, and end to end."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracles
import programs
import pytest
import tiny_lm

pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
torch = pytest.importorskip("torch")

import datasets  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
import trl_rank  # noqa: E402
from packaging.version import Version  # noqa: E402
from trl_rank import DPO, SIMPO, Family, stored  # noqa: E402

from gamma_loss.integrations.trl import CPOConfig, CPOTrainer  # noqa: E402

pytestmark = [
    # TRL's default of gradient_checkpointing and its use, in transformers' new terms.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
OF_SIMPO = {"beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}
TRL_DPO = Family(trl.DPOTrainer, trl.DPOConfig, {"beta": 0.5})
TRL_SIMPO = Family(CPOTrainer, CPOConfig, OF_SIMPO)
FAMILIES = pytest.mark.parametrize("family", [DPO, SIMPO], ids=["dpo", "simpo"])
ROUNDS_TOKENS = Version("1.15") > Version(trl.__version__)  # their log-probabilities, to bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))  # where TRL keeps its preparation of the rows
    datasets.Dataset.from_list(tiny_lm.pairs(48)).save_to_disk(folder)
    return datasets.load_from_disk(folder)


@pytest.fixture(scope="module")
def make(model, data, tmp_path_factory):
    def make(family, *, model=model, peft=False, **options):
        given = {"train_dataset": data}
        for name in options.keys() & {"train_dataset", "eval_dataset", "ref_model"}:
            given[name] = options.pop(name)
        if peft:
            lora = pytest.importorskip("peft").LoraConfig(r=4, task_type="CAUSAL_LM")
            given["peft_config"] = lora
        return trl_rank.make(family, tmp_path_factory.mktemp("out"), model, options, **given)

    return make


@pytest.fixture(scope="module")
def trained(make):
    def trained(family, *, resume=None, **options):
        trainer = make(family, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return trained


def curve(trainer, name="loss"):
    return np.array([row[name] for row in trainer.state.log_history if name in row])


# --- against TRL's own trainers, and from first principles ---

ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
               "gradient_checkpointing": True}  # fmt: skip
VARIANTS = {
    "dpo accumulated": (DPO, ACCUMULATED),
    "dpo bf16": (DPO, {"bf16": True}),
    "dpo peft robust": (DPO, {"peft": True, "learning_rate": 0.2, "loss_type": "robust",
                              "label_smoothing": 0.1}),
    "dpo precomputed with sft": (DPO, {"loss_type": ["sft", "sigmoid_norm"], "learning_rate": 0.1,
                                       "loss_weights": [0.3, 0.7],
                                       "precompute_ref_log_probs": True}),
    "simpo accumulated": (SIMPO, ACCUMULATED | {"label_smoothing": 0.1, "cpo_alpha": 0.3}),
    "simpo peft bf16": (SIMPO, {"peft": True, "learning_rate": 0.2, "bf16": True}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_large_tau_the_curve_is_trl_s_own(trained, variant):
    family, options = VARIANTS[variant]
    if variant == "dpo bf16" and ROUNDS_TOKENS:
        pytest.skip("TRL before 1.15 rounds the log-probability of each token to bfloat16")
    options = {"max_steps": 20, **options}
    ours = trained(family, tau=1e12, **options)
    theirs = trained(TRL_DPO if family is DPO else TRL_SIMPO, **options)
    assert len(curve(ours)) == 20
    assert np.ptp(curve(ours)) > 0.1  # there is something to compare
    names = [n for n, v in theirs.state.log_history[0].items() if isinstance(v, float)]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"} <= set(names)
    for name in names:
        # Float32 rounding, of log-probabilities of about 40 nats, through 20 steps of SGD.
        expected = curve(theirs, name)
        np.testing.assert_allclose(curve(ours, name), expected, rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(curve(ours, "gamma/mean"), family.settings["gamma0"], rtol=1e-6)
    # Every micro-batch was pushed once, however often its activations were computed.
    assert stored(ours).numel() == 80


def reference_logps(model, rows, average):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)

    def logp(row, name):
        text = row[name] + tokenizer.eos_token
        tokens = tiny_lm.response_logps(model, tokenizer, row["prompt"], text)
        return float(tokens.mean() if average else tokens.sum())

    return np.array([[logp(row, name) for row in rows] for name in ("chosen", "rejected")])


@pytest.mark.filterwarnings("ignore:.*compute_metrics.*:FutureWarning")  # of TRL 1.15
@pytest.mark.parametrize(
    ("family", "options"),
    [(DPO, {}), (DPO, {"precompute_ref_log_probs": True, "length_normalize": True, "beta": 5.0}),
     (SIMPO, {})],
    ids=["dpo", "dpo precomputed and normalized", "simpo"],
)  # fmt: skip
def test_the_loss_of_an_evaluation_from_first_principles(trained, model, data, family, options):
    beta, gamma0 = (family.settings | options)["beta"], family.settings["gamma0"]
    average = family is SIMPO or "length_normalize" in options
    targets = np.random.default_rng(0).normal(0.5, 1.0, len(data))
    rows = data.add_column("margin", targets)
    ours = trained(family, **options, tau=0.5, queue_size=16, train_dataset=rows, eval_dataset=rows)
    context = stored(ours).numpy()
    logs = ours.evaluate()
    if not options and family is DPO:  # the same rows, not prepared before
        ours.compute_metrics = lambda found: {"axes": found.predictions.ndim}
        again = ours.evaluate(rows)
        assert (again["eval_loss"], again["eval_axes"]) == (logs["eval_loss"], 3)  # of logits

    rewards = beta * reference_logps(ours.model, data, average)
    if family is DPO:
        start = transformers.AutoModelForCausalLM.from_pretrained(model)
        rewards -= beta * reference_logps(start, data, average)
    gaps = rewards[0] - rewards[1]
    pool = np.concatenate([gaps - targets, context])
    margins = oracles.margins(pool, gamma0, 0.5)[0][: len(data)]
    wanted = targets + (margins - gamma0 if family is DPO else margins)
    weights = oracles.sigmoid(wanted - gaps)
    assert len(context) == 16
    assert np.ptp(margins) > 0.5
    expected = {
        "loss": oracles.simpo(gaps, wanted).mean(),
        "gamma/min": margins.min(), "gamma/max": margins.max(),
        "gamma/effective_pairs": weights.sum() ** 2 / (weights**2).sum(),
    }  # fmt: skip
    if "length_normalize" not in options:  # TRL's rewards are of sums
        expected["rewards/margins"] = gaps.mean()
    found = {name: logs[f"eval_{name}"] for name in expected}
    assert found == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-4)


def test_a_run_in_which_nothing_happens_says_so_after_a_hundred_steps(make):
    loss = make(DPO, tau=1e9, gradient_accumulation_steps=2).gamma_loss
    *first, last = torch.randn(200, 4, 1)
    for micro_batch in first:
        loss(*micro_batch)
    with pytest.warns(UserWarning, match=r"run is DPO to rounding.* the last 200 gaps.* tau = "):
        loss(*last)


# --- the columns margin and weight ---


def test_training_stores_gaps_less_the_margins_of_the_data(make, data):
    targets = np.random.default_rng(1).normal(size=48)
    rows = data.add_column("margin", targets)
    ours = make(DPO, per_device_train_batch_size=48, max_steps=1, train_dataset=rows)
    ours.data_collator = pickle.loads(pickle.dumps(ours.data_collator))  # noqa: S301  as a worker's
    ours.train()  # the policy is the reference, so each gap is 0
    np.testing.assert_allclose(sorted(stored(ours)), sorted(-targets), atol=1e-5)


def test_numbers_of_the_data_are_checked_before_training(make, data):
    for column, value, shown in [
        ("margin", float("nan"), "nan"), ("margin", 1e39, r"1e\+39"), ("margin", None, "None"),
        ("weight", -1.0, "-1.0"),
    ]:  # fmt: skip
        rows = data.add_column(column, [1.0] * 5 + [value] + [1.0] * 42)
        words = rf"column '{column}' must hold a finite number.*, got {shown} in row 5 of "
        with pytest.raises(ValueError, match=words + "train_dataset"):
            make(DPO, train_dataset=rows)
        with pytest.raises(ValueError, match=words + r"eval_dataset\['held out'\]"):
            make(SIMPO, eval_dataset={"all": data, "held out": rows})
    ours = make(SIMPO)
    rows = ours.train_dataset.to_list()[:3]  # a batch that was not checked before
    rows[1]["margin"] = 1.0
    with pytest.raises(ValueError, match=r"column 'margin' .* got None in row 0 of a batch"):
        ours.data_collator(rows)


def stream(rows):
    """Rows as they come, whose columns are not known before."""
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@FAMILIES
def test_a_stream_trains_as_the_dataset_does_and_every_row_is_checked(trained, data, family):
    rows = [row | {"margin": 0.1 * i} for i, row in enumerate(data)]
    alone = trained(family, train_dataset=datasets.Dataset.from_list(rows), max_steps=3,
                    train_sampling_strategy="sequential")  # fmt: skip
    streamed = trained(family, train_dataset=stream(rows), eval_dataset=stream(rows), max_steps=3)
    np.testing.assert_allclose(curve(streamed), curve(alone), rtol=1e-6)
    np.testing.assert_allclose(stored(streamed), stored(alone), rtol=1e-6)
    assert np.isfinite(streamed.evaluate()["eval_loss"])
    for with_margin, without in ((range(1), 1), (range(1, 48), 0)):
        rows = [row | ({"margin": 0.5} if i in with_margin else {}) for i, row in enumerate(data)]
        words = rf"column 'margin' .* in every row or in none, got None in row {without} of train"
        with pytest.raises(ValueError, match=words):
            trained(family, train_dataset=stream(rows))


def test_a_column_with_a_misspelt_name_is_named(make, data):
    rows = data.add_column("Margins", [0.0] * 48).add_column("height", [1] * 48)
    with pytest.warns(
        UserWarning, match="'Margins' of train_dataset is not used: call it 'margin'"
    ):
        make(DPO, train_dataset=rows)
    rows = rows.rename_column("Margins", "weights")
    with pytest.warns(UserWarning, match="'weights' of eval_dataset is not used: call it 'weight'"):
        make(DPO, eval_dataset=stream(rows))


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
    weights = [1.0, 0.0, 2.0, *[1.0] * 5]  # of the five pairs that are left, one has no weight
    rows = long_prompts(data.select(range(8)), 3).add_column("weight", weights)
    twice = data.select([0, 2, 2, 3, 4])  # a pair of weight 2 is two equal ones
    found = []
    for size, some in ((8, rows), (3, rows), (1, rows), (8, twice)):
        ours = trained(
            family, tau=1e12, train_dataset=some, max_steps=1, max_length=60,
            per_device_train_batch_size=size, gradient_accumulation_steps=-(-8 // size),
        )  # fmt: skip
        found += [[*curve(ours), *curve(ours, "grad_norm")]]
        if len(found) == 1:
            assert curve(ours, "gamma/pairs") == pytest.approx(4 / len(ours.train_dataset))
    np.testing.assert_allclose(found, [found[0]] * 4, rtol=1e-4)


def test_a_response_truncated_to_nothing_takes_no_part(trained):
    ours = trained(DPO, tau=0.5, max_steps=3)
    inputs = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))
    count = len(inputs["input_ids"]) // 2
    inputs["completion_mask"][count] = 0  # the first pair's rejected response
    with torch.no_grad():
        loss = ours.compute_loss(ours.model.eval(), inputs)
        rest = {k: v[[i for i in range(2 * count) if i % count]] for k, v in inputs.items()}
        expected = ours.compute_loss(ours.model, rest)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@FAMILIES
def test_training_in_which_no_pair_takes_part_says_so(make, family):
    ours = make(family, max_steps=1)
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


def test_pairs_that_are_left_out_are_counted(make, data):  # TRL 1.8 keeps them for γ-DPO
    words = "{} of the 48 pairs of {} are left out: .*_length = 60"
    with pytest.warns(UserWarning, match=words.format(2, "train_dataset") + " leaves no token"):
        make(SIMPO, max_length=60, train_dataset=long_prompts(data, 2))
    with pytest.raises(ValueError, match=words.format(48, "train_dataset") + ".* Increase max_len"):
        make(SIMPO, max_length=60, train_dataset=long_prompts(data, 48))
    with pytest.warns(UserWarning, match=words.format(48, "eval_dataset") + ".* reports no loss"):
        evaluated = make(SIMPO, max_length=60, eval_dataset=long_prompts(data, 48))
    assert "eval_loss" not in evaluated.evaluate()


# --- the queue: evaluation, checkpoints, processes ---


@FAMILIES
def test_a_resumed_run_with_evaluations_equals_an_uninterrupted_one_without(trained, data, family):
    saved = {"tau": 0.2, "save_strategy": "steps", "save_steps": 3, "eval_steps": 2}
    whole = trained(family, **saved)
    folder = Path(whole.args.output_dir)
    checkpoint = folder / "checkpoint-3"
    watched = trained(family, **saved, resume=checkpoint, eval_dataset=data, eval_strategy="steps")
    assert len(curve(watched, "eval_loss")) == 2
    assert stored(whole).numel() == 24
    assert torch.equal(stored(watched), stored(whole))
    np.testing.assert_array_equal(curve(watched), curve(whole))  # the first part from its file
    for name, value in whole.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[name], value), name
    card = (folder / "README.md").read_text()
    assert "2506.03690" in card  # the paper
    assert ("γ-DPO" if family is DPO else "γ-SimPO") in card
    (checkpoint / "gamma_loss.pt").unlink()  # as in a checkpoint of TRL's own trainer
    with pytest.warns(UserWarning, match=r"no gamma_loss\.pt in .*the queue starts empty"):
        without = trained(family, **saved, resume=checkpoint)
    assert stored(without).numel() == 12


@FAMILIES
def test_the_queue_goes_back_with_the_model_and_is_saved_with_it(
    trained, make, data, model, family
):
    settings = {"tau": 0.2, "learning_rate": 0.5, "eval_dataset": data}
    best = trained(
        family, **settings, eval_strategy="steps", eval_steps=1, save_strategy="steps",
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

    def again(folder=best.args.output_dir, **changed):
        return make(family, **settings | reference | changed, model=folder)

    assert again().evaluate()["eval_loss"] == losses[margins.argmin()]
    assert torch.equal(stored(again(queue_size=2)), stored(best)[-2:])
    without = again(queue_size=0)
    assert without.gamma_loss.queue is None
    without.save_model()
    assert not stored(again(without.args.output_dir)).numel()
    units = {"beta": 1.0, "gamma0": 3.0}
    if family is DPO:  # γ-SimPO always averages, and has no reference
        units["length_normalize"] = True
        assert not stored(again(ref_model=None)).numel()
    for name, value in units.items():
        with pytest.warns(UserWarning, match=f"filled with .*{name} = .*starts empty"):
            assert not stored(again(**{name: value})).numel()


RANKS = {"tau": 0.3, "gradient_accumulation_steps": 2, "max_steps": 4}
SAVED = {**RANKS, "save_strategy": "steps", "save_steps": 2}
JOBS = {  # with options, whether one process saved what is resumed, and FSDP2
    "dpo": (DPO, SAVED, True, False),
    "simpo": (SIMPO, RANKS, False, False),
    "dpo saved": (DPO, SAVED, False, False),
    "dpo sharded": (DPO, RANKS, False, True),
    "dpo sharded bf16": (DPO, {"bf16": True, "max_steps": 1}, False, True),
}


@pytest.fixture(scope="module")
def ranks(trained, model, tmp_path_factory):
    """What one process trained, and what two of each job report, for which they start once."""
    alone = {family.trainer: trained(family, **SAVED) for family in (DPO, SIMPO)}
    checkpoint = str(Path(alone[DPO.trainer].args.output_dir, "checkpoint-2"))
    folder, jobs = tmp_path_factory.mktemp("ranks"), {}
    for name, (family, options, resume, fsdp2) in JOBS.items():
        jobs[name] = family, options, checkpoint if resume else None, fsdp2
    programs.together(2, trl_rank.run, folder, model, jobs, imports="gamma_loss.integrations.trl")
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(alone=alone, of_two=found, folder=folder)


def assert_same_run(alone, history, queue):
    expected, history = (
        [row for row in rows if "loss" in row] for rows in (alone.state.log_history, history)
    )
    assert len(expected) == len(history) == 4
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
    assert_same_run(ranks.alone[JOBS[name][0].trainer], first["history"], first["queue"])


@pytest.mark.xdist_group("trl ranks")
def test_one_process_resumes_what_two_began(ranks, trained):
    ours = trained(DPO, **SAVED, resume=ranks.folder / "dpo saved" / "checkpoint-2")
    assert_same_run(ranks.alone[DPO.trainer], ours.state.log_history, stored(ours).tolist())


@pytest.mark.xdist_group("trl ranks")
@pytest.mark.skipif(ROUNDS_TOKENS, reason="TRL before 1.15 rounds each token to bfloat16")
def test_under_fsdp2_policy_and_reference_round_alike(ranks):
    first = ranks.of_two[0]["dpo sharded bf16"]["history"][0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == first["gamma/kl"] == 0.0


# --- configurations ---


def test_a_config_takes_gamma0_either_way_and_trl_s_own_will_do(make, tmp_path):
    config = SIMPO.config(str(tmp_path), beta=2.5, gamma_beta_ratio=0.2, use_cpu=True)
    assert (config.gamma0, config.simpo_gamma, config.tau) == (0.5, 0.5, 10.0)
    assert SIMPO.config(**config.to_dict()).gamma0 == 0.5
    assert DPO.config(str(tmp_path), use_cpu=True).gamma0 == 4.0
    parser = transformers.HfArgumentParser(DPO.config)
    arguments = ["--output_dir", "x", "--gamma_beta_ratio", "30", "--tau", "3", "--use_cpu", "true"]
    (config,) = parser.parse_args_into_dataclasses(arguments)
    assert (config.gamma0, config.tau, config.queue_size) == (3.0, 3.0, 2048)
    for ours, theirs, gamma0 in ((DPO, TRL_DPO, 4.0), (SIMPO, TRL_SIMPO, 1.0)):
        found = make(theirs._replace(trainer=ours.trainer)).gamma_loss.settings
        assert [found["gamma0"], found["tau"]] == [gamma0, 10.0]
        assert found["beta"] == theirs.settings["beta"]


def test_options_that_would_change_the_loss_are_refused(make, monkeypatch):
    ratio = {"gamma0": 4.0, "gamma_beta_ratio": 1.0}
    for family, options, error, words in [
        (DPO, {"loss_type": "ipo"}, ValueError, r"loss_type must hold .* got \['ipo'\]"),
        (DPO, {"loss_type": ["sigmoid", "robust"]}, ValueError, "must hold exactly one of"),
        (DPO, {"f_divergence_type": "js_divergence"}, ValueError, "must be 'reverse_kl'"),
        (DPO, {"ld_alpha": 0.5}, ValueError, "ld_alpha must be None for γ-DPO, got 0.5"),
        (DPO, {"use_weighting": True}, ValueError, "use_weighting must be False"),
        (SIMPO, {"loss_type": "hinge"}, ValueError, "loss_type must be 'simpo' for γ-SimPO, got"),
        (SIMPO, {"alpha": 0.5}, ValueError, "alpha must be 0.0 for γ-SimPO, got 0.5"),
        (DPO, {"tau": -1.0}, ValueError, "tau"),
        (SIMPO, {"queue_size": -1}, ValueError, "queue_size must be >= 0, got -1"),
        (DPO, {**ratio, "beta": "1"}, TypeError, "beta must be a Python number"),
        (SIMPO, {**ratio, "gamma_beta_ratio": -1.0}, ValueError, "ratio must be finite and >= 0"),
        (SIMPO, {**ratio, "beta": 2.5, "gamma0": 3.0}, ValueError,
         r"gamma0 must be beta \* gamma_beta_ratio = 2\.5 or left out .*, got 3\.0"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            make(family, **options)
    # TRL before 1.15
    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss_liger", None, raising=False)
    words = r"use_liger_kernel must be False .*\(fused_linear_cross_entropy=False\).* TRL 1\.15"
    with pytest.raises(ValueError, match=words):
        make(DPO, use_liger_kernel=True)

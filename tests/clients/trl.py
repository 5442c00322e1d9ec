"""TRL's own tests of its DPO and CPO trainers, with ours in their places.

The models and datasets of its tests are on the hub; here stand tiny random ones under their names.
What fails with TRL's own trainers on these does not count.
"""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import tiny_lm

PACKAGE = "trl"
SOURCE = os.environ.get("TRL_SOURCE", "https://github.com/huggingface/trl")
FILES = {"γ-DPO": "tests/test_dpo_trainer.py", "γ-SimPO": "tests/experimental/test_cpo_trainer.py"}
SKIPPED = (
    "not (VLM or Vision or Slow or liger)"  # their processors are on the hub; Liger's need a GPU
)
REFUSED = {  # a part of a test's name, and with what our trainers refuse what it asks for
    "test_train_loss_types": "loss_type must hold exactly one of",
    "test_train_with_f_divergence": "f_divergence_type must be 'reverse_kl'",
    "test_train_with_ld": "ld_alpha must be None",
    "test_train_with_wpo": "use_weighting must be False",
    "test_cpo_trainer[": "loss_type must be 'simpo'",
    "test_alphapo_trainer": "alpha must be 0.0",
}
TAKEN = ("[sigmoid]", "[sigmoid_norm]", "[robust]", "[reverse_kl]", "simpo")  # which are ours
MODELS = {
    "Qwen2ForCausalLM-2.5": "qwen2", "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss", "Cohere2ForCausalLM": "cohere2", "Olmo3ForCausalLM": "olmo3",
    "T5ForConditionalGeneration": "t5",
}  # fmt: skip
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
SMALL_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
ON_CPU = """
from transformers import TrainingArguments

def on_cpu(self, post_init=TrainingArguments.__post_init__):
    self.use_cpu = True
    post_init(self)

TrainingArguments.__post_init__ = on_cpu
"""
SWAP = """
import trl
import trl.experimental.cpo as cpo
from gamma_loss.integrations import trl as ours

trl.DPOConfig, trl.DPOTrainer = ours.GammaDPOConfig, ours.GammaDPOTrainer
cpo.CPOConfig, cpo.CPOTrainer = ours.GammaSimPOConfig, ours.GammaSimPOTrainer
"""
LOGGED = """
from transformers import Trainer

names = set()

def log(self, logs, *arguments, original=Trainer.log, **options):
    names.update(logs)
    return original(self, logs, *arguments, **options)

Trainer.log = log

def pytest_sessionfinish():
    with open("logged.txt", "w") as file:
        file.write("\\n".join(names))
"""
SABOTAGES = ["trainers that are not exchanged"]


def models(folder):
    import trl
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.build(folder.parent / "model"))
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text("utf-8")
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
               "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
               "decoder_start_token_id": tokenizer.pad_token_id}  # fmt: skip
    for name, kind in MODELS.items():
        small, make = (
            (SMALL_T5, AutoModelForSeq2SeqLM) if kind == "t5" else (SMALL, AutoModelForCausalLM)
        )
        model = make.from_config(AutoConfig.for_model(kind, **small, **special))
        for each in (model, tokenizer):
            each.save_pretrained(folder / f"tiny-{name}")


def datasets(folder):
    rows = tiny_lm.pairs(24)
    talks = [tiny_lm.messages({name: text.strip() for name, text in row.items()}) for row in rows]

    def prompt_inside(rows):
        return [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows]

    kinds = {
        "standard_preference": rows,
        "standard_implicit_prompt_preference": prompt_inside(rows),
        "conversational_preference": talks,
        "conversational_implicit_prompt_preference": prompt_inside(talks),
        "standard_unpaired_preference": [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows
        ],
    }
    folder.mkdir()
    lines = ["---", "configs:"]
    for kind, kept in kinds.items():
        lines += [f"- config_name: {kind}", "  data_files:"]
        for split, part in (("train", kept[:17]), ("test", kept[17:20])):
            (folder / f"{kind}-{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
            lines += [f"  - split: {split}", f"    path: {kind}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def outcomes(folder, file, *options):
    """Run a file of TRL's tests; the tests that passed and those that failed, and with what."""
    report = folder / f"{'-'.join([Path(file).stem, *options])}.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-k", SKIPPED]
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(
        [*command, "-p", "on_cpu", *options, file], cwd=folder, stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip
    passed, failed = set(), {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  our own run's
        problem = case.find("failure") if case.find("error") is None else case.find("error")
        if problem is not None:
            failed[case.get("name")] = problem.get("message", "").splitlines()[-1][:200]
        elif case.find("skipped") is None:
            passed.add(case.get("name"))
    return passed, failed


def run(folder):
    command = ["git", "clone", "-q", "--depth", "1", "--branch", f"v{version(PACKAGE)}", SOURCE]
    subprocess.run([*command, folder / "source"], check=True)
    (folder / "source" / "tests").rename(folder / "tests")  # with the trl that is installed
    (folder / "on_cpu.py").write_text(ON_CPU)
    (folder / "swap.py").write_text(LOGGED if os.environ.get("SABOTAGE") else SWAP + LOGGED)
    hub = folder / "trl-internal-testing"
    hub.mkdir()
    models(hub)
    datasets(hub / "zen")
    for name, file in FILES.items():
        with ThreadPoolExecutor() as pool:  # of processes, each on one core
            own = pool.submit(outcomes, folder, file)
            ours, failed = outcomes(folder, file, "-p", "swap")
        theirs, unable = own.result()
        differ = {test: failed.get(test, "skipped") for test in theirs - ours}
        unexpected = {
            test: why
            for test, why in differ.items()
            if not any(part in test and text in why for part, text in REFUSED.items())
        }
        print(name, len(theirs), len(ours), differ, unable, file=sys.stderr)
        logged = set((folder / "logged.txt").read_text("utf-8").split())
        assert any(metric.startswith("gamma/") for metric in logged), logged
        refused = {
            test
            for test in theirs
            if any(part in test for part in REFUSED) and not any(part in test for part in TAKEN)
        }
        assert refused <= differ.keys(), f"not refused: {refused - differ.keys()}"
        assert theirs, f"no test of {file} passed with TRL's own trainer: {unable}"
        assert not unexpected, unexpected
        yield {"run": f"{len(ours & theirs)} of TRL's own {len(theirs)} tests with {name} in the "
                      f"place of its trainer, the others as they ask for what is refused",
               "refused": sorted(differ)}  # fmt: skip

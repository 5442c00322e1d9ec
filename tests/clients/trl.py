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
from functools import partial
from importlib.metadata import version
from pathlib import Path

import tiny_lm
import transformers
import trl

PACKAGE = "trl"
SOURCE = os.environ.get("TRL_SOURCE", "https://github.com/huggingface/trl")
FILES = {"γ-DPO": "tests/test_dpo_trainer.py", "γ-SimPO": "tests/experimental/test_cpo_trainer.py"}
TESTS = "not (VLM or Vision or Slow or liger)"  # processors are on the hub; Liger needs a GPU
REFUSED = {  # a part of a test's name, and with what our trainers refuse what it asks for
    "test_train_loss_types": "loss_type must hold exactly one of",
    "test_train_with_f_divergence": "f_divergence_type must be 'reverse_kl'",
    "test_train_with_ld": "ld_alpha must be None",
    "test_train_with_wpo": "use_weighting must be False",
    "test_cpo_trainer[": "loss_type must be 'simpo'",
    "test_alphapo_trainer": "alpha must be 0.0",
}
TAKEN = ("[sigmoid]", "[sigmoid_norm]", "[robust]", "[reverse_kl]", "simpo")  # which are ours
MODELS = (
    "Qwen2ForCausalLM-2.5", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "Cohere2ForCausalLM",
    "Olmo3ForCausalLM", "T5ForConditionalGeneration",
)  # fmt: skip
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


def models(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_lm.build(folder / "model"))
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text("utf-8")
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
               "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
               "decoder_start_token_id": tokenizer.pad_token_id}  # fmt: skip
    for name in MODELS:
        kind = getattr(transformers, name.partition("-")[0])
        small = SMALL_T5 if name.startswith("T5") else SMALL
        for each in (kind(kind.config_class(**small, **special)), tokenizer):
            each.save_pretrained(folder / f"tiny-{name}")


def datasets(folder):
    rows = tiny_lm.pairs(20)
    talks = [tiny_lm.messages({name: text.strip() for name, text in row.items()}) for row in rows]
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows
    ]
    kinds = {"standard_unpaired_preference": unpaired}
    for form, pairs in (("standard", rows), ("conversational", talks)):
        kinds[f"{form}_preference"] = pairs
        kinds[f"{form}_implicit_prompt_preference"] = [
            {key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in pairs
        ]
    for kind, kept in kinds.items():
        (folder / kind).mkdir(parents=True)
        for split, part in (("train", kept[:17]), ("test", kept[17:])):
            (folder / kind / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    configs = [{"config_name": kind, "data_dir": kind} for kind in kinds]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


def results(folder, file, plugin):
    """Run a file of TRL's tests: "passed" for each test, or with what it failed or was skipped."""
    report = folder / f"{plugin}.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-k", TESTS]
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(
        [*command, "-p", plugin, file], cwd=folder, stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )  # fmt: skip
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  our own run's
        found[case.get("name")] = "passed"
        for problem in case:
            found[case.get("name")] = f"{problem.tag}: {problem.get('message', '')}"
    return found


def as_expected(test, result):
    """Whether a test has passed, or what it asks for was refused where it has to be."""
    refusals = [text for part, text in REFUSED.items() if part in test]
    if refusals and not any(part in test for part in TAKEN):
        return refusals[0] in result
    return result == "passed"


def run(folder):
    command = ["git", "clone", "-q", "--depth", "1", "--branch", f"v{version(PACKAGE)}", SOURCE]
    subprocess.run([*command, folder / "source"], check=True)
    (folder / "source" / "tests").rename(folder / "tests")  # with the trl that is installed
    (folder / "theirs.py").write_text(ON_CPU)
    (folder / "ours.py").write_text(ON_CPU + SWAP)
    models(folder / "trl-internal-testing")
    datasets(folder / "trl-internal-testing" / "zen")
    for name, file in FILES.items():
        with ThreadPoolExecutor() as pool:  # of processes, each on one core
            theirs, ours = pool.map(partial(results, folder, file), ("theirs", "ours"))
        print(name, theirs, ours, file=sys.stderr)
        tests = [test for test, result in theirs.items() if result == "passed"]
        wrong = {test: ours[test] for test in tests if not as_expected(test, ours[test])}
        assert not wrong, wrong
        refused = sorted(test for test in tests if ours[test] != "passed")
        assert refused, f"the trainers in {file} are not ours, which refuse some of its tests"
        yield {"run": f"{len(tests) - len(refused)} of TRL's own {len(tests)} tests with {name} in "
                      f"the place of its trainer, the others as they ask for what is refused",
               "refused": refused}  # fmt: skip

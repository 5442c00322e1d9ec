"""The programs and pages that train with TRL, whatever its version."""

import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import programs
import pytest
import tiny_lm

pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
pytest.importorskip("torch")

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS / "examples" / "published"))

import datasets  # noqa: E402
import train as published  # noqa: E402
import transformers  # noqa: E402
import trl_dpo as program  # noqa: E402
import trl_rank  # noqa: E402
from packaging.version import Version  # noqa: E402

from gamma_loss import PUBLISHED_SETTINGS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
TINY = "use_cpu=True, bf16=False, report_to=[], max_steps=2, tau="
QUICK = ["--max_steps", "2", "--use_cpu", "true", "--dataloader_pin_memory", "false"]
FILES = ["--dataset", "pairs.jsonl", "--bf16", "false", "--output_dir", "out"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs.write(tiny_lm.pairs(40))


def test_the_code_of_recipe_and_readme_runs(model, monkeypatch):
    """Each block alone, with a model of ours and the page's rows, on the CPU."""
    text = (DOCS / "recipes" / "trl.md").read_text()
    (rows,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    data = datasets.Dataset.from_list([json.loads(line) for line in rows.splitlines()] * 16)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    readme = (DOCS.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text + readme, re.DOTALL)
    blocks = [block for block in blocks if "integrations.trl" in block]
    assert len(blocks) == text.count("```python") + 1
    for block in blocks:
        names = {}
        block = block.replace("Qwen/Qwen3-0.6B", model).replace("tau=", TINY)
        exec(compile(block, "trl.md", "exec"), names)
        assert names["trainer"].state.global_step == 2
        assert trl_rank.stored(names["trainer"]).numel() == 16


def test_the_program_trains_adapters_on_local_files(model, capsys):
    pytest.importorskip("peft")
    trainer = program.main(["--model", model, "--lora", *FILES, *QUICK, "--gamma0", "3"])
    learned = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert learned
    assert all("lora" in name for name in learned)
    assert Path("out", "adapter_model.safetensors").is_file()
    assert re.search(r"2 held-out pairs: accuracy .* \(gamma0 3\)", capsys.readouterr().out)


def test_a_model_is_never_trained_with_the_settings_of_the_tiny_one(model, monkeypatch):
    def trainer(model, args, **_):
        raise ZeroDivisionError(model, args)

    monkeypatch.setattr(program, "GammaDPOTrainer", trainer)
    Path("job.yaml").write_text(f"model: {model}\ndataset: pairs.jsonl\nbf16: false\n")
    for argv in ([f"--model={model}", *FILES], ["--config", "job.yaml"], ["--config=job.yaml"], []):
        with pytest.raises(ZeroDivisionError) as found:
            program.main(argv)
        name, config = found.value.args
        real = [name == model, config.learning_rate < 1e-4, config.save_strategy != "no"]
        assert real == [bool(argv)] * 3


def test_wrong_input_ends_in_one_line(model, monkeypatch):
    Path("broken.yaml").write_text("model: [\n")
    Path("half.yaml").write_text("bf16: false\n")
    same = tiny_lm.messages({"prompt": "?", "chosen": "!", "rejected": "."})
    programs.write([same] * 9, "messages.jsonl")
    programs.write(tiny_lm.pairs(1), "one.jsonl")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    good = ["--model", model, *FILES]
    for argv, words in [  # those about rows are tested in test_examples.py
        (["--mod", "x"], "not used by the HfArgumentParser: ['--mod', 'x']"),
        (["--config"], "--config needs the name of a YAML file"),
        (["--config=missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--config", "broken.yaml"], "while parsing"),
        (["--config", "half.yaml"], "--model is needed"),
        (["--model", "x", "--bf16", "false"], "--dataset is needed"),
        ([*good, "--dataset", "one.jsonl"], "one.jsonl: needs at least 2 pairs"),
        ([*good, "--dataset", "messages.jsonl"], f"{model} has no chat template, which messages"),
        ([*good, "--bf16", "true"], "doesn't support bf16"),
        ([*good, "--output_dir", "pairs.jsonl"], "File exists: 'pairs.jsonl'"),
        ([*good, "--seed", "4294967296"], "--seed must be from 0 to 2**32 - 1, got 4294967296"),
        ([*good, "--gamma0", "-1"], "gamma0"),
        ([*good, "--model", "./nothing"], "./nothing: cannot be loaded as a model"),
    ]:
        assert words in programs.complaint(program, *argv)
    words = "--model_name_or_path is needed"
    assert words in programs.complaint(published, "--config", "half.yaml")


def test_ctrl_c_leaves_whole_checkpoints(model, monkeypatch):
    def interrupted(self, *arguments, save=program.GammaDPOTrainer._save_checkpoint):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, *arguments)

    monkeypatch.setattr(program.GammaDPOTrainer, "_save_checkpoint", interrupted)
    argv = ["--model", model, *FILES, *QUICK, "--save_steps", "1", "--report_to", "none"]
    done = programs.run(program, *argv)
    assert done.returncode == 130
    assert done.stderr.endswith("trl_dpo.py: interrupted\n")
    (checkpoint,) = Path("out").glob("checkpoint-*")
    assert {"model.safetensors", "trainer_state.json"} <= {p.name for p in checkpoint.iterdir()}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="a share of all steps as warmup_steps needs transformers 5",
)
def test_the_authors_settings_are_ready(model, monkeypatch):
    """Their files parse as they are, and train where model, data and machine are ours."""
    Path("data").mkdir()
    for split in ("train", "test"):
        programs.write(tiny_lm.pairs(8), f"data/{split}.jsonl")
    ours = (
        f"--model_name_or_path={model} --dataset_name=./data --output_dir=out --bf16=false "
        "--attn_implementation=eager --dtype=float32 --use_cpu=true --max_steps=1 "
        "--report_to=none --save_strategy=no --gradient_accumulation_steps=2"
    )
    steps = []
    monkeypatch.setattr(published, "train", lambda own, _: steps.append(own.train().global_step))
    for name in PUBLISHED_SETTINGS:
        file = DOCS / f"examples/published/{name}.yaml"
        published.main(["--config", str(file), *ours.split()])
    assert steps == [1] * 4
    # As a program it finds its parts, of which pytest's path has one folder.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "examples" not in path])
    for name in ("_common", "trl_dpo"):
        monkeypatch.delitem(sys.modules, name)
    assert runpy.run_path(published.__file__)["main"]

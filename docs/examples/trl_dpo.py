"""γ-DPO with TRL, on a language model and preference data of your choice.

    python trl_dpo.py                    # a tiny model made on the spot, one minute
    python trl_dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    python trl_dpo.py --model ./my-model --dataset pairs.jsonl --lora

The dataset is a name on the hub, a .jsonl, .json, .csv or .parquet file, or a folder written by
save_to_disk. It has prompt, chosen and rejected (the prompt may also be inside the two, or be chat
messages: TRL's formats). Every option of GammaDPOConfig, so of TRL's DPOConfig and of
transformers' TrainingArguments, is an option here; --config FILE.yaml reads them from a file. The
tiny model, with settings that would wreck a real one, is only for a command line without --model,
--dataset and --config.
"""

import random
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import (
    Parser,
    WrongInput,
    check_folder,
    check_template,
    load,
    load_tokenizer,
    run,
    uninterrupted,
)
from datasets import Dataset, DatasetDict
from trl import TrlParser
from yaml import YAMLError

from gamma_loss.integrations.trl import GammaDPOConfig, GammaDPOTrainer

# For the tiny model: large steps, since it knows nothing yet.
DEMO = (
    "--output_dir", "gamma-dpo-demo", "--save_strategy", "no", "--report_to", "none",
    "--max_steps", "120", "--per_device_train_batch_size", "16", "--beta", "0.1",
    "--learning_rate", "3e-3", "--lr_scheduler_type", "cosine", "--bf16", "false",
    "--gradient_checkpointing", "false", "--logging_steps", "20",
    "--eval_strategy", "steps", "--eval_steps", "40", "--per_device_eval_batch_size", "64",
)  # fmt: skip


@dataclass
class Arguments:
    """What to train, and on what."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder of a model."})
    dataset: str | None = field(default=None, metadata={"help": "Hub name, file or folder."})
    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters only (needs peft)."})


class OneLineParser(Parser, TrlParser):
    """TRL's parser, whose errors are one line."""


def prepare(
    argv: Sequence[str], kinds: tuple[type, type], model: str, dataset: str, demo: str = ""
) -> tuple[Any, Any, DatasetDict, Any]:
    """Return options, configuration, data and tokenizer, after all checks that need no training.

    ``model`` and ``dataset`` are the names of two options. With the name of a folder in ``demo``, a
    model and data are made there instead.
    """
    # Without abbreviations, which a look for an option in argv would not see. TRL knows no
    # --config=FILE.
    parser, no_bf16 = OneLineParser(kinds, allow_abbrev=False), None
    argv = [part for text in argv for part in
            (text.split("=", 1) if text.startswith("--config=") else [text])]  # fmt: skip
    if argv[-1:] == ["--config"]:
        raise WrongInput("--config needs the name of a YAML file")
    try:
        try:
            options, config = parser.parse_args_and_config(argv)
        except ValueError as error:
            if "bf16" not in str(error):
                raise
            no_bf16 = error  # told after all other mistakes
            options, config = parser.parse_args_and_config([*argv, "--bf16", "false"])
    except (ValueError, TypeError, OSError, YAMLError) as error:
        raise WrongInput(error) from None
    for name in () if demo else (model, dataset):
        if not getattr(options, name):
            raise WrongInput(f"--{name} is needed, as an option or in the --config file")
    if getattr(options, "lora", False) and not find_spec("peft"):
        raise WrongInput("--lora needs peft: pip install peft")
    if not 0 <= config.seed < 2**32:
        raise WrongInput(f"--seed must be from 0 to 2**32 - 1, got {config.seed}")
    data = local_pairs() if demo else load_pairs(getattr(options, dataset))
    if demo:
        setattr(options, model, local_model(demo, data["train"]["chosen"]))
    tokenizer = load_tokenizer(getattr(options, model))
    check_template(getattr(options, model), tokenizer, data["train"][0])
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(f"--output_dir: {error}") from None
    check_folder(Path(config.output_dir))
    if no_bf16:
        raise WrongInput(f"{no_bf16} With --bf16 false it trains in float32")
    return options, config, data, tokenizer


def load_pairs(name: str) -> DatasetDict:
    """Load preference data with a training and a test split."""
    data = load(name)
    if "train" not in data:
        raise WrongInput(f"{name}: needs a split 'train', has {', '.join(data)}")
    if "test" in data:
        return data
    if len(data["train"]) < 2:
        raise WrongInput(f"{name}: needs at least 2 pairs, one to train and one to test on")
    return data["train"].train_test_split(test_size=0.05, seed=0)


def local_pairs(count: int = 3000) -> DatasetDict:
    """Make pairs of Python's own help texts: words as written, against the same words shuffled."""
    from pydoc_data.topics import topics

    rng = random.Random(0)
    text = " ".join(" ".join(topics.values()).split())
    sentences = re.findall(r"(?<=\. )[A-Z][^.]{60,200}\.", text)
    rows = []
    for sentence in sorted(set(sentences))[:count]:
        words = sentence.split()
        shuffled = rng.sample(words[4:], len(words) - 4)
        pair = [" " + " ".join(words[4:]), " " + " ".join(shuffled)]
        if rng.random() < 0.1:
            pair.reverse()  # a wrong label, as real data have them
        rows.append({"prompt": " ".join(words[:4]), "chosen": pair[0], "rejected": pair[1]})
    return Dataset.from_list(rows).train_test_split(test_size=200, seed=0)


def local_model(folder: str, texts: list[str]) -> str:
    """Save a small random model, and a tokenizer trained on the texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1000, special_tokens=["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train(trainer: Any, config: Any) -> None:
    """Train and save. Ctrl-C waits for a file that is being written."""
    trainer._save_checkpoint = uninterrupted()(trainer._save_checkpoint)
    trainer.train()
    if config.save_strategy != "no":
        with uninterrupted():
            trainer.save_model()


def main(argv: list[str]) -> GammaDPOTrainer:
    """Train as the command line says, and print how the held-out pairs came out."""
    asked = any(text.partition("=")[0] in ("--model", "--dataset", "--config") for text in argv)
    with tempfile.TemporaryDirectory() as folder:
        options, config, data, tokenizer = prepare(
            argv if asked else [*DEMO, *argv],
            (Arguments, GammaDPOConfig),
            "model",
            "dataset",
            demo="" if asked else folder,
        )
        peft_config = None
        if options.lora:
            from peft import LoraConfig

            peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        trainer = GammaDPOTrainer(
            options.model,
            args=config,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        train(trainer, config)
        logs = trainer.evaluate()
    print(
        f"{len(data['test'])} held-out pairs: accuracy {logs['eval_rewards/accuracies']:.3f}, "
        f"mean reward gap {logs['eval_rewards/margins']:.2f}, margins from "
        f"{logs['eval_gamma/min']:.2f} to {logs['eval_gamma/max']:.2f} (gamma0 {config.gamma0:g})"
    )
    return trainer


if __name__ == "__main__":
    run(main, sys.argv[1:])

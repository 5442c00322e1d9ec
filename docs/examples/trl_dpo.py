"""γ-DPO with TRL, on a language model and preference data of your choice.

    python trl_dpo.py                    # a tiny model made on the spot, one minute
    python trl_dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    python trl_dpo.py --model ./my-model --dataset pairs.jsonl --lora

The dataset is a name on the hub, or a JSONL file with prompt, chosen and rejected (the prompt may
also be inside the two, or be chat messages: TRL's formats). Every option of GammaDPOConfig, so of
TRL's DPOConfig and of transformers' TrainingArguments, is an option here; --config FILE.yaml reads
them from a file. The tiny model, with settings that would wreck a real one, is only for a command
line without --model, --dataset and --config.
"""

import random
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer
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
    dataset: str | None = field(default=None, metadata={"help": "Hub name or a JSONL file."})
    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters only (needs peft)."})


def stop(problem: object) -> NoReturn:
    """End with one line that says what is wrong."""
    print(f"{Path(sys.argv[0]).name}:", " ".join(str(problem).split()), file=sys.stderr)
    sys.exit(2)


def parse(argv: Sequence[str], kinds: tuple[type, ...], needed: Sequence[str]) -> tuple[Any, ...]:
    """Read options and a --config file; ``needed`` are options of the first kind."""
    # Without abbreviations, which a look for an option in argv would not see. TRL knows no
    # --config=FILE.
    parser = TrlParser(kinds, allow_abbrev=False, usage="%(prog)s [options], which --help lists")
    argv = [part for text in argv for part in
            (text.split("=", 1) if text.startswith("--config=") else [text])]  # fmt: skip
    if argv[-1:] == ["--config"]:
        stop("--config needs the name of a YAML file")
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config(argv)
    except (ValueError, TypeError, OSError, YAMLError) as error:
        stop(error)
    for name in needed:
        if not getattr(parsed[0], name):
            stop(f"--{name} is needed as well, on the command line or in the --config file")
    return parsed


def load_pairs(name: str) -> DatasetDict:
    """Load preference data with a training and a test split."""
    try:
        data = load_dataset("json", data_files=name) if Path(name).is_file() else load_dataset(name)
        if "train" in data and "test" not in data:
            data = data["train"].train_test_split(test_size=0.05, seed=0)
    except Exception as error:  # of the network, of the file's format, of too few rows
        stop(f"{name}: cannot be loaded as a dataset: {error.__cause__ or error}")
    if not {"train", "test"} <= set(data):
        stop(f"{name}: needs a split 'train', has {', '.join(data)}")
    for split in ("train", "test"):
        if problem := wrong(data[split]):
            stop(f"{name}, split {split}: {problem}")
    return data


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model, before anything that takes long."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        stop(f"{model}: cannot be loaded as a model: {error}")


def wrong(rows: Dataset) -> str | None:
    """Say why rows are no preference data: TRL itself would train on some of them, promptless."""
    names = {"prompt", "chosen", "rejected"} & set(rows.column_names)
    if not {"chosen", "rejected"} <= names:
        return (
            "needs the columns prompt, chosen and rejected, has "
            f"{', '.join(rows.column_names)}: rename its columns"
        )
    for number, row in enumerate(rows.select_columns(sorted(names)), 1):
        for name in names:
            if not isinstance(row[name], str | list):
                return f"row {number}: {name!r} must be text or messages, got {row[name]!r:.80}"
        # Where it is not given in the form of the responses, TRL looks for it inside them.
        inside = type(row.get("prompt")) is not type(row["chosen"])
        if inside and not (row["chosen"] and row["chosen"][:1] == row["rejected"][:1]):
            return (
                f"row {number} has no prompt: chosen and rejected begin differently, and "
                "'prompt' is not one of the columns or not in their form. It has "
                f"{', '.join(rows.column_names)}: rename its columns"
            )
    return None


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


def main(argv: list[str]) -> GammaDPOTrainer:
    """Train as the command line says, and print how the held-out pairs came out."""
    asked = any(text.partition("=")[0] in ("--model", "--dataset", "--config") for text in argv)
    arguments, config = parse(
        argv if asked else [*DEMO, *argv],
        (Arguments, GammaDPOConfig),
        needed=("model", "dataset") if asked else (),
    )
    data = load_pairs(arguments.dataset) if asked else local_pairs()
    peft_config = None
    if arguments.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or local_model(folder, data["train"]["chosen"])
        trainer = GammaDPOTrainer(
            model,
            args=config,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=load_tokenizer(model),
            peft_config=peft_config,
        )
        trainer.train()
        logs = trainer.evaluate()
    print(
        f"held-out pairs: accuracy {logs['eval_rewards/accuracies']:.3f}, "
        f"mean reward gap {logs['eval_rewards/margins']:.2f}, margins from "
        f"{logs['eval_gamma/min']:.2f} to {logs['eval_gamma/max']:.2f} (gamma0 {config.gamma0:g})"
    )
    if config.save_strategy != "no":
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])

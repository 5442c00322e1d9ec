"""γ-DPO with TRL, on a language model and preference data of your choice.

    python trl_dpo.py                    # a tiny model made on the spot, one minute
    python trl_dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    python trl_dpo.py --model ./my-model --dataset pairs.jsonl --lora

The dataset is a name on the hub, or a JSONL file with prompt, chosen and rejected (the prompt may
also be inside the two, or be chat messages: TRL's formats). Every option of GammaDPOConfig, so of
TRL's DPOConfig and of transformers' TrainingArguments, is an option here; --config FILE.yaml reads
them from a file.
"""

import random
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer
from trl import TrlParser

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


def load_pairs(name: str) -> DatasetDict:
    """Load preference data with a training and a test split."""
    data = load_dataset("json", data_files=name) if Path(name).is_file() else load_dataset(name)
    return data if "test" in data else data["train"].train_test_split(test_size=0.05, seed=0)


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
    demo = not {"--model", "--config"} & set(argv)
    parser = TrlParser((Arguments, GammaDPOConfig))
    arguments, config = parser.parse_args_and_config([*DEMO, *argv] if demo else argv)
    data = load_pairs(arguments.dataset) if arguments.dataset else local_pairs()
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
            processing_class=AutoTokenizer.from_pretrained(model),
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

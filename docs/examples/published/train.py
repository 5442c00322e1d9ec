"""Train γ-SimPO with TRL on the settings of a file, such as the authors' four beside this one.

accelerate launch --num_processes 4 train.py --config llama-3-8b-instruct.yaml
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

from gamma_loss.integrations.trl import GammaSimPOConfig, GammaSimPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from trl_dpo import load_pairs, load_tokenizer, parse


@dataclass
class Arguments:
    """What to train, and on what. Only what is used here: any other option is an error."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or a JSONL file."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of transformers."})
    dtype: str = field(default="float32", metadata={"help": "Of the model's weights."})


def main() -> None:
    """Read the settings, load model and pairs, train and save."""
    arguments, config = parse(
        sys.argv[1:], (Arguments, GammaSimPOConfig), needed=("model_name_or_path", "dataset_name")
    )
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    pairs = load_pairs(arguments.dataset_name)
    trainer = GammaSimPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            arguments.model_name_or_path,
            attn_implementation=arguments.attn_implementation,
            dtype=arguments.dtype,
        ),
        args=config,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

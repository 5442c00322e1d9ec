"""Train γ-SimPO with TRL on the settings of a file, such as the authors' four beside this one.

accelerate launch --num_processes 4 train.py --config llama-3-8b-instruct.yaml
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

from gamma_loss.integrations.trl import GammaSimPOConfig, GammaSimPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import run
from trl_dpo import prepare, train


@dataclass
class Arguments:
    """What to train, and on what. Only what is used here: any other option is an error."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, file or folder."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of transformers."})
    dtype: str = field(default="float32", metadata={"help": "Of the model's weights."})


def main(argv: list[str]) -> None:
    """Read the settings, load model and pairs, train and save."""
    options, config, data, tokenizer = prepare(
        argv, (Arguments, GammaSimPOConfig), "model_name_or_path", "dataset_name"
    )
    trainer = GammaSimPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            options.model_name_or_path,
            attn_implementation=options.attn_implementation,
            dtype=options.dtype,
        ),
        args=config,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )
    train(trainer, config)


if __name__ == "__main__":
    run(main, sys.argv[1:])

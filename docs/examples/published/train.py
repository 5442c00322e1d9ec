"""Train γ-SimPO with TRL on the settings of a file, such as the authors' four beside this one.

accelerate launch --num_processes 4 train.py --config llama-3-8b-instruct.yaml
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser

from gamma_loss.integrations.trl import GammaSimPOConfig, GammaSimPOTrainer


def main() -> None:
    """Read the settings, load model and pairs, train and save."""
    parser = TrlParser((ScriptArguments, GammaSimPOConfig, ModelConfig))
    script, config, model = parser.parse_args_and_config()
    pairs = load_dataset(script.dataset_name)
    trainer = GammaSimPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            attn_implementation=model.attn_implementation,
            dtype=model.dtype,
        ),
        args=config,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

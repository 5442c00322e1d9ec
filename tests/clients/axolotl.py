"""axolotl: γ-DPO and γ-SimPO through `trainer_cls`, with LoRA, and resumed from a checkpoint."""

import json

from clients import replay

PACKAGE = "axolotl"
FIELDS = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
FIELDS["prompt_format"] = "{prompt}\n"  # no token spans prompt and response
CONFIG = {
    "base_model": "model", "datasets": [{"path": "pairs.jsonl", "ds_type": "json", "type": FIELDS,
                                         "split": "train"}],
    "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 12, "num_epochs": 4,
    "learning_rate": 3e-3, "lr_scheduler": "constant", "optimizer": "adamw_torch",
    "logging_steps": 1, "output_dir": "out", "sequence_len": 64, "dataset_processes": 1,
    "save_steps": 6, "bf16": False, "flash_attention": False, "gradient_checkpointing": False,
    "dataset_prepared_path": "prepared", "use_tensorboard": False,
}  # fmt: skip
LOSSES = {
    "γ-DPO": {"rl": "dpo", "rl_beta": 0.5, "trainer_cls": "gamma_trainer.AxolotlGammaDPOTrainer"},
    "γ-SimPO": {"rl": "simpo", "rl_beta": 10.0, "simpo_gamma": 4.0, "cpo_alpha": 0.0,
                "trainer_cls": "gamma_trainer.AxolotlGammaSimPOTrainer"},
}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
RUNS = {
    "γ-SimPO": {},
    "γ-DPO": {},
    "γ-DPO, LoRA, accumulation": {**LORA, "gradient_accumulation_steps": 2},
    "γ-DPO, resumed": {
        "starts": [{"max_steps": 6}, {"resume_from_checkpoint": "out/checkpoint-6"}]
    },
}


def run(folder):
    files = {
        "gamma_trainer.py": replay.recipe("axolotl"),
        "pairs.jsonl": "\n".join(map(json.dumps, replay.pairs(96))),
    }
    command = ["axolotl", "train", "config.yaml", "--launcher", "python"]
    return replay.runs(folder, RUNS, LOSSES, CONFIG, files, command)

"""LLaMA-Factory: γ-DPO and γ-SimPO through the recipe, with LoRA, on one and two processes."""

import json

from clients import replay

PACKAGE = "llamafactory"
CONFIG = {
    "stage": "dpo", "do_train": True, "template": "empty", "dataset": "pairs", "dataset_dir": ".",
    "preprocessing_num_workers": 1, "per_device_train_batch_size": 4, "max_steps": 12,
    "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "use_cpu": True,
    "report_to": "none", "eval_dataset": "pairs", "eval_steps": 5, "eval_strategy": "steps",
    "overwrite_cache": True, "seed": 1, "model_name_or_path": "model", "output_dir": "out",
    "gradient_accumulation_steps": 1,
}  # fmt: skip
LOSSES = {
    "γ-DPO": {"pref_loss": "sigmoid", "pref_beta": 0.5},
    "γ-SimPO": {"pref_loss": "simpo", "pref_beta": 10.0, "simpo_gamma": 4.0},
}
FULL, LORA = {"finetuning_type": "full"}, {"finetuning_type": "lora"}
RUNS = {
    "γ-DPO": FULL,
    "γ-DPO, LoRA, accumulation": {**LORA, "gradient_accumulation_steps": 2},
    "γ-DPO, LoRA, two processes": {**LORA, "ranks": 2},
    "γ-SimPO": FULL,
    "γ-SimPO, LoRA, two processes": {**LORA, "ranks": 2},
}
DATA = {
    "file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
    "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
    "tags": {"role_tag": "role", "content_tag": "content",
             "user_tag": "user", "assistant_tag": "assistant"},
}  # fmt: skip


def run(folder):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}],
         **{key: {"role": "assistant", "content": row[key]} for key in ("chosen", "rejected")}}
        for row in replay.pairs(96)
    ]  # fmt: skip
    files = {
        "gamma_dpo.py": replay.recipe("llama_factory"),
        "torchaudio.py": "",  # which it imports, and this does not need
        "pairs.json": json.dumps(rows),
        "dataset_info.json": json.dumps({"pairs": DATA}),
    }
    command = ["python", "gamma_dpo.py", "config.yaml"]
    return replay.runs(folder, RUNS, LOSSES, CONFIG, files, command)

"""ms-swift: γ-DPO and γ-SimPO as the recipe's plugin, with LoRA, on one and two processes."""

import json

from clients import replay

PACKAGE = "ms-swift"
CONFIG = {
    "dataset": "pairs.jsonl", "val_dataset": "pairs.jsonl", "external_plugins": "gamma_swift.py",
    "model": "model", "model_type": "llama", "template": "dummy", "per_device_train_batch_size": 4,
    "max_steps": 12, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
    "eval_strategy": "steps", "eval_steps": 5, "save_steps": 12, "torch_dtype": "float32",
    "report_to": "none", "use_cpu": True, "output_dir": "out", "add_version": False,
    "dataset_num_proc": 1, "dataloader_num_workers": 0, "load_from_cache_file": False,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
LOSSES = {
    "γ-DPO": {"rlhf_type": "dpo", "beta": 0.5},
    "γ-SimPO": {"rlhf_type": "simpo", "beta": 10.0, "simpo_gamma": 4.0, "cpo_alpha": 0.0},
}
RUNS = {
    "γ-DPO": {"tuner_type": "full"},
    "γ-DPO, LoRA, two processes": {"tuner_type": "lora", "ranks": 2},
    "γ-SimPO, LoRA, accumulation": {"tuner_type": "lora", "gradient_accumulation_steps": 2},
}


def run(folder):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]},
                      {"role": "assistant", "content": row["chosen"]}],
         "rejected_response": row["rejected"]}
        for row in replay.pairs(96)
    ]  # fmt: skip
    files = {
        "gamma_swift.py": replay.recipe("ms_swift"),
        "pairs.jsonl": "\n".join(map(json.dumps, rows)),
    }
    return replay.runs(folder, RUNS, LOSSES, CONFIG, files, ["swift", "rlhf", "config.yaml"])

"""ms-swift: γ-DPO and γ-SimPO as the recipe's plugin, with LoRA, on one and two processes."""

import json

import tiny_lm

from clients import replay, sabotages

SABOTAGES = sabotages.ALL
PACKAGE = "ms-swift"
COMMON = {
    "dataset": "pairs.jsonl", "val_dataset": "pairs.jsonl", "external_plugins": "gamma_swift.py",
    "model": "model", "model_type": "llama", "template": "dummy", "per_device_train_batch_size": 4,
    "max_steps": 12, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
    "eval_strategy": "steps", "eval_steps": 5, "save_steps": 12, "torch_dtype": "float32",
    "report_to": "none", "use_cpu": True, "output_dir": "out", "add_version": False,
    "dataset_num_proc": 1, "dataloader_num_workers": 0, "load_from_cache_file": False,
}  # fmt: skip
DPO = {"rlhf_type": "dpo", "beta": 0.5}
SIMPO = {"rlhf_type": "simpo", "beta": 10.0, "simpo_gamma": 4.0, "cpo_alpha": 0.0}
RUNS = {
    "γ-DPO": {**DPO, "tuner_type": "full"},
    "γ-DPO, LoRA, two processes": {**DPO, "tuner_type": "lora", "ranks": 2},
    "γ-SimPO, LoRA, accumulation": {**SIMPO, "tuner_type": "lora", "accumulated": 2},
}


def run(folder):
    for name, options in RUNS.items():
        options = {"ranks": 1, "accumulated": 1, **options}
        ranks, accumulated = options.pop("ranks"), options.pop("accumulated")
        here = folder / name
        here.mkdir()
        tiny_lm.build(here / "model")
        (here / "gamma_swift.py").write_text(replay.recipe("ms_swift"))
        rows = [
            {"messages": [{"role": "user", "content": row["prompt"]},
                          {"role": "assistant", "content": row["chosen"]}],
             "rejected_response": row["rejected"]}
            for row in replay.pairs(96)
        ]  # fmt: skip
        (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = {**COMMON, **options, "gradient_accumulation_steps": accumulated}
        (here / "config.yaml").write_text(json.dumps(config))
        environment = {"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
        replay.start(here, ["swift", "rlhf", "config.yaml"], **environment)
        yield replay.compare(
            here, name, ranks=ranks,
            accumulated=accumulated, beta=options["beta"], **replay.SETTING,
            reference=options["rlhf_type"] == "dpo",
        )  # fmt: skip

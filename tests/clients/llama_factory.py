"""LLaMA-Factory: γ-DPO and γ-SimPO through the recipe, with LoRA, on one and two processes."""

import json

import tiny_lm

from clients import replay, sabotages

SABOTAGES = sabotages.ALL
PACKAGE = "llamafactory"
COMMON = {
    "stage": "dpo", "do_train": True, "template": "empty", "dataset": "pairs", "dataset_dir": ".",
    "preprocessing_num_workers": 1, "per_device_train_batch_size": 4, "max_steps": 12,
    "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "use_cpu": True,
    "report_to": "none", "eval_dataset": "pairs", "eval_steps": 5, "eval_strategy": "steps",
    "overwrite_cache": True, "seed": 1,
}  # fmt: skip
DPO = {"pref_loss": "sigmoid", "pref_beta": 0.5}
SIMPO = {"pref_loss": "simpo", "pref_beta": 10.0, "simpo_gamma": 4.0}
RUNS = {
    "γ-DPO": {**DPO, "finetuning_type": "full"},
    "γ-DPO, LoRA, accumulation": {**DPO, "finetuning_type": "lora", "accumulated": 2},
    "γ-DPO, LoRA, two processes": {**DPO, "finetuning_type": "lora", "ranks": 2},
    "γ-SimPO": {**SIMPO, "finetuning_type": "full"},
    "γ-SimPO, LoRA, two processes": {**SIMPO, "finetuning_type": "lora", "ranks": 2},
}


def run(folder):
    model = tiny_lm.build(folder / "model")
    for name, options in RUNS.items():
        options = dict(options)
        ranks, accumulated = options.pop("ranks", 1), options.pop("accumulated", 1)
        here = folder / name
        here.mkdir()
        (here / "gamma_dpo.py").write_text(replay.recipe("llama_factory"))
        (here / "torchaudio.py").touch()  # which it imports, and this does not need
        rows = [
            {"messages": [{"role": "user", "content": row["prompt"]}],
             **{key: {"role": "assistant", "content": row[key]} for key in ("chosen", "rejected")}}
            for row in replay.pairs(96)
        ]  # fmt: skip
        (here / "pairs.json").write_text(json.dumps(rows))
        columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
        tags = {"role_tag": "role", "content_tag": "content",
                "user_tag": "user", "assistant_tag": "assistant"}  # fmt: skip
        info = {"pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
                          "columns": columns, "tags": tags}}  # fmt: skip
        (here / "dataset_info.json").write_text(json.dumps(info))
        config = {**COMMON, **options, "model_name_or_path": model, "output_dir": "out",
                  "gradient_accumulation_steps": accumulated}  # fmt: skip
        (here / "config.yaml").write_text(json.dumps(config))
        program = ["torchrun", f"--nproc-per-node={ranks}"] if ranks > 1 else ["python"]
        replay.start(here, [*program, "gamma_dpo.py", "config.yaml"])
        yield replay.compare(
            here, name, ranks=ranks,
            accumulated=accumulated, beta=options["pref_beta"], **replay.SETTING,
            reference=options["pref_loss"] == "sigmoid",
        )  # fmt: skip

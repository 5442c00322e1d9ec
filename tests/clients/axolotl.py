"""axolotl: γ-DPO and γ-SimPO through `trainer_cls`, with LoRA, and resumed from a checkpoint."""

import json

import tiny_lm

from clients import replay, sabotages

UNSEEN = {"each process by itself", "a queue that evaluation writes"}  # in one process that trains
SABOTAGES = [name for name in sabotages.ALL if name not in UNSEEN]
PACKAGE = "axolotl"
FIELDS = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
FIELDS["prompt_format"] = "{prompt}\n"  # no token spans prompt and response
COMMON = {
    "base_model": "model", "datasets": [{"path": "pairs.jsonl", "ds_type": "json", "type": FIELDS,
                                         "split": "train"}],
    "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 12, "num_epochs": 4,
    "learning_rate": 3e-3, "lr_scheduler": "constant", "optimizer": "adamw_torch",
    "logging_steps": 1, "output_dir": "out", "sequence_len": 64, "dataset_processes": 1,
    "save_steps": 6, "bf16": False, "flash_attention": False, "gradient_checkpointing": False,
    "dataset_prepared_path": "prepared", "use_tensorboard": False,
}  # fmt: skip
DPO = {"rl": "dpo", "rl_beta": 0.5, "trainer_cls": "gamma_trainer.AxolotlGammaDPOTrainer"}
SIMPO = {"rl": "simpo", "rl_beta": 10.0, "simpo_gamma": 4.0, "cpo_alpha": 0.0,
         "trainer_cls": "gamma_trainer.AxolotlGammaSimPOTrainer"}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
RUNS = {
    "γ-SimPO": SIMPO,
    "γ-DPO": DPO,
    "γ-DPO, LoRA, accumulation": {**DPO, **LORA, "gradient_accumulation_steps": 2},
    "γ-DPO, resumed": {**DPO, "resumed": True},
}


def run(folder):
    for name, options in RUNS.items():
        options = dict(options)
        starts = [{"max_steps": 6}, {"resume_from_checkpoint": "out/checkpoint-6"}]
        starts = starts if options.pop("resumed", False) else [{}]
        here = folder / name
        here.mkdir()
        tiny_lm.build(here / "model")
        (here / "gamma_trainer.py").write_text(replay.recipe("axolotl"))
        (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, replay.pairs(96))))
        for start in starts:
            config = {**COMMON, **options, **start}
            (here / "config.yaml").write_text(json.dumps(config))
            replay.start(
                here,
                ["axolotl", "train", "config.yaml", "--launcher", "python"],
                AXOLOTL_DO_NOT_TRACK="1",
            )
        yield replay.compare(
            here, name, beta=config["rl_beta"],
            accumulated=config.get("gradient_accumulation_steps"), **replay.SETTING,
            reference=config["rl"] == "dpo",
        )  # fmt: skip

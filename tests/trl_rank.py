"""One of several processes that train together with a trainer for TRL; run by test_trl.py."""

import json
import os
from pathlib import Path

import datasets
import tiny_lm
import torch
import transformers

from gamma_loss.integrations import trl


def main():
    work = json.loads(os.environ["WORK"])
    torch.set_num_threads(1)
    trainer = getattr(trl, work["family"])
    config = getattr(trl, work["family"].replace("Trainer", "Config"))
    trainer = trainer(
        work["model"],
        args=config(
            work["out"], use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=6,
            per_device_train_batch_size=2, learning_rate=0.02, optim="sgd",
            lr_scheduler_type="constant", logging_steps=1, report_to=[], disable_tqdm=True,
            **{"save_strategy": "no", **work["options"]},
        ),
        train_dataset=datasets.Dataset.from_list(tiny_lm.pairs(48)),
        processing_class=transformers.AutoTokenizer.from_pretrained(work["model"]),
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=work["resume"])
    gaps, mask = trainer.gamma_loss.queue.context()
    result = {"history": trainer.state.log_history, "queue": gaps[mask].tolist()}
    Path(work["out"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

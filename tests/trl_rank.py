"""One of two processes that train together with trainers for TRL; run by test_trl.py."""

import json
import os
import sys
from pathlib import Path

import datasets
import tiny_lm
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from gamma_loss.integrations import trl


def shard():
    """Have Accelerate shard models by FSDP2, which by itself it does on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    original = AcceleratorState.__init__

    def init(self, *arguments, **keywords):
        first = not AcceleratorState._shared_state
        original(self, *arguments, **keywords | ({"fsdp_plugin": plugin} if first else {}))
        if first:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def train(model, job):
    AcceleratorState._reset_state()  # of the job before
    if job["fsdp2"] and "ACCELERATE_USE_FSDP" not in os.environ:
        shard()
    trainer = getattr(trl, job["family"])
    config = getattr(trl, job["family"].replace("Trainer", "Config"))
    trainer = trainer(
        model,
        args=config(
            job["out"], use_cpu=True, gradient_checkpointing=False,
            per_device_train_batch_size=2, learning_rate=0.02, optim="sgd",
            lr_scheduler_type="constant", logging_steps=1, report_to=[], disable_tqdm=True,
            **{"bf16": False, "save_strategy": "no", "max_steps": 6, **job["options"]},
        ),
        train_dataset=datasets.Dataset.from_list(tiny_lm.pairs(48)),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=job["resume"])
    sharded = [isinstance(p, DTensor) for p in trainer.model_wrapped.parameters()]
    assert all(sharded) is any(sharded) is job["fsdp2"]
    gaps, mask = trainer.gamma_loss.queue.context()
    return {"history": trainer.state.log_history, "queue": gaps[mask].tolist()}


def main():
    torch.set_num_threads(1)
    work = json.loads(os.environ["WORK"])
    result = {job["name"]: train(work["model"], job) for job in work["jobs"]}
    Path(work["out"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    # Gloo's threads live on where something still refers to their group, and one that is at work
    # while the interpreter shuts down may abort the process: leave without that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

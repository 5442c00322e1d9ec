"""Makes trainers for TRL, here and in one of two processes that train together (test_trl.py)."""

import gc
import json
import os
import warnings
from typing import NamedTuple

import datasets
import tiny_lm
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from gamma_loss.integrations import trl

gc.freeze()  # each training collects garbage at its start, among all that is imported by now

OPTIONS = {  # on one thread, by SGD at a constant rate, with a log at each step
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 6,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 48, "learning_rate": 0.02,
    "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
    "report_to": [], "disable_tqdm": True,
}  # fmt: skip


class Family(NamedTuple):
    trainer: type
    config: type
    settings: dict


DPO = Family(trl.GammaDPOTrainer, trl.GammaDPOConfig, {"beta": 0.5, "gamma0": 2.0})
SIMPO = Family(trl.GammaSimPOTrainer, trl.GammaSimPOConfig, {"beta": 2.0, "gamma0": 1.0})


def make(family, folder, model, options, **arguments):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    args = family.config(str(folder), **OPTIONS | family.settings | options)
    transformers.set_seed(0)  # of adapters
    return family.trainer(model, args=args, processing_class=tokenizer, **arguments)


def stored(trainer):
    gaps, mask = trainer.gamma_loss.queue.context()
    return gaps[mask]


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


def train(model, out, family, options, resume, fsdp2):
    AcceleratorState._reset_state()  # of the job before
    if fsdp2 and "ACCELERATE_USE_FSDP" not in os.environ:
        shard()
    rows = datasets.Dataset.from_list(tiny_lm.pairs(48))
    options = options | {"per_device_train_batch_size": 2}
    trainer = make(family, out, model, options, train_dataset=rows)
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=resume)
    sharded = [isinstance(p, DTensor) for p in trainer.model_wrapped.parameters()]
    assert all(sharded) is any(sharded) is fsdp2
    return {"history": trainer.state.log_history, "queue": stored(trainer).tolist()}


def run(folder, model, jobs):
    """Do jobs as one of two processes, and write their results."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = {name: train(model, str(folder / name), *job) for name, job in jobs.items()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
    # Gloo's threads live on where something still refers to their group, and one that is at work
    # while the interpreter shuts down may abort the process: leave without that.
    os._exit(0)

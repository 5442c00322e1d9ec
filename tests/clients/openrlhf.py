"""OpenRLHF: its DPO trainer, actor and dataset with the recipe's loss, on one and two processes.

DeepSpeed and FlashAttention are empty files, and a few lines take the place of its strategy, which
is made of them.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace as Space

import torch
import torch.distributed as dist

from clients import replay

PACKAGE = "openrlhf"
STUBS = {
    "deepspeed/__init__.py": "",
    "flash_attn/__init__.py": "",
    "flash_attn/bert_padding.py": "index_first_axis = pad_input = rearrange = unpad_input = None",
    "flash_attn/utils/__init__.py": "",
    "flash_attn/utils/distributed.py": "all_gather = None",
}
BETA, STEPS = replay.LOSSES["γ-DPO"]["beta"], 12


class Strategy:
    """One process's or DDP's, as openrlhf.utils.deepspeed has it."""

    ring_attn_group = None
    accumulated_gradient = 1
    args = Space(
        model=Space(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.0),
        logger=Space(wandb=Space(key=None), tensorboard_dir=None, logging_steps=1),
        data=Space(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected"),
        ds=Space(packing_samples=False), eval=Space(steps=5), ckpt=Space(save_steps=-1),
        train=Space(batch_size=4),
    )  # fmt: skip

    def __init__(self, ranks):
        self.ranks, self.history = ranks, []

    def is_rank_0(self):
        return False  # no progress bars

    def average(self, tensor):
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor / self.ranks

    def all_reduce(self, logs):
        logs = {name: self.average(torch.tensor(value)).item() for name, value in logs.items()}
        self.history.append(logs)
        return logs

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        for parameter in model.parameters():
            parameter.grad = self.average(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model):
        return 0.0


def train():
    """In a process of the training."""
    from datasets import Dataset
    from openrlhf.datasets import RewardDataset
    from openrlhf.models import Actor
    from openrlhf.trainer import dpo_trainer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    __import__("train_gamma_dpo")  # the page's, after which it hands over to OpenRLHF
    models = [AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32) for _ in range(2)]
    actors = [Actor(model) for model in models]
    for actor in actors:
        actor.packing_samples = False
    tokenizer, strategy = AutoTokenizer.from_pretrained("model"), Strategy(ranks)
    rows = [row | {"prompt": row["prompt"] + "\n"} for row in replay.pairs(4 * STEPS * ranks)]
    data = RewardDataset(
        Dataset.from_list(rows[rank::ranks]), tokenizer, 64, strategy, is_dpo=True, num_processors=1
    )
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=data.collate_fn)
    optimizer = torch.optim.Adam(actors[0].parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = dpo_trainer.DPOTrainer(
        *actors, strategy, tokenizer, optimizer, loader, loader, scheduler, beta=BETA, max_epochs=1,
    )  # fmt: skip
    trainer.fit(strategy.args)
    if rank == 0:
        Path("trainer_state.json").write_text(json.dumps({"log_history": strategy.history}))


def run(folder):
    table = {"γ-DPO": {}, "γ-DPO, two processes": {"ranks": 2}}
    files = {**STUBS, "train_gamma_dpo.py": replay.recipe("openrlhf")}
    command = ["python", "-m", "clients.openrlhf"]
    return replay.runs(folder, table, {"γ-DPO": {}}, {}, files, command)


if __name__ == "__main__":
    train()

"""Started in a trainer's process: keeps the inputs of its model, its logits and their gradients."""

import atexit
import functools
import os
from glob import glob

import numpy as np
import torch

CALLS = []


def listen(module, args, kwargs, output):
    if type(module).__name__ in ("LlamaForCausalLM", "LoraModel"):  # which calls its forward
        tokens = (args[0] if args else kwargs["input_ids"]).numpy(force=True)
        missing = tokens.shape[1] - output.logits.shape[1]  # of prompts, with logits_to_keep

        def whole(logits, value):
            return torch.nn.functional.pad(
                logits.float(), (0, 0, missing, 0), value=value
            ).numpy(force=True)  # fmt: skip

        call = {
            "tokens": tokens,
            "mask": kwargs["attention_mask"].numpy(force=True),
            "logits": whole(output.logits, float("nan")),
            "gradient": np.empty(0),
            "policy": torch.is_grad_enabled(),
        }
        CALLS.append(call)
        if output.logits.requires_grad:
            output.logits.register_hook(
                lambda gradient: call.update(gradient=whole(gradient, 0.0))
            )  # fmt: skip


def save():
    arrays = {f"{i} {name}": call[name] for i, call in enumerate(CALLS) for name in call}
    rank = os.environ.get("RANK", 0)
    np.savez(f"calls-{rank}-{len(glob(f'calls-{rank}-*'))}.npz", **arrays)  # a resumed run's follow


@functools.cache  # a trainer may import its plugin twice
def start():
    torch.nn.modules.module.register_module_forward_hook(listen, with_kwargs=True)
    atexit.register(save)
    if sabotage := os.environ.get("SABOTAGE"):
        from clients import sabotages

        sabotages.apply(sabotage)

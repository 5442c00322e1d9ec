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
            logits = torch.nn.functional.pad(logits.float(), (0, 0, missing, 0), value=value)
            return logits.numpy(force=True)

        call = {
            "tokens": tokens,
            "mask": kwargs["attention_mask"].numpy(force=True),
            "logits": whole(output.logits, float("nan")),
            "gradient": np.empty(0),
            "policy": torch.is_grad_enabled(),
        }
        CALLS.append(call)
        if output.logits.requires_grad:
            output.logits.register_hook(lambda each: call.update(gradient=whole(each, 0.0)))


def save():
    rank = os.environ.get("RANK", 0)
    for i, call in enumerate(CALLS, len(glob(f"calls-{rank}-*"))):  # a resumed run's follow
        np.savez(f"calls-{rank}-{i:05}.npz", **call)


@functools.cache  # a trainer may import its plugin twice
def start():
    torch.nn.modules.module.register_module_forward_hook(listen, with_kwargs=True)
    atexit.register(save)

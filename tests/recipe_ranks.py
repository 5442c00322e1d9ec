"""What a process of the DDP recipe's test does."""

import functools
import os
import traceback
from unittest import mock


def run(rank, ranks, code, folder, result):
    """Execute a script that expects to be started by torchrun; send its traceback or None."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.chdir(folder)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    join = functools.partial(
        dist.init_process_group, init_method=f"file://{folder}/gloo", rank=rank, world_size=ranks
    )
    try:
        with mock.patch("torch.distributed.init_process_group", join):
            exec(compile(code, "ddp.md", "exec"), {"__name__": "__main__"})
        result.send(None)
    except Exception:
        result.send(traceback.format_exc())

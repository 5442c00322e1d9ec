"""Real processes with gloo between them, and what the tests have them do."""

import multiprocessing
import os
import pkgutil
import signal
import traceback
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from unittest import mock

import numpy as np

import gamma_loss
from gamma_loss import _comm, gamma_preference_loss, metrics

try:
    import torch
    import torch.distributed as dist

    from gamma_loss import GammaPreferenceLoss
except ImportError:  # other tests use `pool` without torch
    pass

RANKS = (1, 2, 3, 5)
PATIENCE = timedelta(seconds=90)  # of a rank that waits for another


class Ranks:
    """Five worker processes, each in a gloo group of the first 1, 2, 3 and 5 of them."""

    def __init__(self, folder):
        context = multiprocessing.get_context("forkserver")  # torch is imported once, then forked
        context.set_forkserver_preload(["torch", "torch.distributed", "gamma_loss.torch"])
        self.pipes, self.processes = [], []
        for rank in range(max(RANKS)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, f"file://{folder}/gloo", rank), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, ranks, task, *arguments, gather_limit=2**17):
        """Have the first `ranks` processes call ``task(group, *arguments)``; return the results."""
        for pipe in self.pipes[:ranks]:
            pipe.send((ranks, gather_limit, task, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes[:ranks]):
            assert pipe.poll(120), f"rank {rank} of {ranks} does not answer"
            answers.append(pipe.recv())
        for rank, (failed, result) in enumerate(answers):
            assert not failed, f"rank {rank} of {ranks}:\n{result}"
        return [result for _, result in answers]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe, init_method, rank):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=init_method, rank=rank, world_size=max(RANKS), timeout=PATIENCE
    )
    groups = {ranks: dist.new_group(list(range(ranks)), timeout=PATIENCE) for ranks in RANKS}
    while True:
        ranks, _comm.GATHER_LIMIT, task, arguments = pipe.recv()
        try:
            pipe.send((False, task(groups[ranks], *arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))


def pool(size, scale=5.0, seed=0):
    return np.random.default_rng(seed).normal(size=size) * scale


def shards(sizes, **arrays):
    """The arrays of each rank: consecutive parts of the given sizes."""
    ends = np.cumsum(sizes)
    return [
        {name: each[end - size : end] for name, each in arrays.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


# --- tasks ---


def loss(arrays, settings, group=None):
    """A loss with its gradient and aux, as NumPy arrays, and its metrics."""
    arrays = {name: torch.tensor(each) for name, each in arrays.items()}
    gaps = arrays.pop("gaps").requires_grad_()
    value, aux = gamma_preference_loss(gaps, group=group, **arrays, **settings)
    value.sum().backward()
    logs = {name: each.item() for name, each in metrics(aux).items()}
    found = {"loss": value.detach(), "gradient": gaps.grad, **aux._asdict()}
    return {name: each.numpy() for name, each in found.items() if each is not None} | logs


def shard_loss(group, of_rank, settings):
    """This rank's part of a loss."""
    return loss(of_rank[dist.get_rank(group)], settings, group)


def calls(group, names, task, *arguments):
    """The calls of named functions by a task, with length and bytes of the last array of each."""
    log = []

    def logged(name, function, *arguments, **keywords):
        arrays = [each for each in arguments if isinstance(each, torch.Tensor)]
        log.append((name, *((arrays[-1].numel(), arrays[-1].nbytes) if arrays else ())))
        return function(*arguments, **keywords)

    with ExitStack() as stack:
        for name in names:
            patch = mock.patch(name, partial(logged, name, pkgutil.resolve_name(name)))
            stack.enter_context(patch)
        task(group, *arguments)
    return log


COLLECTIVES = ("torch.distributed.all_reduce", "torch.distributed.all_gather")


def refused(group, name, of_rank):
    """What a call with this rank's gaps and arguments ends in: an error, or None."""
    gaps, given = of_rank[dist.get_rank(group)]
    function, given = getattr(gamma_loss, name), dict(given)
    dtype = getattr(torch, given.pop("dtype", "torch.float64").removeprefix("torch."))
    arrays = [torch.tensor(gaps, dtype=dtype)] if isinstance(gaps, list) else []
    try:
        if isinstance(function, type):
            training = given.pop("training", True)
            function(group=group, **given).train(training)(*arrays)
        elif name == "solve_margins_streaming":
            function(gaps, group=group, **given)
        else:
            function(*arrays * (2 if "beta" in given else 1), group=group, **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class FailsLater:
    """Chunks that can be read once."""

    def __init__(self):
        self.readings = 0

    def __iter__(self):
        self.readings += 1
        if self.readings > 1:
            raise OSError("no disk")
        return iter([np.array([1.0, 2.0])])


def outlived(group):
    """What a solve ends in for a rank, of which the last one dies."""
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return refused(group, "solve_margins", [([1.0], {"gamma0": 4.0, "tau": 10.0})] * 9)


def train(group, engine, sizes, steps, setting):
    """Train a linear model; return its weights and losses, step by step, and the queue.

    ``engine`` None is one process with all pairs.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = wrapped = torch.nn.Linear(4, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5, 0.3, 0.1]]))
        model.bias.zero_()
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    elif engine == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    loss_module = GammaPreferenceLoss(queue_size=40, group=group, **setting).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    weights, losses = [], []
    for step in range(steps):
        data = np.random.default_rng(step).normal(size=(12, 4))
        if engine:
            data = shards(sizes, data=data)[dist.get_rank(group)]["data"]
        loss, _ = loss_module(wrapped(torch.tensor(data))[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weight = model.weight.detach()
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights.append(weight.numpy().copy())
        losses.append(loss.item())
    gaps, mask = loss_module.queue.context()
    return np.stack(weights), np.array(losses), gaps[mask].numpy()


def run_example(group, code):
    """Run a script that expects to be started by torchrun; return its queue."""
    names = {}
    with mock.patch("torch.distributed.init_process_group"):
        exec(compile(code, "queue.md", "exec"), names)
    gaps, mask = names["loss_fn"].queue.context()
    return gaps[mask].numpy()

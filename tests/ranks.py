"""Real processes with gloo between them, and what the tests have them do."""

import multiprocessing
import os
import signal
import traceback
from datetime import timedelta
from functools import partial

import numpy as np

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
        results = []
        for rank, pipe in enumerate(self.pipes[:ranks]):
            assert pipe.poll(120), f"rank {rank} of {ranks} does not answer"
            failed, result = pipe.recv()
            assert not failed, f"rank {rank} of {ranks}:\n{result}"
            results.append(result)
        return results

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe, init_method, rank):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    from gamma_loss import _comm

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


def shard(values, sizes, rank):
    start = sum(sizes[:rank])
    return values[start : start + sizes[rank]]


def sharded_loss(group, sizes, setting, gaps=None, mask=None, options=None, weights=None):
    """This rank's share of a loss and its gradient, as NumPy arrays."""
    import torch
    import torch.distributed as dist

    from gamma_loss import gamma_preference_loss

    rank = dist.get_rank(group)
    whole = pool(sum(sizes)) if gaps is None else gaps
    mine = torch.tensor(shard(whole, sizes, rank), requires_grad=True)
    kept = None if mask is None else torch.tensor(shard(mask, sizes, rank))
    weights = None if weights is None else torch.tensor(shard(weights, sizes, rank))
    loss, aux = gamma_preference_loss(
        mine, mask=kept, weights=weights, group=group, **setting, **(options or {})
    )
    loss.sum().backward()
    return {
        "loss": loss.detach().numpy(),
        "gradient": mine.grad.numpy(),
        **{
            name: getattr(aux, name).numpy()
            for name in ("margins", "pair_weights", "error_bound", "multiplier")
        },
    }


def with_context(group, gaps, context, setting):
    """Margins where only some ranks have a context, and only some a mask of it."""
    import torch
    import torch.distributed as dist

    from gamma_loss import solve_margins

    rank = dist.get_rank(group)
    others, mask = context[rank]
    return solve_margins(
        torch.tensor(gaps[rank]),
        context=None if others is None else torch.tensor(others),
        context_mask=None if mask is None else torch.tensor(mask),
        group=group,
        **setting,
    ).margins.numpy()


def collectives(group, task, *arguments):
    """Which collectives the task issues, and with how many numbers."""
    import torch.distributed as dist

    log, originals = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def logged(name, *arguments, **keywords):
        log.append((name, max(each.numel() for each in arguments if hasattr(each, "numel"))))
        return originals[name](*arguments, **keywords)

    for name in originals:
        setattr(dist, name, partial(logged, name))
    try:
        task(group, *arguments)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return log


def steps(group, task, *arguments):
    """How many steps of the pairs a task takes."""
    from gamma_loss import _solver

    step, count = _solver.newton_step, []

    def counted(*arguments):
        count.append(1)
        return step(*arguments)

    _solver.newton_step = counted
    try:
        task(group, *arguments)
    finally:
        _solver.newton_step = step
    return len(count)


def refused(group, name, of_rank):
    """What a call with this rank's gaps and arguments ends in: an error, or None."""
    import torch
    import torch.distributed as dist

    import gamma_loss

    gaps, given = of_rank[dist.get_rank(group)]
    function, given = getattr(gamma_loss, name), dict(given)
    dtype = getattr(torch, given.pop("dtype", "float64"))
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
    import torch.distributed as dist

    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return refused(group, "solve_margins", [([1.0], {"gamma0": 4.0, "tau": 10.0})] * 9)


def train(group, engine, sizes, steps, setting):
    """Train a linear model; return its weights and losses, step by step, and the queue.

    ``engine`` None is one process with all pairs.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from gamma_loss import GammaPreferenceLoss

    model = wrapped = torch.nn.Linear(4, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5, 0.3, 0.1]]))
        model.bias.zero_()
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    elif engine == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    loss_module = GammaPreferenceLoss(
        queue_size=40, group=group if engine else None, **setting
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    weights, losses = [], []
    for step in range(steps):
        data = np.random.default_rng(step).normal(size=(12, 4))
        mine = shard(data, sizes, dist.get_rank(group)) if engine else data
        loss, _ = loss_module(wrapped(torch.tensor(mine))[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weight = model.weight.detach()
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights.append(weight.numpy().copy())
        losses.append(loss.item())
    gaps, mask = loss_module.queue.context()
    return np.stack(weights), np.array(losses), gaps[mask].numpy()


def logs_of_no_pairs(group):
    """The metrics of a rank without pairs, in a group where another has some."""
    import torch
    import torch.distributed as dist

    from gamma_loss import gamma_preference_loss, metrics

    gaps = torch.zeros(2 * dist.get_rank(group))
    _, aux = gamma_preference_loss(gaps, gamma0=4.0, tau=10.0, group=group)
    return {name: value.item() for name, value in metrics(aux).items()}


def run_example(group, code):
    """Run a script that expects to be started by torchrun; return its queue."""
    from unittest import mock

    names = {}
    with mock.patch("torch.distributed.init_process_group"):
        exec(compile(code, "queue.md", "exec"), names)
    gaps, mask = names["loss_fn"].queue.context()
    return gaps[mask].numpy()

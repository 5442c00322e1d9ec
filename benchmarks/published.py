"""The published margin solver, written afresh as the peer that benchmarks measure against."""

from __future__ import annotations

import math
import random
from collections import deque

import torch
from torch import Tensor

QUEUE_SIZE = 2048  # gaps that each rank of the published code remembers
POOL_SIZE = 256  # gaps that join one of its solves, the batch's own included


def published_margins(reward_gaps: Tensor, gamma0: float, tau: float, steps: int = 20) -> Tensor:
    """Margins of a pool by multiplicative weights, as the published implementation has them.

    From the uniform distribution, every step multiplies p by ``exp(-rate * gradient)`` of the
    objective of the margin problem and normalises; ``rate = min(0.5 / tau, 1)``. The margins are
    those that the last step started from, so that its own update is not in them. With 1e-10 added
    inside the logarithm, this reproduces the published outputs to rounding error.

    Each step shrinks the KL part of the error by half (where tau >= 0.5), so it converges in the
    published settings. Where gamma0² / tau is large, or tau small, it does not, and says nothing.

    Source for the facts: Sun et al., Findings of ACL 2025, arXiv:2506.03690, and its authors'
    published code.
    """
    size = reward_gaps.shape[0]
    rate = min(0.5 / tau, 1.0)
    p = torch.full_like(reward_gaps, 1 / size)
    for _ in range(steps):
        margins = gamma0 * size * p
        kl_gradient = torch.log(p + 1e-10) - math.log(1 / size)
        gradient = gamma0 * torch.sigmoid(margins - reward_gaps) + tau * kl_gradient
        p = p * torch.exp(-rate * gradient)
        p = p / p.sum()
    return margins


def published_routine(
    reward_gaps: Tensor, gamma0: float, tau: float, queue: deque[float], generator: random.Random
) -> Tensor:
    """Margins of a batch as the published training step finds them, with its traffic.

    The pool is the batch and, up to `POOL_SIZE` gaps in all, a random sample of ``queue``: a Python
    deque of at most `QUEUE_SIZE` earlier gaps. It is put together on the host, so the batch is
    copied there and the pool back to the device; after the solve the batch is copied to the host a
    second time, to be remembered. Both copies make the host wait for the device. What the
    published code also prints each step is left out.

    Source for the facts: as for `published_margins`.
    """
    pairs = reward_gaps.shape[0]
    if pairs > POOL_SIZE:
        raise ValueError(f"reward_gaps must hold at most {POOL_SIZE} pairs, got {pairs}")
    earlier = generator.sample(queue, min(len(queue), POOL_SIZE - pairs))
    pool = torch.tensor(earlier + reward_gaps.tolist(), dtype=reward_gaps.dtype)
    margins = published_margins(pool.to(reward_gaps.device), gamma0, tau)[len(earlier) :]
    queue.extend(reward_gaps.tolist())
    return margins

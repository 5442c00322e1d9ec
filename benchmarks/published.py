"""The published margin solver, written afresh as the peer that benchmarks measure against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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

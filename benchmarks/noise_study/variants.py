"""γ-DPO and γ-SimPO with one choice changed, for the ablations."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines import CONTEXT, Logps
from gamma_loss import preference_loss, solve_margins


class GammaVariant:
    """γ-PO, as `GammaDPO` or `GammaSimPO` (``relative=False``) unless an option says otherwise.

    ``centered``: subtract γ - γ0 or γ. ``queue_size``: gaps remembered. ``sample``: how many of
    them, drawn at random, join a solve (None: all). ``differentiable``: let the gradient through
    the margins. ``label_smoothing``, ``robust``: on top.
    """

    def __init__(
        self, *, beta: float, gamma0: float, tau: float, relative: bool = True,
        centered: bool | None = None, queue_size: int = CONTEXT, sample: int | None = None,
        differentiable: bool = False, label_smoothing: float = 0.0, robust: bool = False,
    ) -> None:  # fmt: skip
        self.beta, self.gamma0, self.tau, self.relative = beta, gamma0, tau, relative
        self.centered = relative if centered is None else centered
        self.queue_size, self.sample = queue_size, sample
        self.differentiable = differentiable
        self.smoothing = {"label_smoothing": label_smoothing, "robust": robust}
        self.queue: Tensor | None = None

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * (logps.h if self.relative else logps.d)
        context = self.queue
        if context is not None and self.sample is not None:
            context = context[torch.randperm(len(context))[: self.sample]]
        pool = gaps if context is None else torch.cat([gaps, context])
        margins = solve_margins(pool.detach(), gamma0=self.gamma0, tau=self.tau).margins
        if self.differentiable:
            margins = through(margins, pool, self.gamma0, self.tau)
        margins = margins[: len(gaps)] - (self.gamma0 if self.centered else 0.0)
        if self.queue_size:
            self.queue = pool_of_last(self.queue, gaps, self.queue_size)
        return preference_loss(gaps, margins, **self.smoothing).mean()


def pool_of_last(queue: Tensor | None, gaps: Tensor, size: int) -> Tensor:
    gaps = gaps.detach()
    return (gaps if queue is None else torch.cat([queue, gaps]))[-size:]


def through(margins: Tensor, gaps: Tensor, gamma0: float, tau: float) -> Tensor:
    """Give solved margins their derivative with respect to the gaps, by the implicit function.

    One Newton step of docs/theory.md from the solution: its value is the solution, and its
    derivative that of the solution since everything but the gaps is held constant.
    """
    a, x = gamma0 / tau, margins / gamma0
    s = torch.sigmoid(margins - gaps.detach())
    weight = x / (1 + a * margins * s * (1 - s))
    # r is 0 at the solution and carries the derivative of the optimality condition.
    r = a * (torch.sigmoid(margins - gaps) - s)
    return margins + gamma0 * weight * ((weight * r).mean() / weight.mean() - r)

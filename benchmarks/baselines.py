"""Preference losses that γ-PO is measured against, each a few lines on the same four inputs.

Every loss is called with `Logps` and returns the scalar mean over the batch. Those that remember
earlier batches are classes whose instances are called. `METHODS` lists them all. Log-probabilities
are in nats: summed over a response, or averaged over its tokens where `Method.averaged` says so.
With π the policy, π_ref the reference, w the chosen and l the rejected response:

    h = log π(w)/π_ref(w) - log π(l)/π_ref(l)        d = log π(w) - log π(l)

A docstring names the formula's source, last the one that is followed; the code is our own.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.published import QUEUE_SIZE, published_routine
from gamma_loss import GammaDPOLoss, GammaSimPOLoss, match_logistic, preference_loss, solve_margins

CONTEXT = 512  # gaps of earlier batches that join γ-PO's pool


class Logps(NamedTuple):
    """Log-probabilities of a batch of pairs, each of shape (pairs,)."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def h(self) -> Tensor:
        return self.d - (self.reference_chosen - self.reference_rejected)

    @property
    def d(self) -> Tensor:
        return self.policy_chosen - self.policy_rejected


class Loss:
    """A loss with a memory. Its settings are attributes."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__ |= settings


def dpo(logps: Logps, *, beta: float) -> Tensor:
    """DPO: ``-log σ(β h)``. Rafailov et al. 2023, arXiv:2305.18290, Eq. 7."""
    return softplus(-beta * logps.h).mean()


def margin_dpo(logps: Logps, *, beta: float, margin: float) -> Tensor:
    """DPO with one margin for all pairs, a constant offset of ODPO: ``-log σ(β h - m)``."""
    return softplus(margin - beta * logps.h).mean()


def cdpo(logps: Logps, *, beta: float, epsilon: float) -> Tensor:
    """Conservative DPO: ``-(1 - ε) log σ(β h) - ε log σ(-β h)``. Mitchell's note of 2023, Eq. 3."""
    gaps = beta * logps.h
    return ((1 - epsilon) * softplus(-gaps) + epsilon * softplus(gaps)).mean()


def rdpo(logps: Logps, *, beta: float, epsilon: float) -> Tensor:
    """rDPO: ``(-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2ε)``. arXiv:2403.00409, Eq. 12."""
    gaps = beta * logps.h
    mixed = (1 - epsilon) * softplus(-gaps) - epsilon * softplus(gaps)
    return mixed.mean() / (1 - 2 * epsilon)


def ipo(logps: Logps, *, beta: float) -> Tensor:
    """IPO: ``(h - 1 / (2 β))²``, its paper's τ being β. Azar et al., arXiv:2310.12036, Eq. 17."""
    return (logps.h - 1 / (2 * beta)).square().mean()


def dr_dpo(logps: Logps, *, beta: float, beta_prime: float) -> Tensor:
    """Dr. DPO: ``-β' log mean exp(-ℓ / β')``, ℓ DPO's loss. Wu et al. 2024, arXiv:2407.07880."""
    return -beta_prime * torch.exp(-softplus(-beta * logps.h) / beta_prime).mean().log()


def ropo(logps: Logps, *, beta: float, alpha: float) -> Tensor:
    """ROPO's loss: ``4α / (1 + α)² (-log σ(β h) + α σ(-β h))``, whose largest pair weight is 1.

    Liang et al., ICML 2025, arXiv:2404.04102, without its filtering and rejection sampling. The
    paper could not be read: three public reimplementations agree (one is in nissymori/SymPO).
    """
    gaps = beta * logps.h
    return 4 * alpha / (1 + alpha) ** 2 * (softplus(-gaps) + alpha * torch.sigmoid(-gaps)).mean()


def sympo(logps: Logps, *, beta: float) -> Tensor:
    """SymPO: ``σ(-β h)``. Nishimori et al., arXiv:2505.24709; code nissymori/SymPO, 506e928."""
    return torch.sigmoid(-beta * logps.h).mean()


def holder_dpo(logps: Logps, *, beta: float, exponent: float) -> Tensor:
    """Hölder-DPO: ``-(1 + q) mean p^q + q mean p^(1 + q)``, p = σ(β h), its paper's γ being q.

    Fujisawa et al., NeurIPS 2025, arXiv:2505.17859 (q = 2 there): its Definition 3 with the φ of
    section 4.2. That the integral of Eq. 12 is the batch's mean is second-hand, from two write-ups.
    """
    log_p = -softplus(-beta * logps.h)
    first, second = torch.exp(exponent * log_p), torch.exp((1 + exponent) * log_p)
    return (exponent * second - (1 + exponent) * first).mean()


class REPO(Loss):
    """RE-PO on DPO: ``-w log σ(β h) - (1 - w) log σ(-β h)``, w the probability of a right label.

    ``w = η σ(β h) / (η σ(β h) + (1 - η) σ(-β h))``, a constant for autograd. η is one annotator's
    reliability: each batch moves it by `momentum` of the way to the mean of w (main runs of the
    paper: from 0.9 by 0.1). Cao et al., ICLR 2026, arXiv:2509.24159, from a detailed public note.
    """

    def __init__(self, *, eta0: float, **settings: float) -> None:
        super().__init__(**settings, eta=eta0)

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * logps.h
        right = torch.sigmoid(gaps.detach() + math.log(self.eta / (1 - self.eta)))
        eta = self.eta + self.momentum * (right.mean().item() - self.eta)
        self.eta = min(max(eta, 1e-6), 1 - 1e-6)  # exactly 1 would never be left again
        return (right * softplus(-gaps) + (1 - right) * softplus(gaps)).mean()


class PLCDPO(Loss):
    """PLC-DPO: a pair is trained as labelled, the other way round, or towards no preference.

    With m = β h a constant for autograd, ``z = (m - M) / S`` by its running mean and standard
    deviation, and ``q = softmax(log π + (z / τ_dir, -z / τ_dir, -|z| / τ_tie))``:

        -(1 - w) log σ(m) + w (-q₁ log σ(m) - q₂ log σ(-m) + q₃ log(1 + e^|m|)),
        w = γ_t (3/2 max q - 1/2)^κ

    Cho et al. 2026, arXiv:2608.30597, Eqs. 3 to 17, in its aggressive recipe (Table 21) but for
    what is searched, τ_dir and γ_max. What it leaves open is chosen by what it reports (A.5, Table
    19): γ_t rises linearly from the warm-up's end to γ_max at the last step; π = (0.8, 0.1, 0.1); M
    and S² start at 0.
    """

    PRIOR, TIE, KEPT, WARM, POWER = (0.8, 0.1, 0.1), 1.15, 0.98, 0.07, 0.8
    mean, variance, step = 0.0, 0.0, 0

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * logps.h
        m = gaps.detach()
        self.step += 1
        self.mean = self.KEPT * self.mean + (1 - self.KEPT) * m.mean()
        self.variance = self.KEPT * self.variance + (1 - self.KEPT) * m.var(correction=0)
        z = (m - self.mean) / self.variance.sqrt().clamp(min=1e-6)
        evidence = torch.stack([z / self.tau_dir, -z / self.tau_dir, -z.abs() / self.TIE])
        q = torch.softmax(evidence + m.new_tensor(self.PRIOR).log()[:, None], 0)
        warm = self.WARM * self.steps
        share = min(max((self.step - warm) / (self.steps - warm), 0.0), 1.0)
        w = self.gamma_max * share * (1.5 * q.amax(0) - 0.5).clamp(min=0) ** self.POWER
        right, wrong, tie = softplus(-gaps), softplus(gaps), softplus(gaps.abs())
        return ((1 - w) * right + w * (q[0] * right + q[1] * wrong + q[2] * tie)).mean()


class Running(Loss):
    """Mean and standard deviation of batches, averaged exponentially from zero at a rate of 0.1."""

    mean = std = 0.0

    def update(self, batch: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * batch.mean()
        self.std = 0.9 * self.std + 0.1 * batch.std()

    def normalise(self, batch: Tensor) -> Tensor:
        # At the first step policy and reference are equal: 0 / 0 in the published code.
        return (batch - self.mean) / (self.std + 1e-6)


class BetaDPO(Running):
    """β-DPO: ``-log σ(β_b h)`` on a share 1 - ρ of the batch, β_b = β (1 + a (mean of its h - M)).

    With running mean M and deviation S of h, it is drawn without replacement with weights
    exp(-(h - M)² / 2S²). Wu et al., NeurIPS 2024, arXiv:2407.08639; trainers.py of their beta-DPO.
    """

    def __call__(self, logps: Logps) -> Tensor:
        h = logps.h
        self.update(h.detach())
        # The largest of log-weight plus Gumbel noise are a draw without replacement.
        noise = -torch.empty_like(h).exponential_().log()
        score = noise - 0.5 * self.normalise(h.detach()).square()
        kept = h[score.topk(max(1, int(h.shape[0] * (1 - self.rho)))).indices]
        beta = self.beta * (1 + self.a * (kept.detach().mean() - self.mean))
        return softplus(-beta.clamp(min=1e-3) * kept).mean()


def simpo(logps: Logps, *, beta: float, margin: float) -> Tensor:
    """SimPO: ``-log σ(β d - m)``. Meng et al., NeurIPS 2024, arXiv:2405.14734, Eq. 6."""
    return softplus(margin - beta * logps.d).mean()


class AlphaDPO(Running):
    """α-DPO: ``-log σ(β (d - α z) - m)``, z = (h - M) / S, by running statistics, a constant.

    Wu et al. 2024, arXiv:2410.10148; scripts/dpo_trainer.py of junkangwu/alpha-DPO.
    """

    def __call__(self, logps: Logps) -> Tensor:
        h = logps.h.detach()
        self.update(h)
        shift = self.alpha * self.normalise(h)
        return softplus(self.margin - self.beta * (logps.d - shift)).mean()


def amapo(logps: Logps, *, beta: float) -> Tensor:
    """AMaPO: ``-log σ(β (d - γ))``, γ = exp(mean (mean - d) / std) where d < mean, else 0.

    γ is a constant. Deng et al. 2025, arXiv:2511.09385; amapo_trainer.py of Shiroha-Offical/AMaPO.
    """
    d = logps.d.detach()
    mean, std = d.mean(), d.std()
    margin = torch.where(d < mean, torch.exp((mean - d) / std * mean), 0.0)
    return softplus(beta * (margin - logps.d)).mean()


class GammaPO:
    """γ-DPO or γ-SimPO with exact margins, by `gamma_loss`'s modules."""

    def __init__(self, *, averaged: bool, **settings: float) -> None:
        make = GammaSimPOLoss if averaged else GammaDPOLoss
        self.inputs, self.module = 2 if averaged else 4, make(**settings, queue_size=CONTEXT)

    def __call__(self, logps: Logps) -> Tensor:
        return self.module(*logps[: self.inputs])[0]


class Published(Loss):
    """The published training step: its 20-step loop, its queue, its sample of 256 gaps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # As published, the queue starts with eight random numbers.
        self.queue = deque(torch.randn(8).tolist(), maxlen=QUEUE_SIZE)
        self.generator = random.Random(0)

    def margins(self, gaps: Tensor) -> Tensor:
        return published_routine(gaps.detach(), self.gamma0, self.tau, self.queue, self.generator)

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * (logps.d if self.averaged else logps.h)
        centre = 0.0 if self.averaged else self.gamma0
        return softplus(self.margins(gaps) - centre - gaps).mean()


class Matched(Loss):
    """``(c / b) (-log σ(b g - d))`` with c, d, b of `gamma_loss.match_logistic`.

    They are fitted to the pair weights that γ-PO has on its pool, the batch and the last `CONTEXT`
    gaps: anew at every step or, with ``once``, until the pool has been full for the first time.
    """

    once, queue, match = False, torch.empty(0), None

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * (logps.d if self.averaged else logps.h)
        full = len(self.queue) == CONTEXT
        pool = torch.cat([self.queue.to(gaps), gaps.detach()])
        if self.match is None or not (self.once and full):
            how = {"gamma0": self.gamma0, "tau": self.tau, "centered": not self.averaged}
            self.match = match_logistic(pool, **how)
        self.queue = pool[-CONTEXT:]
        c, d, b, _ = self.match
        return c / b * softplus(d - b * gaps).mean()


class GammaVariant(Loss):
    """γ-PO as `GammaPO`, in its SimPO form if not ``relative``, with one choice changed.

    ``centered``: subtract γ - γ0 or γ. ``queue_size``: gaps remembered. ``sample``: how many of
    them, drawn at random, join a solve (None: all). ``differentiable``: let the gradient through
    the margins. ``label_smoothing``, ``robust``: on top.
    """

    relative, centered, queue_size, sample, queue = True, None, CONTEXT, None, None
    differentiable, label_smoothing, robust = False, 0.0, False

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * (logps.h if self.relative else logps.d)
        context = self.queue
        if context is not None and self.sample is not None:
            context = context[torch.randperm(len(context))[: self.sample]]
        pool = gaps if context is None else torch.cat([gaps, context])
        margins = solve_margins(pool.detach(), gamma0=self.gamma0, tau=self.tau).margins
        if self.differentiable:
            margins = through(margins, pool, self.gamma0, self.tau)
        centered = self.relative if self.centered is None else self.centered
        margins = margins[: len(gaps)] - (self.gamma0 if centered else 0.0)
        if self.queue_size:
            known = [gaps.detach()] if self.queue is None else [self.queue, gaps.detach()]
            self.queue = torch.cat(known)[-self.queue_size :]
        smoothing = {"label_smoothing": self.label_smoothing, "robust": self.robust}
        return preference_loss(gaps, margins, **smoothing).mean()


def through(margins: Tensor, gaps: Tensor, gamma0: float, tau: float) -> Tensor:
    """Give solved margins their derivative with respect to the gaps: one Newton step from them."""
    a, x = gamma0 / tau, margins / gamma0
    s = torch.sigmoid(margins - gaps.detach())
    weight = x / (1 + a * margins * s * (1 - s))
    r = a * (torch.sigmoid(margins - gaps) - s)  # 0, with the optimality condition's derivative
    return margins + gamma0 * weight * ((weight * r).mean() / weight.mean() - r)


class Method(NamedTuple):
    label: str
    loss: Callable[..., Any]  # a function of (logps, **settings); or a class, or part, of settings
    settings: tuple[str, ...] = ()  # besides beta
    averaged: bool = False  # whether log-probabilities are means over a response's tokens
    relative: bool = True  # to the reference: whether pairs are ranked by h, or by d
    scheduled: bool = False  # whether the loss takes ``steps``, how many the training has

    def make(self, **settings: float) -> Callable[[Logps], Tensor]:
        """Return the loss as a function of the log-probabilities alone, with a fresh memory."""
        if isinstance(self.loss, (type, partial)):
            return self.loss(**settings)
        return lambda logps: self.loss(logps, **settings)


def _family(base: str, label: str, simpo: bool) -> dict[str, Method]:
    def method(words: str, loss: type, **fixed: bool) -> Method:
        return Method(words, partial(loss, averaged=simpo, **fixed), GAMMA, simpo, not simpo)

    return {
        f"gamma-{base}": method(f"γ-{label}", GammaPO),
        f"gamma-{base}-published": method(f"γ-{label}, 20-step loop", Published),
        f"matched-{base}": method(f"matched {label}", Matched),
        f"matched-{base}-once": method(f"matched {label}, once", Matched, once=True),
    }


GAMMA = ("gamma0", "tau")
FREE: Any = {"averaged": True, "relative": False}  # of the reference
METHODS = {
    "dpo": Method("DPO", dpo),
    "margin-dpo": Method("DPO, fixed margin", margin_dpo, ("margin",)),
    "cdpo": Method("cDPO", cdpo, ("epsilon",)),
    "rdpo": Method("rDPO", rdpo, ("epsilon",)),
    "ipo": Method("IPO", ipo),
    "beta-dpo": Method("β-DPO", BetaDPO, ("a", "rho")),
    "dr-dpo": Method("Dr. DPO", dr_dpo, ("beta_prime",)),
    "ropo": Method("ROPO's loss", ropo, ("alpha",)),
    "sympo": Method("SymPO", sympo),
    "holder-dpo": Method("Hölder-DPO", holder_dpo, ("exponent",)),
    "re-po": Method("RE-PO", REPO, ("eta0", "momentum")),
    "plc-dpo": Method("PLC-DPO", PLCDPO, ("tau_dir", "gamma_max"), scheduled=True),
    **_family("dpo", "DPO", simpo=False),
    "gamma-dpo-averaged": Method("γ-DPO, averaged", partial(GammaPO, averaged=False), GAMMA, True),
    "simpo": Method("SimPO", simpo, ("margin",), **FREE),
    "alpha-dpo": Method("α-DPO", AlphaDPO, ("alpha", "margin"), **FREE),
    "amapo": Method("AMaPO", amapo, **FREE),
    **_family("simpo", "SimPO", simpo=True),
}

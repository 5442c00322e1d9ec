"""Preference losses that γ-PO is measured against, each a few lines on the same four inputs.

`METHODS` lists them all. Log-probabilities are in nats: summed over a response, or averaged over
its tokens where `Method.averaged` says so. With π the policy, π_ref the reference, w the chosen and
l the rejected response:

    h = log π(w)/π_ref(w) - log π(l)/π_ref(l)        d = log π(w) - log π(l)

A loss gets the gaps g, β h or β d as `Method.relative` says, or `Logps` and β where ``raw``, and
returns the mean over the batch. Those that remember earlier batches are objects that are called,
with their settings as attributes.
A docstring names the formula's source, last the one that is followed; the code is our own.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
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


def logistic(gaps: Tensor, *, margin: float = 0.0) -> Tensor:
    """``-log σ(g - m)``: DPO if m = 0, ODPO with a constant offset, or with β d SimPO.

    DPO: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. SimPO: Meng et al., NeurIPS 2024,
    arXiv:2405.14734, Eq. 6.
    """
    return softplus(margin - gaps).mean()


def cdpo(gaps: Tensor, *, epsilon: float) -> Tensor:
    """Conservative DPO: ``-(1 - ε) log σ(g) - ε log σ(-g)``. Mitchell's note of 2023, Eq. 3."""
    return ((1 - epsilon) * softplus(-gaps) + epsilon * softplus(gaps)).mean()


def rdpo(gaps: Tensor, *, epsilon: float) -> Tensor:
    """rDPO: ``(-(1 - ε) log σ(g) + ε log σ(-g)) / (1 - 2ε)``. arXiv:2403.00409, Eq. 12."""
    mixed = (1 - epsilon) * softplus(-gaps) - epsilon * softplus(gaps)
    return mixed.mean() / (1 - 2 * epsilon)


def ipo(logps: Logps, *, beta: float) -> Tensor:
    """IPO: ``(h - 1 / (2 β))²``, its paper's τ being β. Azar et al., arXiv:2310.12036, Eq. 17."""
    return (logps.h - 1 / (2 * beta)).square().mean()


def dr_dpo(gaps: Tensor, *, beta_prime: float) -> Tensor:
    """Dr. DPO: ``-β' log mean exp(-ℓ / β')``, ℓ DPO's loss. Wu et al. 2024, arXiv:2407.07880."""
    return -beta_prime * torch.exp(-softplus(-gaps) / beta_prime).mean().log()


def ropo(gaps: Tensor, *, alpha: float) -> Tensor:
    """ROPO's loss: ``4α / (1 + α)² (-log σ(g) + α σ(-g))``, whose largest pair weight is 1.

    Liang et al., ICML 2025, arXiv:2404.04102, without its filtering and rejection sampling. The
    paper could not be read: three public reimplementations agree (one is in nissymori/SymPO).
    """
    return 4 * alpha / (1 + alpha) ** 2 * (softplus(-gaps) + alpha * torch.sigmoid(-gaps)).mean()


def sympo(gaps: Tensor) -> Tensor:
    """SymPO: ``σ(-g)``. Nishimori et al., arXiv:2505.24709; code nissymori/SymPO, 506e928."""
    return torch.sigmoid(-gaps).mean()


def holder_dpo(gaps: Tensor, *, exponent: float) -> Tensor:
    """Hölder-DPO: ``-(1 + q) mean p^q + q mean p^(1 + q)``, p = σ(g), its paper's γ being q.

    Fujisawa et al., NeurIPS 2025, arXiv:2505.17859 (q = 2 there): its Definition 3 with the φ of
    section 4.2. That the integral of Eq. 12 is the batch's mean is second-hand, from two write-ups.
    """
    log_p = -softplus(-gaps)
    first, second = torch.exp(exponent * log_p), torch.exp((1 + exponent) * log_p)
    return (exponent * second - (1 + exponent) * first).mean()


class REPO(SimpleNamespace):
    """RE-PO on DPO: ``-w log σ(g) - (1 - w) log σ(-g)``, w the probability of a right label.

    ``w = η σ(g) / (η σ(g) + (1 - η) σ(-g))``, a constant for autograd. η is one annotator's
    reliability: each batch moves it by `momentum` of the way to the mean of w (main runs of the
    paper: from 0.9 by 0.1). Cao et al., ICLR 2026, arXiv:2509.24159, from a detailed public note.
    """

    eta = None

    def __call__(self, gaps: Tensor) -> Tensor:
        eta = self.eta or self.eta0
        right = torch.sigmoid(gaps.detach() + math.log(eta / (1 - eta)))
        eta += self.momentum * (right.mean().item() - eta)
        self.eta = min(max(eta, 1e-6), 1 - 1e-6)  # exactly 1 would never be left again
        return (right * softplus(-gaps) + (1 - right) * softplus(gaps)).mean()


class PLCDPO(SimpleNamespace):
    """PLC-DPO: a pair is trained as labelled, the other way round, or towards no preference.

    With m = g a constant for autograd, ``z = (m - M) / S`` by its running mean and standard
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

    def __call__(self, gaps: Tensor) -> Tensor:
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


class Running(SimpleNamespace):
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


def exact(*, relative: bool, **settings: float) -> Callable[[Logps], Tensor]:
    """γ-DPO or γ-SimPO with exact margins, by `gamma_loss`'s modules."""
    module = (GammaDPOLoss if relative else GammaSimPOLoss)(**settings, queue_size=CONTEXT)
    return lambda logps: module(*logps[: 4 if relative else 2])[0]


class Published(SimpleNamespace):
    """The published training step: its 20-step loop, its queue, its sample of 256 gaps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # As published, the queue starts with eight random numbers.
        self.queue = deque(torch.randn(8).tolist(), maxlen=QUEUE_SIZE)
        self.generator = random.Random(0)

    def __call__(self, gaps: Tensor) -> Tensor:
        how = self.gamma0, self.tau, self.queue, self.generator
        margins = published_routine(gaps.detach(), *how)
        return softplus(margins - self.gamma0 * self.relative - gaps).mean()


class Matched(SimpleNamespace):
    """``(c / b) (-log σ(b g - d))`` with c, d, b of `gamma_loss.match_logistic`.

    They are fitted to the pair weights that γ-PO has on its pool, the batch and the last `CONTEXT`
    gaps: anew at every step or, with ``once``, until the pool has been full for the first time.
    """

    once, queue, match = False, torch.empty(0), None

    def __call__(self, gaps: Tensor) -> Tensor:
        full = len(self.queue) == CONTEXT
        pool = torch.cat([self.queue.to(gaps), gaps.detach()])
        if self.match is None or not (self.once and full):
            how = {"gamma0": self.gamma0, "tau": self.tau, "centered": self.relative}
            self.match = match_logistic(pool, **how)
        self.queue = pool[-CONTEXT:]
        c, d, b, _ = self.match
        return c / b * softplus(d - b * gaps).mean()


class GammaVariant(SimpleNamespace):
    """γ-PO with exact margins and one choice changed.

    ``centered``: subtract γ - γ0 or γ. ``queue_size``: gaps remembered. ``sample``: how many of
    them, drawn at random, join a solve (None: all). ``differentiable``: let the gradient through
    the margins. ``label_smoothing``, ``robust``: on top.
    """

    centered, queue_size, sample, queue = None, CONTEXT, None, torch.empty(0)
    differentiable, label_smoothing, robust = False, 0.0, False

    def __call__(self, gaps: Tensor) -> Tensor:
        context = queue = self.queue.to(gaps)
        if self.sample is not None:
            context = context[torch.randperm(len(context))[: self.sample]]
        pool = torch.cat([gaps, context])
        margins = solve_margins(pool.detach(), gamma0=self.gamma0, tau=self.tau).margins
        if self.differentiable:
            margins = through(margins, pool, self.gamma0, self.tau)
        centered = self.relative if self.centered is None else self.centered
        margins = margins[: len(gaps)] - (self.gamma0 if centered else 0.0)
        if self.queue_size:
            self.queue = torch.cat([queue, gaps.detach()])[-self.queue_size :]
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
    loss: Callable[..., Any]  # a function of (gaps, **settings); or a class, or part, of settings
    settings: tuple[str, ...] = ()  # besides beta
    averaged: bool = False  # whether log-probabilities are means over a response's tokens
    relative: bool = True  # to the reference: whether pairs are ranked by h, or by d
    raw: bool = False  # whether the loss gets log-probabilities and beta
    scheduled: bool = False  # whether the loss takes ``steps``, how many the training has

    def make(self, *, beta: float, **settings: float) -> Callable[[Logps], Tensor]:
        """Return the loss as a function of the log-probabilities alone, with a fresh memory."""
        settings |= {"beta": beta} if self.raw else {}
        has_memory = isinstance(self.loss, (type, partial))
        loss = self.loss(**settings) if has_memory else partial(self.loss, **settings)
        return loss if self.raw else lambda logps: loss(self.gaps(logps, beta))

    def gaps(self, logps: Logps, beta: float) -> Tensor:
        return beta * (logps.h if self.relative else logps.d)


def _gamma(label: str, loss: Any, relative: bool = True, **fixed: bool) -> Method:
    made = partial(loss, relative=relative, **fixed)
    settings = ("gamma0", "tau")
    return Method(label, made, settings, not relative, relative, raw=loss is exact)


FREE: Any = {"averaged": True, "relative": False}  # of the reference
METHODS = {
    "dpo": Method("DPO", logistic),
    "margin-dpo": Method("DPO, fixed margin", logistic, ("margin",)),
    "cdpo": Method("cDPO", cdpo, ("epsilon",)),
    "rdpo": Method("rDPO", rdpo, ("epsilon",)),
    "ipo": Method("IPO", ipo, raw=True),
    "beta-dpo": Method("β-DPO", BetaDPO, ("a", "rho"), raw=True),
    "dr-dpo": Method("Dr. DPO", dr_dpo, ("beta_prime",)),
    "ropo": Method("ROPO's loss", ropo, ("alpha",)),
    "sympo": Method("SymPO", sympo),
    "holder-dpo": Method("Hölder-DPO", holder_dpo, ("exponent",)),
    "re-po": Method("RE-PO", REPO, ("eta0", "momentum")),
    "plc-dpo": Method("PLC-DPO", PLCDPO, ("tau_dir", "gamma_max"), scheduled=True),
    "gamma-dpo": _gamma("γ-DPO", exact),
    "gamma-dpo-published": _gamma("γ-DPO, 20-step loop", Published),
    "matched-dpo": _gamma("matched DPO", Matched),
    "matched-dpo-once": _gamma("matched DPO, once", Matched, once=True),
    "gamma-dpo-averaged": _gamma("γ-DPO, averaged", exact)._replace(averaged=True),
    "simpo": Method("SimPO", logistic, ("margin",), **FREE),
    "alpha-dpo": Method("α-DPO", AlphaDPO, ("alpha", "margin"), raw=True, **FREE),
    "amapo": Method("AMaPO", amapo, raw=True, **FREE),
    "gamma-simpo": _gamma("γ-SimPO", exact, relative=False),
    "gamma-simpo-published": _gamma("γ-SimPO, 20-step loop", Published, relative=False),
    "matched-simpo": _gamma("matched SimPO", Matched, relative=False),
    "matched-simpo-once": _gamma("matched SimPO, once", Matched, relative=False, once=True),
}

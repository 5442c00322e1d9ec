"""Preference losses that γ-PO is measured against, each a few lines on the same four inputs.

Every loss is called with `Logps` and returns the scalar mean over the batch. Those that remember
earlier batches are classes whose instances are called. `METHODS` lists them all. Log-probabilities
are in nats: summed over a response, or averaged over its tokens where `Method.averaged` says so.
With π the policy, π_ref the reference, w the chosen and l the rejected response:

    h = log π(w)/π_ref(w) - log π(l)/π_ref(l)        d = log π(w) - log π(l)

The formulas are those of the sources that each docstring names, the last one named where there are
several (so of the authors' code, where there is any); the code is our own.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.published import QUEUE_SIZE, published_routine
from gamma_loss import GammaDPOLoss, GammaSimPOLoss, MatchedLoss, match_logistic

CONTEXT = 512  # gaps of earlier batches that join γ-PO's pool


class Logps(NamedTuple):
    """Log-probabilities of a batch of pairs, each of shape (pairs,)."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def h(self) -> Tensor:
        """Log-ratio to the reference, chosen minus rejected."""
        return self.d - (self.reference_chosen - self.reference_rejected)

    @property
    def d(self) -> Tensor:
        """Log-probability under the policy, chosen minus rejected."""
        return self.policy_chosen - self.policy_rejected


# --- with a reference, on summed log-probabilities ---


def dpo(logps: Logps, *, beta: float) -> Tensor:
    """DPO: ``-log σ(β h)``. Rafailov et al. 2023, arXiv:2305.18290, Eq. 7."""
    return softplus(-beta * logps.h).mean()


def margin_dpo(logps: Logps, *, beta: float, margin: float) -> Tensor:
    """DPO with one margin for all pairs: ``-log σ(β h - m)``.

    The offset of ODPO (Amini et al. 2024, arXiv:2402.10571) held constant, or SimPO's with h for d.
    """
    return softplus(margin - beta * logps.h).mean()


def cdpo(logps: Logps, *, beta: float, epsilon: float) -> Tensor:
    """Conservative DPO: ``-(1 - ε) log σ(β h) - ε log σ(-β h)``.

    Mitchell, *A note on DPO with noisy preferences*, 2023, Eq. 3; `label_smoothing` in its code.
    """
    gaps = beta * logps.h
    return ((1 - epsilon) * softplus(-gaps) + epsilon * softplus(gaps)).mean()


def rdpo(logps: Logps, *, beta: float, epsilon: float) -> Tensor:
    """Robust DPO: ``(-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2ε)``.

    Unbiased for DPO on clean labels if each is flipped with probability ε. Chowdhury et al., ICML
    2024, arXiv:2403.00409, Eq. 12; ``loss_type="robust"`` in TRL.
    """
    gaps = beta * logps.h
    mixed = (1 - epsilon) * softplus(-gaps) - epsilon * softplus(gaps)
    return mixed.mean() / (1 - 2 * epsilon)


def ipo(logps: Logps, *, beta: float) -> Tensor:
    """IPO: ``(h - 1 / (2 β))²``, its paper's τ being β here.

    Azar et al. 2024, arXiv:2310.12036, Eq. 17. TRL averages the log-probabilities over the tokens,
    which for responses of one length only rescales β and the loss.
    """
    return (logps.h - 1 / (2 * beta)).square().mean()


def dr_dpo(logps: Logps, *, beta: float, beta_prime: float) -> Tensor:
    """Dr. DPO: ``-β' log mean exp(-ℓ / β')`` over the batch, with ℓ DPO's loss.

    Wu et al. 2024, arXiv:2407.07880; ``mode_loss: DrDPO`` in trainers.py of junkangwu/Dr_DPO.
    """
    return -beta_prime * torch.exp(-softplus(-beta * logps.h) / beta_prime).mean().log()


def ropo(logps: Logps, *, beta: float, alpha: float) -> Tensor:
    """ROPO's loss: ``4α / (1 + α)² (-log σ(β h) + α σ(-β h))``.

    The factor makes the largest pair weight 1. Of Liang et al., ICML 2025, arXiv:2404.04102, only
    the loss, not the filtering nor the rejection sampling around it. The paper's equations could
    not be read here: the formula is that of three public reimplementations, which agree (one cites
    Eq. 9 of an arXiv version, another Eq. 6 of the ICML paper; the third is in nissymori/SymPO).
    """
    gaps = beta * logps.h
    return 4 * alpha / (1 + alpha) ** 2 * (softplus(-gaps) + alpha * torch.sigmoid(-gaps)).mean()


def sympo(logps: Logps, *, beta: float) -> Tensor:
    """SymPO with its sigmoid loss: ``σ(-β h)``, which is symmetric.

    Nishimori et al. 2025, arXiv:2505.24709; ``loss_type: sigmoid`` in alignment/train of
    nissymori/SymPO at 506e928 (without its optional clipping of rewards).
    """
    return torch.sigmoid(-beta * logps.h).mean()


def holder_dpo(logps: Logps, *, beta: float, exponent: float) -> Tensor:
    """Hölder-DPO: ``-(1 + q) mean p^q + q mean p^(1 + q)``, p = σ(β h), its paper's γ being q here.

    Fujisawa et al., NeurIPS 2025, arXiv:2505.17859, whose experiments have q = 2: its Definition 3
    with the φ of section 4.2. Of the estimator (Eq. 12) only the text could be read here: that its
    integral is the batch's mean is second-hand; two public write-ups agree, one with the derivative
    ``-q (1 + q) p^q (1 - p)²``.
    """
    log_p = -softplus(-beta * logps.h)
    first, second = torch.exp(exponent * log_p), torch.exp((1 + exponent) * log_p)
    return (exponent * second - (1 + exponent) * first).mean()


class REPO:
    """RE-PO on DPO: ``-w log σ(β h) - (1 - w) log σ(-β h)``, w the probability of a right label.

    ``w = η σ(β h) / (η σ(β h) + (1 - η) σ(-β h))``, a constant for autograd. η is one annotator's
    reliability: after each batch it moves by `momentum` of the way to the mean of w (main runs of
    the paper: from 0.9 by 0.1). Cao et al., ICLR 2026, arXiv:2509.24159, of which the equations
    were read in a detailed public note, as the paper and its code could not be had here.
    """

    def __init__(self, *, beta: float, eta0: float, momentum: float) -> None:
        self.beta, self.eta, self.momentum = beta, eta0, momentum

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * logps.h
        # The formula's logit: that of η plus the gap.
        right = torch.sigmoid(gaps.detach() + math.log(self.eta / (1 - self.eta)))
        mean = right.mean().item()
        # A share of exactly 1 would never be left again.
        eta = (1 - self.momentum) * self.eta + self.momentum * mean
        self.eta = min(max(eta, 1e-6), 1 - 1e-6)
        return (right * softplus(-gaps) + (1 - right) * softplus(gaps)).mean()


class PLCDPO:
    """PLC-DPO: a pair is trained as labelled, the other way round, or towards no preference.

    With m = β h a constant for autograd, ``z = (m - M) / S`` by its running mean and standard
    deviation, and ``q = softmax(log π + (z / τ_dir, -z / τ_dir, -|z| / τ_tie))``:

        -(1 - w) log σ(m) + w (-q₁ log σ(m) - q₂ log σ(-m) + q₃ log(1 + e^|m|)),
        w = γ_t (3/2 max q - 1/2)^κ

    Cho et al. 2026, arXiv:2608.30597, Eqs. 3 to 17, in the recipe that it calls aggressive (Table
    21) but for what is searched: τ_dir (there 0.55) and γ_max (0.85). What it leaves open is chosen
    by what it reports. γ_t rises linearly from the end of the warm-up to γ_max at the last step:
    then the first fifth of training has 2.0 % of all γ_t, in A.5 1.9 % of all w. π = (0.8, 0.1,
    0.1): then q of a normal z has means 0.66, 0.29, 0.05, in Table 19 with 5 % flips 0.68, 0.27,
    0.06. M and S² start at 0.
    """

    PRIOR, TIE, KEPT, WARM, POWER = (0.8, 0.1, 0.1), 1.15, 0.98, 0.07, 0.8

    def __init__(self, *, beta: float, tau_dir: float, gamma_max: float, steps: int) -> None:
        self.beta, self.tau_dir, self.gamma_max, self.steps = beta, tau_dir, gamma_max, steps
        self.mean, self.variance, self.step = 0.0, 0.0, 0

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


class Running:
    """Mean and standard deviation of batches, averaged exponentially from zero at a rate of 0.1."""

    def __init__(self) -> None:
        self.mean = self.std = 0.0

    def update(self, batch: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * batch.mean()
        self.std = 0.9 * self.std + 0.1 * batch.std()

    def normalise(self, batch: Tensor) -> Tensor:
        # At the first step policy and reference are equal: 0 / 0 in the published code.
        return (batch - self.mean) / (self.std + 1e-6)


class BetaDPO:
    """β-DPO: ``-log σ(β_b h)`` on a part of the batch, with a β for each batch.

    With running mean M and standard deviation S of h, a share 1 - ρ of the batch is drawn without
    replacement with weights exp(-(h - M)² / 2S²), and β_b = β (1 + a (mean of the drawn h - M)), at
    least 1e-3. Wu et al., NeurIPS 2024, arXiv:2407.08639; trainers.py of junkangwu/beta-DPO.
    """

    def __init__(self, *, beta: float, a: float, rho: float) -> None:
        self.beta, self.a, self.rho = beta, a, rho
        self.running = Running()

    def __call__(self, logps: Logps) -> Tensor:
        h = logps.h
        self.running.update(h.detach())
        # The largest of log-weight plus Gumbel noise are a draw without replacement.
        noise = -torch.empty_like(h).exponential_().log()
        score = noise - 0.5 * self.running.normalise(h.detach()).square()
        kept = h[score.topk(max(1, int(h.shape[0] * (1 - self.rho)))).indices]
        beta = self.beta * (1 + self.a * (kept.detach().mean() - self.running.mean))
        return softplus(-beta.clamp(min=1e-3) * kept).mean()


# --- on averaged log-probabilities ---


def simpo(logps: Logps, *, beta: float, margin: float) -> Tensor:
    """SimPO: ``-log σ(β d - m)``, m = β times its gamma_beta_ratio.

    Meng et al., NeurIPS 2024, arXiv:2405.14734, Eq. 6; SimPOTrainer of princeton-nlp/SimPO.
    """
    return softplus(margin - beta * logps.d).mean()


class AlphaDPO:
    """α-DPO: ``-log σ(β (d - α z) - m)`` with z = (h - M) / S a constant for autograd.

    M and S are h's running mean and standard deviation. Wu et al. 2024, arXiv:2410.10148;
    scripts/dpo_trainer.py of junkangwu/alpha-DPO, whose gamma_beta_ratio is m / β.
    """

    def __init__(self, *, beta: float, alpha: float, margin: float) -> None:
        self.beta, self.alpha, self.margin = beta, alpha, margin
        self.running = Running()

    def __call__(self, logps: Logps) -> Tensor:
        h = logps.h.detach()
        self.running.update(h)
        shift = self.alpha * self.running.normalise(h)
        return softplus(self.margin - self.beta * (logps.d - shift)).mean()


def amapo(logps: Logps, *, beta: float) -> Tensor:
    """AMaPO: ``-log σ(β (d - γ))``, γ = exp(mean (mean - d) / std) where d < mean, else 0.

    Mean and standard deviation are the batch's; γ is a constant for autograd. Deng et al. 2025,
    arXiv:2511.09385; scripts/amapo_trainer.py of Shiroha-Offical/AMaPO (without label smoothing).
    """
    d = logps.d.detach()
    mean, std = d.mean(), d.std()
    margin = torch.where(d < mean, torch.exp((mean - d) / std * mean), 0.0)
    return softplus(beta * (margin - logps.d)).mean()


# --- γ-PO ---


class GammaDPO:
    """γ-DPO with exact margins: `gamma_loss.GammaDPOLoss`."""

    def __init__(self, *, beta: float, gamma0: float, tau: float) -> None:
        self.module = GammaDPOLoss(beta=beta, gamma0=gamma0, tau=tau, queue_size=CONTEXT)

    def __call__(self, logps: Logps) -> Tensor:
        return self.module(*logps)[0]


class GammaSimPO:
    """γ-SimPO with exact margins: `gamma_loss.GammaSimPOLoss`."""

    def __init__(self, *, beta: float, gamma0: float, tau: float) -> None:
        self.module = GammaSimPOLoss(beta=beta, gamma0=gamma0, tau=tau, queue_size=CONTEXT)

    def __call__(self, logps: Logps) -> Tensor:
        return self.module(*logps[:2])[0]


class _Published:
    """The published training step: its 20-step loop, its queue, its sample of 256 gaps."""

    def __init__(self, *, beta: float, gamma0: float, tau: float) -> None:
        self.beta, self.gamma0, self.tau = beta, gamma0, tau
        # As published, the queue starts with eight random numbers.
        self.queue = deque(torch.randn(8).tolist(), maxlen=QUEUE_SIZE)
        self.generator = random.Random(0)

    def margins(self, gaps: Tensor) -> Tensor:
        arguments = (self.gamma0, self.tau, self.queue, self.generator)
        return published_routine(gaps.detach(), *arguments)


class PublishedGammaDPO(_Published):
    """γ-DPO with the margins of `benchmarks.published`: ``-log σ(β h - (γ - γ0))``."""

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * logps.h
        return softplus(self.margins(gaps) - self.gamma0 - gaps).mean()


class PublishedGammaSimPO(_Published):
    """γ-SimPO with the margins of `benchmarks.published`: ``-log σ(β d - γ)``."""

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * logps.d
        return softplus(self.margins(gaps) - gaps).mean()


# --- the plain logistic loss that γ-PO amounts to ---


class _Matched:
    """``(c / b) (-log σ(b g - d))`` with c, d, b of `gamma_loss.match_logistic`.

    They are fitted to the pair weights that γ-PO has on its pool, the batch and the last `CONTEXT`
    gaps: anew at every step or, with ``once``, until the pool has been full for the first time.
    """

    once, averaged = False, False

    def __init__(self, *, beta: float, gamma0: float, tau: float) -> None:
        self.beta, self.settings = beta, {"gamma0": gamma0, "tau": tau}
        self.queue = torch.empty(0)
        self.match: MatchedLoss | None = None

    def __call__(self, logps: Logps) -> Tensor:
        gaps = self.beta * (logps.d if self.averaged else logps.h)
        full = len(self.queue) == CONTEXT
        pool = torch.cat([self.queue.to(gaps), gaps.detach()])
        if self.match is None or not (self.once and full):
            self.match = match_logistic(pool, **self.settings, centered=not self.averaged)
        self.queue = pool[-CONTEXT:]
        c, d, b, _ = self.match
        return c / b * softplus(d - b * gaps).mean()


class MatchedDPO(_Matched):
    """The loss of `_Matched` for γ-DPO, fitted at every step."""


class MatchedDPOOnce(_Matched):
    """The loss of `_Matched` for γ-DPO, fitted once."""

    once = True


class MatchedSimPO(_Matched):
    """The loss of `_Matched` for γ-SimPO, fitted at every step."""

    averaged = True


class MatchedSimPOOnce(_Matched):
    """The loss of `_Matched` for γ-SimPO, fitted once."""

    once, averaged = True, True


class Method(NamedTuple):
    label: str
    loss: Callable[..., Any]  # a function of (logps, **settings), or a class of the settings
    settings: tuple[str, ...]  # besides beta
    averaged: bool = False  # whether log-probabilities are means over a response's tokens
    relative: bool = True  # to the reference: whether pairs are ranked by h, or by d
    scheduled: bool = False  # whether the loss takes ``steps``, how many the training has

    def make(self, **settings: float) -> Callable[[Logps], Tensor]:
        """Return the loss as a function of the log-probabilities alone, with a fresh memory."""
        if isinstance(self.loss, type):
            return self.loss(**settings)
        return lambda logps: self.loss(logps, **settings)


METHODS = {
    "dpo": Method("DPO", dpo, ()),
    "margin-dpo": Method("DPO, fixed margin", margin_dpo, ("margin",)),
    "cdpo": Method("cDPO", cdpo, ("epsilon",)),
    "rdpo": Method("rDPO", rdpo, ("epsilon",)),
    "ipo": Method("IPO", ipo, ()),
    "beta-dpo": Method("β-DPO", BetaDPO, ("a", "rho")),
    "dr-dpo": Method("Dr. DPO", dr_dpo, ("beta_prime",)),
    "ropo": Method("ROPO's loss", ropo, ("alpha",)),
    "sympo": Method("SymPO", sympo, ()),
    "holder-dpo": Method("Hölder-DPO", holder_dpo, ("exponent",)),
    "re-po": Method("RE-PO", REPO, ("eta0", "momentum")),
    "plc-dpo": Method("PLC-DPO", PLCDPO, ("tau_dir", "gamma_max"), scheduled=True),
    "gamma-dpo": Method("γ-DPO", GammaDPO, ("gamma0", "tau")),
    "gamma-dpo-averaged": Method("γ-DPO, averaged", GammaDPO, ("gamma0", "tau"), averaged=True),
    "gamma-dpo-published": Method("γ-DPO, 20-step loop", PublishedGammaDPO, ("gamma0", "tau")),
    "matched-dpo": Method("matched DPO", MatchedDPO, ("gamma0", "tau")),
    "matched-dpo-once": Method("matched DPO, once", MatchedDPOOnce, ("gamma0", "tau")),
    "simpo": Method("SimPO", simpo, ("margin",), averaged=True, relative=False),
    "alpha-dpo": Method("α-DPO", AlphaDPO, ("alpha", "margin"), averaged=True, relative=False),
    "amapo": Method("AMaPO", amapo, (), averaged=True, relative=False),
    "gamma-simpo": Method("γ-SimPO", GammaSimPO, ("gamma0", "tau"), averaged=True, relative=False),
    "gamma-simpo-published": Method(
        "γ-SimPO, 20-step loop",
        PublishedGammaSimPO,
        ("gamma0", "tau"),
        averaged=True,
        relative=False,
    ),
    "matched-simpo": Method(
        "matched SimPO", MatchedSimPO, ("gamma0", "tau"), averaged=True, relative=False
    ),
    "matched-simpo-once": Method(
        "matched SimPO, once", MatchedSimPOOnce, ("gamma0", "tau"), averaged=True, relative=False
    ),
}

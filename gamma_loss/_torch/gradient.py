"""The gradient of a loss whose slopes were found on the way to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gamma_loss._loss import GammaLossAux, Logps, LossSettings, array_loss
from gamma_loss._spread import WHOLE


def with_slopes(
    loss: Tensor, slopes: Tensor, aux: GammaLossAux, logps: Logps, settings: LossSettings
) -> Tensor:
    """Return the loss as a function of log-probabilities to automatic differentiation.

    ``slopes`` are its derivatives with respect to the chosen ones.
    """
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in logps):
        apply: Any = _WithSlopes.apply
        loss = apply(*logps, (loss, slopes, aux, settings))
    return loss


def scaled(ctx: Any, gradient: Tensor, slopes: Tensor) -> list[Tensor | None]:
    """Return the gradient of the log-probabilities, which are a function's first inputs."""
    chosen = gradient * slopes
    rejected = -chosen
    of_inputs = zip((chosen, rejected, rejected, chosen), ctx.needs_input_grad, strict=False)
    return [each if wanted else None for each, wanted in of_inputs]


class _WithSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *logps, known = arguments
        loss: Tensor
        loss, slopes, ctx.aux, ctx.settings = known
        ctx.save_for_backward(slopes, *logps)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *logps = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the slopes are no constants then
            gradients = _differentiable(ctx, logps, gradient)
        else:
            gradients = scaled(ctx, gradient, slopes)
        return *gradients, None


def _differentiable(ctx: Any, logps: list[Tensor | None], gradient: Tensor) -> list[Tensor | None]:
    """Return the gradient as a function of the log-probabilities, the margins being constants."""
    margins, dtype = ctx.aux.margins, ctx.aux.margins.dtype
    # Views, of which none depends on another, as one log-probability may on the other.
    logps = [None if each is None else each.view_as(each) for each in logps]
    upcast = Logps(*(None if each is None else each.to(dtype) for each in logps))
    solved = margins, ctx.aux.multiplier, ctx.aux.residual
    loss, _ = array_loss(upcast, ctx.aux.mask, ctx.settings, lambda _: solved, WHOLE)
    needed = ctx.needs_input_grad[:4]
    wanted: Any = [each for each, is_needed in zip(logps, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(loss, wanted, gradient, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]

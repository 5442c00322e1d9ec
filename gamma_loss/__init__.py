"""γ-PO: preference losses with exact dynamic target margins, for torch, NumPy and JAX.

An independent implementation of Sun et al., *Robust Preference Optimization via Dynamic Target
Margins*, Findings of ACL 2025, arXiv:2506.03690. Importing it imports no array library; each one is
imported when its arrays arrive, and torch also with a module or `sequence_logps`.
``python -m gamma_loss`` tells what is installed, and tests one solve.

Losses, on any array library:
    gamma_dpo_loss              Loss of γ-DPO and diagnostics, from log-probabilities.
    gamma_simpo_loss            Loss of γ-SimPO and diagnostics, from log-probabilities.
    gamma_preference_loss       The same from reward gaps.
    preference_loss             Logistic loss of each pair, with a given margin.
    GammaLossAux                The diagnostics of a loss.
    metrics                     Scalars for a training log, from the diagnostics.

Modules for torch:
    GammaDPOLoss                gamma_dpo_loss with a queue of recent gaps.
    GammaSimPOLoss              gamma_simpo_loss with a queue of recent gaps.
    GammaPreferenceLoss         gamma_preference_loss with a queue of recent gaps.
    GapQueue                    The queue of recent gaps.
    sequence_logps              Log-probability of each response, from logits.

Margins:
    solve_margins               Margins of a pool of gaps, with a proven error bound.
    MarginSolution              The result of solve_margins.
    solve_margins_streaming     The same for gaps that are read in chunks.
    MarginRule                  The result of solve_margins_streaming.
    queue_init                  An empty queue of gaps, for JAX and functional torch.
    queue_push                  The queue with a batch of gaps added.
    QueueState                  The queue of queue_init.

Settings and their meaning:
    PUBLISHED_SETTINGS          The settings of the four published γ-SimPO runs.
    choose_settings             gamma0 and tau for wanted margins, from gaps.
    match_logistic              The plain logistic loss closest to γ-PO on a pool.
    MatchedLoss                 The result of match_logistic.
    label_smoothing_from_shift  Label smoothing that acts as a margin shift does.
    shift_from_label_smoothing  Margin shift that acts as label smoothing does.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from gamma_loss.losses import (
    GammaLossAux,
    gamma_dpo_loss,
    gamma_preference_loss,
    gamma_simpo_loss,
    preference_loss,
)
from gamma_loss.margins import MarginSolution, solve_margins
from gamma_loss.metrics import metrics
from gamma_loss.presets import PUBLISHED_SETTINGS
from gamma_loss.queue import QueueState, queue_init, queue_push
from gamma_loss.smoothing import label_smoothing_from_shift, shift_from_label_smoothing

if TYPE_CHECKING:
    from gamma_loss.matching import MatchedLoss, choose_settings, match_logistic
    from gamma_loss.streaming import MarginRule, solve_margins_streaming
    from gamma_loss.torch import (
        GammaDPOLoss,
        GammaPreferenceLoss,
        GammaSimPOLoss,
        GapQueue,
        sequence_logps,
    )

__version__ = "0.1.0"

__all__ = [
    "PUBLISHED_SETTINGS",
    "GammaDPOLoss",
    "GammaLossAux",
    "GammaPreferenceLoss",
    "GammaSimPOLoss",
    "GapQueue",
    "MarginRule",
    "MarginSolution",
    "MatchedLoss",
    "QueueState",
    "choose_settings",
    "gamma_dpo_loss",
    "gamma_preference_loss",
    "gamma_simpo_loss",
    "label_smoothing_from_shift",
    "match_logistic",
    "metrics",
    "preference_loss",
    "queue_init",
    "queue_push",
    "sequence_logps",
    "shift_from_label_smoothing",
    "solve_margins",
    "solve_margins_streaming",
]
_TORCH = {"GammaDPOLoss", "GammaPreferenceLoss", "GammaSimPOLoss", "GapQueue", "sequence_logps"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_streaming = name in ("MarginRule", "solve_margins_streaming")
    home = "torch" if name in _TORCH else "streaming" if is_streaming else "matching"
    return getattr(importlib.import_module(f"gamma_loss.{home}"), name)


def __dir__() -> list[str]:
    has_torch = importlib.util.find_spec("torch") is not None  # help() looks up every name
    return sorted({*globals(), *__all__} - (set() if has_torch else _TORCH))

"""γ-PO: preference losses with exact dynamic target margins, for torch, NumPy and JAX.

An independent implementation of Sun et al., *Robust Preference Optimization via Dynamic Target
Margins*, Findings of ACL 2025, arXiv:2506.03690. Importing it imports no array library. Each one is
imported when its arrays arrive, and torch also when a module or `sequence_logps` is asked for.
"""

import importlib
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


def __getattr__(name: str) -> object:
    if name in __all__:
        for home in ("matching", "streaming", "torch"):  # torch last: the others do not import it
            module = importlib.import_module(f"gamma_loss.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What needs torch: the queue and the losses as modules, logits, and pools over many ranks."""

from gamma_loss.torch.logps import sequence_logps
from gamma_loss.torch.modules import GammaDPOLoss, GammaPreferenceLoss, GammaSimPOLoss
from gamma_loss.torch.queue import GapQueue

__all__ = ["GammaDPOLoss", "GammaPreferenceLoss", "GammaSimPOLoss", "GapQueue", "sequence_logps"]

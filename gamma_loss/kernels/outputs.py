"""What the loss kernel fills."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Tensors in the dtype of the loss, and a mask of booleans."""

    loss: Tensor
    rows: Tensor  # (7, pairs), in the order of `gamma_loss._loss.Rows`
    certificate: Tensor  # (2,): ν and the residual
    mask: Tensor  # which pairs count

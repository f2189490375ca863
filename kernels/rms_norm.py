"""Root-mean-square norm, with the residual addition that precedes it in a transformer layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None) -> Tensor:
    """Norm of the rows of `x` [..., size], scaled by `weight` [size]; computed in float32.

    With `update` (the shape of `x`), `x += update` happens first, in place: `x` is the residual stream.
    """
    return rms_norm_reference(x, weight, eps, update)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None) -> Tensor:
    """The same in torch."""
    if update is not None:
        x += update
    return F.rms_norm(x, weight.shape, weight, eps)

"""Folding the scale and shift of a layer norm into the linear layer behind it, which is exact but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def folded(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that takes what ``norm`` gives before its own weight and bias."""
    return linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias

"""Folding the scale and shift of a layer norm into the linear layer behind it, which is exact but for rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormedLinear:
    """What a layer norm and the linear layer behind it compute, with their weights as they are now.

    The scale and shift of the norm are folded into the linear layer. In what a compiler makes of a model they are not:
    that would fold them in every pass, and compiled norms scale and shift at no cost.
    """

    def __init__(self, norm: nn.LayerNorm, linear: nn.Linear) -> None:
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._norm: tuple[Tensor | None, Tensor | None] = None, None
        self._linear: tuple[Tensor, Tensor]
        if torch.compiler.is_compiling():
            self._norm, self._linear = (norm.weight, norm.bias), (linear.weight, linear.bias)
        else:
            self._linear = linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, self._shape, *self._norm, eps=self._eps), *self._linear)


class LocalAndShared:
    """A linear layer of which a part sees what all tokens of an image share, and is computed once an image.

    Args:
        local: (C', C), the weight of what each token has of its own.
        shared: (C', D) and (C',), weight and bias of what is the same for all.
    """

    def __init__(self, local: Tensor, shared: tuple[Tensor, Tensor]) -> None:
        self._compiled = torch.compiler.is_compiling()
        self._local = local if self._compiled else local.t().contiguous().unsqueeze(0)
        self._shared = shared if self._compiled else (shared[0].contiguous(), shared[1].clone())

    def __call__(self, own: Tensor, mean: Tensor) -> Tensor:
        """(B, n, C') of (B, n, C) and (B, 1, D)."""
        shared = F.linear(mean, *self._shared)  # (B, 1, C')
        if self._compiled:
            return F.linear(own, self._local) + shared
        batch = own.shape[0]
        return torch.baddbmm(shared, own, self._local if batch == 1 else self._local.expand(batch, -1, -1))

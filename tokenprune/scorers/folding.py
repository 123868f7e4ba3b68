"""What rankings are made of: layers with weights folded into one another, exact but for rounding.

Shapes: B images, K tokens of each, R rows = B·K, or B, K in what a compiler makes, C, C' and D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.scorers.rows import Rows
from tokenprune.tokens import becomes_code

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Layer(NamedTuple):
    """A linear layer, and the activation behind it.

    Attributes:
        weight: (C, C'), transposed.
        bias: (1, C').
        activation: ``"gelu"`` or ``"relu"``.
    """

    weight: Tensor
    bias: Tensor
    activation: str

    @classmethod
    def of(cls, linear: nn.Linear, activation: str) -> Layer:
        """That of a module, with its weights as they are now."""
        return cls(_transposed(linear.weight), linear.bias.clone().unsqueeze(0), activation)

    def __call__(self, rows: Tensor) -> Tensor:
        """(R, C') of (R, C)."""
        return _activated(self.bias, rows, self.weight, self.activation)


class NormedLayer:
    """A layer norm, the linear layer behind it, and the activation behind that, with their weights as they are now.

    The scale and shift of the norm are folded into the linear layer. In what a compiler makes of a model they are not:
    that would fold them in every pass, and compiled norms scale and shift at no cost.
    """

    def __init__(self, norm: nn.LayerNorm, linear: nn.Linear, activation: str) -> None:
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._norm: tuple[Tensor | None, Tensor | None] = None, None
        if torch.compiler.is_compiling():
            self._norm, self._layer = (norm.weight, norm.bias), Layer.of(linear, activation)
        else:
            bias = linear.bias + linear.weight @ norm.bias
            self._layer = Layer(_transposed(linear.weight * norm.weight), bias.unsqueeze(0), activation)

    def __call__(self, rows: Tensor) -> Tensor:
        """(R, C') of (R, C)."""
        return self._layer(F.layer_norm(rows, self._shape, *self._norm, eps=self._eps))


class LocalAndShared:
    """A layer of which a part sees the mean over an image's patch tokens, and is computed once an image.

    Args:
        local: (C', C), the weight of what each token has of its own.
        shared: (C', D), the weight of the mean.
        bias: (C',).
        activation: ``"gelu"`` or ``"relu"``.
    """

    def __init__(self, local: Tensor, shared: Tensor, bias: Tensor, activation: str) -> None:
        self._local, self._shared = _transposed(local), _transposed(shared)
        self._bias, self._activation = bias.clone().unsqueeze(0), activation

    def __call__(self, own: Tensor, rows: Rows, averaged: Tensor) -> Tensor:
        """(R, C') of what tokens have of their own (R, C), and of what is averaged over an image's (R, D)."""
        shared = _affine(self._bias, rows.mean(averaged), self._shared)  # (1, C') or (B, 1, C')
        if rows.of_one:
            return _activated(shared, own, self._local, self._activation)
        if own.dim() == 3:  # ONNX would copy an expanded weight
            return _ACTIVATIONS[self._activation](own @ self._local + shared)
        hidden = torch.baddbmm(shared, rows.by_image(own), self._local.expand(rows.num_images, -1, -1))
        return _ACTIVATIONS[self._activation](hidden).flatten(0, 1)


def _transposed(weight: Tensor) -> Tensor:
    """A weight (C', C) as (C, C')."""
    return weight.t() if torch.compiler.is_compiling() else weight.t().contiguous()


def _activated(bias: Tensor, rows: Tensor, weight: Tensor, activation: str) -> Tensor:
    """The activation of bias + rows · weight, (R, C'): one operator where PyTorch has an exact one."""
    # It has no gradient, autocast does not know it, and on a GPU its GELU is an approximation.
    unknown = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or rows.device.type != "cpu"
    if becomes_code() or unknown or rows.dim() == 3:
        return _ACTIVATIONS[activation](_affine(bias, rows, weight))
    return torch._addmm_activation(bias, rows, weight, use_gelu=activation == "gelu")


def _affine(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Rows · weight + bias, (R, C')."""
    return torch.addmm(bias, rows, weight) if rows.dim() == 2 else F.linear(rows, weight.t(), bias.squeeze(0))

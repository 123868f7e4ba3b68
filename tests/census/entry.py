"""An entry of the census: a small model of a library, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STAGES, KEEP_RATIO, NUM_IMAGES = (1, 2), (0.6, 0.36), 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model that a library can build, at a small size.

    Attributes:
        library: The library.
        family: What the library files the model under, such as "vision_transformer" or "dinov2".
        name: What the library calls it: the name of an entry point or of a class.
        build: Makes the model, with random weights and in training mode.
        inputs: Given how many images and a generator, the keyword arguments of a forward pass on different images.
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.library} {self.name}"

    def model(self, *, double: bool = False) -> nn.Module:
        """The model in eval mode, every parameter drawn anew, so that no zero hides anything."""
        generator = torch.Generator().manual_seed(7)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.double() if double else model

    def example(self, *, double: bool = False) -> dict[str, Any]:
        """The same inputs every time."""
        inputs = self.inputs(NUM_IMAGES, torch.Generator().manual_seed(8))
        return _doubled(inputs) if double else inputs


def _doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _doubled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_doubled(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

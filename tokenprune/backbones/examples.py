"""Examples: the models of a library on which its adapter is proved, and what they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Example:
    """A model of a library, at a small size, on which `tokenprune.prove` proves what must hold.

    Sizes should differ from one another: with as many classes or heads as tokens, one could be taken for the other.

    Attributes:
        name: What the library calls the model: the name of an entry point or of a class. Several examples of one name
            are one entry in the table of proved models.
        family: What the library files the model under, such as ``"vision_transformer"`` or ``"dinov2"``.
        build: Makes the model, with any weights: `model` draws every parameter anew. Buffers stay as they are.
        inputs: Given how many images and a generator of random numbers, the keyword arguments of a forward pass on
            that many different images.
        stages: Indices of the blocks in front of which tokens are pruned; ``None`` as `tokenprune.sparsify` takes it.
        keep_ratio: As `tokenprune.sparsify` takes it.
        pruned: The name of a reduction, as `tokenprune.sparsify` takes it.
        compiled: Whether ``"compile"`` and ``"export"`` are to be proved as well, which takes seconds: what
            `torch.compile` and `torch.export` do with the dense model, they must do with the pruned one.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Mapping[str, Any]]
    stages: Sequence[int] | None = (1, 2)
    keep_ratio: float | Sequence[float] = (0.6, 0.36)
    pruned: str = "drop"
    compiled: bool = False

    def model(self, *, double: bool = False) -> nn.Module:
        """The model in eval mode, every parameter drawn anew, so that no zero hides anything; the same every time.

        Args:
            double: Whether in double precision.
        """
        generator = torch.Generator().manual_seed(7)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.double() if double else model

    def arguments(self, *, double: bool = False) -> dict[str, Any]:
        """The keyword arguments of a forward pass on three images, the same every time.

        Args:
            double: Whether in double precision.
        """
        inputs = dict(self.inputs(3, torch.Generator().manual_seed(8)))
        return {name: _doubled(value) for name, value in inputs.items()} if double else inputs


def _doubled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _doubled(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_doubled(item) for item in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

"""Running a model to learn about it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokenprune.sparsifier import Sparsifier


def example_images(model: nn.Module, input_size: Sequence[int], batch_size: int = 1) -> Tensor:
    """Random images (batch, *input_size) of the model's dtype on its device."""
    parameter = next(model.parameters())
    return torch.rand(batch_size, *input_size, device=parameter.device, dtype=parameter.dtype)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and afterwards each back in its own."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def gathering(sparsifier: Sparsifier) -> Iterator[None]:
    """Have pruned tokens removed, whatever the execution is set to."""
    before, sparsifier.execution = sparsifier.execution, "gather"
    try:
        yield
    finally:
        sparsifier.execution = before

"""Running a model to learn about it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError


def random_inputs(model: nn.Module, **shapes: Sequence[int]) -> dict[str, Tensor]:
    """Random numbers of the given shapes, the same every time, of the model's dtype on its device.

    Raises:
        UnsupportedModelError: The model is on the meta device, where nothing can be run.
    """
    parameter = next(model.parameters())
    if parameter.device.type == "meta":
        raise UnsupportedModelError(
            f"this {type(model).__name__} is on the meta device and cannot be run; give it weights first."
        )
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(*shape, generator=generator).to(parameter.device, parameter.dtype)
        for name, shape in shapes.items()
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and afterwards restore the mode of each."""
    with kept_modes(model):
        model.eval()
        yield


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards restore the mode that each module is in now."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode

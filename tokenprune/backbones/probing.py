"""Running a model to learn about it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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


def call(model: nn.Module, inputs: Any) -> Any:
    """What a model returns of a tensor, a tuple of positional arguments or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Every floating-point tensor in what a model returned, by where it stands."""
    return dict(_tensors(output, "output"))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]")

"""Gradients of models in a fixed draw, and how they are compared."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.zoo import Case


def loss_of(case: Case, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return sum(output.float().square().mean() for output in case.run(model, images).values())  # type: ignore[return-value]


def gradients(case: Case, model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss_of(case, model, images).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1e-6)
        assert ((actual[name] - expected[name]).abs().max() / scale).item() <= tolerance, name


def enable_checkpointing(model: nn.Module, **options: bool) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False, **options})

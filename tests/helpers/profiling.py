"""What PyTorch's profiler sees of a pass."""

from __future__ import annotations

from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.helpers.zoo import Case


def operators(case: Case, model: nn.Module) -> int:
    """How many operators a pass of one image calls, those inside of others aside."""
    model(case.images(1))  # what is kept for passes to come is made once
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(case.images(1))
    return sum(event.cpu_parent is None for event in found.events())

"""Parameter groups and the learning rate of each at every step."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate at every step: linear warm-up, then cosine decay.

    Attributes:
        steps: Optimisation steps.
        warmup_steps: Steps of warm-up among them, from ``min_learning_rate`` up.
        min_learning_rate: Where the cosine ends; a group whose peak is lower keeps that.
        frozen_steps: Steps during which groups marked ``"waits"`` have learning rate 0.
    """

    steps: int
    warmup_steps: int
    min_learning_rate: float
    frozen_steps: int = 0

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rate of every group for a step, counted from 0; ``"full_lr"`` is a group's peak."""
        for group in optimizer.param_groups:
            waits = group["waits"] and step < self.frozen_steps
            group["lr"] = 0.0 if waits else self.rate(group["full_lr"], step)

    def rate(self, full: float, step: int) -> float:
        """The learning rate at a step, for a group whose peak is ``full``."""
        low = min(self.min_learning_rate, full)
        if step < self.warmup_steps:
            return low + (full - low) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return low + (full - low) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    slow: Collection[nn.Parameter] = (),
    slow_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for AdamW: no weight decay on biases, norms and what ``model.no_weight_decay()`` names.

    Args:
        model: Its parameters are grouped, except those that require no gradient.
        learning_rate: Peak learning rate of all but the slow parameters.
        weight_decay: Of the others.
        slow: Parameters with a learning rate of their own, which the schedule may freeze at first.
        slow_factor: Their learning rate, as a fraction of ``learning_rate``.
    """
    exempt: Any = getattr(model, "no_weight_decay", set)
    slow = set(slow)
    groups = []
    for group in param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=exempt()):
        for is_slow in (False, True):
            parameters = [parameter for parameter in group["params"] if (parameter in slow) == is_slow]
            if parameters:
                rate = learning_rate * slow_factor if is_slow else learning_rate
                groups.append({**group, "params": parameters, "lr": rate, "full_lr": rate, "waits": is_slow})
    return groups

"""Two learning rates of one optimiser: the predictors', and the backbone's, which may be held for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def split_groups(optimizer: torch.optim.Optimizer, backbone: set[int], scale: float) -> None:
    """Split every parameter group into ``"predictors"`` and ``"backbone"``.

    Args:
        optimizer: Whose groups are replaced.
        backbone: The ids of the parameters of the backbone.
        scale: Its learning rate as a fraction of the others'.
    """
    every = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # Predictors come first: the Trainer logs the learning rate of the first group.
    optimizer.param_groups[:] = [
        *_part(optimizer, "predictors", every - backbone, 1.0),
        *_part(optimizer, "backbone", backbone, scale),
    ]


def _part(optimizer: torch.optim.Optimizer, name: str, members: set[int], scale: float) -> Iterator[dict[str, Any]]:
    """Of every parameter group the parameters with these ids, at a fraction of its learning rate."""
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if id(parameter) in members]
        if parameters:
            yield {**group, "params": parameters, "lr": group["lr"] * scale, "name": name}


def leave_out_backbone(optimizer: torch.optim.Optimizer, held: Callable[[], bool]) -> None:
    """Have steps of the optimiser pass over the backbone's groups where ``held()``, as if they had no gradients.

    No weight decay, no moments, and no step counted.
    """
    every: list[list[dict[str, Any]]] = []

    def before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        every.append(optimizer.param_groups)
        if held():
            optimizer.param_groups = [group for group in optimizer.param_groups if group.get("name") != "backbone"]

    def after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        optimizer.param_groups = every.pop()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


@contextmanager
def zero_gradients(parameters: Iterable[nn.Parameter], held: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, gradients of these parameters are 0 where ``held()``.

    For DeepSpeed, which takes gradients away in the backward pass, before anybody could drop them.
    """

    def hook(grad: Tensor) -> Tensor | None:
        return torch.zeros_like(grad) if held() else None

    handles = [parameter.register_hook(hook) for parameter in parameters if parameter.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def complete_states(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that have not learned yet the state that they have in front of their first step.

    Files that hold a state in parts are read into that of every parameter.
    """
    every = optimizer.param_groups
    fresh = {parameter for group in every for parameter in group["params"] if not optimizer.state.get(parameter)}
    if not fresh:
        return
    # A step of length 0 makes the state.
    optimizer.param_groups = [
        {**group, "lr": 0.0, "weight_decay": 0.0, "params": [one for one in group["params"] if one in fresh]}
        for group in every
    ]
    before = {parameter: parameter.grad for parameter in fresh}
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.param_groups = every
    for parameter, grad in before.items():
        parameter.grad = grad
        state = optimizer.state[parameter]
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0

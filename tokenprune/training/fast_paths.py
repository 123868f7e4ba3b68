"""Fitting fast paths to the parts that they stand in for, on images without labels.

Shapes: B images, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.api import dense, sparsifier_of
from tokenprune.backbones.probing import eval_mode
from tokenprune.backbones.token_wise import as_sequence, first_tensor
from tokenprune.errors import StateError
from tokenprune.pruning.reductions import FastPath
from tokenprune.pruning.stage import Stage
from tokenprune.tokens import output_tokens


def fit_fast_paths(model: nn.Module, images: Tensor | Iterable[Any], *, ridge: float = 1e-3) -> tuple[float, ...]:
    """Set each fast path to the best linear stand-in for its part of a block, by least squares.

    The model runs unpruned, and the linear layer of a path is fitted to what the part gives for the tokens that it
    gets, behind the path's norm. That takes one pass over the images and one system of C equations a path. Nothing else
    is changed.

    Args:
        model: A model that was sparsified with ``pruned="fast"`` or another reduction with fast paths.
        images: Images (B, channels, height, width), or batches: each a tensor, a tuple of positional or a mapping of
            keyword arguments of a forward pass. A few hundred images will do.
        ridge: What is added to the diagonal of the system, relative to its mean; not negative.

    Returns:
        For each path, in the order of the blocks, the share of the variance of its part's output that it explains, at
        most 1; 0 would be no better than a constant.

    Raises:
        StateError: The model is not sparsified, or has no fast paths.
        ValueError: There are no images, or ``ridge`` is negative.
    """
    sparsifier = sparsifier_of(model)
    stages = [cast(Stage, stage) for stage in sparsifier.stages]
    paths = [module for stage in stages for module in stage.reduction.modules() if isinstance(module, FastPath)]
    if not paths:
        raise StateError("this model has no fast paths to fit; sparsify it with pruned='fast'.")
    if ridge < 0:
        raise ValueError(f"ridge={ridge} is negative.")
    systems = [_System(path) for path in paths]
    with eval_mode(model), dense(model), torch.no_grad(), ExitStack() as hooks:
        for system in systems:
            part = system.path.part
            hooks.callback(part.first.register_forward_pre_hook(system.enter, with_kwargs=True).remove)
            hooks.callback(part.last.register_forward_hook(system.leave).remove)
        for batch in [images] if isinstance(images, Tensor) else images:
            _run(model, batch)
    if not systems[0].count:
        raise ValueError("images: there are none to fit the fast paths on.")
    return tuple(map(partial(_System.solve, ridge=ridge), systems))


class _System:
    """The normal equations of a path: sums over tokens of products of its inputs, and of these with the outputs."""

    def __init__(self, path: FastPath) -> None:
        self.path, width = path, path.linear.in_features
        self.inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.products = torch.zeros(width + 1, width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.count = 0
        self._given: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = first_tensor(args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given, self._given = self._given, None
        if given is None:
            return
        channels_first = self.path.part.channels_first
        before = self.path.norm(as_sequence(given, channels_first=channels_first)).flatten(0, 1).float()
        after = as_sequence(output_tokens(output), channels_first=channels_first).flatten(0, 1).float()
        before = torch.cat([before, torch.ones_like(before[:, :1])], dim=1)  # (B·L, C + 1)
        self.inputs += (before.T @ before).double().cpu()
        self.products += (before.T @ after).double().cpu()
        self.squares += after.square().sum(dim=0).double().cpu()
        self.count += len(before)

    def solve(self, *, ridge: float) -> float:
        """Set the path's linear layer; the share of variance that it explains."""
        inputs, products, width = self.inputs / self.count, self.products / self.count, len(self.squares)
        damped = inputs.clone()
        damped.diagonal()[:width] += ridge * inputs.diagonal()[:width].mean() + torch.finfo(torch.float32).tiny
        weights = torch.linalg.solve(damped, products)  # (C + 1, C)
        with torch.no_grad():
            self.path.linear.weight.copy_(weights[:width].T)
            self.path.linear.bias.copy_(weights[width])
        error = (
            self.squares / self.count - 2 * (weights * products).sum(0) + (weights * (inputs @ weights)).sum(0)
        ).sum()
        variance = (self.squares / self.count - products[width].square()).sum()
        return float(1 - error / variance.clamp(min=torch.finfo(torch.float32).tiny))


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*batch) if isinstance(batch, (tuple, list)) else model(batch)

"""Sequences of tokens: where patches stand in them, and taking tokens out and putting them back.

Shapes: B images, P prefix tokens, N patch tokens, n of them left, Q suffix tokens, L = P + N + Q,
K = P + n + Q, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.errors import StateError


def sizes(tensor: Tensor) -> Sequence[int]:
    """The shape in plain numbers, also while TorchScript traces a model, where sizes are tensors."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return [int(size) for size in tensor.shape] if tracing else tensor.shape


class Layout(NamedTuple):
    """How many tokens of which kind a sequence has, in their order."""

    num_prefix: int
    num_patches: int
    num_suffix: int

    @property
    def length(self) -> int:
        """L."""
        return sum(self)

    def patches(self, tokens: Tensor) -> Tensor:
        """The patch tokens (B, N, C) of a sequence (B, L, C)."""
        return tokens[:, self.num_prefix : self.num_prefix + self.num_patches]

    def positions(self, indices: Tensor) -> Tensor:
        """Patch indices (B, n) as positions in the sequence, with those of all other tokens: (B, K)."""
        everything = torch.arange(self.length, device=indices.device).expand(indices.shape[0], -1)
        parts = [everything[:, : self.num_prefix], indices + self.num_prefix]
        if self.num_suffix:
            parts.append(everything[:, -self.num_suffix :])
        return torch.cat(parts, dim=1)

    def with_others(self, keep: Tensor) -> Tensor:
        """Decisions on patches (B, N) as decisions on all tokens (B, L): the others are kept."""
        parts = [keep.new_ones(keep.shape[0], self.num_prefix), keep]
        if self.num_suffix:
            parts.append(keep.new_ones(keep.shape[0], self.num_suffix))
        return torch.cat(parts, dim=1)


def select(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens (B, K, C) at each image's own positions (B, K), of tokens (B, L, C)."""
    # Whole rows of one long sequence are copied several times as fast as torch.gather picks numbers.
    rows = _rows(tokens, positions)
    return tokens.flatten(0, 1).index_select(0, rows).view(*positions.shape, -1)


def put_back(tokens: Tensor, positions: Tensor, waiting: Tensor) -> Tensor:
    """The tokens ``waiting`` (B, L, C), with ``tokens`` (B, K, C) in place of those at ``positions`` (B, K)."""
    rows = _rows(waiting, positions)
    return waiting.flatten(0, 1).index_copy(0, rows, tokens.flatten(0, 1)).view_as(waiting)


def _rows(tokens: Tensor, positions: Tensor) -> Tensor:
    batch, length, _ = tokens.shape
    return (positions + length * torch.arange(batch, device=positions.device).unsqueeze(1)).flatten()


def kept_indices(keep: Tensor, num_keep: int) -> Tensor:
    """The indices (B, n), ascending, of the n kept ones of every image in (B, N) decisions."""
    return keep.argsort(dim=1, descending=True, stable=True)[:, :num_keep]


def find_tokens(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, as_grid: bool = False) -> Tensor:
    """The tokens (B, L, C) among the arguments of a block: the first one, or the first tensor by name.

    Raises:
        StateError: There are none of that shape; ``as_grid`` asks for (B, rows, columns, C) instead.
    """
    tokens = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    if not isinstance(tokens, Tensor) or tokens.dim() != (4 if as_grid else 3):
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        wanted = "(B, rows, columns, C)" if as_grid else "(B, L, C)"
        raise StateError(f"{type(block).__name__} got {got} where tokens of shape {wanted} were expected.")
    return tokens


def replace_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, *, as_grid: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other tokens (B, K, C); as a grid of one row where the block takes grids."""
    tokens = tokens.unsqueeze(1) if as_grid else tokens
    if args:
        return (tokens, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: tokens}


def output_tokens(output: Any) -> Tensor:
    """The tokens in what a block returned: all of it, or the first item of a tuple."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens

"""Blocks that take grids of tokens, seen from outside as sequences.

Shapes: B images, H rows and W columns of tokens, L = H·W, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.adaptations import Adaptation, RunningModel
from tokenprune.backbones.token_wise import as_sequence, first_tensor, in_shape
from tokenprune.errors import StateError
from tokenprune.tokens import replace_tokens, sizes


class TokenGrid(Adaptation):
    """Blocks take and return (B, H, W, C) or (B, C, H, W), and get all tokens.

    In front of a block tokens are a sequence (B, L, C), for whoever looks at them there; both ways round are views.

    Args:
        channels_first: Whether blocks take (B, C, H, W).
    """

    summary_obstacle = "tokens stand in a grid"

    def __init__(self, *, channels_first: bool) -> None:
        self.channels_first = channels_first
        self._shape: Sequence[int] = ()

    def install_outside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for block in blocks:
            yield block.register_forward_pre_hook(self._flatten, with_kwargs=True)

    def install_inside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for block in blocks:
            yield block.register_forward_pre_hook(self._unflatten, with_kwargs=True)

    def _flatten(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = first_tensor(args, kwargs)
        if tokens is None or tokens.dim() != 4:
            got = "no tensor" if tokens is None else f"shape {tuple(tokens.shape)}"
            raise StateError(
                f"{type(block).__name__} got {got} where a grid of tokens of four dimensions was expected."
            )
        self._shape = tuple(sizes(tokens))
        return replace_tokens(args, kwargs, as_sequence(tokens, channels_first=self.channels_first))

    def _unflatten(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = first_tensor(args, kwargs)
        assert tokens is not None
        grid = in_shape(tokens, self._shape, channels_first=self.channels_first)
        return replace_tokens(args, kwargs, grid)

"""Adaptations of single families of timm.

Shapes: B images, N patch tokens, L tokens of a sequence, H heads, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.adaptations import Adaptation, RunningModel
from tokenprune.tokens import Layout, output_tokens, replace_output_tokens


class TailClassToken(Adaptation):
    """A class token comes in behind the blocks, and attends over all tokens there (CaiT, VOLO)."""

    def tail_layouts(self, layout: Layout) -> tuple[Layout, ...]:
        return (layout.replace(num_prefix=layout.num_prefix + 1),)


class TalkingHeads(Adaptation):
    """Modules that mix finished attention weights (B, L, L, H) over the heads (CaiT, arXiv 2103.17239).

    A bias of theirs would let pruned tokens in again, so that these are masked once more.
    """

    mixes_weights = True
    packing_obstacle = "attention mixes finished weights over the heads"

    def __init__(self, mixers: Sequence[nn.Module]) -> None:
        self.mixers = tuple(mixers)

    def modules(self) -> Iterable[nn.Module]:
        return self.mixers

    def install_inside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for mixer in self.mixers:
            yield mixer.register_forward_hook(partial(self._after_mixer, running))

    def _after_mixer(
        self, running: RunningModel, mixer: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        return running.mask_weights(output)


class LateClassToken(Adaptation):
    """A class token joins in front of a block that is not the first (ConViT, arXiv 2103.10697).

    Args:
        block: The index of that block.
    """

    def __init__(self, block: int) -> None:
        self.block = block

    def num_late_prefix(self, block: int) -> int:
        return int(block >= self.block)


class GridTokens(Adaptation):
    """Blocks take and return (B, rows, columns, C), and treat rows and columns alike (VOLO, arXiv 2106.13112).

    Outside, tokens are a sequence (B, L, C); of those that are left a block gets a grid of one row.
    """

    summary_obstacle = "tokens stand in a grid"

    def __init__(self) -> None:
        self._grid = (1, 1)

    def install_outside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for block in blocks:
            yield block.register_forward_pre_hook(self._flatten_arguments)
            yield block.register_forward_hook(self._unflatten_output, prepend=True)

    def install_inside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for block in blocks:
            yield block.register_forward_pre_hook(self._unflatten_arguments)
            yield block.register_forward_hook(self._flatten_output, prepend=True)

    def _flatten_arguments(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._grid = (args[0].shape[1], args[0].shape[2])
        return args[0].flatten(1, 2), *args[1:]

    def _unflatten_arguments(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._as_grid(args[0]), *args[1:]

    def _flatten_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace_output_tokens(output, output_tokens(output).flatten(1, 2))

    def _unflatten_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace_output_tokens(output, self._as_grid(output_tokens(output)))

    def _as_grid(self, tokens: Tensor) -> Tensor:
        rows, columns = self._grid if tokens.shape[1] == self._grid[0] * self._grid[1] else (1, tokens.shape[1])
        return tokens.view(tokens.shape[0], rows, columns, -1)

"""Adaptations of single families of transformers.

Shapes: B images, n patch tokens that are left, L tokens before any pruning, K tokens of the sequence as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.adaptations import Adaptation, Removed, RunningModel, Scope
from tokenprune.backbones.interception import AttentionCall, Interception
from tokenprune.tokens import Layout


class PositionInput(Adaptation):
    """Blocks number their tokens from 0, unless a parameter gives the positions (V-JEPA 2, arXiv 2506.09985).

    Args:
        name: That parameter; it takes (B, n).
    """

    summary_obstacle = "its blocks number the tokens"

    def __init__(self, name: str) -> None:
        self.name = name

    def install_inside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for index, block in enumerate(blocks):
            place = tuple(inspect.signature(block.forward).parameters).index(self.name)
            yield block.register_forward_pre_hook(partial(self._before_block, running, index, place), with_kwargs=True)

    def _before_block(
        self, running: RunningModel, index: int, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        indices = running.kept_indices(index)
        if indices is None:
            return None
        if place < len(args):
            return (*args[:place], indices, *args[place + 1 :]), kwargs
        return args, {**kwargs, self.name: indices}


class FullLength(Adaptation):
    """Modules that make a bias for a number of tokens that they are given (BEiT, arXiv 2106.08254).

    They are always given the unpruned length; the bias is then gathered for the tokens that are left.

    Args:
        makers: The modules.
        keyword: The keyword argument that gives it.
    """

    summary_obstacle = "attention adds a bias for each pair of tokens"

    def __init__(self, makers: Sequence[nn.Module], keyword: str) -> None:
        self.makers, self.keyword = tuple(makers), keyword

    def modules(self) -> Iterable[nn.Module]:
        return self.makers

    def install_inside(self, blocks: Sequence[nn.Module], running: RunningModel) -> Iterator[RemovableHandle]:
        for maker in self.makers:
            hook = partial(self._override_sequence_length, running)
            yield maker.register_forward_pre_hook(hook, with_kwargs=True)

    def _override_sequence_length(
        self, running: RunningModel, maker: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        length = running.full_length()
        if length is None or kwargs.get(self.keyword) is None:
            return None
        return args, {**kwargs, self.keyword: length}


class FrameMessage(Adaptation):
    """A message of the whole video stands behind each frame's tokens while a block attends (X-CLIP, 2208.02816)."""

    packing_obstacle = "blocks mix the frames of a video"

    def attention_layouts(self, layout: Layout) -> tuple[Layout, ...]:
        return (layout.replace(num_suffix=layout.num_suffix + 1),)


class SharedTables(Adaptation):
    """Attention puts a dimension for the images in front of its rotary tables by itself, one for all images.

    A table that has been gathered has an entry for each image already, and gets none.
    """

    summary_obstacle = "attention rotates by tables with an entry for each token"

    def __init__(self) -> None:
        self._scope = _WithoutNewDimension()

    def around_attention(self, attention: nn.Module, removed: Removed) -> Scope | None:
        self._scope.tables = removed.gathered
        return self._scope


class _WithoutNewDimension(Interception):
    """While attention runs: certain tables (B, K, …) keep their first dimension where another one is put before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: tuple[Tensor, ...] = ()

    def leave(self) -> None:
        super().leave()
        self.tables = ()

    def attention(self, call: AttentionCall) -> Tensor:
        return call.run()

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _ADDING_DIMENSIONS and any(table is args[0] for table in self.tables):
            table, *rest = args
            if func is Tensor.unsqueeze:
                return table if rest == [0] else func(*args)
            shape = [*rest[0]] if isinstance(rest[0], (tuple, list)) else rest
            return func(table, [table.shape[0], *shape[1:]] if shape[0] == 1 else shape)
        return func(*args, **kwargs)


_ADDING_DIMENSIONS = (Tensor.unsqueeze, Tensor.view, Tensor.reshape)

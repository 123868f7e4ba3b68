"""Pruned tokens stay where they are, and take a fast path around the token-wise parts of blocks.

Shapes: B images, L tokens of a block, K of them on the path of kept ones, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.token_wise import TokenWise, as_sequence, first_tensor, in_shape
from tokenprune.pruning.executions.paths import Paths
from tokenprune.pruning.reductions.base import (
    Reduced,
    Reduction,
    ReductionContext,
    Split,
    WholeModel,
    register_reduction,
)
from tokenprune.tokens import replace_tokens, sizes


class FastPath(nn.Module):
    """What a pruned token gets in the place of a token-wise part of a block: a LayerNorm and one linear layer.

    Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks (arXiv
    2207.01580): out = x + m·MLP(LN x) + (1 − m)·Fast(x).

    Deviation: it starts at 0, so that a pruned token skips the part; see `tokenprune.fit_fast_paths` for a start that
    does less harm. The authors draw its weights at random, or scale them with 1e-6.

    Args:
        block: The number of the block.
        part: The part of it that kept tokens go through.
    """

    def __init__(self, block: int, part: TokenWise) -> None:
        super().__init__()
        self.block, self.part = block, part
        self.norm = nn.LayerNorm(part.embed_dim)
        self.linear = nn.Linear(part.embed_dim, part.embed_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self._given: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    def forward(self, tokens: Tensor) -> Tensor:
        """What (B, L, C) becomes; (B, L, C)."""
        result: Tensor = self.linear(self.norm(tokens))
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None}

    def install(self, model: WholeModel) -> Iterator[RemovableHandle]:
        """Put the hooks around the part that split its tokens and join them again."""
        part = self.part
        yield part.first.register_forward_pre_hook(partial(self._enter, model), with_kwargs=True)
        if part.mixing is not None:
            yield part.mixing[0].register_forward_hook(partial(self._fill, model))
            yield part.mixing[1].register_forward_pre_hook(partial(self._take, model))
        yield part.last.register_forward_hook(partial(self._leave, model))

    def _enter(
        self, model: WholeModel, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        paths, tokens = model.paths(self.block), first_tensor(args, kwargs)
        if paths is None or tokens is None:
            return None
        # Tokens of a convolution stand column by column; they are laid out once, and not anew for each path.
        self._given, self._shape = self._sequence(tokens).contiguous(), tuple(sizes(tokens))
        return replace_tokens(args, kwargs, self._in_shape(paths.kept(self._given)))

    def _fill(self, model: WholeModel, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        paths = self._paths(model)
        return None if paths is None else self._in_shape(paths.fill(self._sequence(output)))

    def _take(self, model: WholeModel, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        paths = self._paths(model)
        return None if paths is None else (self._in_shape(paths.kept(self._sequence(args[0]))), *args[1:])

    def _leave(self, model: WholeModel, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        paths, given = self._paths(model), self._given
        self._given = None
        if paths is None or given is None:
            return None
        others: Tensor = self(paths.others(given))
        return self._in_shape(paths.join(self._sequence(output), others.to(output.dtype)))

    def _paths(self, model: WholeModel) -> Paths | None:
        """The two paths, while the part runs split."""
        return None if self._given is None else model.paths(self.block)

    def _sequence(self, tokens: Tensor) -> Tensor:
        return as_sequence(tokens, channels_first=self.part.channels_first)

    def _in_shape(self, sequence: Tensor) -> Tensor:
        return in_shape(sequence, self._shape, channels_first=self.part.channels_first)


class Fast(Reduction):
    """Kept tokens go through a block's MLP, the others through a fast path; every token stays in the sequence.

    Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks (arXiv
    2207.01580). What mixes tokens, such as window attention and convolutions, sees all of them, so that windows,
    feature maps and dense heads are as they were. Every stage scores all tokens anew.

    Args:
        context: Of the stage, with the token-wise parts of the blocks behind it.
    """

    restores = True
    whole = True
    anew = True
    looks_at_pruned = False

    def __init__(self, context: ReductionContext) -> None:
        super().__init__()
        self.paths = nn.ModuleList(FastPath(block, part) for block, part in context.parts())

    def forward(self, split: Split) -> Reduced:
        return Reduced(split.patches)

    def install(self, model: WholeModel) -> Iterator[RemovableHandle]:
        for path in self.paths:
            assert isinstance(path, FastPath)
            yield from path.install(model)


class NestedFast(Fast):
    """`Fast`, with stages that score the kept tokens of the one before, so that a pruned token never comes back."""

    anew = False


@register_reduction("fast")
def build(context: ReductionContext) -> Fast:
    """A `Fast` with a path for each part."""
    return Fast(context)


@register_reduction("fast_nested")
def build_nested(context: ReductionContext) -> NestedFast:
    """A `NestedFast` with a path for each part."""
    return NestedFast(context)

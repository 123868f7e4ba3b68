"""The description of a backbone: all that the library needs to know of somebody else's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An attribute of the model's own that must have a certain value while the model is sparsified.

    Attributes:
        owner: The object that carries the attribute, such as an attention module or a config.
        name: The attribute, such as a switch between fused and written-out attention.
        value: The value it takes; `unsparsify` puts the old one back.
    """

    owner: Any
    name: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a Vision Transformer looks like, without a word on how it is pruned.

    Every block takes tokens of shape (B, L, C) as its first argument, prefix tokens first, then
    the patch tokens in row-major order, and returns tokens of the same shape (alone, or as the
    first item of a tuple).

    Attributes:
        blocks: The transformer blocks in the order they run.
        num_prefix_tokens: Class, distillation and register tokens in front of the patch tokens;
            they are never scored and never pruned.
        embed_dim: The tokens' width C.
        patch_size: Height and width of a patch in pixels, to tell the grid of an image from its
            size; ``None`` where there is none.
        grid_size: Rows and columns of patches at the model's nominal image size, ``None`` where
            unknown.
        final_norm: The module whose output the model calls its final tokens; ``None`` means the
            output of the last block.
        attentions: For each block the modules in which its attention happens; ``None`` finds them:
            the outermost modules whose class is named after attention, otherwise the block.
        settings: What must be set on the model while it is sparsified.
        grid_methods: Names of methods of the model that reshape tokens into a grid; while tokens
            are being pruned they refuse to run.
    """

    blocks: Sequence[nn.Module]
    num_prefix_tokens: int
    embed_dim: int
    patch_size: tuple[int, int] | None = None
    grid_size: tuple[int, int] | None = None
    final_norm: nn.Module | None = None
    attentions: Sequence[Sequence[nn.Module]] | None = None
    settings: Sequence[Setting] = field(default=())
    grid_methods: Sequence[str] = field(default=())

    def attention_modules(self, index: int) -> tuple[nn.Module, ...]:
        """The modules in which the attention of block ``index`` happens."""
        if self.attentions is not None:
            return tuple(self.attentions[index])
        return tuple(_outermost_attention(self.blocks[index])) or (self.blocks[index],)

    def check(self, model: nn.Module) -> None:
        """Refuse a description that does not fit ``model``.

        Raises:
            UnsupportedModelError: A module is not part of the model, or a number makes no sense.
        """
        name = type(model).__name__
        if len(self.blocks) == 0:
            raise UnsupportedModelError(f"the Backbone of this {name} names no blocks, in front of which to prune.")
        if self.attentions is not None and len(self.attentions) != len(self.blocks):
            raise UnsupportedModelError(
                f"Backbone.attentions has {len(self.attentions)} entries for {len(self.blocks)} blocks; give one a "
                "block, or None to have them found."
            )
        parts = set(model.modules())
        named = [
            *self.blocks,
            *(module for index in range(len(self.blocks)) for module in self.attention_modules(index)),
        ]
        if self.final_norm is not None:
            named.append(self.final_norm)
        for module in named:
            if module not in parts:
                raise UnsupportedModelError(
                    f"the Backbone names a {type(module).__name__} that is not part of this {name}; "
                    "describe the very object that is being sparsified."
                )
        if len(set(self.blocks)) != len(self.blocks):
            raise UnsupportedModelError(
                f"{name} runs the same block more than once; tokens can only be pruned once in front of a block."
            )
        for setting in self.settings:
            if not hasattr(setting.owner, setting.name):
                raise UnsupportedModelError(
                    f"a Setting of the Backbone names {setting.name!r}, which {type(setting.owner).__name__} has not."
                )
        for method in self.grid_methods:
            if not callable(getattr(type(model), method, None)):
                raise UnsupportedModelError(f"Backbone.grid_methods names {method!r}, which is no method of {name}.")
        if self.num_prefix_tokens < 0 or self.embed_dim < 1:
            raise UnsupportedModelError(
                f"Backbone(num_prefix_tokens={self.num_prefix_tokens}, embed_dim={self.embed_dim}): "
                "the first must be at least 0, the second at least 1."
            )


def _outermost_attention(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        name = type(child).__name__.lower()
        found += [child] if "attention" in name or "attn" in name else _outermost_attention(child)
    return found

"""The description of a backbone: all that the library needs to know of somebody else's model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from tokenprune.backbones.adaptations import Adaptation
from tokenprune.backbones.fields import check_fields
from tokenprune.backbones.levels import Hierarchy
from tokenprune.backbones.packed import Packed
from tokenprune.backbones.padded import Images, padded_images
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.errors import UnsupportedModelError
from tokenprune.tokens import Layout

Downstream = Literal["pooled", "all tokens", "any number"]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a Vision Transformer looks like, and nothing about how it is pruned.

    Every block takes tokens of shape (B, L, C) as its first argument, prefix tokens first, then
    the patch tokens in row-major order, then suffix tokens, and returns tokens of the same shape
    (alone, or as the first item of a tuple). The first three attributes describe nearly every
    model; each of the others says in which way one differs.

    Attributes:
        blocks: The transformer blocks in the order they run.
        num_prefix_tokens: *Tokens:* class, distillation and register tokens in front of the patch tokens;
            they are never scored and never pruned.
        embed_dim: The tokens' width C.
        num_suffix_tokens: Tokens behind the patch tokens, such as detection tokens; never pruned.
        class_token: Whether the first prefix token, if there is any, is a class token; ``False`` where all
            are register tokens.
        patch_size: *Patch grid:* height and width of a patch in pixels, to infer the grid of an image from its
            size; ``None`` where there is none.
        grid_size: Rows and columns of patches at the model's nominal image size, ``None`` where
            unknown.
        final_norm: *Downstream:* the module whose output the model calls its final tokens; ``None`` means the
            output of the last block.
        downstream: What stands behind the blocks. ``"pooled"``: it pools tokens, or takes single ones.
            ``"all tokens"``: it needs every token, as the blocks' neighbours do in some models, so that pruned
            tokens are restored behind every block whatever the reduction. ``"any number"``: it takes sequences of
            any length, so that the kept tokens alone are handed on in every execution.
        attentions: *Attention:* for each block the modules in which its attention happens; ``None`` finds
            them: the outermost modules whose class is named after attention, otherwise the block.
        token_inputs: The names of the blocks' parameters, besides tokens, that have an entry for each token, with
            what the model gives and what each image gets: patterns such as ``"n d -> b 1 n d"``, one for each
            number of dimensions (see `tokenprune.backbones.patterns`), or ``None`` to have them inferred from
            their shapes. Those that are not named are inferred as well.
        neutral_inputs: For such parameters as have an entry for each patch token and none for the others, as rotary
            tables do, the numbers of an entry that changes nothing, one for each equal share of its width; those of
            a tuple of tables one after the other, such as (1, 0) for a cosine and a sine table. Without them the
            model cannot run in `varlen` execution.
        adaptations: What the model's family needs besides, one object each.
        tower: The part of the model whose forward pass runs the blocks and pools their tokens, where
            the model is more than that; ``None`` means the model itself.
        packed: *Packed images:* how the model packs the images of a batch into one sequence of tokens, if it does. Then
            blocks take (T, C) or (1, T, C), prefix tokens in front of each image's patches, and no suffix tokens.
        patch_mask: *Padded images:* the name of the tower's parameter, or of an entry of a mapping that it is given,
            that says which patches are there, (B, N) or (B, rows, columns), where images of different sizes are rows
            of patches, padded to the longest; ``None`` where all have as many.
        token_wise: *Two paths:* for each block the parts that treat tokens one by one, for reductions that keep every
            token in the sequence; ``None`` has them found, by running the model, when such a reduction is chosen.
        hierarchy: The levels of a model whose blocks need the full grid of tokens; ``embed_dim``, ``patch_size`` and
            ``grid_size`` describe the one that stages stand in. ``None`` for a flat list of blocks.
    """

    blocks: Sequence[nn.Module]
    num_prefix_tokens: int
    embed_dim: int
    num_suffix_tokens: int = 0
    class_token: bool = True
    patch_size: tuple[int, int] | None = None
    grid_size: tuple[int, int] | None = None
    final_norm: nn.Module | None = None
    downstream: Downstream = "pooled"
    attentions: Sequence[Sequence[nn.Module]] | None = None
    token_inputs: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    neutral_inputs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    adaptations: Sequence[Adaptation] = field(default=())
    tower: nn.Module | None = None
    packed: Packed | None = None
    patch_mask: str | None = None
    token_wise: Sequence[Sequence[TokenWise]] | None = None
    hierarchy: Hierarchy | None = None

    @property
    def reach(self) -> range:
        """The numbers of the blocks in front of which stages may stand: all, or those over the same tokens."""
        if self.hierarchy is not None:
            return self.hierarchy.level.blocks
        blocks = None if self.packed is None else self.packed.blocks
        return range(len(self.blocks)) if blocks is None else blocks

    def for_stages(self, stages: Sequence[int] | None) -> Backbone:
        """The description for these stages, where blocks run over several kinds of tokens: of those in front of them.

        Raises:
            PlanError: They stand in several levels of a hierarchy, or in front of blocks over different tokens.
        """
        if self.packed is not None and self.packed.coarser is not None:
            packed = self.packed.for_stages(stages)
            return replace(self, packed=packed, final_norm=self.final_norm if packed.coarser is None else None)
        if self.hierarchy is None:
            return self
        chosen = self.hierarchy.for_stages(stages)
        level = chosen.level
        return replace(
            self, hierarchy=chosen, embed_dim=level.embed_dim, patch_size=level.patch_size, grid_size=level.grid_size
        )

    def attention_modules(self, index: int) -> tuple[nn.Module, ...]:
        """The modules in which the attention of block ``index`` happens."""
        if self.attentions is not None:
            return tuple(self.attentions[index])
        return tuple(outermost_attention(self.blocks[index])) or (self.blocks[index],)

    def num_prefix_at(self, index: int) -> int:
        """The prefix tokens in the sequence that block ``index`` gets; behind the last block, that of its output."""
        return self.num_prefix_tokens + sum(adaptation.num_late_prefix(index) for adaptation in self.adaptations)

    def layout_at(self, layout: Layout, block: int) -> Layout:
        """A layout as block ``block`` gets it: with the prefix tokens that have joined by then."""
        num_prefix = self.num_prefix_at(block)
        return layout if layout.num_prefix == num_prefix else layout.replace(num_prefix=num_prefix)

    def attention_layouts(self, layout: Layout, block: int) -> list[Layout]:
        """The sequence that a block gets, and those that it attends over instead."""
        own = self.layout_at(layout, block)
        return [own, *(other for adaptation in self.adaptations for other in adaptation.attention_layouts(own))]

    def tail_layouts(self, layout: Layout) -> list[Layout]:
        """The sequence behind the last block, and those that the model makes of it there."""
        patches, without_suffix = layout.replace(num_prefix=0, num_suffix=0), layout.replace(num_suffix=0)
        made = [other for adaptation in self.adaptations for other in adaptation.tail_layouts(layout)]
        return [patches, layout, without_suffix, *made]

    def grid_of(self, num_patches: int, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Rows and columns of the patches of an image.

        Args:
            num_patches: N.
            image_size: Its height and width in pixels, ``None`` where unknown.

        Returns:
            ``None`` where so many patches make no grid that is known.
        """
        if image_size is not None and self.patch_size is not None:
            (height, width), (patch_height, patch_width) = image_size, self.patch_size
            for grid in (
                (height // patch_height, width // patch_width),
                (-(-height // patch_height), -(-width // patch_width)),  # images padded to whole patches
            ):
                if grid[0] * grid[1] == num_patches:
                    return grid
            return None
        fits = self.grid_size is not None and math.prod(self.grid_size) == num_patches
        return self.grid_size if fits else None

    def images(self, tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Images | None:
        """The images that the tower is called with, where they are of different sizes.

        Raises:
            StateError: They are packed into one sequence, and nothing says where each ends.
        """
        if self.packed is not None:
            return self.packed.read(tower, args, kwargs, self.num_prefix_tokens)
        return None if self.patch_mask is None else padded_images(tower, args, kwargs, self.patch_mask)

    @property
    def summary_obstacles(self) -> tuple[str, ...]:
        """Why a token that stands for several others has no place in this model; empty if it has one."""
        found = [f"its blocks are given {name!r}, with an entry for each token" for name in self.token_inputs]
        found += [one.summary_obstacle for one in self.adaptations if one.summary_obstacle is not None]
        return tuple(dict.fromkeys(found))

    @property
    def packing_obstacles(self) -> tuple[str, ...]:
        """Why blocks cannot be given the tokens of several images as one sequence; empty if they can."""
        found = [one.packing_obstacle for one in self.adaptations if one.packing_obstacle is not None]
        return tuple(dict.fromkeys(found))

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Channels, height and width of the images ``model`` was built for; 3, 224, 224 where nothing says."""
        tower = model if self.tower is None else self.tower
        convolution = next((module for module in tower.modules() if isinstance(module, nn.Conv2d)), None)
        channels = 3 if convolution is None else convolution.in_channels
        if self.grid_size is None or self.patch_size is None:
            return channels, 224, 224
        return channels, self.grid_size[0] * self.patch_size[0], self.grid_size[1] * self.patch_size[1]

    def check(self, model: nn.Module) -> None:
        """Refuse a description that does not fit ``model``.

        Raises:
            UnsupportedModelError: A module is not part of the model, or a number makes no sense.
        """
        name = type(model).__name__
        check_fields(vars(self), Downstream)
        if len(self.blocks) == 0:
            raise UnsupportedModelError(f"the Backbone of this {name} names no blocks, in front of which to prune.")
        self._check_modules(model)
        if len(set(self.blocks)) != len(self.blocks):
            raise UnsupportedModelError(
                f"{name} runs the same block more than once; tokens can only be pruned once in front of a block."
            )
        if self.attentions is not None and len(self.attentions) != len(self.blocks):
            raise UnsupportedModelError(
                f"Backbone.attentions has {len(self.attentions)} entries for {len(self.blocks)} blocks; give one a "
                "block, or None to have them found."
            )
        if self.token_wise is not None and len(self.token_wise) != len(self.blocks):
            raise UnsupportedModelError(
                f"Backbone.token_wise has {len(self.token_wise)} entries for {len(self.blocks)} blocks; give one a "
                "block, or None to have them found."
            )
        if self.hierarchy is not None and not 0 <= self.hierarchy.number < len(self.hierarchy.levels):
            raise UnsupportedModelError(
                f"Hierarchy(number={self.hierarchy.number}): expected one of {len(self.hierarchy.levels)} levels."
            )
        for modules in self.attentions or ():
            inside = [part for module in modules for part in module.modules()]
            if any(inside.count(module) > 1 for module in modules):
                raise UnsupportedModelError(
                    "Backbone.attentions names a module of a block twice, or one inside of another; name the outermost "
                    "alone."
                )
        if self.tower is not None and not {*self.blocks} <= {*self.tower.modules()}:
            raise UnsupportedModelError(
                f"Backbone(tower={type(self.tower).__name__}(…)): expected the part of this {name} that runs all "
                "its blocks, or None."
            )

    def _check_modules(self, model: nn.Module) -> None:
        parts = set(model.modules())
        named = [*self.blocks, *(module for modules in self.attentions or () for module in modules)]
        named += [module for module in (self.final_norm, self.tower) if module is not None]
        named += [module for adaptation in self.adaptations for module in adaptation.modules()]
        named += [module for parts in self.token_wise or () for part in parts for module in part.modules]
        for module in named:
            if module not in parts:
                raise UnsupportedModelError(
                    f"the Backbone names a {type(module).__name__} that is not part of this {type(model).__name__}; "
                    "describe the very object that is being sparsified."
                )


def outermost_attention(module: nn.Module) -> list[nn.Module]:
    """The modules inside a module whose class is named after attention, but none inside another of them."""
    found: list[nn.Module] = []
    for child in module.children():
        name = type(child).__name__.lower()
        found += [child] if "attention" in name or "attn" in name else outermost_attention(child)
    return found

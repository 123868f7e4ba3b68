"""The description of a backbone: all that the library needs to know of somebody else's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

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


def exchange(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Make settings, and return those that make them undone, in the order to make them in.

    If one fails, none is left made.
    """
    previous: list[Setting] = []
    try:
        for setting in settings:
            before = Setting(owner=setting.owner, name=setting.name, value=getattr(setting.owner, setting.name))
            setattr(setting.owner, setting.name, setting.value)
            previous.insert(0, before)
    except BaseException:
        exchange(previous)
        raise
    return tuple(previous)


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """A tensor that an attention module keeps as an attribute, with an entry for each token.

    Attributes:
        owner: The attention module.
        name: The attribute.
        pattern: What the tensor is, and what each image gets of it, such as ``"b n m d -> b n m d"``
            (see `Backbone.token_inputs`).
        build: Makes the tensor for a number of tokens.
    """

    owner: nn.Module
    name: str
    pattern: str
    build: Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a Vision Transformer looks like, without a word on how it is pruned.

    Every block takes tokens of shape (B, L, C) as its first argument, prefix tokens first, then
    the patch tokens in row-major order, then suffix tokens, and returns tokens of the same shape
    (alone, or as the first item of a tuple). The first three attributes describe nearly every
    model; each of the others says in which way one differs.

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
            are being dropped they refuse to run. With ``"forward"`` among them, so does `sparsify`.
        tower: The part of the model whose forward pass runs the blocks and pools their tokens, where
            the model is more than that; ``None`` means the model itself.
        num_suffix_tokens: Tokens behind the patch tokens, such as detection tokens; never pruned.
        class_token: Whether the first prefix token, if there is any, is a class token; ``False`` where all
            are registers.
        num_late_prefix_tokens: Prefix tokens that join in front between two blocks.
        num_inner_tokens: Tokens that a block adds behind the sequence while it attends.
        num_tail_tokens: Tokens that the tail puts in front of the sequence before it attends.
        token_inputs: For names of the blocks' parameters that have an entry for each token, what the
            model gives and what each image gets: patterns such as ``"n d -> b 1 n d"``, with ``b``
            images, ``n`` and ``m`` tokens and anything else as it is, one for each number of
            dimensions. Others are told from their shapes.
        shared_token_inputs: Whether attention puts a dimension for the images in front of its token
            inputs by itself, one for all images.
        position_input: A parameter of the blocks that takes the row-major positions (B, n) of the
            patch tokens, for blocks that otherwise number their tokens from 0.
        biased_attention: Whether attention adds a bias of its own over all tokens to the scores, so
            that it must be cut down to those left.
        length_inputs: Modules of attention that are told how many tokens there are, and make a bias for
            so many, with the keyword by which they are told: they are told of all.
        token_tables: Tensors that attention modules keep, with an entry for each token.
        weight_mixers: Modules that take finished attention weights (B, L, L, H) and mix them, so
            that pruned tokens must be masked once more.
        put_back: Whether pruned tokens are put back after every block, as they were before it,
            because the model needs all of them between its blocks or behind the last one; so it is in
            any model that is sparsified with ``pruned="preserve"``.
        leave_pruned: Whether what follows the tower takes any number of tokens, so that in `mask`
            execution, too, the tower's output has the kept ones alone.
        grid_tokens: Whether blocks take and return (B, rows, columns, C), without other tokens, and
            treat rows and columns alike.
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
    tower: nn.Module | None = None
    num_suffix_tokens: int = 0
    class_token: bool = True
    num_late_prefix_tokens: int = 0
    num_inner_tokens: int = 0
    num_tail_tokens: int = 0
    token_inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shared_token_inputs: bool = False
    position_input: str | None = None
    biased_attention: bool = False
    length_inputs: Sequence[tuple[nn.Module, str]] = field(default=())
    token_tables: Sequence[TokenTable] = field(default=())
    weight_mixers: Sequence[nn.Module] = field(default=())
    put_back: bool = False
    leave_pruned: bool = False
    grid_tokens: bool = False

    def preserving(self) -> Backbone:
        """The same model, with pruned tokens put back: whatever comes after a block gets all of them."""
        return replace(self, put_back=True, leave_pruned=False, grid_methods=())

    def attention_modules(self, index: int) -> tuple[nn.Module, ...]:
        """The modules in which the attention of block ``index`` happens."""
        if self.attentions is not None:
            return tuple(self.attentions[index])
        return tuple(outermost_attention(self.blocks[index])) or (self.blocks[index],)

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
        if len(self.blocks) == 0:
            raise UnsupportedModelError(f"the Backbone of this {name} names no blocks, in front of which to prune.")
        parts = set(model.modules())
        named = [
            *self.blocks,
            *(module for modules in self.attentions or () for module in modules),
        ]
        named += [module for module in (self.final_norm, self.tower) if module is not None]
        named += [module for module, _ in self.length_inputs]
        named += [*self.weight_mixers, *(table.owner for table in self.token_tables)]
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
        if self.attentions is not None and len(self.attentions) != len(self.blocks):
            raise UnsupportedModelError(
                f"Backbone.attentions has {len(self.attentions)} entries for {len(self.blocks)} blocks; give one a "
                "block, or None to have them found."
            )
        for setting in self.settings:
            if not hasattr(setting.owner, setting.name):
                raise UnsupportedModelError(
                    f"a Setting of the Backbone names {setting.name!r}, which {type(setting.owner).__name__} has not."
                )
        for method in self.grid_methods:
            if not callable(getattr(type(self.tower or model), method, None)):
                raise UnsupportedModelError(f"Backbone.grid_methods names {method!r}, which is no method of {name}.")
        if self.num_prefix_tokens < 0 or self.embed_dim < 1:
            raise UnsupportedModelError(
                f"Backbone(num_prefix_tokens={self.num_prefix_tokens}, embed_dim={self.embed_dim}): "
                "the first must be at least 0, the second at least 1."
            )
        for option in ("num_suffix_tokens", "num_late_prefix_tokens", "num_inner_tokens", "num_tail_tokens"):
            if getattr(self, option) < 0:
                raise UnsupportedModelError(f"Backbone({option}={getattr(self, option)}): must be at least 0.")


def outermost_attention(module: nn.Module) -> list[nn.Module]:
    """The modules inside a module whose class is named after attention, but none inside another of them."""
    found: list[nn.Module] = []
    for child in module.children():
        name = type(child).__name__.lower()
        found += [child] if "attention" in name or "attn" in name else outermost_attention(child)
    return found

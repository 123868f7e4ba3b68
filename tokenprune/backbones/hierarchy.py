"""Hierarchies: blocks over grids of tokens that become coarser from level to level, found by running the model once.

Structure counts, names do not: a block is an item of a list of modules that is called once, takes and returns tokens of
one shape, and holds a part that treats them one by one. Blocks in a row over tokens of the same number and width are a
level.

Shapes: B images, N tokens of a level, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from tokenprune.backbones.adaptations import Adaptation
from tokenprune.backbones.levels import Hierarchy, Level
from tokenprune.backbones.module_calls import Recording
from tokenprune.backbones.token_grid import TokenGrid
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.backbones.token_wise_candidates import FoundPart, has_candidates
from tokenprune.backbones.token_wise_probe import Probe
from tokenprune.errors import UnsupportedModelError

_NEARLY = 0.75
"""Of levels whose parts cost nearly the same, the deepest one counts: its tokens say most."""


class HierarchyStructure(NamedTuple):
    """What was found: attributes of a `Backbone` of the same names."""

    blocks: tuple[nn.Module, ...]
    embed_dim: int
    patch_size: tuple[int, int] | None
    grid_size: tuple[int, int] | None
    final_norm: nn.Module
    attentions: tuple[tuple[nn.Module, ...], ...]
    token_wise: tuple[tuple[TokenWise, ...], ...]
    hierarchy: Hierarchy
    adaptations: tuple[Adaptation, ...]


class _Block(NamedTuple):
    module: nn.Module
    parts: list[FoundPart]
    shape: tuple[int, ...]
    channels_first: bool

    @property
    def embed_dim(self) -> int:
        return self.shape[1 if self.channels_first else -1]

    @property
    def num_tokens(self) -> int:
        return torch.Size(self.shape[1:]).numel() // self.embed_dim


def observe_hierarchy(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    image_size: tuple[int, int],
    num_images: int = 2,
    num_prefix_tokens: int = 0,
    row_major: bool = True,
    obstacle: str | None = None,
) -> HierarchyStructure:
    """Run a model on images and say what hierarchy it is.

    Weights, modes and random state are left as they are.

    Args:
        model: The model, or the part of it that runs the blocks.
        inputs: Keyword arguments of its forward pass.
        image_size: Height and width in pixels of the images in them.
        num_images: How many images are in them.
        num_prefix_tokens: Tokens in front of those of the grid.
        row_major: Whether the tokens of a level stand in the order of rows.
        obstacle: As for `Hierarchy`.

    Raises:
        UnsupportedModelError: The model could not be run, or has no blocks with a part that treats tokens one by one;
            the message says what it has.
    """
    name = type(model).__name__
    probe = Probe(model, inputs)
    recording = probe.record()
    modules = _blocks(model, recording)
    found = probe.parts(modules, recording)
    # Where channels are as many as rows, one block does not say which are which; all together do, or else their parts.
    ways = [
        [block for module in modules if (block := _block(module, found[module], recording, num_images, channels_first))]
        for channels_first in (False, True)
    ]
    blocks = max(ways, key=lambda blocks: (len(blocks), sum(map(_is_read_as_its_parts, blocks))))
    if not blocks:
        raise UnsupportedModelError(_refusal(name, modules, found))
    levels, costs = [], []
    for _, group in groupby(enumerate(blocks), key=lambda one: one[1].shape):
        numbers, members = zip(*group, strict=True)
        levels.append(_level(numbers, members[0], image_size, num_prefix_tokens, row_major))
        costs.append(sum(part.cost for member in members for part in member.parts))
    level = max(number for number, cost in enumerate(costs) if cost >= _NEARLY * max(costs))
    chosen = levels[level]
    first = blocks[chosen.start]
    return HierarchyStructure(
        blocks=tuple(block.module for block in blocks),
        embed_dim=chosen.embed_dim,
        patch_size=chosen.patch_size,
        grid_size=chosen.grid_size,
        final_norm=_final_map(blocks[-1].module, recording),
        attentions=tuple((block.module,) for block in blocks),
        token_wise=tuple(tuple(one.part for one in block.parts) for block in blocks),
        hierarchy=Hierarchy(tuple(levels), level, obstacle),
        adaptations=(TokenGrid(channels_first=first.channels_first),) if len(first.shape) == 4 else (),
    )


def _blocks(model: nn.Module, recording: Recording) -> list[nn.Module]:
    """Items of lists that may hold a part, and take and give tokens of one shape; none inside another."""
    items = {
        item
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for item in module.children()
        if item in recording.calls and recording.calls[item].times == 1
    }
    fitting = [item for item in items if _keeps_shape(item, recording) and has_candidates(item, recording)]
    names = recording.names
    innermost = [item for item in fitting if not any(names[other].startswith(f"{names[item]}.") for other in fitting)]
    return sorted(innermost, key=lambda item: recording.calls[item].number)


def _keeps_shape(module: nn.Module, recording: Recording) -> bool:
    call = recording.calls[module]
    return len(call.shape) in (3, 4) and call.output_shape == call.shape


def _block(
    module: nn.Module, parts: list[FoundPart], recording: Recording, num_images: int, channels_first: bool
) -> _Block | None:
    """A block, with those of its parts that see its tokens as they come in; ``None`` if there are none."""
    shape = recording.calls[module].shape
    if shape[0] != num_images:
        return None
    block = _Block(module, [], shape, channels_first and len(shape) == 4)
    same = [
        one
        for one in parts
        if one.shape[0] == shape[0]
        and one.part.embed_dim == block.embed_dim
        and torch.Size(one.shape).numel() == torch.Size(shape).numel()
    ]
    return block._replace(parts=same) if same else None


def _is_read_as_its_parts(block: _Block) -> bool:
    return all(found.part.channels_first == block.channels_first for found in block.parts)


def _level(
    numbers: Sequence[int], block: _Block, image_size: tuple[int, int], num_prefix: int, row_major: bool
) -> Level:
    grid = _grid(block, image_size, num_prefix) if row_major else None
    patch = None if grid is None else (image_size[0] // grid[0], image_size[1] // grid[1])
    return Level(numbers[0], numbers[-1] + 1, block.embed_dim, patch, grid)


def _grid(block: _Block, image_size: tuple[int, int], num_prefix: int) -> tuple[int, int] | None:
    """Rows and columns of a level's tokens, if they divide the image into patches of whole pixels."""
    if len(block.shape) == 4:
        rows, columns = block.shape[2:] if block.channels_first else block.shape[1:3]
        return int(rows), int(columns)
    number = block.num_tokens - num_prefix
    area = image_size[0] * image_size[1] / number
    side = round(area**0.5)
    grid = (image_size[0] // side, image_size[1] // side) if side else (0, 0)
    return grid if grid[0] * grid[1] == number else None


def _final_map(last: nn.Module, recording: Recording) -> nn.Module:
    """The norm of all final tokens, or the last block, where they are pooled first."""
    end = recording.calls[last]
    tokens = torch.Size(end.shape).numel()
    for module, call in recording.calls.items():
        is_norm = "norm" in type(module).__name__.lower() and call.number > end.number
        behind = is_norm and not recording.names[module].startswith(f"{recording.names[last]}.")
        if behind and call.times == 1 and torch.Size(call.output_shape).numel() == tokens:
            return module
    return last


def _refusal(name: str, modules: Sequence[nn.Module], found: Mapping[nn.Module, Sequence[FoundPart]]) -> str:
    if not modules:
        return (
            f"{name} has no list of blocks that take and give tokens of one shape, with linear layers over them, so "
            "that there is no part that could be run for some of the tokens alone."
        )
    kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
    with_parts = [module for module in modules if found[module]]
    if not with_parts:
        return (
            f"the blocks of {name} ({kinds}) have no part that treats tokens one by one and is worth a fast path: no "
            "two linear layers in a row to more channels and back, with nothing between them that mixes tokens."
        )
    return f"in the blocks of {name} ({kinds}) what treats tokens one by one does not see them as the block gets them."

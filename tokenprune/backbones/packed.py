"""Models that are given the images of a batch as one sequence of patches, each image with as many as it has.

Such a tower is called with patches one after the other and, in a second input, the grids that they come from. Its
blocks take tokens (T, C) or (1, T, C), and cumulative lengths by which attention is split, by image or by window.

Shapes: B images, a video with all its frames counting as one, P prefix tokens of each, N patch tokens of the largest of
them, T tokens of all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.errors import PlanError, StateError

Order = Callable[[Mapping[str, Any]], Tensor]


class PackedImages(NamedTuple):
    """The images that a packed sequence holds.

    An image's patch tokens are numbered from 0, in the order in which the tower is given them.

    Attributes:
        lengths: How many patch tokens each image has.
        num_groups: How many merge groups each has: neighbours that go on as one token behind the blocks.
        groups: (B, N) int64, the merge group of each patch token, those of an image numbered from 0.
        present: (B, N), 1 = a patch token, 0 = there to fill the row.
        places: (B, P + N) int64, where each token stands in the sequence that the blocks get, prefix tokens first; T
            for what fills the row.
        num_prefix: P, how many tokens stand in front of each image's patches in the sequence.
    """

    lengths: tuple[int, ...]
    num_groups: tuple[int, ...]
    groups: Tensor
    present: Tensor
    places: Tensor
    num_prefix: int = 0

    @property
    def length(self) -> int:
        """T."""
        return sum(self.lengths) + self.num_prefix * len(self.lengths)

    @property
    def longest(self) -> int:
        """N."""
        return max(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How a model packs the images of a batch into one sequence.

    Attributes:
        grids: The name of the tower's parameter with each image's grid: (B, 2), rows and columns of patches, or (B, 3),
            with the number of frames in front.
        lengths: The names of the blocks' parameters with cumulative lengths, (number of segments + 1,) from 0 to T, by
            which attention is split.
        merge_size: How many neighbours, in height as in width, go on as one token behind the blocks; they are kept or
            pruned together. 1 if none; the name of a parameter of the tower that gives one for each image; or a pair
            of numbers for height and width.
        blockwise: Whether such neighbours follow one another in the sequence; otherwise patches stand row by row.
        across_frames: Whether what becomes one token is also merged over all frames of a video.
        patch_size: Height and width of a token in what ``grids`` counts, such as pixels; 1 where it counts tokens.
        cell_size: How many tokens, in height as in width, are in each cell that ``grids`` counts; 1 where it counts
            tokens.
        order: Given the tower's arguments by name, (T,) int64: for each place in the sequence that the blocks get,
            which token stands there, as the tower is given them. ``None`` where they stand as given.
        blocks: The numbers of the blocks that run over these tokens; ``None`` means all.
        coarser: The same for the blocks behind these, where neighbours become one token between blocks. Stages stand
            in front of blocks of one kind, and all tokens go on to the others.
    """

    grids: str
    lengths: Sequence[str] = ("cu_seqlens",)
    merge_size: int | tuple[int, int] | str = 1
    blockwise: bool = True
    across_frames: bool = False
    patch_size: int = 1
    cell_size: int = 1
    order: Order | None = None
    blocks: range | None = None
    coarser: Packed | None = None

    def for_stages(self, stages: Sequence[int] | None) -> Packed:
        """How the tokens are packed in front of whose blocks these stages stand; the finest ones by default.

        Raises:
            PlanError: They stand in front of blocks over different tokens.
        """
        try:
            named = {*(stages or ())}
        except TypeError:  # no numbers in a sequence, which the plan refuses
            return self
        parts = [self]
        while (coarser := parts[-1].coarser) is not None:
            parts.append(coarser)
        found = [part for part in parts if part.blocks is not None and named & {*part.blocks}]
        if len(found) > 1:
            listed = " or ".join(f"{one.blocks.start} … {one.blocks.stop - 1}" for one in parts if one.blocks)
            raise PlanError(
                f"stages={tuple(stages or ())}: this model merges tokens between its blocks, and those behind it are "
                f"not those in front of it; name blocks of one part: {listed}."
            )
        return found[0] if found else self

    def read(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_prefix: int = 0
    ) -> PackedImages:
        """The images that a tower is called with.

        Args:
            tower: The tower.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            num_prefix: P, how many tokens stand in front of each image's patches in the blocks' sequence.

        Raises:
            StateError: There are no grids among the arguments.
        """
        arguments = arguments_of(tower, args, kwargs)
        given = arguments.get(self.grids)
        images = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
        if given is None and self.patch_size > 1 and images is not None and images.dim() == 4:  # all of the same size
            given = [images.shape[2:]] * len(images)
        if given is None or images is None:
            raise StateError(
                f"{type(tower).__name__} was called without {self.grids!r}, by which its images are told apart."
            )
        device = images.device
        grids = [tuple(int(size) for size in grid) for grid in (given.tolist() if isinstance(given, Tensor) else given)]
        factor, divisor = self.cell_size, self.patch_size
        tokens = tuple((*grid[:-2], *(size * factor // divisor for size in grid[-2:])) for grid in grids)
        places = None if self.order is None else self.order(arguments).argsort().to(device)
        return _images(tokens, self._merge_sizes(arguments, len(grids)), self.blockwise, self.across_frames).on(
            device, places, num_prefix
        )

    def _merge_sizes(self, arguments: Mapping[str, Any], num_images: int) -> tuple[tuple[int, int], ...]:
        size = self.merge_size
        if isinstance(size, str):
            return tuple((int(one), int(one)) for one in arguments[size])
        pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        return (pair,) * num_images


def arguments_of(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is called with, by name."""
    return {**dict(zip(inspect.signature(tower.forward).parameters, args, strict=False)), **kwargs}


class _Numbers(NamedTuple):
    """What is known of images by their grids alone, on the CPU."""

    lengths: tuple[int, ...]
    num_groups: tuple[int, ...]
    groups: Tensor
    present: Tensor

    def on(self, device: torch.device, places: Tensor | None, num_prefix: int) -> PackedImages:
        """The same on a device, with the places (T,) of all tokens in the blocks' sequence."""
        lengths = torch.tensor(self.lengths) + num_prefix
        starts, total = lengths.cumsum(0) - lengths, int(lengths.sum())
        given = starts.unsqueeze(1) + torch.arange(num_prefix + max(self.lengths))  # (B, P + N)
        given = given.clamp(max=total - 1).to(device)
        found = given if places is None else places[given]
        present = self.present.to(device)
        there = F.pad(present, (num_prefix, 0), value=1.0) > 0  # (B, P + N)
        return PackedImages(
            self.lengths,
            self.num_groups,
            self.groups.to(device),
            present,
            torch.where(there, found, torch.full_like(found, total)),
            num_prefix,
        )


@lru_cache(maxsize=16)
def _images(
    grids: tuple[tuple[int, ...], ...], merge_sizes: tuple[tuple[int, int], ...], blockwise: bool, across_frames: bool
) -> _Numbers:
    """What is known of images of these grids, which one pass after the other may have."""
    lengths = tuple(math.prod(grid) for grid in grids)
    longest = max(lengths)
    groups, present = torch.zeros(len(grids), longest, dtype=torch.long), torch.zeros(len(grids), longest)
    for row, (grid, sizes) in enumerate(zip(grids, merge_sizes, strict=True)):
        groups[row, : lengths[row]] = _groups(grid, sizes, blockwise, across_frames)
        present[row, : lengths[row]] = 1.0
    return _Numbers(lengths, tuple(int(number) + 1 for number in groups.amax(dim=1)), groups, present)


def _groups(grid: tuple[int, ...], sizes: tuple[int, int], blockwise: bool, across_frames: bool) -> Tensor:
    """The merge group of each token of an image: (N,) int64, numbered row by row."""
    frames, (rows, columns), (height, width) = math.prod(grid[:-2]), grid[-2:], sizes
    if blockwise:
        of_frame = torch.arange(rows * columns) // (height * width)
    else:
        across = -(-columns // width)
        of_frame = (torch.arange(rows)[:, None] // height * across + torch.arange(columns) // width).flatten()
    number = 0 if across_frames else int(of_frame.max()) + 1
    return (torch.arange(frames)[:, None] * number + of_frame).flatten()

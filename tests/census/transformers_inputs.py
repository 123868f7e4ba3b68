"""What the forward of transformers' vision models asks for, drawn at a small size.

Legend: B images, T tokens of a packed batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

IMAGE_SIZE, PATCH_SIZE, DEPTH = 48, 8, 4
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES, PATCH_VALUES = GRID**2, 3 * PATCH_SIZE**2
IMAGE_TOKEN = 40

# Height and width in patches of the images of a batch: two merged, once or twice, three pooled, or neither.
GRIDS = {
    1: ((6, 6), (4, 6), (6, 3), (5, 5), (3, 4)),
    2: ((6, 6), (4, 6), (6, 2), (2, 4)),
    3: ((6, 6), (3, 6), (6, 3), (3, 3)),
    4: ((4, 8), (4, 4), (8, 4)),
}

Inputs = Callable[[int, torch.Generator], dict[str, Any]]


def grids(batch: int, multiple: int = 1) -> list[tuple[int, int]]:
    """The images' heights and widths in patches, multiples of a number."""
    return list(itertools.islice(itertools.cycle(GRIDS[multiple]), batch))


def draw(**shapes: tuple[int, ...]) -> Inputs:
    """Random values of these shapes, the batch dimension left out."""
    return lambda batch, generator: {name: torch.randn(batch, *s, generator=generator) for name, s in shapes.items()}


def each(**values: Any) -> Inputs:
    """The same values for every image."""
    return lambda batch, _: {name: torch.tensor([value] * batch) for name, value in values.items()}


def both(*parts: Inputs) -> Inputs:
    """The inputs of all parts."""
    return lambda batch, generator: {name: value for part in parts for name, value in part(batch, generator).items()}


def hidden(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """A mask of patches, other ones in each image, equally many."""
    ranks = torch.rand(batch, NUM_PATCHES, generator=generator).argsort(1).argsort(1)
    return {"bool_masked_pos": ranks < NUM_PATCHES // 4}


def padded(mask: str = "", cell: int = 1, sizes: str = "", images: int = 0) -> Inputs:
    """Images of different sizes at the upper left of squares, noise in the rest.

    Args:
        mask: The name of a mask of what belongs to the images.
        cell: The height and width of a patch in that mask.
        sizes: The name of the images' sizes in pixels.
        images: How many images each element of the batch has; 0 for one, without a dimension for it.
    """

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        lead = (batch, images) if images else (batch,)
        shapes = torch.tensor(grids(batch * max(images, 1), 2 if sizes else 1))
        made = {"pixel_values": torch.randn(*lead, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
        if mask:
            inside = torch.arange(GRID * cell) < (shapes * cell)[..., None]  # (B, 2, height or width)
            made[mask] = (inside[:, 0, :, None] & inside[:, 1, None]).unflatten(0, lead)
        return made | ({sizes: shapes * PATCH_SIZE} if sizes else {})

    return make


def naflex(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """The patches of images of different sizes as rows of one length, noise in the rest."""
    shapes = torch.tensor(grids(batch, 2))
    return {
        "pixel_values": torch.randn(batch, NUM_PATCHES, PATCH_VALUES, generator=generator),
        "pixel_attention_mask": torch.arange(NUM_PATCHES) < shapes.prod(1, keepdim=True),
        "spatial_shapes": shapes,
    }


def placed(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """The same with the column and the row of each patch, -1 in the rest."""
    places = torch.full((batch, NUM_PATCHES, 2), -1)
    for row, (height, width) in zip(places, grids(batch, 3), strict=True):
        row[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
    values = torch.randn(batch, NUM_PATCHES, PATCH_VALUES, generator=generator)
    return {"pixel_values": values, "pixel_position_ids": places}


def packed(
    name: str = "hidden_states",
    sizes: str = "grid_thw",
    shape: Callable[[int], tuple[int, ...]] = lambda total: (total, 2 * PATCH_VALUES),
    multiple: int = 2,
) -> Inputs:
    """The patches of images of different sizes one after the other, in a shape made from T, and those sizes."""

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        shapes = torch.tensor(grids(batch, multiple))
        drawn = torch.randn(shape(int(shapes.prod(1).sum())), generator=generator)
        if "thw" in sizes:
            return {name: drawn, sizes: torch.cat([torch.ones(batch, 1, dtype=torch.long), shapes], 1)}
        return {name: drawn, sizes: shapes}

    return make


def areas(divisor: int = 1, multiple: int = 2) -> Callable[[int], list[int]]:
    """How many tokens the images of different sizes become, given how many patches become one."""
    return lambda batch: [height * width // divisor for height, width in grids(batch, multiple)]


def prompt(num_image_tokens: int | Callable[[int], list[int]] = 0, places: str = "", prefix: str = "") -> Inputs:
    """Words, other ones for each image, and among them the places of the image, whose mask may have a name."""

    def make(batch: int, generator: torch.Generator) -> dict[str, Any]:
        counts = num_image_tokens(batch) if callable(num_image_tokens) else [num_image_tokens] * batch
        words = torch.randint(3, IMAGE_TOKEN, (batch, 6), generator=generator)
        tokens = torch.zeros(batch, 6 + max(counts), dtype=torch.long)
        for row, count in enumerate(counts):
            image = torch.full((count,), IMAGE_TOKEN)
            tokens[row, : 6 + count] = torch.cat([words[row, :2], image, words[row, 2:]])
        made = {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": (tokens != 0).long()}
        return made | ({places: tokens == IMAGE_TOKEN} if places else {})

    return make


SQUARE = (IMAGE_SIZE, IMAGE_SIZE)
IMAGES = draw(pixel_values=(3, *SQUARE))
WORDS = both(IMAGES, prompt())
NOISED = both(IMAGES, draw(noise=(NUM_PATCHES,)))
VIDEO_SIZES: dict[str, Any] = {"image_size": 24, "num_frames": 8, "tubelet_size": 2}  # 4 x 3 x 3 patches
VIDEOS, CLIPS = draw(pixel_values=(8, 3, 24, 24)), draw(pixel_values_videos=(8, 3, 24, 24))


def mllama_tiles(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Images of two tiles, every second one of a single tile, noise in the other."""
    single = torch.arange(batch) % 2
    return {
        "pixel_values": torch.randn(batch, 1, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "aspect_ratio_ids": (2 - single)[:, None],
        "aspect_ratio_mask": torch.stack([torch.ones_like(single), 1 - single], 1)[:, None],
    }

"""The image tokens that a vision-language model puts into a prompt, image by image.

Shapes: I images, N tokens of one, T tokens of all, C channels, r rows of a tower's batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune.errors import StateError


class ImageTokens:
    """What a model's encoding method has given.

    Attributes:
        sizes: The number of tokens in each of its entries: an image, a tile of one, or the images of a prompt.
    """

    def __init__(self, output: Any, described: VisionLanguage) -> None:
        self._output, self._described = output, described
        entries = _entries(self._primary)
        self.sizes = [len(entry) for entry in entries]
        self._tiles = [size for entry in self.sizes for size in self._split(entry)]
        self.flat = torch.cat(entries)  # (T, C)

    @property
    def _primary(self) -> Any:
        output = self._output
        if hasattr(output, "pooler_output"):
            return output.pooler_output
        # Releases that give no output object give the tokens, or these and further features.
        return output[0] if isinstance(output, tuple) and not isinstance(output[0], Tensor) else output

    def pieces(self, placeholders: Tensor | None) -> list[int]:
        """The number of tokens in each piece that is pruned by itself: of an entry, what stands together in a prompt.

        Args:
            placeholders: (b, L) bool, the places of all tokens in the prompts; ``None`` where they are unknown.

        Raises:
            StateError: The tokens of one image stand in two prompts, so that they are not in the prompts' order.
        """
        if placeholders is None:
            return self._tiles
        row, column = placeholders.nonzero(as_tuple=True)  # (T,)
        for size, rows in zip(self._tiles, row.cpu().split(self._tiles), strict=True):
            if size and int(rows[0]) != int(rows[-1]):
                raise StateError(
                    f"an image of {size} tokens would be in two prompts: the model's own code has its images in "
                    "another order than the prompts, as a search of several beams has in some models whose prompts "
                    "have several images; generate with num_beams=1."
                )
        starts = torch.ones(len(row), dtype=torch.bool, device=row.device)
        starts[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1)
        ends = torch.tensor(self._tiles, device=row.device).cumsum(0)[:-1]
        starts[ends] = True
        places = [*starts.nonzero().flatten().tolist(), len(row)]
        return [end - start for start, end in pairwise(places)]

    def _split(self, size: int) -> list[int]:
        one = self._described.num_tokens
        return [one] * (size // one) if one and size % one == 0 else [size]

    def keep(self, kept: Tensor) -> Any:
        """What the method would give of the tokens that are kept, (T,) bool, alone."""
        output = self._output
        if not hasattr(output, "pooler_output"):
            if self._primary is output:
                return self._select(output, kept)
            return (self._select(output[0], kept), *(self._select(other, kept) for other in output[1:]))
        shorter = copy.copy(output)
        for name in ("pooler_output", *self._described.features):
            if getattr(output, name, None) is not None:
                setattr(shorter, name, self._select(getattr(output, name), kept))
        return shorter

    def _select(self, values: Any, kept: Tensor) -> Any:
        """Of values for all tokens, in any of the shapes in which models give them, those of the kept ones."""
        if isinstance(values, Tensor):
            if values.dim() == 2:  # (T, C)
                return values[kept]
            chosen = values.flatten(0, 1)[kept]
            counts = {int(part.sum()) for part in kept.split(self.sizes)}
            return chosen.reshape(len(values) if len(counts) == 1 else 1, -1, values.shape[-1])
        if [len(part) for part in values] == self.sizes and all(part.dim() == 2 for part in values):
            return [part[mask] for part, mask in zip(values, kept.split(self.sizes), strict=True)]
        return [self._select(part, kept) for part in values]  # one for each layer


def _entries(tokens: Any) -> list[Tensor]:
    """Tokens in any of the shapes in which models give them, as (N, C) for each image or tile."""
    if isinstance(tokens, Tensor):
        return [tokens] if tokens.dim() == 2 else list(tokens)
    return [part for entry in tokens for part in _entries(entry)]


def tower_rows(placeholders: Tensor, pieces: Sequence[int], num_rows: int) -> list[int]:
    """For each piece of a prompt the row of the tower's batch that it comes from.

    Where a search runs several beams of a prompt, the images of each prompt are repeated for each beam.

    Args:
        placeholders: (b, L) bool, the places of all tokens in the prompts.
        pieces: The numbers of tokens in the pieces.
        num_rows: r.

    Raises:
        StateError: The tower has seen other images.
    """
    beams, rest = divmod(len(pieces), num_rows)
    if rest or not beams or len(placeholders) % beams:
        raise StateError(
            f"the prompts hold {len(pieces)} images or tiles, and the vision tower has last seen {num_rows}; pass "
            "pixel_values, or choose a pruner that needs no decisions of the tower, such as pruner='diverse'."
        )
    starts = torch.tensor([0, *pieces[:-1]]).cumsum(0)
    prompts = placeholders.nonzero(as_tuple=True)[0].cpu()[starts].tolist()
    found, first = [], 0
    for prompt in range(0, len(placeholders), beams):
        count = prompts.count(prompt)
        found += [first + image for _ in range(beams) for image in range(count)]
        first += count
    if len(found) != len(pieces):
        raise StateError("the beams of a prompt hold different numbers of images.")
    return found

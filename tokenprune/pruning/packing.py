"""A packing: how the images of a batch stand in one long sequence, each with as many tokens as it has.

Between two blocks a batch has two forms. *Rectangle*: a row for each image, those with fewer tokens padded. *Packed*:
one sequence in which the images follow one another, without padding. Stages and whatever stands behind the last block
see rectangles; blocks run on packed sequences.

Shapes: B images, k tokens of one of them, K tokens of the rectangle's rows, T tokens of all images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import StateError
from tokenprune.tokens import sizes


class Part(NamedTuple):
    """Images with equally many tokens, which stand next to each other in a packed sequence.

    Attributes:
        start: Where the first one's tokens begin.
        num_images: How many there are.
        length: k.
    """

    start: int
    num_images: int
    length: int

    @property
    def end(self) -> int:
        """Where the last one's tokens end."""
        return self.start + self.num_images * self.length


class Packing(NamedTuple):
    """How a rectangle (B, K, …) and a packed sequence (1, T, …) are made of each other.

    Images with equally many tokens are neighbours in the packed sequence, so that each `Part` of it is a rectangle
    again, without a copy.

    Attributes:
        shape: B and K.
        parts: The parts of the packed sequence, from its beginning to its end.
        rows: (T,) int64, for each token of the packed sequence the row in the flattened rectangle (B · K); ``None``
            where all images have K tokens, so that both are the same numbers.
    """

    shape: tuple[int, int]
    parts: tuple[Part, ...]
    rows: Tensor | None = None

    @classmethod
    def of_equal(cls, num_images: int, length: int) -> Packing:
        """The packing of images with K tokens each."""
        return cls((num_images, length), (Part(0, num_images, length),))

    @classmethod
    def of(cls, present: Tensor) -> Packing:
        """The packing of images of which not all tokens of the rectangle are present, (B, K) of 0 and 1.

        The numbers of tokens are read from the device, which waits for it.
        """
        num_images, length = sizes(present)
        counts: list[int] = present.sum(dim=1).long().tolist()
        if min(counts) == length:
            return cls.of_equal(num_images, length)
        order = sorted(range(num_images), key=lambda image: -counts[image])
        images = torch.tensor(order, device=present.device)
        found = present.index_select(0, images).flatten().nonzero().squeeze(1)  # (T,), in the packed order
        rows = images[found // length] * length + found % length
        lengths = [(size, len(list(group))) for size, group in groupby(counts[image] for image in order)]
        starts = accumulate((size * number for size, number in lengths), initial=0)
        return cls((num_images, length), tuple(Part(s, n, k) for s, (k, n) in zip(starts, lengths, strict=False)), rows)

    @property
    def length(self) -> int:
        """T."""
        return self.parts[-1].end

    @property
    def lengths(self) -> list[int]:
        """The numbers of tokens of all images, in the order in which these stand in the packed sequence."""
        return [part.length for part in self.parts for _ in range(part.num_images)]

    def pack(self, values: Tensor, axis: int = 1) -> Tensor:
        """Of a rectangle (B, K, …) the packed sequence (1, T, …).

        Args:
            values: Images in the first dimension.
            axis: The dimension that counts tokens.
        """
        moved = values.movedim(axis, 1).flatten(0, 1)  # (B · K, …)
        packed = moved if self.rows is None else moved.index_select(0, self.rows)
        return packed.unsqueeze(0).movedim(1, axis)

    def unpack(self, values: Tensor) -> Tensor:
        """Of a packed sequence (1, T, …) the rectangle (B, K, …), with 0 where an image has no token.

        Raises:
            StateError: It is no packed sequence of so many tokens.
        """
        if (*sizes(values)[:2],) != (1, self.length):
            raise StateError(
                f"a block was given the tokens of {self.shape[0]} images in one sequence (1, {self.length}, …), and "
                f"made {tuple(values.shape)} of it: it does more than attend and look at each token by itself. Run "
                "this model in another execution."
            )
        flat = values[0]
        if self.rows is not None:
            flat = values.new_zeros(self.shape[0] * self.shape[1], *sizes(values)[2:]).index_copy(0, self.rows, flat)
        rectangle: Tensor = flat.unflatten(0, self.shape)
        return rectangle

    def unpack_segments(self, segments: Sequence[Tensor]) -> Tensor | None:
        """Of consecutive segments (1, t, …) of a packed sequence the rectangle; ``None`` while some are missing."""
        complete = sum(sizes(segment)[1] for segment in segments) >= self.length
        return self.unpack(torch.cat([*segments], dim=1)) if complete else None

    def split(self, values: Tensor) -> list[Tensor]:
        """Of queries, keys or values (1, H, T, D) those of each part: (images, H, k, D), without a copy."""
        by_token = values[0].transpose(0, 1)  # (T, H, D)
        return [
            by_token[part.start : part.end].unflatten(0, (part.num_images, part.length)).transpose(1, 2)
            for part in self.parts
        ]

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """Of what each part gave, (images, H, k, D), one sequence (1, H, T, D)."""
        flat = [value.transpose(1, 2).flatten(0, 1) for value in values]  # (images · k, H, D)
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        return joined.transpose(0, 1).unsqueeze(0)

    def places(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """Which images a part has (images,), and where their tokens stand in the rectangle's rows (images, k).

        ``None`` where it has all images, and all of the rectangle.
        """
        if self.rows is None:
            return None
        rows = self.rows[part.start : part.end].view(part.num_images, part.length)
        return rows[:, 0] // self.shape[1], rows % self.shape[1]

"""Models that are given images of different sizes as rows of patches, padded to the longest of them.

Shapes: B images, N patches of a row, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokenprune.backbones.packed import PackedImages, arguments_of


class PaddedImages(NamedTuple):
    """The images of a padded batch.

    Attributes:
        present: (B, N), 1 = a patch of the image, 0 = padding.
    """

    present: Tensor


Images = PackedImages | PaddedImages
"""Images of different sizes, in one sequence or in a row each."""


def padded_images(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> PaddedImages | None:
    """The images that a tower is called with; ``None`` where it is given no mask of what is padding.

    Args:
        tower: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        name: Of the mask, among the arguments or in a mapping among them.
    """
    entries: dict[str, Any] = {}
    for key, value in arguments_of(tower, args, kwargs).items():
        entries.update(value if isinstance(value, Mapping) else {key: value})
    mask = entries.get(name)
    return PaddedImages(mask.flatten(1).float()) if isinstance(mask, Tensor) else None

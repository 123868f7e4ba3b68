"""Images, and what are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.generated.strategies.common import ODD

_SIDES = st.one_of(st.sampled_from([8, 16, 32, 32, 40, 48, 64]), st.integers(0, 70))


@st.composite
def _images(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(["size", "size", "size", "fits", "type", "shape", "numbers", "memory", "odd"]))
    batch = draw(st.sampled_from([0, 1, 1, 2, 3]))
    generator = torch.Generator().manual_seed(4)
    if kind == "size":
        return torch.randn(batch, 3, draw(_SIDES), draw(_SIDES), generator=generator)
    images = torch.randn(batch, 3, 32, draw(st.sampled_from([32, 48])), generator=generator)
    if kind == "type":
        dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
        return images.to(draw(st.sampled_from(dtypes)))
    if kind == "shape":
        shapes: list[Callable[[Tensor], Any]] = [
            lambda images: images[:, :1], lambda images: images[:, :0], lambda images: images[:, [0, 1, 2, 0]],
            lambda images: images[0] if len(images) else images, lambda images: images.flatten(),
            lambda images: images.unsqueeze(0), lambda images: images.permute(0, 2, 3, 1), lambda images: images.sum(),
        ]  # fmt: skip
        return draw(st.sampled_from(shapes))(images)
    if kind == "numbers":
        number = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38, 0.0, -1e-45, 1e4]))
        where = draw(st.sampled_from([slice(None), slice(0, 1), slice(4, 9)]))
        images[:1, :, where, where] = number
    if kind == "memory":
        views: list[Callable[[Tensor], Any]] = [
            lambda images: images.to(memory_format=torch.channels_last), lambda images: images.transpose(2, 3),
            lambda images: images[:1].expand(3 * min(batch, 1), -1, -1, -1), lambda images: images.flip(0),
            lambda images: images[::2], lambda images: images.requires_grad_(),
        ]  # fmt: skip
        return draw(st.sampled_from(views))(images)
    return draw(ODD) if kind == "odd" else images


IMAGES = _images()
"""What a model is called with, of a size that it was built for or not."""

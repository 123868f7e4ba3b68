"""How pictures become the input of a torchvision model: as for ImageNet, since a model does not say what it learned."""

from __future__ import annotations

from typing import cast

from torch import nn

from tokenprune import Preprocessing, UnsupportedModelError


def preprocessing(model: nn.Module) -> Preprocessing:
    """As torchvision's ``ImageClassification`` does it by default: resized to 256 ÷ 224 of the model's size, and cut.

    Which weights a model was given stands nowhere on it. For weights made otherwise, such as the SWAG ones, take
    their ``transforms()``.

    Raises:
        UnsupportedModelError: It is no `VisionTransformer`.
    """
    from torchvision.models import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"torchvision's {type(model).__name__} is not a VisionTransformer.")
    size = cast(int, model.image_size)
    box = size * 256 // 224
    return Preprocessing(
        size=(size, size),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=(box, box),
        interpolation="bilinear",
    )

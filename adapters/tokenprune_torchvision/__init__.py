"""The adapter of torchvision's `VisionTransformer`.

The model is described in `models`; from what it is built again is in `rebuilding`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenprune import Adapter, Backbone, Preprocessing, UnsupportedModelError
from tokenprune_torchvision import models, rebuilding

__all__ = ["TorchvisionAdapter", "adapter"]


class TorchvisionAdapter(Adapter):
    """Knows ``vit_b_16`` and its relatives."""

    def describe(self, model: nn.Module) -> Backbone:
        return models.describe(model)

    def identity(self, model: nn.Module) -> dict[str, Any]:
        return rebuilding.identity(model)

    def build(self, identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
        return rebuilding.build(identity, pretrained=pretrained)

    def load(self, name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
        from torchvision.models import get_model, list_models

        if name not in list_models():
            raise LookupError("no model of that name")
        options: dict[str, Any] = {}
        if image_size is not None:
            if image_size[0] != image_size[1]:
                raise UnsupportedModelError(f"torchvision's {name} takes square images, and not {image_size}.")
            options["image_size"] = image_size[0]
        try:
            model: nn.Module = get_model(name, weights="DEFAULT" if pretrained else None, **options)
        except Exception as error:  # whatever a constructor or a download raises
            raise UnsupportedModelError(f"torchvision cannot make {name!r}: {error}") from error
        return model

    def names(self) -> list[str]:
        import torchvision.models

        return list(torchvision.models.list_models(module=torchvision.models))

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """As torchvision's ``ImageClassification`` does it by default: resized to 256 ÷ 224 of the size, and cropped.

        Which weights a model was given stands nowhere on it. For weights made otherwise, such as the SWAG ones, take
        their ``transforms()``.
        """
        from torchvision.models import VisionTransformer

        if not isinstance(model, VisionTransformer):
            raise UnsupportedModelError(f"torchvision's {type(model).__name__} is not a VisionTransformer.")
        size = int(model.image_size)
        box = size * 256 // 224
        return Preprocessing(
            size=(size, size),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            resize=(box, box),
            interpolation="bilinear",
        )


adapter = TorchvisionAdapter()

"""Loading torchvision's models by the names of their builders."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenprune import UnsupportedModelError


def load(name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The model of a builder's name.

    Raises:
        LookupError: torchvision has no such builder.
        UnsupportedModelError: It has, and cannot make the model, at that size or with those weights.
    """
    from torchvision import models

    if name not in models.list_models():
        raise LookupError("no model of that name")
    options: dict[str, Any] = {}
    if image_size is not None:
        if image_size[0] != image_size[1]:
            raise UnsupportedModelError(f"torchvision's {name} takes square images, and not {image_size}.")
        options["image_size"] = image_size[0]
    try:
        model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    except Exception as error:  # whatever a constructor or a download raises
        raise UnsupportedModelError(f"torchvision cannot make {name!r}: {error}") from error
    return model


def names() -> list[str]:
    """The names of torchvision's classification models."""
    from torchvision import models

    return list(models.list_models(module=models))

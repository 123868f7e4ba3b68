"""Every Vision Transformer of torchvision, built at a small size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torchvision
from torch import nn
from torchvision.models import list_models, vision_transformer

from tests.census.entry import Entry

SIZES = {"image_size": 48, "patch_size": 8, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}


def _small(build: Callable[..., nn.Module], **arguments: object) -> nn.Module:
    return build(**{**arguments, **SIZES})


def _create(name: str) -> nn.Module:
    """Calls an entry point, and of the arguments with which that builds a model changes the sizes."""
    with patch.object(vision_transformer, "VisionTransformer", partial(_small, vision_transformer.VisionTransformer)):
        return torchvision.models.get_model(name, num_classes=7)


def examples() -> list[Entry]:
    """All that are supported, to prove: flat models, and hierarchies with a fast path."""
    from tests.census import torchvision_hierarchies  # which is written with what is here

    return [*flat_examples(), *torchvision_hierarchies.every()]


def flat_examples() -> list[Entry]:
    """Flat models; the first is compiled and exported as well."""
    first, *others = supported()
    return [replace(first, compiled=True), *others]


def supported() -> list[Entry]:
    """The entry points that begin with vit."""
    return [
        Entry(
            library="torchvision",
            family="vision_transformer",
            name=name,
            build=partial(_create, name),
            inputs=lambda batch, generator: {"x": torch.randn(batch, 3, 48, 48, generator=generator)},
        )
        for name in list_models()
        if name.startswith("vit_")
    ]

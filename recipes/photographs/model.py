"""The dense model of the photographs: a small timm ViT, to timm ``photographs_vit``, and its shipped weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
from timm.models import VisionTransformer, register_model

from recipes.photographs.data import PHOTOGRAPHS
from recipes.small.model import default_cfgs as make_default_cfgs
from recipes.small.model import load_weights, small_vit

WEIGHTS = Path(__file__).with_name("dense.safetensors")

default_cfgs = make_default_cfgs("photographs_vit", num_classes=len(PHOTOGRAPHS))


@register_model  # type: ignore[untyped-decorator]
def photographs_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The architecture of `recipes.small.model.small_vit`, for sixteen photographs."""
    return small_vit("photographs_vit", pretrained, **options)


def build_model() -> VisionTransformer:
    """The architecture, untrained."""
    return cast(VisionTransformer, timm.create_model("photographs_vit"))


def load_dense_model(weights: Path = WEIGHTS) -> VisionTransformer:
    """The trained dense model, in float32 (the file holds float16)."""
    return load_weights("photographs_vit", weights)

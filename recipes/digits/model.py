"""The demo's dense model: a small timm ViT, known to timm as ``digits_vit``, and its shipped weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import VisionTransformer, register_model

from recipes.small.model import default_cfgs as make_default_cfgs
from recipes.small.model import load_weights, save_weights, small_vit

WEIGHTS = Path(__file__).with_name("dense.safetensors")

default_cfgs = make_default_cfgs("digits_vit", num_classes=10)


@register_model  # type: ignore[untyped-decorator]
def digits_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The architecture of `recipes.small.model.small_vit`, for ten digits."""
    return small_vit("digits_vit", pretrained, **options)


def build_model() -> VisionTransformer:
    """The architecture, untrained."""
    return cast(VisionTransformer, timm.create_model("digits_vit"))


def load_dense_model(weights: Path = WEIGHTS) -> VisionTransformer:
    """The trained dense model, in float32 (the file holds float16)."""
    return load_weights("digits_vit", weights)


def save_dense_model(model: torch.nn.Module, weights: Path = WEIGHTS) -> None:
    """Write the weights as float16 safetensors, whole or not at all."""
    save_weights(model, weights)

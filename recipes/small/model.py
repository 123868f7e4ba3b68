"""The architecture of the shipped dense models, and their weights: float16 on disk, float32 in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs

from recipes.engine.checkpoints import write_whole

IMAGE_SIZE = 64


def default_cfgs(name: str, num_classes: int, *, first_conv: str = "patch_embed.proj", classifier: str = "head") -> Any:
    """What timm is told of an architecture; a module that registers one calls it ``default_cfgs``."""
    return generate_default_cfgs(
        {
            name: {
                "num_classes": num_classes,
                "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "first_conv": first_conv,
                "classifier": classifier,
            }
        }
    )


def small_vit(name: str, pretrained: bool, **options: Any) -> VisionTransformer:
    """8 x 8 patches of 8 pixels, 12 blocks of width 64 with 2 heads, a class token."""
    architecture = {
        "img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 64, "depth": 12, "num_heads": 2, "mlp_ratio": 2
    }  # fmt: skip
    model = build_model_with_cfg(VisionTransformer, name, pretrained, **{**architecture, **options})
    return cast(VisionTransformer, model)


def load_weights(name: str, weights: Path) -> VisionTransformer:
    """A trained dense model, in float32 (the file holds float16)."""
    model = cast(VisionTransformer, timm.create_model(name))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model


def save_weights(model: torch.nn.Module, weights: Path) -> None:
    """Write weights as float16 safetensors, whole or not at all."""
    state = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    write_whole(weights, lambda partial: save_file(state, partial))

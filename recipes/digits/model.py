"""The demo's dense model: a small timm ViT, known to timm as ``digits_vit``, and its shipped weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

from recipes.digits.data import IMAGE_SIZE
from recipes.engine.checkpoints import write_whole

WEIGHTS = Path(__file__).with_name("dense.safetensors")

default_cfgs = generate_default_cfgs(
    {
        "digits_vit": {
            "num_classes": 10,
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def digits_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """8 x 8 patches of 8 pixels, 12 blocks of width 64 with 2 heads, a class token."""
    architecture = {
        "img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 64, "depth": 12, "num_heads": 2, "mlp_ratio": 2
    }  # fmt: skip
    model = build_model_with_cfg(VisionTransformer, "digits_vit", pretrained, **{**architecture, **options})
    return cast(VisionTransformer, model)


def build_model() -> VisionTransformer:
    """The architecture, untrained."""
    return cast(VisionTransformer, timm.create_model("digits_vit"))


def load_dense_model(weights: Path = WEIGHTS) -> VisionTransformer:
    """The trained dense model, in float32 (the file holds float16)."""
    model = build_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model


def save_dense_model(model: torch.nn.Module, weights: Path = WEIGHTS) -> None:
    """Write the weights as float16 safetensors, whole or not at all."""
    state = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    write_whole(weights, lambda partial: save_file(state, partial))

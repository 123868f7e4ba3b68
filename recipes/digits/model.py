"""The demo's dense model: a small timm ViT, and its shipped weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer

from recipes.digits.data import IMAGE_SIZE
from recipes.engine import write_whole

WEIGHTS = Path(__file__).with_name("dense.safetensors")


def build_model() -> VisionTransformer:
    """The architecture: 8 x 8 patches of 8 pixels, 12 blocks of width 64, a class token; untrained."""
    return VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=8, embed_dim=64, depth=12, num_heads=2, mlp_ratio=2, num_classes=10
    )


def load_dense_model(weights: Path = WEIGHTS) -> VisionTransformer:
    """The trained dense model, in float32 (the file holds float16)."""
    model = build_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model


def save_dense_model(model: VisionTransformer, weights: Path = WEIGHTS) -> None:
    """Write the weights as float16 safetensors, whole or not at all."""
    state = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    write_whole(weights, lambda partial: save_file(state, partial))

"""Small real models, built once, of which every generated input gets a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionVisionTransformer

PATCH_SIZE = 8


def _timm(**options: Any) -> Callable[[], nn.Module]:
    sizes = {"img_size": 32, "patch_size": PATCH_SIZE, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    return lambda: VisionTransformer(**{**sizes, **options})


def _transformers() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
                       image_size=32, patch_size=PATCH_SIZE, num_labels=5)  # fmt: skip
    return ViTForImageClassification(config)


def _torchvision() -> nn.Module:
    return TorchvisionVisionTransformer(image_size=32, patch_size=PATCH_SIZE, num_layers=4, num_heads=2,
                                        hidden_dim=16, mlp_dim=32, num_classes=5)  # fmt: skip


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "timm": _timm(),
    "timm, registers, average": _timm(reg_tokens=2, global_pool="avg", init_values=0.5, depth=5, img_size=(32, 48)),
    "timm, any size": _timm(dynamic_img_size=True, qk_norm=True),
    "transformers": _transformers,
    "torchvision": _torchvision,
}
KINDS = tuple(_BUILDERS)


@cache
def _built(kind: str) -> nn.Module:
    model, generator = _BUILDERS[kind]().eval(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def fresh(kind: str) -> Any:
    """A model in eval mode, the same every time, and nobody else's."""
    return copy.deepcopy(_built(kind))


def depth_of(kind: str) -> int:
    """How many blocks it has."""
    return 5 if kind == "timm, registers, average" else 4


def size_of(kind: str) -> tuple[int, int]:
    """Height and width of the images that it was built for."""
    return (32, 48) if kind == "timm, registers, average" else (32, 32)


def images_of(kind: str, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    """Images, of the size that fits unless another is given."""
    return torch.randn(batch, 3, *(size or size_of(kind)), generator=torch.Generator().manual_seed(8))


def run(model: nn.Module, images: Any) -> Tensor:
    """Its logits, with the same random numbers every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return logits(model, images)


def logits(model: nn.Module, images: Any) -> Tensor:
    """What its head gives."""
    output = model(images)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found

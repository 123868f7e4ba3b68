"""Small hierarchies of the real libraries, one of each kind of block, and a flat model, for the fast path.

Every parameter is drawn anew, so that zero-initialised scales and tables hide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune

WIDTHS, DEPTHS = (8, 16, 32, 64), (1, 1, 4, 1)
IMAGE_SIDE, SIDE = 96, 6
"""Of images, and of the grid of the third level."""
LEVEL = range(2, 6)
"""The numbers of the third level's blocks."""
KEEP_RATIO = (0.7, 0.5, 0.3)


@dataclass(frozen=True)
class Hierarchy:
    """A model class in one of its forms.

    Attributes:
        name: What the tests call it.
        build: Makes the model.
        mixes: Whether tokens are mixed inside of its MLPs.
    """

    name: str
    build: Callable[[], nn.Module]
    mixes: bool = False

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model in eval mode, the same weights every time."""
        generator = torch.Generator().manual_seed(7)
        model = self.build().to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
        return model

    def sparsified(self, dtype: torch.dtype = torch.float32, pruned: str = "fast", **options: Any) -> nn.Module:
        """The same model sparsified, its scorers and fast paths drawn wide."""
        model = tokenprune.sparsify(self.model(dtype), keep_ratio=KEEP_RATIO, pruned=pruned, **options)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in model.tokenprune.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        return model

    def images(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(8)
        return torch.randn(batch, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator, dtype=dtype)

    def run(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Every output tensor, by name."""
        output = model(images)
        if isinstance(output, Tensor):
            return {"output": output}
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def __str__(self) -> str:
        return self.name


def _timm(cls: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm.models

        return getattr(timm.models, cls)(num_classes=7, **options)

    return build


def _transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options, num_labels=7))

    return build


def _poolformer() -> nn.Module:
    """With a norm over all tokens."""
    from timm.layers import GroupNorm1
    from timm.models import MetaFormer

    return MetaFormer(num_classes=7, depths=DEPTHS, dims=WIDTHS, norm_layers=GroupNorm1)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 4), CNBlockConfig(64, None, 1)]
    return ConvNeXt(settings, num_classes=7)


_SWIN: dict[str, Any] = {"embed_dim": 8, "depths": DEPTHS, "num_heads": (1, 1, 2, 2), "window_size": 3}
SWIN = Hierarchy("timm Swin", _timm("SwinTransformer", img_size=IMAGE_SIDE, **_SWIN))
CONVNEXT = Hierarchy("timm ConvNeXt", _timm("ConvNeXt", depths=DEPTHS, dims=WIDTHS))
RESPONSE_NORM = Hierarchy(
    "timm ConvNeXt V2",
    _timm("ConvNeXt", depths=DEPTHS, dims=WIDTHS, use_grn=True, ls_init_value=None, conv_mlp=True),
    mixes=True,
)
ALL = [
    SWIN,
    CONVNEXT,
    RESPONSE_NORM,
    Hierarchy(
        "timm PVT v2",
        _timm("PyramidVisionTransformerV2", depths=DEPTHS, embed_dims=WIDTHS, num_heads=(1, 1, 2, 2)),
        mixes=True,
    ),
    Hierarchy("timm PoolFormer", _poolformer),
    Hierarchy(
        "transformers Swin",
        _transformers("SwinForImageClassification", "SwinConfig", image_size=IMAGE_SIDE, patch_size=4, **_SWIN),
    ),
    Hierarchy(
        "transformers ConvNeXt",
        _transformers(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            image_size=IMAGE_SIDE,
            hidden_sizes=WIDTHS,
            depths=DEPTHS,
        ),
    ),
    Hierarchy("torchvision ConvNeXt", _torchvision_convnext),
]

every_kind = pytest.mark.parametrize("case", ALL, ids=str)
swin_and_convnext = pytest.mark.parametrize("case", [SWIN, CONVNEXT], ids=str)

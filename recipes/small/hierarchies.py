"""A small Swin and a small ConvNeXt for the small data sets, known to timm as ``small_swin`` and ``small_convnext``."""

from __future__ import annotations

from typing import Any, cast

from timm.models import ConvNeXt, SwinTransformer, build_model_with_cfg, register_model
from torch import nn

from recipes.small.model import IMAGE_SIZE
from recipes.small.model import default_cfgs as make_default_cfgs

default_cfgs = {
    **make_default_cfgs("small_swin", num_classes=10, classifier="head.fc"),
    **make_default_cfgs("small_convnext", num_classes=10, first_conv="stem.0", classifier="head.fc"),
}


@register_model  # type: ignore[untyped-decorator]
def small_swin(pretrained: bool = False, **options: Any) -> SwinTransformer:
    """Levels of 16 x 16, 8 x 8 and 4 x 4 tokens, the second one with 6 blocks of width 32; windows of 4 x 4."""
    architecture: dict[str, Any] = {
        "img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 16, "depths": (1, 6, 1), "num_heads": (1, 2, 4),
        "window_size": 4, "drop_path_rate": 0.0, "feature_cfg": {"out_indices": (0, 1, 2)},
    }  # fmt: skip
    return cast(
        SwinTransformer, build_model_with_cfg(SwinTransformer, "small_swin", pretrained, **{**architecture, **options})
    )


@register_model  # type: ignore[untyped-decorator]
def small_convnext(pretrained: bool = False, **options: Any) -> ConvNeXt:
    """Levels of 16 x 16, 8 x 8, 4 x 4 and 2 x 2 positions, the second one with 6 blocks of width 32.

    Weights start with a variance of 1 / fan-in and layer scales at 1: with the original 0.02 and 1e-6, blocks as narrow
    as these hardly change what goes through them, and a short training does not get off chance.
    """
    architecture: dict[str, Any] = {
        "depths": (1, 6, 1, 1), "dims": (16, 32, 48, 64), "ls_init_value": 1.0,
        "feature_cfg": {"out_indices": (0, 1, 2, 3)},
    }  # fmt: skip
    model = build_model_with_cfg(ConvNeXt, "small_convnext", pretrained, **{**architecture, **options})
    for module in () if pretrained else model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return cast(ConvNeXt, model)

"""ConvNeXt and Swin of torchvision, every entry point, built at a small size, for the fast path."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torchvision
from torch import nn
from torchvision.models import convnext, list_models, swin_transformer

from tests.census.entry import Entry
from tests.census.timm import images

_SIZES = ((8, 16, 1), (16, 32, 1), (32, 64, 4), (64, None, 1))


# With stochastic depth a block that two images skip has no gradient.
_CONVNEXT = {"block_setting": [convnext.CNBlockConfig(*sizes) for sizes in _SIZES], "stochastic_depth_prob": 0.0}
_SWIN = {
    "stochastic_depth_prob": 0.0,
    "embed_dim": 16,
    "depths": [1, 1, 4, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": [3, 3],
}


def _create(name: str) -> nn.Module:
    """Calls an entry point, and of the arguments with which that builds a model changes the sizes."""
    file, kind, sizes = (
        (convnext, "ConvNeXt", _CONVNEXT)
        if name.startswith("convnext")
        else (swin_transformer, "SwinTransformer", _SWIN)
    )
    build = getattr(file, kind)

    def small(*settings: Any, **arguments: Any) -> nn.Module:
        made: nn.Module = build(**{**arguments, **sizes})
        return made

    with patch.object(file, kind, small):
        return torchvision.models.get_model(name, num_classes=7)


def every() -> list[Entry]:
    """The entry points of ConvNeXt and of both versions of Swin."""
    return [
        Entry(
            library="torchvision",
            family=name.split("_")[0],
            name=name,
            build=partial(_create, name),
            inputs=partial(images, 96, 96),
            stages=None,
            keep_ratio=0.6,
            pruned="fast",
        )
        for name in list_models()
        if name.startswith(("convnext", "swin_"))
    ]

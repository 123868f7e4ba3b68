"""How images become the input of a timm model: by the configuration that its weights were made with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from tokenprune import Preprocessing, UnsupportedModelError
from tokenprune_timm.models import image_size, num_channels

_FITS: dict[str, Literal["cover", "contain", "squash"]] = {"squash": "squash", "border": "contain"}


def preprocessing(model: nn.Module) -> Preprocessing:
    """As ``timm.data.create_transform`` does it for evaluation, at the size the model was built for."""
    from timm.data import resolve_data_config

    size, channels = image_size(model), num_channels(model)
    if channels not in (1, 3):
        raise UnsupportedModelError(
            f"this {type(model).__name__} takes images of {channels} channels, and no pictures."
        )
    config: dict[str, Any] = resolve_data_config({"input_size": (channels, *size)}, model=model)
    share = config["crop_pct"] or 0.875  # timm's own default
    interpolation = config["interpolation"]
    return Preprocessing(
        size=size,
        mean=_fitted(config["mean"], channels),
        std=_fitted(config["std"], channels),
        resize=(math.floor(size[0] / share), math.floor(size[1] / share)),
        fit=_FITS.get(config["crop_mode"], "cover"),
        interpolation="bicubic" if interpolation == "random" else interpolation,
    )


def _fitted(numbers: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number a channel; for grey that of the colours, on average."""
    return tuple(numbers) if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels

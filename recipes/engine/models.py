"""Dense models from timm, with weights that fit the data."""

from __future__ import annotations

from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import nn

from recipes.engine.settings import SettingsError, TrainingSettings


def dense_model(settings: TrainingSettings, num_classes: int, **options: Any) -> nn.Module:
    """The dense model that the settings name, with their weights.

    Args:
        settings: ``model``, ``width``, ``image_size``, ``checkpoint``, ``pretrained``, ``drop_path``.
        num_classes: Classes of the data.
        options: Further arguments of the model.

    Raises:
        SettingsError: timm knows no such model, or the weights do not fit.
    """
    if settings.width is not None:
        options |= {"embed_dim": settings.width, "num_heads": num_heads(settings.width)}
    if settings.image_size is not None:
        options["img_size"] = settings.image_size
    if settings.drop_path:
        options["drop_path_rate"] = settings.drop_path
    pretrained = settings.pretrained and settings.checkpoint is None
    if pretrained:
        known = timm.get_pretrained_cfg(settings.model)
        if known is not None and known.num_classes != num_classes:
            raise SettingsError(_other_classes(settings, f"timm's weights of {settings.model}", num_classes))
    try:
        model: nn.Module = timm.create_model(settings.model, pretrained=pretrained, num_classes=num_classes, **options)
    except RuntimeError as error:
        raise SettingsError(f"timm cannot make model={settings.model!r}: {error}") from error
    if settings.checkpoint is not None:
        try:
            load_checkpoint(model, str(settings.checkpoint), weights_only=True)
        except RuntimeError as error:
            raise SettingsError(_other_classes(settings, str(settings.checkpoint), num_classes, error)) from error
    return model


def num_heads(width: int) -> int:
    """Heads of a DeiT of a width: of 64 channels each, or of a few more where 64 does not divide it."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def data_config(settings: TrainingSettings, model: nn.Module) -> dict[str, Any]:
    """Input size, mean, deviation, interpolation and crop that the model's weights were made for."""
    options = {} if settings.image_size is None else {"img_size": settings.image_size}
    config: dict[str, Any] = resolve_data_config(options, model=model)
    return config


def _other_classes(settings: TrainingSettings, source: str, num_classes: int, error: Exception | None = None) -> str:
    said = "" if error is None else f" ({str(error).splitlines()[-1].strip()})"
    return (
        f"{source} do not fit model={settings.model!r} with the {num_classes} classes of {settings.data_dir}{said}. "
        "The dense model must have learned these classes before it is sparsified: python -m recipes.dense does that."
    )

"""Dense models from timm, with weights that fit the data."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import nn

from recipes.engine.settings import SettingsError, TrainingSettings


def dense_model(settings: TrainingSettings, num_classes: int, *, new_head: bool = False, **options: Any) -> nn.Module:
    """The dense model that the settings name, with their weights.

    Args:
        settings: ``model``, ``width``, ``image_size``, ``checkpoint``, ``pretrained``, ``drop_path``.
        num_classes: Classes of the data.
        new_head: If the weights are for another number of classes, start with a new head.
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
    known = timm.get_pretrained_cfg(settings.model)
    pretrained = settings.checkpoint is not None or settings.pretrained
    source = str(settings.checkpoint or f"timm's weights of {settings.model}")
    try:
        if known is not None and settings.checkpoint is not None:
            learned = _classes_in(settings.checkpoint, known.classifier)
            # timm adapts position embedding, first convolution and head of a file as it does for its own weights.
            options["pretrained_cfg_overlay"] = {"file": str(settings.checkpoint), "num_classes": learned}
        else:
            learned = None if known is None else known.num_classes
        if pretrained and learned not in (None, num_classes) and not new_head:
            raise SettingsError(_do_not_fit(settings, source, num_classes, f"they are for {learned}"))
        model = _create(settings.model, pretrained=pretrained, num_classes=num_classes, **options)
    except (RuntimeError, OSError, UnpicklingError, SafetensorError) as error:
        if settings.checkpoint is None:
            raise SettingsError(f"timm cannot make model={settings.model!r}: {error}") from error
        last = str(error).strip().splitlines()[-1].strip()
        raise SettingsError(_do_not_fit(settings, source, num_classes, last)) from error
    return model


def _create(name: str, **options: Any) -> nn.Module:
    """The model of that name; one that has nothing of the images' size in it is not told the size."""
    try:
        model: nn.Module = timm.create_model(name, **options)
    except TypeError as error:
        if "unexpected keyword argument 'img_size'" not in str(error):
            raise
        del options["img_size"]
        model = timm.create_model(name, **options)
    return model


def _classes_in(checkpoint: Path, classifier: Any) -> int | None:
    """The number of classes of the weights in a file; ``None`` if they have no head of this name."""
    name = classifier if isinstance(classifier, str) else (classifier or ("head",))[0]
    weight = load_state_dict(str(checkpoint), weights_only=True).get(f"{name}.weight")
    return None if weight is None else int(weight.shape[0])


def num_heads(width: int) -> int:
    """Attention heads of a DeiT of this width: 64 channels each, or a few more if 64 does not divide it."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def data_config(settings: TrainingSettings, model: nn.Module) -> dict[str, Any]:
    """Input size, mean, standard deviation, interpolation and crop that the weights were trained with."""
    options = {} if settings.image_size is None else {"img_size": settings.image_size}
    config: dict[str, Any] = resolve_data_config(options, model=model)
    return config


def _do_not_fit(settings: TrainingSettings, source: str, num_classes: int, why: str) -> str:
    return (
        f"{source} do not fit model={settings.model!r} with the {num_classes} classes of {settings.data_dir}: {why}. "
        "The dense model must be trained on these classes before it is sparsified: python -m recipes.dense does that."
    )

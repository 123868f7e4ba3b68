"""Image classifiers of transformers, with weights that fit the data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTConfig

from recipes.engine.settings import SettingsError

# What the paper's schedule freezes, under the names in transformers' models.
_EMBEDDINGS = ("cls_token", "class_embedding", "pos_embed", "position_embeddings", "position_embedding.weight")


def trained_classifier(name: str, num_classes: int) -> nn.Module:
    """A model that was trained on the classes of the data.

    Args:
        name: Folder, or id on the Hub.
        num_classes: Classes of the data.

    Raises:
        SettingsError: There is no such model, it has other classes, or weights are missing.
    """
    learned = _config(name).num_labels
    if learned != num_classes:
        raise SettingsError(_untrained(name, num_classes, f"knows {learned}"))
    model, missing = _load(name)
    if missing:
        raise SettingsError(_untrained(name, num_classes, f"lacks weights of {', '.join(sorted(missing)[:3])}"))
    return model


def classifier_to_train(name: str, classes: Sequence[str]) -> nn.Module:
    """A model with one output per class: its own head, or a new one if it was trained on other classes.

    Raises:
        SettingsError: There is no such model.
    """
    if _config(name).num_labels == len(classes):
        return _load(name)[0]
    return _load(name, **_labels(classes), ignore_mismatched_sizes=True)[0]


def tiny_classifier(classes: Sequence[str]) -> nn.Module:
    """A ViT of four narrow blocks for images of 64 pixels, with random weights."""
    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        **_labels(classes),
    )
    model: nn.Module = AutoModelForImageClassification.from_config(config)
    return model


def image_processor(name: str) -> Any:
    """The image processor saved with a model; ``None`` if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # what transformers raises where there is none, or none for this kind of model
        return None


def freeze_embeddings(model: nn.Module) -> None:
    """Freeze class token and position embeddings, as in the paper's schedule."""
    for name, parameter in model.named_parameters():
        if name.endswith(_EMBEDDINGS):
            parameter.requires_grad_(False)


def keep_names(model: Any) -> None:
    """Make ``model.save_pretrained`` write weights under the names of the model's ``state_dict``.

    From version 5 on, transformers writes them under the names of the checkpoints that were published first, which the
    Trainer ignores when it loads the best or the last checkpoint again (transformers issue 48805).
    ``from_pretrained`` reads both.
    """
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SettingsError(f"transformers cannot open model {name!r}: {error}") from error


def _load(name: str, **options: Any) -> tuple[nn.Module, list[str]]:
    """A model in float32, and the names of weights that are not in its files."""
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise SettingsError(f"transformers cannot load model {name!r} as an image classifier: {error}") from error
    return model, list(info["missing_keys"])


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def _untrained(name: str, num_classes: int, said: str) -> str:
    return (
        f"model {name!r} does not know the {num_classes} classes of the data: it {said}. A dense model must be "
        "trained on them before it is sparsified: python -m recipes.hf_finetune --dense does that, and writes a model "
        "to start from."
    )

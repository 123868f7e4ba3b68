"""Models of the table's rows, with random weights or those of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import timm
import tokenprune_timm.lvvit  # noqa: F401  # registers the models
import yaml
from timm.models import load_state_dict
from torch import nn

import tokenprune
from recipes.engine.run_folder import settings_file
from recipes.engine.settings import SettingsError, ratio_of
from recipes.paper.rows import ARCHITECTURES, Architecture, Row

# What a run of ours must share with the paper for its weights to count for a row.
_AS_PUBLISHED = {"stages": None, "scorer": "predictor"}


def sparse_model(architecture: Architecture) -> nn.Module:
    """The architecture with random weights and DynamicViT's three stages."""
    model: nn.Module = timm.create_model(architecture.model, **architecture.options)
    return tokenprune.sparsify(model)


def weights_of(row: Row, path: Path, num_classes: int) -> nn.Module:
    """The row's model with the weights of a checkpoint.

    Args:
        row: The row.
        path: What a recipe wrote to its output (the folder, or the weights in it), an official DynamicViT
            checkpoint, or, for a dense row, a checkpoint of the dense model.
        num_classes: Classes of the data.

    Raises:
        SettingsError: They are not the weights of this row's model.
    """
    file = path / ("model.safetensors" if row.ratio == 1 else "tokenprune.safetensors") if path.is_dir() else path
    _check_run(row, settings_file(file.parent))
    architecture = ARCHITECTURES[row.architecture]
    model: nn.Module = timm.create_model(architecture.model, num_classes=num_classes, **architecture.options)
    if row.ratio < 1:
        tokenprune.sparsify(model, keep_ratio=row.ratio)
    try:
        state = load_state_dict(str(file), weights_only=True)
        if any(name.startswith("score_predictor.") for name in state):
            state = tokenprune.load_dynamicvit(file, keep_ratio=min(row.ratio, 0.99)).state_dict()
        model.load_state_dict(state)
    except Exception as error:  # torch, pickle and safetensors raise a dozen kinds for damaged files
        raise SettingsError(
            f"{file} does not hold the weights of {row.name} ({architecture.title} at {architecture.image_size} px, "
            f"{num_classes} classes): {error}"
        ) from error
    return model


def _check_run(row: Row, saved: Path) -> None:
    """Refuse weights that a recipe trained with another ratio, other stages or another scorer."""
    if row.ratio == 1 or not saved.is_file():
        return
    settings = yaml.safe_load(saved.read_text())
    expected = {"keep_ratio": row.ratio, **_AS_PUBLISHED}
    trained = {name: settings.get(name) for name in expected}
    trained["keep_ratio"] = ratio_of(trained["keep_ratio"])
    if trained != expected:
        raise SettingsError(f"{saved.parent} was trained with {trained}; row {row.name} takes {expected}.")

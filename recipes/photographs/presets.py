"""Settings under which recipes run on the photographs: those of all small data sets, and the shipped dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.engine.settings import TrainingSettings
from recipes.photographs.data import make_photographs
from recipes.photographs.model import WEIGHTS
from recipes.small.presets import SMALL_DENSE, SMALL_SPARSE

DATA = Path("runs/photographs-images")
BATCH_SIZE = 64

# 10 epochs of 187 steps.
PHOTOGRAPHS_DENSE: dict[str, Any] = {
    **SMALL_DENSE,
    "data_dir": DATA,
    "model": "photographs_vit",
    "epochs": 10,
    "batch_size": BATCH_SIZE,
    "learning_rate": 1e-3 * 1024 / BATCH_SIZE,
    "horizontal_flip": 0.5,
}
PHOTOGRAPHS_SPARSE: dict[str, Any] = {
    **SMALL_SPARSE,
    "data_dir": DATA,
    "model": "photographs_vit",
    "checkpoint": WEIGHTS,
}


def make_images(settings: TrainingSettings) -> None:
    """Make the image folder that the settings name, if it is missing."""
    make_photographs(settings.data_dir)

"""Settings under which recipes run on the digits: those of all small data sets, and the shipped dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.digits.data import make_digits
from recipes.digits.model import WEIGHTS
from recipes.engine.settings import TrainingSettings
from recipes.small.presets import SMALL_DENSE, SMALL_SPARSE

DATA = Path("runs/digits-images")

# 26 epochs of 156 steps.
DIGITS_DENSE: dict[str, Any] = {**SMALL_DENSE, "data_dir": DATA, "model": "digits_vit", "epochs": 26}
DIGITS_SPARSE: dict[str, Any] = {**SMALL_SPARSE, "data_dir": DATA, "model": "digits_vit", "checkpoint": WEIGHTS}


def make_images(settings: TrainingSettings) -> None:
    """Make the image folder that the settings name, if it is missing."""
    make_digits(settings.data_dir)

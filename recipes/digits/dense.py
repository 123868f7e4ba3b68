"""Train the demo's dense model from scratch and write its weights."""

from __future__ import annotations

from pathlib import Path

from recipes.digits.data import DigitsConfig, make_digits
from recipes.digits.model import WEIGHTS
from recipes.digits.presets import DIGITS_DENSE
from recipes.small.dense import train_from_scratch


def train_digits(
    data: Path,
    output: Path,
    *,
    weights: Path = WEIGHTS,
    epochs: int = 26,
    seed: int = 0,
    digits: DigitsConfig | None = None,
) -> float:
    """Make the images, if they are missing, and train: see `recipes.small.dense.train_from_scratch`.

    ``digits`` says what the image folder holds; ``None`` means the full set.
    """
    make_digits(data, digits)
    return train_from_scratch(DIGITS_DENSE, data, output, weights=weights, epochs=epochs, seed=seed)

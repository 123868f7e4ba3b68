"""Train the photographs' dense model from scratch and write its weights."""

from __future__ import annotations

from pathlib import Path

from recipes.photographs.data import PhotographsConfig, make_photographs
from recipes.photographs.model import WEIGHTS
from recipes.photographs.presets import PHOTOGRAPHS_DENSE
from recipes.small.dense import train_from_scratch


def train_photographs(
    data: Path,
    output: Path,
    *,
    weights: Path = WEIGHTS,
    epochs: int = 10,
    seed: int = 0,
    photographs: PhotographsConfig | None = None,
) -> float:
    """Make the images, if they are missing, and train: see `recipes.small.dense.train_from_scratch`.

    ``photographs`` says what the image folder holds; ``None`` means the full set.
    """
    make_photographs(data, photographs)
    return train_from_scratch(PHOTOGRAPHS_DENSE, data, output, weights=weights, epochs=epochs, seed=seed)

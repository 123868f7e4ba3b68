"""Training of a shipped dense model from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.dense import DenseSettings, train_dense
from recipes.small.model import save_weights


def train_from_scratch(
    preset: Mapping[str, Any], data: Path, output: Path, *, weights: Path, epochs: int, seed: int
) -> float:
    """Train with cross-entropy and write the weights.

    Args:
        preset: The settings, but for what follows.
        data: The image folder.
        output: The folder for the state of the run.
        weights: The safetensors file to write.
        epochs: Passes over the images.
        seed: Seed of weights and order of images.

    Returns:
        Validation accuracy as a fraction.
    """
    chosen = {**preset, "data_dir": data, "epochs": epochs, "warmup_epochs": min(1.0, epochs / 10)}
    settings = DenseSettings(**chosen, output=output / f"dense-seed{seed}", seed=seed, resume=True)
    outcome = train_dense(settings, description="dense model")
    save_weights(outcome.model, weights)
    return outcome.scores["top1"]

"""Train the demo's dense model from scratch and write its weights."""

from __future__ import annotations

from pathlib import Path

from recipes.dense import DenseSettings, train_dense
from recipes.digits.data import DigitsConfig, make_digits
from recipes.digits.model import WEIGHTS, save_dense_model
from recipes.digits.presets import DIGITS_DENSE


def train_digits(
    data: Path,
    output: Path,
    *,
    weights: Path = WEIGHTS,
    epochs: int = 26,
    seed: int = 0,
    digits: DigitsConfig | None = None,
) -> float:
    """Train from scratch with cross-entropy.

    Args:
        data: The digits image folder, made if missing.
        output: The folder for the state of the run.
        weights: The safetensors file to write.
        epochs: Passes over the images.
        seed: Seed of weights and order of images.
        digits: What the image folder holds; ``None`` means the full set.

    Returns:
        Validation accuracy as a fraction.
    """
    make_digits(data, digits)
    chosen = {**DIGITS_DENSE, "data_dir": data, "epochs": epochs, "warmup_epochs": min(1.0, epochs / 10)}
    settings = DenseSettings(**chosen, output=output / f"dense-seed{seed}", seed=seed, resume=True)
    outcome = train_dense(settings, description="dense model")
    save_dense_model(outcome.model, weights)
    return outcome.scores["top1"]

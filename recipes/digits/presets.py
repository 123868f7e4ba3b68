"""Settings under which recipes run on the digits: no augmentation, short runs, the shipped dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.digits.data import make_digits
from recipes.digits.model import WEIGHTS
from recipes.engine.settings import TrainingSettings

DATA = Path("runs/digits-images")
BATCH_SIZE = 128

DIGITS: dict[str, Any] = {
    "data_dir": DATA,
    "model": "digits_vit",
    "pretrained": False,
    "auto_augment": "",
    "color_jitter": 0.0,
    "horizontal_flip": 0.0,
    "min_crop": 1.0,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "batch_size": BATCH_SIZE,
    "ema_decay": 0.0,
    "num_workers": 1,
    "log_every": 10,
}

# Dense training from scratch: 26 epochs of 156 steps, random crops.
DIGITS_DENSE: dict[str, Any] = {
    **DIGITS,
    "epochs": 26,
    "warmup_epochs": 1.0,
    "learning_rate": 1.5e-3 * 1024 / BATCH_SIZE,
    "drop_path": 0.0,
    "min_crop": 0.7,
    "label_smoothing": 0.1,
}

# A step of Adam moves a weight by about the learning rate. The static scorer has one weight
# per position, which has to reach ±2 by itself; the predictor's weights add up.
SCORER_LEARNING_RATES = {"predictor": 3e-3, "static": 5e-2}
BACKBONE_LEARNING_RATES = {"masked": 5e-5, "gathered": 2e-4}


def learning_rates(scorer: str, schedule: str = "masked") -> dict[str, float]:
    """The settings that give a scorer its learning rate, and the backbone the same one for every scorer."""
    rate = SCORER_LEARNING_RATES.get(scorer, SCORER_LEARNING_RATES["predictor"])
    return {
        "learning_rate": rate * 1024 / BATCH_SIZE,
        "calibration_rate": rate,
        "backbone_factor": BACKBONE_LEARNING_RATES[schedule] / rate,
    }


# Fine-tuning from the shipped dense model: a hundred steps.
DIGITS_SPARSE: dict[str, Any] = {
    **DIGITS,
    **learning_rates("predictor"),
    "checkpoint": WEIGHTS,
    "epochs": 1,
    "steps_per_epoch": 100,
    "warmup_epochs": 0.1,
    "frozen_epochs": 0.0,
    "label_smoothing": 0.0,
}


def make_images(settings: TrainingSettings) -> None:
    """Make the image folder that the settings name, if it is missing."""
    make_digits(settings.data_dir)

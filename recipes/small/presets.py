"""Settings under which recipes run on the small data sets: no augmentation, short runs."""

from __future__ import annotations

from typing import Any

BATCH_SIZE = 128

SMALL: dict[str, Any] = {
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

# Dense training from scratch, with random crops.
SMALL_DENSE: dict[str, Any] = {
    **SMALL,
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


# Fine-tuning from a shipped dense model: a hundred steps.
SMALL_SPARSE: dict[str, Any] = {
    **SMALL,
    **learning_rates("predictor"),
    "epochs": 1,
    "steps_per_epoch": 100,
    "warmup_epochs": 0.1,
    "frozen_epochs": 0.0,
    "label_smoothing": 0.0,
}

"""One run of the demo: sparsify the dense model with one scorer and fine-tune it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

import tokenprune
from recipes.digits.model import WEIGHTS, build_model
from recipes.digits.presets import DIGITS_SPARSE
from recipes.dynamicvit import SparseSettings
from recipes.dynamicvit import fine_tune as fine_tune_sparse
from recipes.engine.fitting import run_once
from recipes.engine.logbook import read_log
from recipes.small.presets import learning_rates

STEPS_PER_EPOCH = 100


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """What decides a fine-tuning run.

    Attributes:
        scorer: What scores the tokens: ``"predictor"``, ``"random"`` or ``"static"``.
        keep_ratio: ρ; the three stages keep ρ, ρ², ρ³ of the patch tokens.
        steps: Optimisation steps; more than 100 are rounded up to epochs of equal length.
        seed: Seed of the scorers' weights, the order of images and the sampled decisions.
        schedule: ``"masked"``, or ``"gathered"``: calibrated first, for 100 steps without labels.
    """

    scorer: str
    keep_ratio: float
    steps: int
    seed: int = 0
    schedule: Literal["masked", "gathered"] = "masked"

    def settings(self, data: Path, output: Path, dense_weights: Path) -> SparseSettings:
        """The settings of the run, in a folder of its own in ``output``."""
        epochs = math.ceil(self.steps / STEPS_PER_EPOCH)
        digest = hashlib.sha256(dense_weights.read_bytes() + (data / "digits.json").read_bytes()).hexdigest()
        chosen: dict[str, Any] = {
            **DIGITS_SPARSE,
            **learning_rates(self.scorer, self.schedule),
            "schedule": self.schedule,
            "data_dir": data,
            "checkpoint": dense_weights,
            "keep_ratio": [self.keep_ratio],
            "scorer": self.scorer,
            "epochs": epochs,
            "steps_per_epoch": math.ceil(self.steps / epochs),
            "warmup_epochs": epochs / 10,
            "log_every": 1,
            "seed": self.seed,
            "output": output / f"{self._name}-seed{self.seed}-{digest[:8]}",
        }
        return SparseSettings(**chosen, resume=True)

    @property
    def _name(self) -> str:
        name = f"{self.scorer}-{self.keep_ratio:g}-{self.steps}"
        return name if self.schedule == "masked" else f"{name}-{self.schedule}"


@dataclass(frozen=True, kw_only=True)
class SparseResult:
    """What a run reached.

    Attributes:
        config: The run.
        folder: Its output folder.
        accuracy: Validation accuracy of the pruned model, as a fraction.
        kept: Fraction of patch tokens kept after the last stage at each step, as sampled in training.
    """

    config: SparseConfig
    folder: Path
    accuracy: float
    kept: list[float]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return {**asdict(self), "folder": str(self.folder)}

    def model(self) -> nn.Module:
        """The fine-tuned model."""
        return tokenprune.from_pretrained(self.folder, model=build_model())


def fine_tune(config: SparseConfig, data: Path, output: Path, dense_weights: Path = WEIGHTS) -> SparseResult:
    """Make one run, or read its results if it was made before.

    Args:
        config: The run.
        data: The digits image folder.
        output: The run gets a folder of its own in it.
        dense_weights: The dense model, which is both the start and the teacher.

    Raises:
        Interrupted: Ctrl-C was pressed; the same call continues where it stopped.
    """
    settings = config.settings(data, output, dense_weights)
    made = run_once(
        settings, lambda: fine_tune_sparse(settings, description=f"{config.scorer}, ρ {config.keep_ratio:g}")
    )
    return SparseResult(
        config=config,
        folder=settings.output,
        accuracy=made["scores"]["top1"],
        kept=[round(line["kept_3"], 4) for line in read_log(settings.output, "training")],
    )

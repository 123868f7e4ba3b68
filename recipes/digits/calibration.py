"""The demo's model with predictors that were calibrated without labels."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import tokenprune
from recipes.digits.model import WEIGHTS, load_dense_model
from recipes.digits.sparse import SparseConfig
from recipes.engine.checkpoints import Interrupted, write_whole
from recipes.engine.randomness import seed_everything
from recipes.small.calibration import images_of


def calibrated_model(config: SparseConfig, data: Path, output: Path, dense_weights: Path = WEIGHTS) -> nn.Module:
    """The dense model with predictors that were calibrated without labels, or what an earlier call has saved of it.

    Args:
        config: Of the run; its scorer is trained alone.
        data: The digits image folder.
        output: The model gets a folder of its own in it.
        dense_weights: The dense model.

    Raises:
        Interrupted: Ctrl-C was pressed; the same call begins again.
    """
    settings = config.settings(data, output, dense_weights)
    folder = settings.output.with_name(f"calibrated-{settings.output.name}")
    dense = load_dense_model(dense_weights)
    if folder.exists():
        return tokenprune.from_pretrained(folder, model=dense)
    seed_everything(config.seed)
    model: nn.Module = tokenprune.sparsify(dense, keep_ratio=config.keep_ratio, scorer=config.scorer)
    report = tokenprune.calibrate(model, images_of(settings, model, config.seed), steps=config.steps, seed=config.seed)
    if report.stopped == "interrupted":
        raise Interrupted(f"the calibration was stopped after step {report.steps} of {config.steps}.")
    write_whole(folder, lambda partial: tokenprune.save_pretrained(model, partial))
    return model

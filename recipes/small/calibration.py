"""Calibration of a small dense model without labels, over several seeds: one for all keep ratios, and gathered."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import tokenprune
from recipes.dynamicvit import SparseSettings
from recipes.engine.checkpoints import write_json
from recipes.engine.data import class_indices, loader, open_images
from recipes.engine.fitting import evaluate_dense, evaluate_model
from recipes.engine.models import data_config
from recipes.engine.randomness import seed_everything
from recipes.engine.tables import Table

KEEP_RATIO = 0.5


def run_calibration(
    *,
    load_model: Callable[[], nn.Module],
    settings: SparseSettings,
    output: Path,
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    backbone_steps: int,
    console: Console,
    scorer: str = "predictor",
) -> list[dict[str, Any]]:
    """Calibrate the predictors of the dense model once a seed, and print the accuracy at every ratio.

    Args:
        load_model: Gives the trained dense model.
        settings: Which images there are, and how they are read.
        output: ``calibration.json`` is written there.
        keep_ratios: Where to measure.
        seeds: Of the scorers' weights, the order of images and the sampled decisions.
        steps: Of the calibration.
        backbone_steps: Gathered steps of the backbone that follow, at each ratio by itself; 0 for none.
        console: Where the table is printed.
        scorer: The registered name of a learned scorer.

    Returns:
        A dict a seed and ratio, with the accuracy calibrated and, if there are such steps, trained on.
    """
    output.mkdir(parents=True, exist_ok=True)
    dense = evaluate_dense(settings)["top1"]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        seed_everything(seed)
        model: Any = tokenprune.sparsify(load_model(), keep_ratio=KEEP_RATIO, scorer=scorer)
        images = images_of(settings, model, seed)
        report = tokenprune.calibrate(model, images, steps=steps, seed=seed)
        calibrated = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        console.print(f"seed {seed}: {report}")
        for ratio in keep_ratios:
            model.load_state_dict(calibrated)
            model.tokenprune.keep_ratio = ratio
            row = {"seed": seed, "keep_ratio": ratio, "calibrated": accuracy_of(model, settings)}
            if backbone_steps:
                tokenprune.calibrate(model, images, steps=0, train="all", backbone_steps=backbone_steps, seed=seed)
                row["gathered"] = accuracy_of(model, settings)
            rows.append(row)
    write_json(output / "calibration.json", {"dense": dense, "steps": steps, "rows": rows})
    console.print(table(rows, dense, keep_ratios).rich())
    return rows


def images_of(settings: SparseSettings, model: nn.Module, seed: int) -> Any:
    """Shuffled batches of training images, with labels that nobody looks at."""
    images = open_images(settings, training=True)
    images.set_epoch(seed)
    return loader(images, settings, data_config(settings, model), training=True)


def accuracy_of(model: nn.Module, settings: SparseSettings) -> float:
    """Validation accuracy of a model, as a fraction."""
    classes = class_indices(open_images(settings, training=True))
    return evaluate_model(model.eval(), settings, classes=classes)["top1"]


def table(rows: Sequence[dict[str, Any]], dense: float, keep_ratios: Sequence[float]) -> Table:
    """Mean and range over the seeds."""
    made = Table(
        title=f"Calibrated without labels; dense {dense:.2%}", columns=("ρ", "trained", "mean", "lowest … highest")
    )
    for ratio in keep_ratios:
        for name in ("calibrated", "gathered"):
            found = [row[name] for row in rows if row["keep_ratio"] == ratio and name in row]
            if found:
                spread = f"{min(found):.2%} … {max(found):.2%}"
                made.add(f"{ratio:g}", LABELS[name], f"{statistics.mean(found):.2%}", spread)
    return made


LABELS = {"calibrated": "predictors", "gathered": "predictors, then the backbone"}

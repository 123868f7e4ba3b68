"""Fixed and adaptive budgets beside each other, on one of the small data sets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokenprune
from recipes.engine.checkpoints import write_json
from recipes.engine.data import loader, open_images
from recipes.engine.models import data_config
from recipes.engine.settings import TrainingSettings
from recipes.small.presets import BATCH_SIZE, SMALL

NUM_CALIBRATION = 512
SCORERS = ("informative", "predictor", "cls_attention")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A scorer at a ratio, with one seed.

    Attributes:
        scorer: Its name.
        keep_ratio: ρ.
        seed: Of the order of the images, and of the predictors' training.
        fixed: Accuracy with as many tokens of every image.
        adaptive: Accuracy with as many as each calls for.
        fixed_gmacs: Multiply-adds of the former, in 10⁹.
        adaptive_gmacs: Their mean over the validation images.
        spread: Their quartiles.
    """

    scorer: str
    keep_ratio: float
    seed: int
    fixed: float
    adaptive: float
    fixed_gmacs: float
    adaptive_gmacs: float
    spread: tuple[float, float]


def run_budgets(
    *,
    load_model: Callable[[], nn.Module],
    data: Path,
    output: Path,
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    console: Console,
) -> list[Comparison]:
    """Compare both budgets for each scorer, ratio and seed, print a table and write ``budgets.json``.

    Args:
        load_model: Gives the trained dense model.
        data: An image folder that has been made.
        output: Where ``budgets.json`` goes.
        keep_ratios: Each ρ.
        seeds: Of the order of the images, and of the predictors' training.
        steps: Of the predictors' calibration.
        console: Where the table is printed.
    """
    output.mkdir(parents=True, exist_ok=True)
    training, _ = _images(data, load_model(), training=True)
    validation, labels = _images(data, load_model(), training=False)
    found: list[Comparison] = []
    for scorer in SCORERS:
        for seed in seeds:
            found += _compared(load_model(), scorer, seed, training, (validation, labels), keep_ratios, steps)
            write_json(output / "budgets.json", {"steps": steps, "results": [asdict(one) for one in found]})
    console.print(budgets_table(found))
    return found


def _compared(
    dense: nn.Module,
    scorer: str,
    seed: int,
    training: Tensor,
    validation: tuple[Tensor, Tensor],
    keep_ratios: Sequence[float],
    steps: int,
) -> list[Comparison]:
    images, labels = validation
    torch.manual_seed(seed)
    model: Any = tokenprune.sparsify(dense.eval(), keep_ratio=0.5, scorer=scorer)
    order = torch.randperm(len(training))
    if scorer == "predictor":
        batches = training[order[NUM_CALIBRATION:]].split(BATCH_SIZE)  # others than those that thresholds are found on
        tokenprune.calibrate(model, batches, steps=steps, seed=seed, progress=False)
    tokenprune.calibrate_budget(model, training[order[:NUM_CALIBRATION]].split(BATCH_SIZE), keep_ratios=keep_ratios)
    found = []
    for ratio in keep_ratios:
        model.tokenprune.keep_ratio = ratio
        accuracy = {}
        for budget in ("fixed", "adaptive"):
            model.tokenprune.budget = budget
            accuracy[budget] = _accuracy(model, images, labels)
        report = tokenprune.flops(model, images=images)
        model.tokenprune.budget = "fixed"
        assert report.mean_gmacs is not None and report.spread is not None
        found.append(
            Comparison(
                scorer=scorer,
                keep_ratio=ratio,
                seed=seed,
                **accuracy,
                fixed_gmacs=report.sparse_gmacs,
                adaptive_gmacs=report.mean_gmacs,
                spread=report.spread,
            )
        )
    return found


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])
    return float((logits.argmax(dim=1) == labels).float().mean())


def _images(data: Path, model: nn.Module, *, training: bool) -> tuple[Tensor, Tensor]:
    """All images of a split, as the model takes them, and their classes; in the order of the folder."""
    settings = TrainingSettings(**{**SMALL, "data_dir": data, "model": "digits_vit", "num_workers": 0})
    folder = open_images(settings, training=training)
    batches: Any = loader(folder, settings, data_config(settings, model), training=False)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def budgets_table(found: Sequence[Comparison]) -> Table:
    """Means over the seeds as a rich table."""
    made = Table(title="Accuracy at equal mean multiply-adds")
    for name in ("scorer", "ρ", "seeds", "fixed", "adaptive", "gain, lowest … highest", "GMACs fixed", "adaptive"):
        made.add_column(name, justify="left" if name == "scorer" else "right")
    for scorer, ratio in dict.fromkeys((one.scorer, one.keep_ratio) for one in found):
        same = [one for one in found if (one.scorer, one.keep_ratio) == (scorer, ratio)]
        gains = [100 * (one.adaptive - one.fixed) for one in same]
        made.add_row(
            scorer,
            f"{ratio:g}",
            str(len(same)),
            f"{statistics.mean(one.fixed for one in same):.2%}",
            f"{statistics.mean(one.adaptive for one in same):.2%}",
            f"{min(gains):+.2f} … {max(gains):+.2f}",
            f"{statistics.mean(one.fixed_gmacs for one in same):.4f}",
            f"{statistics.mean(one.adaptive_gmacs for one in same):.4f}",
        )
    return made

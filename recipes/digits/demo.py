"""The demo: a dense model in, five sparse ones out, one table and one picture."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console
from torch import nn

import tokenprune
from recipes.digits.calibration import calibrated_model
from recipes.digits.data import DigitsConfig, make_digits
from recipes.digits.model import WEIGHTS, build_model, load_dense_model
from recipes.digits.sparse import SparseConfig, fine_tune
from recipes.dynamicvit import SparseSettings
from recipes.engine.checkpoints import write_json, write_whole
from recipes.engine.data import loader, open_images
from recipes.engine.fitting import evaluate_dense
from recipes.engine.models import data_config
from recipes.engine.tables import Table
from recipes.small.calibration import accuracy_of
from recipes.small.model import IMAGE_SIZE

INPUT_SIZE = (3, IMAGE_SIZE, IMAGE_SIZE)
BATCH_SIZE = 256
"""Of the timed batches: with 64 such small images, two cores spend their time between products, not on them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        name: The model.
        accuracy: Validation accuracy as a fraction.
        gmacs: GMACs per image.
        gmac_ratio: Dense ÷ sparse GMACs.
        dense_images_per_second: Throughput without pruning, measured in turn with the next.
        images_per_second: Throughput of the model as it is.
        speedup: Median over the pairs.
    """

    name: str
    accuracy: float
    gmacs: float
    gmac_ratio: float
    dense_images_per_second: float
    images_per_second: float
    speedup: float


def run_demo(
    *,
    data: Path,
    output: Path,
    keep_ratio: float,
    steps: int,
    seed: int,
    console: Console,
    pairs: int = 10,
    digits: DigitsConfig | None = None,
    dense_weights: Path = WEIGHTS,
) -> list[Row]:
    """Make the images, the models, the table, the picture and ``results.json``.

    Args:
        data: The digits image folder, made if missing.
        output: Where everything else is written.
        keep_ratio: ρ.
        steps: Steps of the calibration, and of each fine-tuning.
        seed: Seed of the runs.
        console: Where the table is printed.
        pairs: Timed pairs of batches per row.
        digits: What the image folder holds; ``None`` means the full set.
        dense_weights: The trained dense model.

    Raises:
        Interrupted: Ctrl-C was pressed; the same call continues where it stopped.
    """
    output.mkdir(parents=True, exist_ok=True)
    make_digits(data, digits)
    learned, static = (
        SparseConfig(scorer=scorer, keep_ratio=keep_ratio, steps=steps, seed=seed) for scorer in ("predictor", "static")
    )
    settings = learned.settings(data, output, dense_weights)
    dense_accuracy = evaluate_dense(settings)["top1"]
    calibrated = calibrated_model(learned, data, output, dense_weights)
    tuned = [fine_tune(config, data, output, dense_weights) for config in (learned, static)]
    free = [
        tokenprune.sparsify(load_dense_model(dense_weights), keep_ratio=keep_ratio, scorer=scorer, pruned=pruned)
        for scorer, pruned in (("informative", "fuse"), ("random", "drop"))
    ]
    models = {
        "calibrated, no labels": (calibrated, accuracy_of(calibrated, settings)),
        "fine-tuned, labels": (tuned[0].model(), tuned[0].accuracy),
        "training-free": (free[0], accuracy_of(free[0], settings)),
        "static, fine-tuned": (tuned[1].model(), tuned[1].accuracy),
        "random": (free[1], accuracy_of(free[1], settings)),
    }
    rows = _measure(dense_accuracy, models, console, pairs)
    title = f"Tokens kept by the learned scorer, ρ = {keep_ratio:g}"
    picture = tokenprune.show(calibrated, _examples(settings), scores=False, title=title)
    write_whole(output / "kept_tokens.png", lambda partial: picture.savefig(partial, format="png"))
    report = {
        "keep_ratio": keep_ratio,
        "steps": steps,
        "seed": seed,
        "rows": [asdict(row) for row in rows],
        "runs": [result.to_dict() for result in tuned],
        "versions": {"tokenprune": tokenprune.__version__, "torch": torch.__version__, "timm": timm.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_json(output / "results.json", report)
    console.print(table(rows, keep_ratio).rich())
    console.print(f"Results, checkpoints and the picture of kept tokens are in [bold]{output}[/].")
    return rows


def _measure(
    dense_accuracy: float, models: Mapping[str, tuple[nn.Module, float]], console: Console, pairs: int
) -> list[Row]:
    rows: list[Row] = []
    with console.status("measuring speed"):
        for name, (model, accuracy) in models.items():
            counted = tokenprune.flops(model, INPUT_SIZE)
            timed = tokenprune.throughput(model, INPUT_SIZE, batch_size=BATCH_SIZE, pairs=pairs)
            if not rows:
                speed = timed.dense_images_per_second
                rows.append(
                    Row(name="dense", accuracy=dense_accuracy, gmacs=counted.dense_gmacs, gmac_ratio=1.0,
                        dense_images_per_second=speed, images_per_second=speed, speedup=1.0)
                )  # fmt: skip
            rows.append(
                Row(name=name, accuracy=accuracy, gmacs=counted.sparse_gmacs, gmac_ratio=counted.ratio,
                    dense_images_per_second=timed.dense_images_per_second,
                    images_per_second=timed.sparse_images_per_second, speedup=timed.speedup)
            )  # fmt: skip
    return rows


def _examples(settings: SparseSettings) -> torch.Tensor:
    """Six validation images, spread over the classes."""
    images = open_images(settings, training=False)
    loader(images, settings, data_config(settings, build_model()), training=False)  # gives the images their transform
    chosen = [(2 * index + 1) * len(images) // 12 for index in range(6)]
    return torch.stack([images[index][0] for index in chosen])


def table(rows: list[Row], keep_ratio: float) -> Table:
    """The results as a table."""
    made = Table(
        title=f"Handwritten digits among clutter, ρ = {keep_ratio:g}; speed at batch {BATCH_SIZE}",
        columns=("model", "accuracy", "GMACs", "images/s dense", "images/s", "speed-up", "speed-up ÷ GMAC ratio"),
    )
    for row in rows:
        made.add(
            row.name,
            f"{row.accuracy:.1%}",
            f"{row.gmacs:.4f}",
            f"{row.dense_images_per_second:.0f}",
            f"{row.images_per_second:.0f}",
            f"{row.speedup:.2f}",
            f"{row.speedup / row.gmac_ratio:.2f}",
        )
    return made

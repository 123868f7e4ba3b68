"""The demo's runs over several seeds and keep ratios: the table of means in the docs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from recipes.digits.data import make_digits
from recipes.digits.model import WEIGHTS
from recipes.digits.sparse import SparseConfig, fine_tune
from recipes.engine.checkpoints import write_json
from recipes.engine.fitting import evaluate_dense

SCORERS = ("predictor", "random", "static")
LABELS = {"predictor": "learned", "random": "random", "static": "static"}


def run_study(
    *,
    data: Path,
    output: Path,
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    console: Console,
    scorers: Sequence[str] = SCORERS,
    schedule: Literal["masked", "gathered"] = "masked",
) -> dict[str, dict[str, list[float]]]:
    """Run every scorer at every ratio with every seed, print the table and write ``study.json``.

    Returns:
        Accuracies by ratio and scorer, one per seed; the dense model's under ``"1"`` and ``"dense"``.

    Raises:
        Interrupted: Ctrl-C was pressed; the same call continues where it stopped.
    """
    output.mkdir(parents=True, exist_ok=True)
    make_digits(data)
    settings = SparseConfig(scorer="predictor", keep_ratio=1.0, steps=steps).settings(data, output, WEIGHTS)
    accuracies: dict[str, dict[str, list[float]]] = {"1": {"dense": [evaluate_dense(settings)["top1"]]}}
    for ratio in keep_ratios:
        accuracies[f"{ratio:g}"] = {
            scorer: [
                fine_tune(
                    SparseConfig(scorer=scorer, keep_ratio=ratio, steps=steps, seed=seed, schedule=schedule),
                    data,
                    output,
                ).accuracy
                for seed in seeds
            ]
            for scorer in scorers
        }
    report = {"steps": steps, "schedule": schedule, "seeds": list(seeds), "accuracies": accuracies}
    write_json(output / "study.json", report)
    console.print(study_table(accuracies))
    return accuracies


def study_table(accuracies: dict[str, dict[str, list[float]]]) -> Table:
    """Mean and range over the seeds as a rich table."""
    dense = accuracies["1"]["dense"][0]
    made = Table(title=f"Accuracy on held-out digits; dense {dense:.2%}")
    for name in ("ρ", "scorer", "mean", "lowest", "highest", "points below dense"):
        made.add_column(name, justify="left" if name == "scorer" else "right")
    for ratio, scorers in accuracies.items():
        for scorer, values in scorers.items():
            if scorer == "dense":
                continue
            mean = statistics.mean(values)
            made.add_row(
                ratio,
                LABELS[scorer],
                f"{mean:.2%}",
                f"{min(values):.2%}",
                f"{max(values):.2%}",
                f"{100 * (dense - mean):.2f}",
            )
    return made

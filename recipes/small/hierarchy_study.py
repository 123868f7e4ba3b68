"""What fast paths cost in accuracy: a small Swin and a small ConvNeXt on one of the small data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
from rich.console import Console
from timm.models import load_state_dict

import recipes.small.hierarchies  # noqa: F401 - registers the models
import tokenprune
from recipes.dense import DenseSettings, train_dense
from recipes.engine.checkpoints import write_json
from recipes.engine.data import class_indices, open_images
from recipes.engine.fitting import evaluate_model, run_once
from recipes.engine.models import data_config
from recipes.engine.randomness import seed_everything
from recipes.engine.tables import Table
from recipes.hierarchy import REDUCTION, HierarchySettings, start_fast_paths, train_hierarchy, training_images
from recipes.small.presets import learning_rates
from tokenprune.scorers import Random

STARTS = ("zero", "random", "fitted")
FITTED = (("predictor", "fitted"), ("random", "fitted"))
PLANS: dict[tuple[float, ...], tuple[tuple[str, str], ...]] = {
    (0.7, 0.5, 0.3): (*(("predictor", start) for start in STARTS[:-1]), *FITTED),
    (0.5, 0.3, 0.1): FITTED,
    (0.2, 0.1, 0.05): FITTED,
}
"""By plan, the scorers with starts of the fast paths. A predictor that was not trained says as little as chance."""
CALIBRATED: tuple[Literal["zero", "fitted"], ...] = ("zero", "fitted")
"""Starts of the fast paths with which predictors are trained alone."""
MODELS = ("small_swin", "small_convnext")
BATCH_SIZE = 64
"""Of dense training; half of the flat models'."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A result.

    Attributes:
        model: timm's name.
        keep_ratios: Of the three stages; empty for the dense model.
        scorer: Its name.
        fast_paths: How they start.
        trained: What is: ``"all"``, ``"predictors"``, without labels, or ``""``.
        steps: Of training.
        accuracy: On the validation images, as a fraction.
        unpruned: The same weights' without pruning; ``None`` where they are the dense model's.
        gmacs: An image.
    """

    model: str
    keep_ratios: tuple[float, ...]
    scorer: str
    fast_paths: str
    trained: str
    steps: int
    accuracy: float
    unpruned: float | None
    gmacs: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """What decides the results.

    Attributes:
        dense: Settings of dense training.
        sparse: Settings of fine-tuning.
        data: The image folder.
        output: Every run gets a folder in it.
        epochs: Of dense training.
        steps: Of fine-tuning.
        seed: Of everything random.
    """

    dense: Mapping[str, Any]
    sparse: Mapping[str, Any]
    data: Path
    output: Path
    epochs: int
    steps: int
    seed: int

    def run(self, models: Sequence[str] = MODELS, *, console: Console) -> list[Row]:
        """Train what has not been trained yet, and print the table; ``hierarchies.json`` has it too."""
        rows = [row for model in models for row in self.rows(model)]
        write_json(self.output / "hierarchies.json", [asdict(row) for row in rows])
        console.print(table(rows).rich())
        return rows

    def rows(self, model: str) -> Iterator[Row]:
        """The results of one model."""
        dense = self.dense_settings(model)
        made = run_once(dense, partial(train_dense, dense, description=f"{model}, dense"))
        yield Row(model=model, keep_ratios=(), scorer="", fast_paths="", trained="", steps=0,
                  accuracy=made["scores"]["top1"], unpruned=None, gmacs=made["gmacs"]["dense"])  # fmt: skip
        for start in CALIBRATED:
            yield from self._calibrated(model, start)
        for settings in self.sparse_settings(model):
            yield self._untrained(settings)
            label = f"{model}, {settings.scorer}, {settings.fast_paths}, {settings.keep_ratio}"
            made = run_once(settings, partial(train_hierarchy, settings, description=label))
            scores, gmacs = made["scores"], made["gmacs"]["sparse"]
            yield _row(settings, scores["top1"], gmacs, trained="all", steps=self.steps, unpruned=scores["dense_top1"])

    def dense_settings(self, model: str) -> DenseSettings:
        """Of the dense model."""
        given = {"model": model, "data_dir": self.data, "epochs": self.epochs, "warmup_epochs": 0.5}
        given |= {"seed": self.seed, "batch_size": BATCH_SIZE, "learning_rate": 1.5e-3 * 1024 / BATCH_SIZE}
        given["output"] = self.output / f"{model}-dense-seed{self.seed}"
        return DenseSettings(**{**self.dense, **given, "resume": True})

    def sparse_settings(self, model: str) -> Iterator[HierarchySettings]:
        """Of every run of fine-tuning."""
        weights = self.dense_settings(model).output / "model.safetensors"
        for ratios, rows in PLANS.items():
            for scorer, start in rows:
                given = {"model": model, "data_dir": self.data, "checkpoint": weights, "keep_ratio": [*ratios]}
                given |= {"scorer": scorer, "fast_paths": start, "steps_per_epoch": self.steps, "seed": self.seed}
                name = f"{model}-{scorer}-{start}-{ratios[0]:g}-{self.steps}-seed{self.seed}"
                given |= {**learning_rates(scorer), "output": self.output / name}
                yield HierarchySettings(**{**self.sparse, **given, "resume": True})

    def _untrained(self, settings: HierarchySettings) -> Row:
        return _measured(_sparse(settings), settings, trained="", steps=0)

    def _calibrated(self, model: str, start: Literal["zero", "fitted"]) -> Iterator[Row]:
        """Predictors trained without labels, once for all plans, and tokens chosen at random, with the same weights."""
        every = [settings for settings in self.sparse_settings(model) if settings.fast_paths == "fitted"]
        first = replace(every[0], fast_paths=start)
        made = _sparse(first)
        stages = made.tokenprune.stages
        for stage in stages:
            stage.reduction.requires_grad_(False)  # as the backbone, so that predictors alone are trained
        images = training_images(first, made, self.steps * first.batch_size)
        tokenprune.calibrate(made, images, steps=self.steps, seed=self.seed, progress=False)
        learned = [stage.scorer for stage in stages]
        for settings in every:
            made.tokenprune.keep_ratio = settings.ratio
            for stage, scorer in zip(stages, learned, strict=True):
                stage.scorer = scorer if settings.scorer == "predictor" else Random()
            seed_everything(self.seed)
            settings = replace(settings, fast_paths=start)
            yield _measured(made, settings, trained="predictors", steps=self.steps)


def _sparse(settings: HierarchySettings) -> Any:
    """The dense model, sparsified, with its fast paths at their start."""
    seed_everything(settings.seed)
    classes = class_indices(open_images(settings, training=True)) or {}
    model = timm.create_model(settings.model, num_classes=len(classes))
    model.load_state_dict(load_state_dict(str(settings.checkpoint)))
    tokenprune.sparsify(model.eval(), keep_ratio=settings.ratio, scorer=settings.scorer, pruned=REDUCTION)
    start_fast_paths(model, settings)
    return model


def _measured(model: Any, settings: HierarchySettings, *, trained: str, steps: int) -> Row:
    """The row of a model whose dense weights are as they were."""
    classes = class_indices(open_images(settings, training=True)) or {}
    gmacs = tokenprune.flops(model, data_config(settings, model)["input_size"]).sparse_gmacs
    accuracy = evaluate_model(model, settings, classes=classes)["top1"]
    return _row(settings, accuracy, gmacs, trained=trained, steps=steps, unpruned=None)


def _row(
    settings: HierarchySettings, accuracy: float, gmacs: float, *, trained: str, steps: int, unpruned: float | None
) -> Row:
    return Row(model=settings.model, keep_ratios=tuple(settings.keep_ratio or ()), scorer=settings.scorer,
               fast_paths=settings.fast_paths, trained=trained, steps=steps, accuracy=accuracy, unpruned=unpruned,
               gmacs=gmacs)  # fmt: skip


def table(rows: list[Row]) -> Table:
    """The rows, one a line."""
    columns = ("model", "keep ratios", "scorer", "fast paths", "trained", "steps", "accuracy", "unpruned", "MMACs")
    made = Table(title="Fast paths", columns=columns)
    for row in rows:
        plan = ", ".join(f"{ratio:g}" for ratio in row.keep_ratios) or "dense"
        what = (plan, row.scorer, row.fast_paths, row.trained, str(row.steps) if row.keep_ratios else "")
        unpruned = "" if row.unpruned is None else f"{row.unpruned:.2%}"
        made.add(row.model, *what, f"{row.accuracy:.2%}", unpruned, f"{row.gmacs * 1e3:.2f}")
    return made

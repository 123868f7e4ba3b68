"""Making the points: sparsify at a cost, train what is to be trained, evaluate; each of them once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import tokenprune
from recipes.dynamicvit import attached, fine_tune
from recipes.engine.checkpoints import write_json, write_whole
from recipes.engine.fitting import run_once
from recipes.engine.randomness import seed_everything
from recipes.frontier.grid import Method, Point
from recipes.frontier.plans import plan_at, sparsified
from recipes.frontier.tasks import Task
from recipes.small.presets import SCORER_LEARNING_RATES

CALIBRATION_STEPS = 100
GATHERED_STEPS = 150


class Runs:
    """The points of a data set, in a folder, from which a later call goes on.

    Args:
        task: The data set.
        output: The folder of all data sets.
    """

    def __init__(self, task: Task, output: Path) -> None:
        self.task, self.output = task, output
        self.folder = output / task.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "points.json"
        self.found: dict[str, dict[str, Any]] = self._read(self._file)

    def dense(self) -> dict[str, Any]:
        """Accuracy and GMACs of the dense model."""
        if "dense" not in self.found:
            model = tokenprune.sparsify(self.task.load_dense_model(), scorer="random")
            gmacs = tokenprune.flops(model, attached(model).backbone.input_size(model)).dense_gmacs
            accuracy = self.task.accuracy(tokenprune.unsparsify(model))
            self._keep("dense", {"accuracy": accuracy, "gmacs": gmacs})
        return self.found["dense"]

    def make(self, point: Point) -> dict[str, Any]:
        """What a point was found to be: ``accuracy``, ``gmacs``, and the plan's ``keep_ratios``."""
        name = name_of(point)
        if name not in self.found:
            plan = self._plan(point)
            model = self._model(point, plan)
            attached(model).keep_ratio = plan["keep_ratios"]
            seed_everything(point.seed)
            self._keep(name, {**asdict(point), **plan, "accuracy": self.task.accuracy(model)})
        return self.found[name]

    def _keep(self, name: str, found: dict[str, Any]) -> None:
        self.found = {**self._read(self._file), name: found}  # another process may have added some
        write_json(self._file, self.found)

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def _sparsified(self, method: Method, keep_ratio: Any = None) -> nn.Module:
        return sparsified(self.task.load_dense_model(), method, keep_ratio)

    def _plan(self, point: Point) -> dict[str, Any]:
        """Keep ratios and GMACs at the point's cost: the same for every training, seed and data set.

        The dense models of the data sets differ in their heads alone, by a ten-thousandth of the multiply-adds.
        """
        file = self.output / "plans.json"
        plans = self._read(file)
        name = f"{point.method.scorer}-{point.method.pruned}-{point.cost:g}"
        if name not in plans:
            plan = plan_at(self.task.load_dense_model(), point.method, point.cost * self.dense()["gmacs"])
            plans = {**self._read(file), name: plan}
            write_json(file, plans)
        found: dict[str, Any] = plans[name]
        return found

    def _model(self, point: Point, plan: dict[str, Any]) -> nn.Module:
        match point.method.training:
            case "none":
                return self._sparsified(point.method, plan["keep_ratios"])
            case "calibrated":
                return self._calibrated(point)
            case "gathered":
                if point.method.scorer in SCORER_LEARNING_RATES:
                    model = self._calibrated(point)
                    attached(model).keep_ratio = plan["keep_ratios"]
                else:
                    model = self._sparsified(point.method, plan["keep_ratios"])
                images = self.task.training_batches(point.seed)
                tokenprune.calibrate(
                    model, images, steps=0, train="all", backbone_steps=GATHERED_STEPS, keep_ratio_range=None,
                    seed=point.seed, progress=False,
                )  # fmt: skip
                return model
            case "masked":
                return self._masked(point, plan)

    def _calibrated(self, point: Point) -> nn.Module:
        """With scorers that were trained once for all costs and reductions, tokens dropped."""
        method = point.method
        folder = self.folder / f"{method.scorer}-seed{point.seed}"
        if not folder.exists():
            seed_everything(point.seed)
            model = self._sparsified(Method(scorer=method.scorer, pruned="drop", training="calibrated"))
            report = tokenprune.calibrate(
                model, self.task.training_batches(point.seed), steps=CALIBRATION_STEPS,
                learning_rate=SCORER_LEARNING_RATES[method.scorer], seed=point.seed, progress=False,
            )  # fmt: skip

            def write(partial: Path) -> None:
                tokenprune.save_pretrained(model, partial)
                (partial / "calibration.json").write_text(report.to_json())

            write_whole(folder, write)
        calibrated = tokenprune.from_pretrained(folder, model=self.task.load_dense_model())
        model = self._sparsified(method)
        attached(model).stages.load_state_dict(attached(calibrated).stages.state_dict())
        return model

    def _masked(self, point: Point, plan: dict[str, Any]) -> nn.Module:
        """DynamicViT's own order: scorers and backbone together, with labels, every token in every block."""
        settings = self.task.settings(
            self.folder / name_of(point), keep_ratio=plan["keep_ratios"], scorer=point.method.scorer, seed=point.seed
        )
        run_once(settings, lambda: fine_tune(settings, description=name_of(point)))
        return tokenprune.from_pretrained(settings.output, model=self.task.load_dense_model())


def name_of(point: Point) -> str:
    """The name under which a point is kept."""
    method = point.method
    return f"{method.training}-{method.scorer}-{method.pruned}-{point.cost:g}-seed{point.seed}"

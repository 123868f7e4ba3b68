"""From settings to a trained model: data, dense model, what a recipe makes of it, training, results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import tokenprune
from recipes.engine.checkpoints import write_json, write_whole
from recipes.engine.data import class_indices, loader, number_of_classes, open_images
from recipes.engine.evaluation import evaluate, is_sparsified
from recipes.engine.models import data_config, dense_model
from recipes.engine.randomness import seed_everything
from recipes.engine.run_folder import check_continuation
from recipes.engine.settings import Settings, TrainingSettings
from recipes.engine.tables import Table
from recipes.engine.training import LossFunction, make_accelerator, train


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a recipe makes of a dense model.

    Attributes:
        model: What to train.
        loss_function: As `recipes.engine.training.train` takes it.
        parameter_groups: From `recipes.engine.optimization.parameter_groups`.
        frozen_epochs: Epochs during which groups marked ``"waits"`` have learning rate 0.
        find_unused_parameters: Whether some parameters get no gradient in some steps.
    """

    model: nn.Module
    loss_function: LossFunction
    parameter_groups: list[dict[str, Any]]
    frozen_epochs: float = 0.0
    find_unused_parameters: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run reached.

    Attributes:
        model: The trained model, or its EMA.
        scores: As `recipes.engine.evaluation.evaluate_both` returns them.
        gmacs: GMACs per image: ``dense``, and for a sparsified model ``sparse``.
    """

    model: nn.Module
    scores: Mapping[str, float]
    gmacs: Mapping[str, float]


def fit(
    settings: TrainingSettings,
    prepare: Callable[[nn.Module, int], Job],
    *,
    description: str,
    model_options: Mapping[str, Any] | None = None,
    new_head: bool = False,
    console: Console | None = None,
    gmacs: Mapping[str, float] | None = None,
) -> Outcome:
    """Train what ``prepare`` makes of the dense model, and write results and weights to ``settings.output``.

    ``results.json`` has settings, scores, GMACs, versions and the command. A sparse model's weights are
    written with `tokenprune.save_pretrained`, so that `tokenprune.from_pretrained` loads the folder; a dense one's
    to ``model.safetensors``.

    Args:
        settings: All that decides the run.
        prepare: Called with the dense model and the number of images per step; returns the `Job`.
        description: Label of the progress bar.
        model_options: Further arguments of the dense model.
        new_head: Whether weights for other classes are accepted, with a new head.
        console: Where the table of results is printed; nowhere if not given.
        gmacs: Filled in by ``prepare``, for a model that is made cheaper by something other than pruning stages.

    Raises:
        SettingsError, DataError, Interrupted, FloatingPointError: As `recipes.engine.training.train`.
    """
    accelerator = make_accelerator(settings)
    training = open_images(settings, training=True)
    validation = open_images(settings, training=False, classes=class_indices(training))
    num_classes = number_of_classes(training, settings)
    seed_everything(settings.seed)
    dense = dense_model(settings, num_classes, new_head=new_head, **(model_options or {}))
    config = data_config(settings, dense)
    job = prepare(dense, settings.images_per_step(accelerator.num_processes))
    if settings.activation_checkpointing:
        cast(Any, job.model).set_grad_checkpointing()
    model, scores = train(
        accelerator,
        job.model,
        job.loss_function,
        job.parameter_groups,
        loader(training, settings, config, training=True),
        loader(validation, settings, config, training=False),
        settings,
        description=description,
        num_classes=num_classes,
        frozen_epochs=job.frozen_epochs,
        find_unused_parameters=job.find_unused_parameters,
    )
    outcome = Outcome(model=model, scores=scores, gmacs=gmacs or count_gmacs(model, config["input_size"]))
    if accelerator.is_main_process:
        _save(outcome.model, settings)
        write_results(outcome, settings)
        if console is not None:
            console.print(results_table(outcome).rich())
    accelerator.wait_for_everyone()
    return outcome


def _save(model: nn.Module, settings: TrainingSettings) -> None:
    if is_sparsified(model):
        tokenprune.save_pretrained(model, settings.output)
        return
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_whole(settings.output / "model.safetensors", lambda partial: save_file(state, partial))


def evaluate_dense(settings: TrainingSettings) -> dict[str, float]:
    """Accuracy of the dense model that the settings start from; see `recipes.engine.evaluation.evaluate`."""
    training = open_images(settings, training=True)  # whose classes the weights were trained for
    model = dense_model(settings, number_of_classes(training, settings))
    return evaluate_model(model, settings, classes=class_indices(training))


def evaluate_model(
    model: nn.Module, settings: TrainingSettings, *, classes: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Accuracy of a model on the settings' validation split; see `recipes.engine.evaluation.evaluate`.

    ``classes`` are the class indices that the model was trained with; inferred from the validation split if not given.
    """
    accelerator = make_accelerator(settings)
    images = open_images(settings, training=False, classes=classes)
    batches = loader(images, settings, data_config(settings, model), training=False)
    return evaluate(
        accelerator, model.to(accelerator.device), accelerator.prepare(batches), batches=settings.validation_batches
    )


def count_gmacs(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, float]:
    """GMACs per image of a dense model, or of both paths of a sparsified one."""
    if not is_sparsified(model):
        # Any stage will do, since only the dense path is counted; every model has a first block.
        try:
            sparse = tokenprune.sparsify(model, [0], 1.0, scorer="random")
        except tokenprune.UnsupportedModelError:  # a hierarchy, whose tokens all stay
            sparse = tokenprune.sparsify(model, None, 1.0, scorer="random", pruned="fast")
        report = tokenprune.flops(sparse, input_size)
        tokenprune.unsparsify(model)
        return {"dense": report.dense_gmacs}
    report = tokenprune.flops(model, input_size)
    return {"dense": report.dense_gmacs, "sparse": report.sparse_gmacs}


def run_once(settings: TrainingSettings, run: Callable[[], Any]) -> dict[str, Any]:
    """Call ``run``, unless its results are there already, and return what its ``results.json`` holds.

    Raises:
        SettingsError: The results that are there were made with other settings.
    """
    results = settings.output / "results.json"
    if results.exists():
        check_continuation(settings)
    else:
        run()
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def write_results(outcome: Outcome, settings: Settings, *, libraries: Sequence[str] = ("timm", "accelerate")) -> None:
    """Write ``results.json``: settings, scores, GMACs, versions and the command."""
    results = {
        "settings": settings.to_dict(),
        "scores": dict(outcome.scores),
        "gmacs": dict(outcome.gmacs),
        "versions": {name: version(name) for name in ("tokenprune", "torch", *libraries)},
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    write_json(settings.output / "results.json", results)


def results_table(outcome: Outcome) -> Table:
    """Accuracy and GMACs of both paths, or of a dense model's only one."""
    table = Table(title="", columns=("path", "top-1", "top-5", "GMACs", "kept per stage"))
    kept = " / ".join(f"{value:.0%}" for name, value in outcome.scores.items() if name.startswith("kept_"))
    # A model that is cheaper without stages has no dense path of its own.
    paths = [("dense", "dense_" if "sparse" in outcome.gmacs else "")]
    if "sparse" in outcome.gmacs:
        paths.insert(0, ("sparse", ""))
    for path, prefix in paths:
        top1, top5 = (outcome.scores.get(f"{prefix}{name}") for name in ("top1", "top5"))
        shown = ["–" if value is None else f"{value:.2%}" for value in (top1, top5)]
        table.add(path, *shown, f"{outcome.gmacs[path]:.4g}", kept if path == "sparse" else "")
    return table

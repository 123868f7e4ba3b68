"""Fine-tune any image classifier of transformers, on an image folder or data set, so that it can drop tokens.

With the transformers Trainer and DynamicViT's loss and schedule (arXiv 2106.02034). A model that was trained on other
classes is first fine-tuned on those of the data, with --dense:

python -m recipes.hf_finetune --dense --model google/vit-base-patch16-224 --data-dir flowers --output runs/flowers
python -m recipes.hf_finetune --model runs/flowers --data-dir flowers --output runs/flowers-0.7
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import EvalPrediction, Trainer, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

import tokenprune
from recipes.engine.command_line import Preset, command
from recipes.engine.fitting import Outcome, count_gmacs, results_table, write_results
from recipes.engine.run_folder import check_folder, continues, write_settings
from recipes.engine.settings import SettingsError
from recipes.huggingface.arguments import training_arguments
from recipes.huggingface.data import Images, input_config, open_images
from recipes.huggingface.models import (
    classifier_to_train,
    freeze_embeddings,
    image_processor,
    keep_names,
    tiny_classifier,
    trained_classifier,
)
from recipes.huggingface.settings import HfSettings
from tokenprune.integrations.checkpoints import find_complete
from tokenprune.integrations.sharding import save_whole
from tokenprune.integrations.transformers import SparseTrainer

PRESETS = {
    "smoke": Preset(
        help="A few steps of a tiny ViT, or of --model, to check that everything works here.",
        settings={
            "tiny_model": True,
            "epochs": 2,
            "batch_size": 8,
            "max_train_images": 64,
            "max_validation_images": 32,
            "num_workers": 1,
            "log_every": 1,
            "output": "runs/hf-smoke",
        },
    ),
}


def run(settings: HfSettings, *, console: Console | None = None) -> Outcome:
    """Train, evaluate, and write model, ``settings.yaml`` and ``results.json`` to ``settings.output``.

    With ``resume`` it goes on with the newest checkpoint there that was written to its end; without one it starts.

    Raises:
        SettingsError: The settings do not fit the model, the data, the machine or the run in ``output``.
        DataError: The data cannot be read.
    """
    _check_output(settings)
    images = open_images(settings)
    set_seed(settings.seed)
    model = _model(settings, images)
    images = _in_the_order_of(model, images)
    processor = None if settings.model is None else image_processor(settings.model)
    config = input_config(processor, model.config)
    training, validation = images.prepared(settings, config, str(model.main_input_name))
    options = {
        "train_dataset": training,
        "eval_dataset": validation,
        "processing_class": processor,
        "data_collator": default_data_collator,
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": best_classes,
    }
    try:
        trainer = _dense_trainer(model, settings, options) if settings.dense else _trainer(model, settings, options)
        # Now, so that a model that cannot be pruned is not trained first.
        counts = count_gmacs(model, config["input_size"])
    except (ValueError, TypeError, tokenprune.TokenpruneError) as error:
        raise SettingsError(str(error)) from error
    if trainer.is_world_process_zero() and not continues(settings):
        write_settings(settings)
    trainer.train(resume_from_checkpoint=find_complete(trainer.args) if settings.resume else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    if settings.dense:  # which a SparseTrainer does by itself
        save_whole(trainer, None)
    outcome = Outcome(model=model, scores=scores(metrics), gmacs=counts)
    if trainer.is_world_process_zero():
        write_results(outcome, settings, libraries=("transformers", "datasets", "accelerate"))
        if console is not None:
            console.print(results_table(outcome).rich())
    trainer.accelerator.wait_for_everyone()  # the first process still writes
    trainer.accelerator.end_training()
    return outcome


def _check_output(settings: HfSettings) -> None:
    there = settings.output.is_dir() and get_last_checkpoint(str(settings.output)) is not None
    check_folder(settings, holds_checkpoint=there)


def _model(settings: HfSettings, images: Images) -> Any:
    if settings.model is None:
        return tiny_classifier(images.classes)
    if settings.dense:
        return classifier_to_train(settings.model, images.classes)
    return trained_classifier(settings.model, len(images.classes))


def _in_the_order_of(model: Any, images: Images) -> Images:
    """The images with the class indices of the model, if its classes have the same names."""
    learned = {name: int(index) for name, index in (model.config.label2id or {}).items()}
    return images.labelled(learned) if set(learned) == set(images.classes) else images


def _trainer(model: Any, settings: HfSettings, options: dict[str, Any]) -> Trainer:
    teacher = None
    if settings.teacher is not None:
        teacher = trained_classifier(settings.teacher, model.config.num_labels)
    freeze_embeddings(model)
    tokenprune.sparsify(model, settings.stages, settings.ratio, scorer=settings.scorer)
    # A stage that keeps all it gets does not call its scorer.
    unused = settings.schedule == "masked" and 1.0 in model.tokenprune.plan.keep_probabilities
    arguments = training_arguments(
        settings, len(options["train_dataset"]), ddp_find_unused_parameters=True if unused else None
    )
    return SparseTrainer(
        model,
        arguments,
        teacher=teacher,
        kl_weight=settings.kl_weight,
        distill_weight=settings.distill_weight,
        ratio_weight=settings.ratio_weight,
        backbone_learning_rate_scale=settings.backbone_factor,
        freeze_epochs=settings.frozen_epochs,
        schedule=settings.schedule,
        calibration_steps=settings.calibration_steps,
        calibration_rate=settings.calibration_rate,
        evaluate_dense=True,
        **options,
    )


def _dense_trainer(model: Any, settings: HfSettings, options: dict[str, Any]) -> Trainer:
    keep_names(model)
    return Trainer(model, training_arguments(settings, len(options["train_dataset"])), **options)


def best_classes(logits: Any, labels: Tensor) -> Tensor:
    """The five top classes (B, 5), best first, of logits (B, K): all that accuracy needs."""
    if isinstance(logits, tuple):  # a model with several heads returns their mean first
        logits = logits[0]
    best: Tensor = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return best


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy as ``accuracy``, and ``top5`` where there are five classes, from what `best_classes` returns."""
    hits = prediction.predictions == prediction.label_ids[:, None]
    found = {"accuracy": float(hits[:, 0].mean())}
    return {**found, "top5": float(hits.any(axis=1).mean())} if hits.shape[1] == 5 else found


def scores(metrics: dict[str, float]) -> dict[str, float]:
    """The Trainer's metrics under the names of `recipes.engine.evaluation.evaluate_both`."""
    names = {f"eval_{path}{old}": f"{path}{new}" for path in ("", "dense_") for old, new in
             (("accuracy", "top1"), ("top5", "top5"))}  # fmt: skip
    found = {new: metrics[old] for old, new in names.items() if old in metrics}
    kept = [name for name in metrics if name.startswith("eval_kept_ratio_")]
    return {**found, **{f"kept_{stage}": metrics[f"eval_kept_ratio_{stage - 1}"] for stage in range(1, len(kept) + 1)}}


app = command(HfSettings, lambda settings: run(settings, console=Console()), help_text=__doc__, presets=PRESETS)

if __name__ == "__main__":
    app()

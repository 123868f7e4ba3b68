"""What `SparseTrainer` refuses: arguments that cannot be had together, and models that it cannot train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokenprune.errors import StateError
from tokenprune.pruning.sparsifier import Sparsifier

PAPER_LEARNING_RATE_SCALE = 0.01
# The second is what older versions of transformers call it.
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


def check_arguments(args: Any, options: Mapping[str, Any], criterion: Any, backbone_learning_rate_scale: float) -> None:
    """Refuse what would be ignored, or could not run.

    Raises:
        ValueError: It says which of the trainer's arguments do not go together.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would take nn.DataParallel, whose replicas cannot be pruned; start one "
            "process a GPU with torchrun or accelerate launch, or show the process one GPU only."
        )
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would replace the loss; pass criterion=… for its classification part.")
    if criterion is not None and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is for the default criterion; smooth the labels in "
            "your own, or leave one of them out."
        )
    if (options.get("optimizers") or (None,))[0] is not None and (
        backbone_learning_rate_scale != PAPER_LEARNING_RATE_SCALE
    ):
        raise ValueError(
            "an optimizer of your own has its own learning rates; leave backbone_learning_rate_scale out, or let "
            "args.optim name the optimizer."
        )


def check_schedule(
    schedule: str, args: Any, options: Mapping[str, Any], freeze_epochs: float | None, calibration_steps: int
) -> None:
    """Refuse what a schedule does not go together with.

    Raises:
        ValueError: It says what.
    """
    if schedule not in ("masked", "gathered"):
        raise ValueError(f"schedule={schedule!r}: choose 'masked' or 'gathered'.")
    if calibration_steps < 1:
        raise ValueError(f"calibration_steps={calibration_steps}: expected at least 1.")
    if schedule == "masked":
        return
    if freeze_epochs:
        raise ValueError(
            f"freeze_epochs={freeze_epochs}: in the gathered schedule the scorers learn before the first epoch, and "
            "the backbone in all of them; leave it out."
        )
    if options.get("model_init") is not None:
        raise ValueError("schedule='gathered' calibrates the model that it is given; pass model instead of model_init.")
    if any(getattr(args, name, False) for name in _CHECKPOINTING):
        raise ValueError(
            "activation checkpointing would run blocks again that cannot know which tokens were removed; leave it out, "
            "or take schedule='masked'."
        )


def use_non_reentrant_checkpointing(args: Any) -> None:
    """Have activation checkpointing, if it is on, keep the gradients of the keep decisions.

    Raises:
        ValueError: Re-entrant checkpointing is asked for.
    """
    for name in _CHECKPOINTING:
        if getattr(args, name, False):
            options = dict(getattr(args, f"{name}_kwargs") or {})
            if options.setdefault("use_reentrant", False):
                raise ValueError(
                    f"{name}_kwargs={options}: re-entrant checkpointing loses the gradients of the keep decisions; "
                    'pass {"use_reentrant": False}, or nothing.'
                )
            setattr(args, f"{name}_kwargs", options)


def check_sparsified(model: nn.Module) -> None:
    """Refuse a model that carries no sparsifier itself.

    Raises:
        StateError: Nothing can be trained or saved of it.
    """
    # Not through wrappers: what holds the model may save it without the predictors.
    modules: Mapping[str, Any] = getattr(model, "_modules", {})
    if not isinstance(modules.get("tokenprune"), Sparsifier):
        raise StateError(
            f"this {type(model).__name__} is not sparsified; call tokenprune.sparsify(model) first, and pass the model "
            "itself, not a wrapper around it."
        )


def check_classifies(model: nn.Module) -> None:
    """Refuse a model whose configuration says that its logits are not those of one class out of several.

    Raises:
        ValueError: It is for regression, or for several labels an image.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"config.problem_type={problem!r}: the default criterion is cross-entropy over classes; pass criterion=…, "
            "and kl_weight=0 if the logits are no classes that exclude each other."
        )

"""The settings of training runs: what all trainers share, what the engine adds, and which values contradict."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml

from recipes.engine.options import Augmentation, Data, Machine, Model, Optimisation, Pruning, Run, violations

OtherSettings = TypeVar("OtherSettings", bound="Settings")


class SettingsError(ValueError):
    """A setting is unknown, out of its range, or contradicts another."""


class Settings:
    """What every dataclass of settings can do."""

    output: Path

    def __post_init__(self) -> None:
        for violation in violations(self):
            raise SettingsError(violation)

    def to_yaml(self) -> str:
        """The settings as a YAML mapping that ``--config`` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, in the order of the fields."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def derive(self, settings_class: type[OtherSettings], **changes: Any) -> OtherSettings:
        """Settings of a class whose fields these all have: the same values except for ``changes``."""
        names = [field.name for field in fields(settings_class)]  # type: ignore[arg-type]
        return settings_class(**{**{name: getattr(self, name) for name in names}, **changes})


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What decides every training run, on the engine or on transformers' Trainer.

    A field without a default differs between the two: the subclasses say how, and why.
    """

    # Data
    data_dir: Path | None
    dataset: str | None
    train_split: Annotated[str, Data(help="The split to train on.")] = "train"
    validation_split: Annotated[str, Data(help="The split to evaluate on.")] = "validation"
    num_workers: Annotated[int, Data(min=0, help="Data loading workers per training process.")] = 4

    # Augmentation
    auto_augment: Annotated[str, Augmentation(help="timm's RandAugment policy; '' = off.")] = "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Augmentation(min=0, help="Used only if auto_augment is ''.")] = 0.4
    horizontal_flip: Annotated[float, Augmentation(min=0, max=1, help="Probability.")] = 0.5
    min_crop: Annotated[
        float, Augmentation(min=0.01, max=1, help="Smallest random crop, as a fraction of the area.")
    ] = 0.08
    random_erasing: Annotated[float, Augmentation(min=0, max=1, help="Probability.")] = 0.25
    label_smoothing: Annotated[float, Augmentation(min=0, max=0.99)] = 0.1

    # Model
    model: str | None

    # Optimisation
    epochs: Annotated[int, Optimisation(min=1)] = 30
    batch_size: Annotated[int, Optimisation(min=1, help="Images per process and forward pass.")]
    accumulation: Annotated[int, Optimisation(min=1, help="Forward passes per optimisation step.")] = 1
    learning_rate: Annotated[
        float, Optimisation(min=0, help="For a total batch of 1024; scaled linearly with the batch.")
    ] = 1e-3
    min_learning_rate: Annotated[float, Optimisation(min=0, help="Where the cosine schedule ends.")] = 1e-6
    warmup_epochs: Annotated[float | None, Optimisation(min=0, help="Epochs of linear warm-up.")]
    weight_decay: Annotated[float, Optimisation(min=0, help="Not applied to biases and norms.")] = 0.05
    clip_gradient: Annotated[float, Optimisation(min=0, help="Largest norm of the gradient; 0 = no clipping.")] = 0.0

    # Machine
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], Machine(help="Precision of autocast.")] = "no"
    compile: Annotated[bool, Machine(help="torch.compile the model, and its teacher.")] = False
    activation_checkpointing: Annotated[bool, Machine(help="Less memory, a third more time.")] = False

    # Run
    output: Annotated[Path, Run(help="Where the model, checkpoints, logs and results go.")]
    resume: Annotated[bool, Run(help="Resume from the last checkpoint in output.")] = False
    seed: Annotated[int, Run(min=0, help="Random seed.")] = 0
    log_every: Annotated[int, Run(min=1, help="Steps between log lines.")] = 50
    tracker: Annotated[Literal["tensorboard", "wandb", "none"], Run(help="Also log to this tracker.")] = "tensorboard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate == 0:
            raise SettingsError("learning_rate=0 trains nothing; give one above 0.")
        if self.min_learning_rate > self.learning_rate:
            raise SettingsError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}."
            )
        if (self.warmup_epochs or 0) >= self.epochs:
            raise SettingsError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}.")

    def images_per_step(self, num_processes: int) -> int:
        """Images per optimisation step, over all processes."""
        return self.batch_size * self.accumulation * num_processes

    def scaled_learning_rate(self, images_per_step: int) -> float:
        """The peak learning rate for a total batch of this size: ``learning_rate`` is for 1024 images."""
        return self.learning_rate * images_per_step / 1024


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(RunSettings):
    """What decides a run on the engine, whose data and models are timm's."""

    # Data
    data_dir: Annotated[Path, Data(help="Image folder (or tars, or cache) with one subfolder per split.")]
    dataset: Annotated[str, Data(help="timm's data set type: '' for folders and tars, hfds/…, wds/…")] = ""
    num_classes: Annotated[
        int | None, Data(min=1, help="Needed only if the data does not say, as with WebDatasets.")
    ] = None
    max_damaged: Annotated[int, Data(min=0, help="Unreadable images to skip; one more is an error.")] = 20

    # Augmentation
    mixup: Annotated[float, Augmentation(min=0, help="α of mixup; 0 = off.")] = 0.8
    cutmix: Annotated[float, Augmentation(min=0, help="α of cutmix; 0 = off.")] = 1.0

    # Model
    model: Annotated[str, Model(help="The dense model, by its name in timm.")]
    width: Annotated[int | None, Model(min=16, help="Embedding width, instead of the model's own.")] = None
    image_size: Annotated[int | None, Model(min=16, help="In pixels; the model's own if not given.")] = None
    checkpoint: Annotated[Path | None, Model(help="The dense model's weights: a .pth or .safetensors file.")] = None
    pretrained: Annotated[bool, Model(help="Without a checkpoint, start from timm's pretrained weights.")] = True
    drop_path: Annotated[float, Model(min=0, max=0.99, help="Stochastic depth rate.")] = 0.0

    # Optimisation
    steps_per_epoch: Annotated[
        int | None, Optimisation(min=1, help="To shorten epochs; a pass over the data if not given.")
    ] = None
    batch_size: int = 128  # On eight processes the paper's 1024.
    # The Trainer's warm-up starts at 0.
    min_learning_rate: Annotated[
        float, Optimisation(min=0, help="Where the cosine schedule ends and the warm-up starts.")
    ] = 1e-6
    warmup_epochs: float = 5.0  # As many in the paper's 30 epochs as in the 300 of DeiT's dense training.
    ema_decay: Annotated[
        float, Optimisation(min=0, max=1, help="Decay of the EMA of the weights, which is evaluated; 0 = off.")
    ] = 0.9999

    # Run
    output: Path = Path("runs/run")
    checkpoint_every: Annotated[int, Run(min=0, help="Steps between checkpoints, besides those after each epoch.")] = 0
    validation_batches: Annotated[int | None, Run(min=1, help="Evaluate on only this many per process.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise SettingsError(f"batch_size={self.batch_size}: mixup and cutmix take an even one.")
        if self.ema_decay == 1:
            raise SettingsError("ema_decay=1 never averages anything in; give one below 1, or 0 to turn it off.")
        if self.width is not None and self.pretrained and self.checkpoint is None:
            raise SettingsError(
                f"width={self.width}: timm has no weights of another width; give a checkpoint, or --no-pretrained."
            )
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise SettingsError(f"checkpoint={self.checkpoint}: there is no such file.")


@dataclass(frozen=True, kw_only=True)
class PruningSettings(RunSettings):
    """What is pruned, and with which loss it is trained; the defaults are DynamicViT's (arXiv 2106.02034)."""

    keep_ratio: Annotated[
        list[float] | None,
        Pruning(help="ρ keeps ρ, ρ², ρ³ of the patches; or give one ratio for each stage.", show_default="0.7"),
    ] = None
    stages: Annotated[
        list[int] | None, Pruning(help="Blocks to prune before; a quarter of the depth apart if not given.")
    ] = None
    scorer: Annotated[
        str, Pruning(help="Token scorer: predictor, cls_attention, redundancy, informative, random, static.")
    ] = "predictor"
    schedule: Annotated[
        Literal["masked", "gathered"],
        Pruning(
            help="masked: scorers and backbone learn together, on all tokens. gathered: scorers are calibrated first, "
            "without labels; then the backbone learns with tokens removed."
        ),
    ] = "masked"
    calibration_steps: Annotated[int, Pruning(min=1, help="Gathered: steps that train the scorers.")] = 100
    calibration_rate: Annotated[float, Pruning(min=0, help="Gathered: their learning rate in these steps.")] = 3e-3
    backbone_factor: Annotated[float, Pruning(min=0, help="The backbone's learning rate ÷ the predictors'.")] = 0.01
    frozen_epochs: Annotated[
        float | None, Pruning(min=0, help="Masked: epochs in which only the predictors are trained.")
    ]
    kl_weight: Annotated[float, Pruning(min=0, help="λ_KL, the weight of the KL loss.")] = 0.5
    distill_weight: Annotated[float, Pruning(min=0, help="λ_distill, the weight of token distillation.")] = 0.5
    ratio_weight: Annotated[float, Pruning(min=0, help="Masked: λ_ratio, the weight of the ratio loss.")] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.frozen_epochs or 0) > self.epochs:
            raise SettingsError(f"frozen_epochs={self.frozen_epochs} is more than epochs={self.epochs}.")
        if self.schedule == "gathered" and self.activation_checkpointing:
            raise SettingsError(
                "activation_checkpointing: blocks that are run again would not find which tokens were removed; leave "
                "it out, or take schedule='masked'."
            )
        for name in ("backbone_factor", "calibration_rate"):
            if self.schedule == "gathered" and getattr(self, name) == 0:
                raise SettingsError(f"{name}=0 leaves a phase of schedule='gathered' nothing to train.")

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of ``mixed_precision``, as `tokenprune.calibrate` takes it."""
        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

    @property
    def ratio(self) -> float | list[float]:
        """The keep ratio as `tokenprune.sparsify` takes it."""
        return ratio_of(self.keep_ratio)


def ratio_of(keep_ratio: list[float] | None) -> float | list[float]:
    """The keep ratio of a setting as `tokenprune.sparsify` takes it: ρ, or a ratio for each stage."""
    ratios = keep_ratio or [0.7]
    return ratios[0] if len(ratios) == 1 else ratios


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value

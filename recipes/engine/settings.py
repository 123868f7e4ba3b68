"""The settings that training recipes share, and what contradicts what among them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from typer import Option


class SettingsError(ValueError):
    """A setting is unknown, out of its range, or contradicts another."""


class Settings:
    """What every dataclass of settings can do."""

    output: Path

    def to_yaml(self) -> str:
        """The settings as a YAML mapping that ``--config`` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, in order."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """What decides a training run: data, augmentation, optimisation, precision, and where results go."""

    # Data
    data_dir: Annotated[Path, Option(help="Image folder (or tars, or cache) with one sub-folder a split.")]
    dataset: Annotated[str, Option(help="timm's name of the kind of data: '' folders and tars, hfds/…, wds/…")] = ""
    train_split: Annotated[str, Option(help="The split to learn from.")] = "train"
    validation_split: Annotated[str, Option(help="The split to evaluate on.")] = "validation"
    num_classes: Annotated[int | None, Option(min=1, help="Only where the data cannot tell, as WebDatasets.")] = None
    num_workers: Annotated[int, Option(min=0, help="Processes that decode images, for each training process.")] = 4
    max_damaged: Annotated[int, Option(min=0, help="Unreadable images that are skipped; one more is an error.")] = 20

    # Augmentation
    auto_augment: Annotated[str, Option(help="timm's RandAugment policy; '' = none.")] = "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Option(min=0, help="Used where auto_augment is ''.")] = 0.4
    horizontal_flip: Annotated[float, Option(min=0, max=1, help="Probability.")] = 0.5
    min_crop: Annotated[float, Option(min=0.01, max=1, help="Smallest random crop, share of the area.")] = 0.08
    random_erasing: Annotated[float, Option(min=0, max=1, help="Probability.")] = 0.25
    mixup: Annotated[float, Option(min=0, help="α of mixup; 0 = none.")] = 0.8
    cutmix: Annotated[float, Option(min=0, help="α of cutmix; 0 = none.")] = 1.0
    label_smoothing: Annotated[float, Option(min=0, max=0.99)] = 0.1

    # Model
    model: Annotated[str, Option(help="timm's name of the dense model.")]
    width: Annotated[int | None, Option(min=16, help="Embedding width in place of the model's own.")] = None
    image_size: Annotated[int | None, Option(min=16, help="Pixels; the model's own where not given.")] = None
    checkpoint: Annotated[Path | None, Option(help="The dense model's weights: a .pth or .safetensors file.")] = None
    pretrained: Annotated[bool, Option(help="Without a checkpoint, take timm's pre-trained weights.")] = True
    drop_path: Annotated[float, Option(min=0, max=0.99, help="Stochastic depth.")] = 0.0

    # Optimisation
    epochs: Annotated[int, Option(min=1)] = 30
    steps_per_epoch: Annotated[int | None, Option(min=1, help="Shorter epochs; all of the data if not given.")] = None
    batch_size: Annotated[int, Option(min=1, help="Images a process and forward pass.")] = 128
    accumulation: Annotated[int, Option(min=1, help="Forward passes a step; the batch grows by as much.")] = 1
    learning_rate: Annotated[float, Option(min=0, help="For a batch of 1024, in all; others in proportion.")] = 1e-3
    min_learning_rate: Annotated[float, Option(min=0, help="Where the cosine ends and the warm-up starts.")] = 1e-6
    warmup_epochs: Annotated[float, Option(min=0, help="Epochs of linear warm-up.")] = 5.0
    weight_decay: Annotated[float, Option(min=0, help="Not of biases and norms.")] = 0.05
    clip_gradient: Annotated[float, Option(min=0, help="Largest norm of the gradient; 0 = any.")] = 0.0
    ema_decay: Annotated[float, Option(min=0, max=1, help="Of the averaged weights, which are evaluated; 0 = off.")] = (
        0.9999
    )

    # Machine
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], Option(help="Autocast.")] = "no"
    compile: Annotated[bool, Option(help="torch.compile the model.")] = False
    activation_checkpointing: Annotated[bool, Option(help="Less memory, a third more time.")] = False

    # Run
    output: Annotated[Path, Option(help="Where checkpoints, logs and results go.")] = Path("runs/run")
    resume: Annotated[bool, Option(help="Go on from the last checkpoint in output.")] = False
    seed: Annotated[int, Option(min=0, help="Of everything random.")] = 0
    log_every: Annotated[int, Option(min=1, help="Steps between two lines of the log.")] = 50
    checkpoint_every: Annotated[int, Option(min=0, help="Steps between checkpoints, besides each epoch's end.")] = 0
    validation_batches: Annotated[int | None, Option(min=1, help="Of each process; evaluate on so many only.")] = None
    tracker: Annotated[Literal["tensorboard", "wandb", "none"], Option(help="Besides the JSON lines.")] = "tensorboard"

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise SettingsError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise SettingsError(f"batch_size={self.batch_size}: mixup and cutmix take an even one.")
        if self.ema_decay == 1:
            raise SettingsError("ema_decay=1 never averages anything in; it lies below 1, and 0 turns it off.")
        if self.min_learning_rate > self.learning_rate:
            raise SettingsError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}."
            )
        if self.width is not None and self.pretrained and self.checkpoint is None:
            raise SettingsError(
                f"width={self.width}: timm has no weights of another width; give a checkpoint, or --no-pretrained."
            )
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise SettingsError(f"checkpoint={self.checkpoint}: there is no such file.")


@dataclass(frozen=True, kw_only=True)
class PruningSettings(Settings):
    """What is pruned, and by which loss that is learned; the defaults are DynamicViT's (arXiv 2106.02034)."""

    keep_ratio: Annotated[
        list[float] | None, Option(help="ρ keeps ρ, ρ², ρ³ of the patches; or give one ratio for each stage. [0.7]")
    ] = None
    stages: Annotated[
        list[int] | None, Option(help="Blocks in front of which to prune; a quarter apart if not given.")
    ] = None
    scorer: Annotated[str, Option(help="What scores tokens: predictor, cls_attention, random, static.")] = "predictor"
    backbone_factor: Annotated[float, Option(min=0, help="The backbone's learning rate ÷ the predictors'.")] = 0.01
    kl_weight: Annotated[float, Option(min=0, help="λ_KL.")] = 0.5
    distill_weight: Annotated[float, Option(min=0, help="λ_distill.")] = 0.5
    ratio_weight: Annotated[float, Option(min=0, help="λ_ratio.")] = 2.0

    @property
    def ratio(self) -> float | list[float]:
        """The keep ratio as `tokenprune.sparsify` takes it."""
        ratios = self.keep_ratio or [0.7]
        return ratios[0] if len(ratios) == 1 else ratios


# What may differ between a run and its continuation without changing what is computed.
FREE_ON_RESUME = frozenset({"resume", "output", "num_workers", "log_every", "checkpoint_every", "tracker", "data_dir"})


def check_continuation(settings: Settings, saved: str) -> None:
    """Refuse to continue a run, whose settings were saved as YAML, under others.

    Raises:
        SettingsError: They differ in what decides the result.
    """
    before, now = yaml.safe_load(saved), settings.to_dict()
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys((*before, *now))
        if name not in FREE_ON_RESUME and before.get(name) != now.get(name)
    ]
    if changed:
        raise SettingsError(f"{settings.output} was made with other settings: {'; '.join(changed)}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value

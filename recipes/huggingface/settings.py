"""Settings of fine-tuning a model of transformers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from recipes.engine.settings import PruningSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class HfSettings(PruningSettings):
    """What decides a run of `recipes.hf_finetune`."""

    # Data
    data_dir: Annotated[Path | None, Option(help="Image folder with one sub-folder a split, in it one a class.")] = None
    dataset: Annotated[str | None, Option(help="In place of data_dir: name or folder for datasets.load_dataset.")] = (
        None
    )
    dataset_config: Annotated[str | None, Option(help="The data set's configuration, where it has several.")] = None
    train_split: Annotated[str, Option(help="The split to learn from, such as 'train' or 'train[:90%]'.")] = "train"
    validation_split: Annotated[str, Option(help="The split to evaluate on.")] = "validation"
    image_column: Annotated[str | None, Option(help="The first column of images if not given.")] = None
    label_column: Annotated[str | None, Option(help="The first column of classes if not given.")] = None
    max_train_images: Annotated[int | None, Option(min=1, help="Learn from so many only, drawn by the seed.")] = None
    max_validation_images: Annotated[int | None, Option(min=1, help="Evaluate on so many only.")] = None
    num_workers: Annotated[int, Option(min=0, help="Processes that decode images, for each training process.")] = 4

    # Augmentation
    auto_augment: Annotated[str, Option(help="timm's RandAugment policy; '' = none.")] = "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Option(min=0, help="Used where auto_augment is ''.")] = 0.4
    horizontal_flip: Annotated[float, Option(min=0, max=1, help="Probability.")] = 0.5
    min_crop: Annotated[float, Option(min=0.01, max=1, help="Smallest random crop, share of the area.")] = 0.08
    random_erasing: Annotated[float, Option(min=0, max=1, help="Probability.")] = 0.25
    label_smoothing: Annotated[float, Option(min=0, max=0.99)] = 0.1

    # Model
    model: Annotated[str | None, Option(help="Folder, or id on the Hub, of an image classifier.")] = None
    tiny_model: Annotated[bool, Option(help="Where no model is given, a tiny ViT with random weights.")] = False
    dense: Annotated[bool, Option(help="Train the model densely, on the classes of the data; prune nothing.")] = False
    teacher: Annotated[
        str | None, Option(help="Folder or id of a dense model that has learned these classes; the model if not given.")
    ] = None

    # Optimisation
    epochs: Annotated[int, Option(min=1)] = 30
    batch_size: Annotated[int, Option(min=1, help="Images a process and forward pass.")] = 64
    accumulation: Annotated[int, Option(min=1, help="Forward passes a step; the batch grows by as much.")] = 1
    learning_rate: Annotated[float, Option(min=0, help="For a batch of 1024, in all; others in proportion.")] = 1e-3
    min_learning_rate: Annotated[float, Option(min=0, help="Where the cosine ends.")] = 1e-6
    warmup_epochs: Annotated[float | None, Option(min=0, help="Of linear warm-up. [a sixth of all]")] = None
    frozen_epochs: Annotated[
        float | None, Option(min=0, help="In which the predictors learn alone. [a sixth of all]")
    ] = None
    weight_decay: Annotated[float, Option(min=0, help="Not of biases and norms.")] = 0.05
    clip_gradient: Annotated[float, Option(min=0, help="Largest norm of the gradient; 0 = any.")] = 0.0

    # Machine
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], Option(help="Autocast.")] = "no"
    compile: Annotated[bool, Option(help="torch.compile the model.")] = False
    activation_checkpointing: Annotated[bool, Option(help="Less memory, a third more time.")] = False

    # Run
    output: Annotated[Path, Option(help="Where the model, checkpoints, logs and results go.")] = Path("runs/hf")
    resume: Annotated[bool, Option(help="Go on from the last checkpoint in output.")] = False
    seed: Annotated[int, Option(min=0, help="Of everything random.")] = 0
    log_every: Annotated[int, Option(min=1, help="Steps between two lines of the log.")] = 50
    tracker: Annotated[Literal["tensorboard", "wandb", "none"], Option(help="Besides what is printed.")] = "tensorboard"

    def __post_init__(self) -> None:
        if self.model is None and not self.tiny_model:
            raise SettingsError("give --model, a folder or an id on the Hub (or --tiny-model, to try things out).")
        if (self.data_dir is None) == (self.dataset is None):
            raise SettingsError("give either --data-dir or --dataset.")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise SettingsError(f"data_dir={self.data_dir}: there is no such folder.")
        for name in ("warmup_epochs", "frozen_epochs"):
            if (getattr(self, name) or 0) > self.epochs:
                raise SettingsError(f"{name}={getattr(self, name)} is more than epochs={self.epochs}.")
        if not 0 < self.learning_rate >= self.min_learning_rate:
            raise SettingsError(
                f"learning_rate={self.learning_rate} is 0, or below min_learning_rate={self.min_learning_rate}."
            )
        if self.dense:
            self._check_dense()

    def _check_dense(self) -> None:
        sparse = [*(field.name for field in fields(PruningSettings)), "teacher", "frozen_epochs"]
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in sparse if getattr(self, name) != defaults[name]]
        if given:
            raise SettingsError(f"dense=True prunes nothing and has no teacher; leave out {', '.join(given)}.")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, the paper's 5 of 30 where they are not given."""
        return self.epochs / 6 if self.warmup_epochs is None else self.warmup_epochs

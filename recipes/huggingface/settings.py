"""Settings of fine-tuning a model of transformers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from recipes.engine.options import Data, Model, Optimisation, Pruning
from recipes.engine.settings import PruningSettings, RunSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class HfSettings(PruningSettings):
    """What decides a run of `recipes.hf_finetune`, on transformers' Trainer with data from `datasets`."""

    # Data
    data_dir: Annotated[
        Path | None, Data(help="Image folder with one subfolder per split, and in it one per class.")
    ] = None
    dataset: Annotated[str | None, Data(help="Instead of data_dir: name or folder for datasets.load_dataset.")] = None
    dataset_config: Annotated[str | None, Data(help="Configuration of the data set, if it has several.")] = None
    # datasets can slice a split; timm cannot.
    train_split: Annotated[str, Data(help="The split to train on, such as 'train' or 'train[:90%]'.")] = "train"
    image_column: Annotated[str | None, Data(help="The first column of images if not given.")] = None
    label_column: Annotated[str | None, Data(help="The first column of classes if not given.")] = None
    max_train_images: Annotated[int | None, Data(min=1, help="Train on only this many, drawn with the seed.")] = None
    max_validation_images: Annotated[
        int | None, Data(min=1, help="Evaluate on only this many, drawn with the seed.")
    ] = None

    # Model
    model: Annotated[str | None, Model(help="Folder, or id on the Hub, of an image classifier.")] = None
    tiny_model: Annotated[bool, Model(help="If no model is given, take a tiny ViT with random weights.")] = False
    dense: Annotated[bool, Model(help="Train the model on the classes of the data without pruning.")] = False
    teacher: Annotated[
        str | None, Model(help="Folder or id of a dense model of these classes; the model itself if not given.")
    ] = None

    # Optimisation
    batch_size: int = 64  # Half of the engine's, which is for ImageNet on eight GPUs: data sets here are smaller.
    # Shares of the epochs, as data sets of every size take other numbers of them; the paper's 5 of 30.
    warmup_epochs: Annotated[
        float | None, Optimisation(min=0, help="Epochs of linear warm-up.", show_default="a sixth of all")
    ] = None
    frozen_epochs: Annotated[
        float | None, Pruning(min=0, help="Epochs in which the predictors learn alone.", show_default="a sixth of all")
    ] = None

    # Run
    output: Path = Path("runs/hf")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and not self.tiny_model:
            raise SettingsError("give --model, a folder or an id on the Hub (or --tiny-model, to try things out).")
        if (self.data_dir is None) == (self.dataset is None):
            raise SettingsError("give either --data-dir or --dataset.")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise SettingsError(f"data_dir={self.data_dir}: there is no such folder.")
        if self.dense:
            self._check_dense()

    def _check_dense(self) -> None:
        of_any_run = {field.name for field in fields(RunSettings)}
        sparse = [*(field.name for field in fields(PruningSettings) if field.name not in of_any_run), "teacher"]
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in sparse if getattr(self, name) != defaults[name]]
        if given:
            raise SettingsError(f"dense=True prunes nothing and has no teacher; leave out {', '.join(given)}.")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, in the paper's proportion of 5 in 30 if not given."""
        return self.epochs / 6 if self.warmup_epochs is None else self.warmup_epochs

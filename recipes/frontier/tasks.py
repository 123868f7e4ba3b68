"""The data sets of the comparison, each with its shipped dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.digits.model import load_dense_model as load_digits_model
from recipes.digits.presets import DIGITS_SPARSE
from recipes.digits.presets import make_images as make_digits_images
from recipes.dynamicvit import SparseSettings
from recipes.engine.data import loader, open_images
from recipes.engine.models import data_config
from recipes.engine.randomness import seed_everything
from recipes.engine.settings import TrainingSettings
from recipes.photographs.model import load_dense_model as load_photographs_model
from recipes.photographs.presets import PHOTOGRAPHS_SPARSE
from recipes.photographs.presets import make_images as make_photographs_images


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and its dense model.

    Attributes:
        name: Its name, also that of its folders.
        preset: The settings of fine-tuning on it.
        make_images: Makes the image folder of given settings, if it is missing.
        load_dense_model: The trained dense model.
        num_validation: Use only so many validation images, evenly spread; all of them if ``None``.
    """

    name: str
    preset: Mapping[str, Any]
    make_images: Callable[[TrainingSettings], None]
    load_dense_model: Callable[[], nn.Module]
    num_validation: int | None = None

    def settings(self, output: Path, **changes: Any) -> SparseSettings:
        """The settings of a run on it."""
        return SparseSettings(**{**self.preset, **changes}, output=output, resume=True)

    def training_batches(self, seed: int) -> Any:
        """Shuffled batches of training images and labels, the same for a seed."""
        seed_everything(seed)
        return self._loader(training=True)

    @cached_property
    def validation(self) -> tuple[Tensor, Tensor]:
        """The validation images (B, 3, H, W) and their class indices (B,), read once."""
        read = list(self._loader(training=False))
        images, labels = (torch.cat(parts) for parts in zip(*read, strict=True))
        if self.num_validation is not None:
            chosen = torch.linspace(0, len(images) - 1, self.num_validation).round().long()
            images, labels = images[chosen], labels[chosen]
        return images, labels

    def _loader(self, *, training: bool) -> Any:
        settings = self.settings(Path("unused"))
        self.make_images(settings)
        images = open_images(settings, training=training)
        return loader(images, settings, data_config(settings, self.load_dense_model()), training=training)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Top-1 of a model on the validation images, as a fraction."""
        images, labels = self.validation
        model.eval()
        correct = [(model(part).argmax(dim=1) == known).sum() for part, known in _split(images, labels)]
        return float(torch.stack(correct).sum()) / len(labels)


def _split(images: Tensor, labels: Tensor, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(batch_size), labels.split(batch_size), strict=True)


DIGITS = Task(name="digits", preset=DIGITS_SPARSE, make_images=make_digits_images, load_dense_model=load_digits_model)
PHOTOGRAPHS = Task(
    name="photographs",
    preset=PHOTOGRAPHS_SPARSE,
    make_images=make_photographs_images,
    load_dense_model=load_photographs_model,
)
TASKS = {task.name: task for task in (DIGITS, PHOTOGRAPHS)}

"""Image folders and data sets through datasets, augmented with timm's transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from recipes.engine.data import DataError, augmentation
from recipes.huggingface.settings import HfSettings


@dataclass(frozen=True, kw_only=True)
class Images:
    """Two splits of a data set.

    Attributes:
        training: Images with classes; a `datasets.Dataset`.
        validation: The same.
        image_column: The column of the images in both.
        label_column: The column of the class indices in both.
        classes: Names of the classes, by index.
    """

    training: Any
    validation: Any
    image_column: str
    label_column: str
    classes: tuple[str, ...]

    def labelled(self, indices: Mapping[str, int]) -> Images:
        """The same images with other class indices, such as those that a model was trained with."""
        by_index = sorted(indices, key=lambda name: indices[name])
        if by_index == list(self.classes):
            return self
        training, validation = (
            split.align_labels_with_mapping(dict(indices), self.label_column)
            for split in (self.training, self.validation)
        )
        return Images(
            training=training,
            validation=validation,
            image_column=self.image_column,
            label_column=self.label_column,
            classes=tuple(by_index),
        )

    def prepared(
        self, settings: HfSettings, input_config: Mapping[str, Any], input_name: str = "pixel_values"
    ) -> tuple[Any, Any]:
        """Both splits as a Trainer takes them: augmented for training, a centre crop for validation.

        Args:
            settings: The augmentation.
            input_config: From `input_config`.
            input_name: The name of the model's image input.
        """
        augmented = create_transform(
            **{**input_config, "crop_pct": None},
            is_training=True,
            **augmentation(settings),
        )
        centred = create_transform(**input_config, is_training=False)
        columns = self.image_column, self.label_column
        return (
            self.training.with_transform(Prepare(augmented, *columns, input_name)),
            self.validation.with_transform(Prepare(centred, *columns, input_name)),
        )


@dataclass(frozen=True)
class Prepare:
    """From a batch of a data set to a model's inputs; a class, so that it can be pickled for worker processes."""

    transform: Callable[[Image.Image], Any]
    image_column: str
    label_column: str
    input_name: str

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Preprocess a batch, which has lists of images and of class indices."""
        return {
            self.input_name: [self.transform(image.convert("RGB")) for image in batch[self.image_column]],
            "labels": batch[self.label_column],
        }


def open_images(settings: HfSettings) -> Images:
    """Both splits that the settings name.

    Raises:
        DataError: They cannot be opened, lack images or classes, or have different classes.
    """
    training, validation = (_open(settings, split) for split in (settings.train_split, settings.validation_split))
    image_column = _column(training, settings.image_column, datasets.Image, "image_column")
    label_column = _column(training, settings.label_column, datasets.ClassLabel, "label_column")
    for name, of_training in ((image_column, datasets.Image), (label_column, datasets.ClassLabel)):
        if not isinstance(validation.features.get(name), of_training):
            raise DataError(f"split {settings.validation_split!r} has no column {name!r} as {settings.train_split!r}.")
    classes, others = (split.features[label_column].names for split in (training, validation))
    if classes != others:
        raise DataError(
            f"split {settings.train_split!r} has {len(classes)} classes and {settings.validation_split!r} "
            f"{len(others)}, or under other names: {sorted(set(classes) ^ set(others))[:5]} are in one of them only."
        )
    return Images(
        training=_some(training, settings.max_train_images, settings.seed),
        validation=_some(validation, settings.max_validation_images, settings.seed),
        image_column=image_column,
        label_column=label_column,
        classes=tuple(classes),
    )


def input_config(processor: Any, model_config: Any) -> dict[str, Any]:
    """Size, mean, standard deviation, interpolation and crop that a model takes, as timm's transforms name them.

    Args:
        processor: The model's image processor; ``None`` means ImageNet's mean and standard deviation, and the
            size in the model's configuration.
        model_config: The model's configuration.

    Raises:
        DataError: Neither has an image size.
    """
    said: dict[str, Any] = {} if processor is None else processor.to_dict()
    resized = _size(said.get("size"))
    cropped = _size(said.get("crop_size")) if said.get("do_center_crop") else None
    size = (
        cropped or resized or _size(getattr(getattr(model_config, "vision_config", model_config), "image_size", None))
    )
    if size is None:
        raise DataError(
            f"neither an image processor nor the configuration of this {model_config.model_type} says how large images "
            "are; put a preprocessor_config.json with a size into the model's folder."
        )
    normalized = said.get("do_normalize", True)
    return {
        "input_size": (3, *size),
        "interpolation": Image.Resampling(said.get("resample") or Image.Resampling.BICUBIC).name.lower(),
        "mean": tuple(said.get("image_mean") or IMAGENET_DEFAULT_MEAN) if normalized else (0.0, 0.0, 0.0),
        "std": tuple(said.get("image_std") or IMAGENET_DEFAULT_STD) if normalized else (1.0, 1.0, 1.0),
        "crop_pct": cropped[0] / resized[0] if cropped and resized else 1.0,
    }


def _size(said: Any) -> tuple[int, int] | None:
    """Height and width from a configuration's value: a number, a pair, or a mapping with names."""
    if isinstance(said, Mapping):
        said = said.get("shortest_edge") or (said.get("height"), said.get("width"))
    if isinstance(said, int):
        return said, said
    if said is None or None in said:
        return None
    height, width = said
    return height, width


def _open(settings: HfSettings, split: str) -> Any:
    try:
        if settings.data_dir is not None:
            return datasets.load_dataset("imagefolder", data_dir=str(settings.data_dir), split=split)
        return datasets.load_dataset(settings.dataset, settings.dataset_config, split=split)
    except Exception as error:  # datasets raises errors of many kinds: its own, the Hub's, ValueError, OSError
        where = settings.dataset if settings.data_dir is None else settings.data_dir
        raise DataError(f"datasets cannot open split {split!r} of {where}: {error}") from error


def _column(split: Any, name: str | None, kind: type, setting: str) -> str:
    found = [column for column, feature in split.features.items() if isinstance(feature, kind)]
    if name is None and found:
        return str(found[0])
    if name in found:
        return str(name)
    columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in split.features.items())
    raise DataError(f"{setting}={name!r}: no such column of {kind.__name__}; there are {columns}.")


def _some(split: Any, number: int | None, seed: int) -> Any:
    if number is None or number >= len(split):
        return split
    return split.shuffle(seed=seed).select(range(number))  # folders are sorted by class

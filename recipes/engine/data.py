"""Images through timm's data sets, loaders and augmentation; damaged ones are skipped and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from recipes.engine.randomness import seed_everything
from recipes.engine.settings import RunSettings, TrainingSettings

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """The data cannot be read, or too much of it is damaged."""


class Images(Dataset[tuple[Any, int]]):
    """A timm data set whose images are augmented identically in every run and process.

    The random numbers of an image depend only on the seed, the epoch and its index. An image that
    cannot be decoded is replaced by the next one that can.

    Attributes:
        transform: From a PIL image to a tensor; timm's loader sets it.
        damaged: Which images could not be read, (number of images,) of bool, shared with the worker processes.
    """

    transform: Callable[[Any], Any] | None = None

    def __init__(self, samples: Any, *, seed: int, max_damaged: int) -> None:
        self.samples = samples
        # timm decodes where a failure cannot be counted, so it is asked for bytes, which are decoded here.
        if hasattr(samples, "load_bytes"):
            samples.load_bytes = True
        self.seed = seed
        self.max_damaged = max_damaged
        self.damaged = torch.zeros(len(samples), dtype=torch.bool).share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in workers that are already running too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            try:
                image, target = self._read(place)
                break
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
                self.damaged[place] = True
                logger.warning("image %d cannot be read and is skipped: %s", place, error)
        else:
            raise DataError(f"none of {len(self)} images can be read.")
        seed_everything(self.seed, int(self._epoch), place)
        return (image if self.transform is None else self.transform(image)), target

    def _read(self, place: int) -> tuple[Image.Image, int]:
        image, target = self.samples[place]
        if isinstance(image, bytes):
            image = Image.open(BytesIO(image))
        return image.convert("RGB"), target

    def check(self) -> None:
        """Raise in the training process: an error of a worker process does not reach it as a `DataError`.

        Raises:
            DataError: More than ``max_damaged`` images could not be read so far.
        """
        if int(self.damaged.sum()) > self.max_damaged:
            names = self.damaged_names()
            raise DataError(
                f"{len(names)} images cannot be read and max_damaged={self.max_damaged}: {', '.join(names[:20])}. "
                "Replace them, or allow more."
            )

    def damaged_names(self) -> list[str]:
        """The files, or the indices where there are no files, of images that could not be read so far."""
        indices = self.damaged.nonzero().flatten().tolist()
        reader = getattr(self.samples, "reader", None)
        return [str(index) if reader is None else str(self.samples.filename(index)) for index in indices]


def open_images(settings: TrainingSettings, *, training: bool, classes: Mapping[str, int] | None = None) -> Any:
    """One split of the data, without a transform.

    Args:
        settings: Where the data is and what kind.
        training: Whether to open the training split.
        classes: Index of each class in the other split, from `class_indices`. A folder numbers the classes that it
            contains, so a split that lacks one would number the others differently.

    Returns:
        `Images`, or timm's iterable data set for streamed data.

    Raises:
        DataError: timm cannot open it; the message has timm's own.
    """
    if not settings.dataset and not settings.data_dir.exists():
        raise DataError(f"data_dir={settings.data_dir}: there is no such folder.")
    split = settings.train_split if training else settings.validation_split
    try:
        samples = create_dataset(
            settings.dataset,
            root=str(settings.data_dir),
            split=split,
            is_training=training,
            batch_size=settings.batch_size,
            seed=settings.seed,
            class_map=dict(classes) if classes and not settings.dataset else None,
        )
    except Exception as error:  # timm and the readers behind it raise what they like, AssertionError among it
        raise DataError(
            f"timm cannot open split {split!r} of {settings.data_dir} (dataset={settings.dataset!r}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(samples, IterableDataset):
        if settings.num_workers == 0:
            raise DataError(
                f"dataset={settings.dataset!r} is a stream, which needs worker processes: num_workers from 1."
            )
        return samples
    return Images(samples, seed=settings.seed, max_damaged=settings.max_damaged)


def class_indices(images: Any) -> Mapping[str, int] | None:
    """The index of each class in what `open_images` returned; ``None`` if the data does not say."""
    samples = images.samples if isinstance(images, Images) else images
    found: Mapping[str, int] | None = getattr(getattr(samples, "reader", samples), "class_to_idx", None)
    return found


def number_of_classes(images: Any, settings: TrainingSettings) -> int:
    """The number of classes that the data has.

    Raises:
        DataError: The data does not say, or contradicts the settings.
    """
    classes = class_indices(images)
    if not classes:
        if settings.num_classes is None:
            raise DataError(f"{settings.data_dir} does not tell its number of classes; give num_classes.")
        return settings.num_classes
    if settings.num_classes not in (None, len(classes)):
        raise DataError(f"num_classes={settings.num_classes}, but {settings.data_dir} has {len(classes)} classes.")
    return len(classes)


def loader(
    images: Any, settings: TrainingSettings, data_config: Mapping[str, Any], *, training: bool
) -> DataLoader[Any]:
    """The loader of timm: shuffled batches of augmented images for training, centre crops in order for validation.

    Args:
        images: What `open_images` returned.
        settings: Batch size, augmentation, workers.
        data_config: Input size, mean, standard deviation, interpolation and crop, from `timm.data.resolve_data_config`.
        training: Whether to augment, shuffle and drop an incomplete last batch.
    """
    size: tuple[int, ...] = data_config["input_size"]
    made: DataLoader[Any] = create_loader(
        images,
        input_size=size,
        batch_size=settings.batch_size,
        is_training=training,
        **(augmentation(settings) if training else {}),
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        num_workers=settings.num_workers,
        pin_memory=torch.cuda.is_available(),
        use_prefetcher=False,
        persistent_workers=settings.num_workers > 0 and not isinstance(images, IterableDataset),
    )
    return made


def augmentation(settings: RunSettings) -> dict[str, Any]:
    """The augmentation of training images, as arguments of `timm.data.create_transform`."""
    return {
        "scale": (settings.min_crop, 1.0),
        "ratio": (1.0, 1.0) if settings.min_crop == 1 else (3 / 4, 4 / 3),
        "hflip": settings.horizontal_flip,
        "color_jitter": settings.color_jitter or None,
        "auto_augment": settings.auto_augment or None,
        "re_prob": settings.random_erasing,
        "re_mode": "pixel",
    }


def first_batches(loader: Any, number: int | None) -> Iterator[Any]:
    """The first batches of a prepared loader, all if ``number`` is ``None``; a loader is notified if it ends early."""
    for index, batch in enumerate(loader):
        if isinstance(loader.dataset, Images):
            loader.dataset.check()
        if index == number:
            if hasattr(loader, "end"):
                loader.end()
            return
        yield batch

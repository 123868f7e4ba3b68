"""Batches of pictures, prepared for a model, out of folders, files and WebDatasets.

Shapes: B images, K channels, H and W height and width in pixels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenprune.backbones.preprocessing import Preprocessing
from tokenprune.errors import PictureError, extra

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_SHUFFLED = 1000
"""How many samples of a stream are shuffled at a time."""


def picture_loader(
    sources: Sequence[str | Path],
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> DataLoader[Any]:
    """A loader of shuffled batches (B, K, H, W), whose labels, if there are any, are not read.

    Args:
        sources: Folders, which are searched with all that is in them, and files of pictures; or tar files of a
            WebDataset, also as ``shard-{000..099}.tar``. Not both.
        preprocessing: How a picture becomes the input of the model.
        batch_size: B.
        num_workers: Processes that read; of a WebDataset at most as many as it has files.
        seed: Of the order.

    Raises:
        PictureError: There is no picture.
        MissingExtraError: Pillow is not installed, or webdataset for a WebDataset.
    """
    shards = [str(source) for source in sources if str(source).endswith(".tar")]
    if shards and len(shards) < len(sources):
        raise PictureError("folders and WebDatasets cannot be read together; give one or the other.")
    if shards:
        return _stream(shards, preprocessing, batch_size, num_workers, seed)
    return DataLoader(
        Pictures(picture_files(sources), preprocessing),
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
    )


def picture_files(sources: Sequence[str | Path]) -> list[Path]:
    """All pictures in folders, searched with all that is in them, and those that are named, in order.

    Raises:
        PictureError: There is none, or no such file.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        elif source.is_file():
            found.append(source)
        else:
            raise PictureError(f"{source}: there is no such file or folder.")
    if not found:
        raise PictureError(f"there are no pictures ({', '.join(SUFFIXES)}) in {', '.join(map(str, sources))}.")
    return found


class Pictures(Dataset[Tensor]):
    """Pictures of files as inputs of a model; for one that cannot be read, the next one that can.

    Args:
        files: The pictures.
        preprocessing: How a picture becomes an input.
    """

    def __init__(self, files: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing = files, preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        for offset in range(len(self)):
            file = self.files[(index + offset) % len(self)]
            try:
                return self.preprocessing.apply(file)
            except PictureError as error:
                logger.warning("%s is skipped: %s", file, error)
        raise PictureError(f"none of {len(self)} pictures can be read.")


def _stream(
    shards: Sequence[str], preprocessing: Preprocessing, batch_size: int, num_workers: int, seed: int
) -> DataLoader[Any]:
    with extra("recipes"):
        import webdataset
    urls = [url for shard in shards for url in webdataset.shardlists.expand_urls(shard)]
    missing = [url for url in urls if not re.match(r"[a-z]+:", url) and not Path(url).is_file()]
    if missing:
        raise PictureError(f"{missing[0]}: there is no such file.")
    stream = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=seed, empty_check=False)
        .shuffle(_SHUFFLED, seed=seed)
        .decode("pil", handler=webdataset.warn_and_continue, only=[suffix.lstrip(".") for suffix in SUFFIXES])
        .map(_Prepared(preprocessing))
    )
    return DataLoader(stream, batch_size=batch_size, num_workers=min(num_workers, len(urls)))


class _Prepared:
    """The picture of a sample as the input of a model; of several the first by name. Can be sent to a process."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, sample: dict[str, Any]) -> Tensor:
        for name in sorted(sample):
            if f".{name.rpartition('.')[2].lower()}" in SUFFIXES:
                return self.preprocessing.apply(sample[name])
        raise PictureError(
            f"sample {sample.get('__key__')!r} of {sample.get('__url__')} has no picture, only {sorted(sample)}."
        )

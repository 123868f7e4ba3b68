"""Images for the tests of integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from tests.helpers.trainer import NUM_CLASSES, NUM_IMAGES


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise around a colour of each class."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(NUM_IMAGES):
        label = index % NUM_CLASSES
        pixels = torch.randint(0, 120, (32, 32, 3), generator=generator)
        pixels[..., label] += 120
        folder = root / "train" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return root


def to_pixels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    pixels = [
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in batch["image"]
    ]
    return {
        "pixel_values": [(p.view(32, 32, 3).permute(2, 0, 1).float() / 127.5) - 1 for p in pixels],
        "label": batch["label"],
    }


@pytest.fixture(scope="session")
def images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(image_folder), cache_dir=str(cache), split="train")
    return loaded.with_transform(to_pixels)

"""The digits image folder: scikit-learn's handwritten digits, each hidden in a cluttered scene.

Every scene shows one whole digit, enlarged three times and placed at random, among fragments of
other digits and noise. The class is the whole digit's. Train and validation scenes are made from
disjoint sets of original digits, fragments included, so that nothing seen in training is tested.
The folder is an ordinary image folder (``train/3/00012.png``), read like any user's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits

from recipes.small.folder import make_folder
from recipes.small.model import IMAGE_SIZE

DIGIT_SCALE = 3
DIGIT_SIZE = 8 * DIGIT_SCALE


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What decides the folder's content; written into it, so that an outdated folder is made anew.

    Attributes:
        num_train: Scenes in ``train/``.
        num_validation: Scenes in ``validation/``.
        validation_fraction: Fraction of the 1797 original digits that is held out for validation.
        num_fragments: Fragments of other digits in each scene, or the fewest and the most of them.
        noise: Standard deviation of the pixel noise, as a fraction of full white.
        seed: Seed of everything random.
    """

    num_train: int = 20_000
    num_validation: int = 2_000
    validation_fraction: float = 0.25
    num_fragments: int | tuple[int, int] = 4
    noise: float = 0.06
    seed: int = 0


# Fragments cover a sixth of a digit on average, so that a scene shows one to four digits' worth of foreground.
VARYING = DigitsConfig(num_train=6_400, num_fragments=(0, 18))


def _enlarge(pixels: np.ndarray) -> np.ndarray:
    """(h, w) values of 0..16 -> (3h, 3w) values of 0..1."""
    height, width = pixels.shape
    image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    size = (width * DIGIT_SCALE, height * DIGIT_SCALE)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _scene(digits: np.ndarray, index: int, config: DigitsConfig, rng: np.random.Generator) -> Image.Image:
    """One scene: the whole digit ``digits[index]`` over fragments of others, with noise on top."""
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    number = config.num_fragments
    for _ in range(number if isinstance(number, int) else int(rng.integers(number[0], number[1] + 1))):
        height, width = rng.integers(3, 5, size=2)
        top, left = rng.integers(0, 8 - height + 1), rng.integers(0, 8 - width + 1)
        other = digits[rng.integers(len(digits))]
        fragment = _enlarge(other[top : top + height, left : left + width])
        y = rng.integers(0, IMAGE_SIZE - fragment.shape[0] + 1)
        x = rng.integers(0, IMAGE_SIZE - fragment.shape[1] + 1)
        window = canvas[y : y + fragment.shape[0], x : x + fragment.shape[1]]
        np.maximum(window, fragment, out=window)
    y, x = rng.integers(0, IMAGE_SIZE - DIGIT_SIZE + 1, size=2)
    canvas[y : y + DIGIT_SIZE, x : x + DIGIT_SIZE] = _enlarge(digits[index])
    canvas += rng.normal(0, config.noise, canvas.shape).astype(np.float32)
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))


def _write_split(
    root: Path, digits: np.ndarray, labels: np.ndarray, count: int, config: DigitsConfig, rng: np.random.Generator
) -> None:
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
    for number in track(range(count), description=f"writing {root.name} images", transient=True):
        index = number % len(digits)
        _scene(digits, index, config, rng).save(root / str(labels[index]) / f"{number:05d}.png")


def make_digits(root: Path, config: DigitsConfig | None = None) -> Path:
    """Write the image folder once, or reuse the one that is there; see `recipes.small.folder.make_folder`.

    Args:
        root: The folder to make, with ``train/``, ``validation/`` and ``digits.json``.
        config: What to put in it; ``None`` means the full set. A folder made with another one is made anew.

    Returns:
        ``root``.

    Raises:
        FileExistsError: The folder holds something that was not made here; it is left as it is.
    """
    config = config or DigitsConfig()
    return make_folder(root, config, "digits.json", lambda folder: _write(folder, config))


def _write(folder: Path, config: DigitsConfig) -> None:
    digits = load_digits()
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(digits.images))
    num_held_out = round(len(order) * config.validation_fraction)
    held_out, seen = order[:num_held_out], order[num_held_out:]
    for name, chosen, count in (
        ("train", seen, config.num_train),
        ("validation", held_out, config.num_validation),
    ):
        _write_split(folder / name, digits.images[chosen], digits.target[chosen], count, config, rng)

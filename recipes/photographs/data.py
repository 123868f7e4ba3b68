"""The photographs image folder: crops of the photographs that scikit-image and scikit-learn ship, one class each.

Every photograph is cut into square cells. A fixed quarter of them, spread over the photograph, is held out for
validation, and no crop reaches over the edge of its cell, so that no pixel of a validation image is seen in training.
A crop is enlarged or reduced, turned, mirrored, bleached, and changed in brightness and contrast. It fills the image,
but for distractors: pieces of other photographs of the same split, most of them towards the border. The class is the
photograph that fills the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from recipes.small.folder import make_folder
from recipes.small.model import IMAGE_SIZE

CELL_SIZE = 96
SHORTER_SIDE = 4 * CELL_SIZE
LARGEST_TURN = 15.0  # degrees, beside quarter turns
LEAST_CONTRAST = 0.06  # standard deviation of a crop's pixels, as a fraction of full white
MOST_DRAWS = 5  # until a crop has that contrast

# Class -> the file that holds it, in the packages' own folders: what they would download is not used.
SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")
PHOTOGRAPHS: dict[str, tuple[tuple[str, ...], str]] = {
    "astronaut": (SKIMAGE, "astronaut.png"),
    "brick": (SKIMAGE, "brick.png"),
    "cameraman": (SKIMAGE, "camera.png"),
    "cat": (SKIMAGE, "chelsea.png"),
    "coffee": (SKIMAGE, "coffee.png"),
    "coins": (SKIMAGE, "coins.png"),
    "flower": (SKLEARN, "flower.jpg"),
    "galaxies": (SKIMAGE, "hubble_deep_field.jpg"),
    "grass": (SKIMAGE, "grass.png"),
    "gravel": (SKIMAGE, "gravel.png"),
    "moon": (SKIMAGE, "moon.png"),
    "motorcycle": (SKIMAGE, "motorcycle_left.png"),
    "palace": (SKLEARN, "china.jpg"),
    "retina": (SKIMAGE, "retina.jpg"),
    "rocket": (SKIMAGE, "rocket.jpg"),
    "tissue": (SKIMAGE, "ihc.png"),
}

Cells = dict[str, list[Image.Image]]


@dataclass(frozen=True, kw_only=True)
class PhotographsConfig:
    """What decides the folder's content; written into it, so that an outdated folder is made anew.

    Attributes:
        num_train: Images in ``train/``.
        num_validation: Images in ``validation/``.
        smallest_crop: Side of the smallest crop, in pixels of the photograph; the largest just fits its cell.
        num_distractors: Pieces of other photographs in each image.
        largest_distractor: Longest side of one, in pixels of the image.
        noise: Standard deviation of the pixel noise, as a fraction of full white.
        seed: Seed of everything random.
    """

    num_train: int = 12_000
    num_validation: int = 2_000
    smallest_crop: int = 44
    num_distractors: int = 3
    largest_distractor: int = 28
    noise: float = 0.03
    seed: int = 0


def make_photographs(root: Path, config: PhotographsConfig | None = None) -> Path:
    """Write the image folder once, or reuse the one that is there.

    Args:
        root: The folder to make, with ``train/``, ``validation/`` and ``photographs.json``.
        config: What to put in it; ``None`` means the full set. A folder made with another one is made anew.

    Returns:
        ``root``.

    Raises:
        FileExistsError: The folder holds something that was not made here, and is left as it is.
        FileNotFoundError: An installed package lacks a photograph.
    """
    config = config or PhotographsConfig()
    return make_folder(root, config, "photographs.json", lambda folder: _write(folder, config))


def _write(folder: Path, config: PhotographsConfig) -> None:
    rng = np.random.default_rng(config.seed)
    train, validation = split_cells()
    for name, cells, count in (
        ("train", train, config.num_train),
        ("validation", validation, config.num_validation),
    ):
        _write_split(folder / name, cells, count, config, rng)


def _write_split(root: Path, cells: Cells, count: int, config: PhotographsConfig, rng: np.random.Generator) -> None:
    labels = list(cells)
    for label in labels:
        (root / label).mkdir(parents=True)
    for number in track(range(count), description=f"writing {root.name} images", transient=True):
        label = labels[number % len(labels)]
        _scene(cells, label, config, rng).save(root / label / f"{number:05d}.png")


def split_cells() -> tuple[Cells, Cells]:
    """The cells of every photograph, for training and for validation."""
    train: Cells = {}
    validation: Cells = {}
    for label in PHOTOGRAPHS:
        photograph = _open(label)
        train[label], validation[label] = [], []
        for row in range(photograph.height // CELL_SIZE):
            for column in range(photograph.width // CELL_SIZE):
                top, left = row * CELL_SIZE, column * CELL_SIZE
                cell = photograph.crop((left, top, left + CELL_SIZE, top + CELL_SIZE))
                # One of four in every row and column, a knight's move from the next.
                held_out = (column + 2 * row + row // 2) % 4 == 1
                (validation if held_out else train)[label].append(cell)
    return train, validation


def _open(label: str) -> Image.Image:
    """A photograph, its shorter side four cells long."""
    (package, *folders), name = PHOTOGRAPHS[label]
    file = resources.files(package).joinpath(*folders, name)
    if not file.is_file():
        raise FileNotFoundError(
            f"the installed {package} has no {'/'.join((*folders, name))}, which is the class {label!r}; "
            "install the versions of constraints.txt."
        )
    with file.open("rb") as stream:
        photograph = Image.open(stream).convert("RGB")
    scale = SHORTER_SIDE / min(photograph.size)
    size = (round(photograph.width * scale), round(photograph.height * scale))
    return photograph.resize(size, Image.Resampling.LANCZOS)


def _scene(cells: Cells, label: str, config: PhotographsConfig, rng: np.random.Generator) -> Image.Image:
    """One image: a crop of ``label`` that fills it, distractors of other classes, and noise."""
    canvas = _crop(cells[label], IMAGE_SIZE, config, rng)
    others = [other for other in cells if other != label]
    for _ in range(config.num_distractors):
        height, width = rng.integers(config.largest_distractor // 2, config.largest_distractor + 1, size=2)
        y, x = _towards_the_border(IMAGE_SIZE - height, rng), _towards_the_border(IMAGE_SIZE - width, rng)
        piece = _crop(cells[others[rng.integers(len(others))]], max(height, width), config, rng)
        canvas[y : y + height, x : x + width] = piece[:height, :width]
    canvas += rng.normal(0, config.noise, canvas.shape).astype(np.float32)
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))


def _towards_the_border(largest: int, rng: np.random.Generator) -> int:
    """A position in [0, largest] whose density grows from the middle to both ends."""
    return round(largest * rng.beta(0.6, 0.6))


def _crop(cells: list[Image.Image], size: int, config: PhotographsConfig, rng: np.random.Generator) -> Any:
    """A changed piece of a photograph -> (size, size, 3) of float32, 0..1 and beyond."""
    for _ in range(MOST_DRAWS):
        pixels = _piece(cells[rng.integers(len(cells))], size, config, rng)
        if pixels.std() > LEAST_CONTRAST:  # else it shows next to nothing, such as a clear sky
            break
    grey = pixels.mean(axis=2, keepdims=True)
    bleached = grey + (pixels - grey) * rng.uniform(0, 1)
    mean = bleached.mean()
    return (bleached - mean) * rng.uniform(0.6, 1.3) + 0.5 * mean + rng.uniform(0.1, 0.4)


def _piece(cell: Image.Image, size: int, config: PhotographsConfig, rng: np.random.Generator) -> Any:
    """A turned and mirrored square of one cell, at a scale of its own -> (size, size, 3) of float32, 0..1."""
    angle = np.deg2rad(rng.uniform(-LARGEST_TURN, LARGEST_TURN))
    spread = abs(np.cos(angle)) + abs(np.sin(angle))  # the square's bounding box, in units of its side
    # Of a smaller piece, less of the cell is shown at the same scale.
    side = rng.uniform(config.smallest_crop, CELL_SIZE / spread) * size / IMAGE_SIZE
    reach = side * spread / 2
    center = rng.uniform(reach, CELL_SIZE - reach, size=2)
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * side / 2  # upper left, lower left, lower right …
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    quad = (corners @ turn + center).clip(0, CELL_SIZE).flatten().tolist()
    turned = cell.transform((size, size), Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)
    pixels = np.rot90(np.asarray(turned, dtype=np.float32) / 255, k=int(rng.integers(4)))
    return np.fliplr(pixels) if rng.integers(2) else pixels

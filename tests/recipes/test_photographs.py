"""The photographs recipe on a handful of images: data, dense model, command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from recipes.dynamicvit import SparseSettings
from recipes.photographs import data as photographs_data
from recipes.photographs.__main__ import app
from recipes.photographs.data import PHOTOGRAPHS, PhotographsConfig, make_photographs, split_cells
from recipes.photographs.dense import train_photographs
from recipes.photographs.model import WEIGHTS, load_dense_model
from recipes.photographs.presets import PHOTOGRAPHS_SPARSE
from recipes.small.model import IMAGE_SIZE

SMALL = PhotographsConfig(num_train=96, num_validation=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("data") / "photographs", SMALL)


def test_the_folder_is_an_ordinary_image_folder(folder: Path) -> None:
    for split, count in (("train", 96), ("validation", 32)):
        images = sorted((folder / split).glob("*/*.png"))
        assert len(images) == count and {path.name for path in (folder / split).iterdir()} == set(PHOTOGRAPHS)
        with Image.open(images[0]) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"


def test_no_region_of_the_test_split_is_seen_in_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, validation = split_cells()
    for label in PHOTOGRAPHS:
        seen = {cell.tobytes() for cell in train[label]}
        assert len(seen) == len(train[label]) >= 12 and len(validation[label]) * 3 == len(seen)
        assert not any(cell.tobytes() in seen for cell in validation[label])
    shown: dict[str, set[bytes]] = {"train": set(), "validation": set()}
    piece, write_split = photographs_data._piece, photographs_data._write_split
    current = ""

    def record(cell: Image.Image, *others: Any) -> Any:
        shown[current].add(cell.tobytes())
        return piece(cell, *others)

    def begin(root: Path, *others: Any) -> None:
        nonlocal current
        current = root.name
        write_split(root, *others)

    monkeypatch.setattr(photographs_data, "_piece", record)
    monkeypatch.setattr(photographs_data, "_write_split", begin)
    make_photographs(tmp_path / "photographs", SMALL)
    # Everything that an image shows, distractors included, is cut from these cells.
    assert shown["train"] and shown["validation"] and not shown["train"] & shown["validation"]
    assert shown["validation"] <= {cell.tobytes() for cells in validation.values() for cell in cells}


def test_a_crop_stays_in_its_cell() -> None:
    """Outside of a cell there is nothing: what a crop shows of it would be black."""
    white = Image.new("RGB", (photographs_data.CELL_SIZE,) * 2, "white")
    rng = np.random.default_rng(0)
    for size in (12, IMAGE_SIZE) * 50:
        assert photographs_data._piece(white, size, SMALL, rng).min() == 1


def test_images_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    name = sorted((folder / "train").glob("*/*.png"))[5].relative_to(folder)
    again = make_photographs(tmp_path / "again", SMALL)
    other = make_photographs(tmp_path / "other", PhotographsConfig(num_train=96, num_validation=32, seed=1))
    assert (again / name).read_bytes() == (folder / name).read_bytes() != (other / name).read_bytes()


def test_a_photograph_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PHOTOGRAPHS, "cat", (("skimage", "data"), "dog.png"))
    with pytest.raises(FileNotFoundError, match=r"no data/dog.png, which is the class 'cat'"):
        make_photographs(tmp_path / "photographs", SMALL)
    assert not list(tmp_path.iterdir())


def test_the_shipped_weights_are_small_and_whole() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    assert load_dense_model().head.out_features == len(PHOTOGRAPHS)


def test_the_settings_fit_the_recipes(folder: Path, tmp_path: Path) -> None:
    assert SparseSettings(**{**PHOTOGRAPHS_SPARSE, "data_dir": folder}, output=tmp_path).checkpoint == WEIGHTS


def test_the_dense_model_is_trained_and_written(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    assert 0 <= train_photographs(folder, tmp_path, weights=weights, epochs=1, photographs=SMALL) <= 1
    assert load_file(weights)["head.bias"].shape == (len(PHOTOGRAPHS),)


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = CliRunner().invoke(app, ["images", "--data", str(tmp_path)])
    assert result.exit_code == 2 and "--data" in result.output
    assert "Commands" in CliRunner().invoke(app, ["--help"]).output

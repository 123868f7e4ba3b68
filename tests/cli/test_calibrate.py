"""``tokenprune calibrate``: what it reads, what it writes, how it ends."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune
from tests.helpers.command_line import fields, run
from tests.helpers.zoo import BY_NAME
from tokenprune.backbones.preprocessing import Preprocessing
from tokenprune.errors import PictureError
from tokenprune.training.pictures import picture_loader

QUICK = ("--steps", "2", "--batch-size", "2", "--num-workers", "0", "--device", "cpu")
PREPROCESSING = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(number: int) -> Image.Image:
    """A picture of one colour, by which it is known again."""
    return Image.fromarray(np.full((12, 16, 3), 10 * number, dtype=np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, eight pictures in folders of two classes, and the same as a WebDataset of two tar files."""
    root = tmp_path_factory.mktemp("data")
    model: Any = BY_NAME["transformers ViT classifier"].model()
    model.save_pretrained(root / "model")
    for number in range(8):
        folder = root / "pictures" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
        with tarfile.open(root / f"shard-{number % 2}.tar", "a") as shard:
            buffer = io.BytesIO()
            picture(number).save(buffer, "png")
            for name, content in ((f"{number}.png", buffer.getvalue()), (f"{number}.cls", b"no number")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    (root / "pictures" / "notes.txt").write_text("no picture")
    return root


@pytest.mark.parametrize("images", ["pictures", "shard-{0..1}.tar"])
def test_a_model_is_calibrated_and_saved(data: Path, images: str, tmp_path: Path) -> None:
    options = ("--stages", "2,4", "-k", "0.5", "-o", str(tmp_path / "out"), *QUICK)
    found = fields("calibrate", str(data / "model"), str(data / images), *options)
    assert found["report"]["steps"] == 2 and found["keep_ratios"] == [0.5, 0.25]
    assert found["report"]["num_validation_images"] == 4 and found["report"]["num_images"] == 4
    model: Any = tokenprune.from_pretrained(tmp_path / "out")
    dense = BY_NAME["transformers ViT classifier"].model().state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in dense.items())
    assert model.tokenprune.plan.stages == (2, 4)


def test_the_table_and_a_saved_model_as_a_start(data: Path, tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    shown = run("calibrate", str(data / "model"), str(data / "pictures"), "--stages", "2,4", "-o", first, *QUICK)
    assert shown.exit_code == 0 and "top-1 agreement with the dense model" in shown.stdout and first in shown.stdout
    again = fields("calibrate", first, str(data / "pictures"), "-o", second, "--train", "all", "--backbone-steps", "2",
                   "--keep-ratio-range", "own", *QUICK)  # fmt: skip
    assert again["report"]["steps"] == 4 and len(again["report"]["agreements"]) == 1


@pytest.mark.parametrize(
    ("images", "options", "code", "message"),
    [
        ("pictures/notes.txt", (), 2, "none of 1 pictures can be read"),
        ("nowhere", (), 2, "there is no such file or folder"),
        ("nowhere.tar", (), 2, "there is no such file"),
        ("model", (), 2, "there are no pictures"),
        ("pictures", ("--keep-ratio-range", "0.5"), 2, "expected two numbers"),
        ("pictures", ("--keep-ratio-range", "0.7,0.5"), 2, "the lowest keep ratio comes first"),
        ("pictures", ("--steps", "0"), 2, "steps=0"),
        ("pictures", ("--learning-rate", "-1"), 2, "learning_rate=-1.0"),
        ("pictures", ("--scorer", "cls_attention"), 1, "nothing to train"),
        ("pictures", ("--device", "nonsense"), 2, "--device nonsense"),
    ],
)
def test_bad_arguments_end_in_one_line(
    data: Path, tmp_path: Path, images: str, options: tuple[str, ...], code: int, message: str
) -> None:
    result = run("calibrate", str(data / "model"), str(data / images), "-o", str(tmp_path / "out"), *QUICK, *options)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(data: Path) -> None:
    result = run("calibrate", "no model", str(data / "pictures"), "-o", str(data / "pictures" / "notes.txt"))
    assert result.exit_code == 2 and "is a file; name a folder" in result.stderr


def colours(loader: Any) -> list[int]:
    """Of which pictures the batches are made."""
    return [round(float((pixel + 1) / 2 * 255 / 10)) for batch in loader for pixel in batch[:, 0, 0, 0]]


def test_every_picture_comes_once_in_an_order_that_the_seed_decides(data: Path) -> None:
    orders = [
        colours(picture_loader([data / "pictures"], PREPROCESSING, batch_size=3, seed=seed)) for seed in (0, 0, 1)
    ]
    assert sorted(orders[0]) == [*range(8)] and orders[0] == orders[1] != orders[2]
    named = [data / "pictures" / "class 0", data / "pictures" / "class 1" / "3.png"]
    assert sorted(colours(picture_loader(named, PREPROCESSING))) == [0, 2, 3, 4, 6]
    shards = [str(data / "shard-{0..1}.tar")]
    assert sorted(colours(picture_loader(shards, PREPROCESSING, batch_size=3))) == [*range(8)]
    loader = picture_loader(shards, PREPROCESSING, batch_size=2)
    assert sorted(colours(loader)) == sorted(colours(loader)) == [*range(8)]  # it can be read again


def test_a_damaged_picture_is_skipped_and_named(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "0.png").write_bytes(b"damaged")
    assert colours(picture_loader([tmp_path], PREPROCESSING)) == [1, 1]
    assert "0.png is skipped" in caplog.text
    with pytest.raises(PictureError, match="cannot be read together"):
        picture_loader([tmp_path, "shard.tar"], PREPROCESSING)

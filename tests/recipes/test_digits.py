"""The digits recipe on a handful of images: data, demo, command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from recipes.digits import __main__ as command_line
from recipes.digits import data as digits_data
from recipes.digits import demo as digits_demo
from recipes.digits.__main__ import app
from recipes.digits.data import DigitsConfig, make_digits
from recipes.digits.demo import Row, run_demo
from recipes.digits.dense import train_digits
from recipes.digits.model import WEIGHTS, build_model, load_dense_model, save_dense_model
from recipes.digits.sparse import SparseConfig, fine_tune
from recipes.engine.checkpoints import Interrupted
from recipes.small.model import IMAGE_SIZE

NAMES = ["dense", "calibrated, no labels", "fine-tuned, labels", "training-free", "static, fine-tuned", "random"]
SMALL = DigitsConfig(num_train=260, num_validation=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", SMALL)


def test_the_folder_is_an_ordinary_image_folder(folder: Path) -> None:
    for split, count in (("train", 260), ("validation", 24)):
        images = sorted((folder / split).glob("*/*.png"))
        assert len(images) == count and {path.name for path in (folder / split).iterdir()} == set("0123456789")
        with Image.open(images[0]) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_no_digit_of_the_test_split_is_seen_in_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: dict[str, list[np.ndarray[Any, Any]]] = {}

    def record(root: Path, digits: Any, labels: Any, count: int, config: Any, rng: Any) -> None:
        root.mkdir(parents=True)
        used[root.name] = list(digits)

    monkeypatch.setattr(digits_data, "_write_split", record)
    make_digits(tmp_path / "digits", SMALL)
    # Everything a split shows, whole digits and fragments, is cut from the digits it was handed.
    assert len(used["train"]) + len(used["validation"]) == 1797
    seen = {digit.tobytes() for digit in used["train"]}
    assert not any(digit.tobytes() in seen for digit in used["validation"])


def test_a_folder_is_reused_and_a_stale_one_made_anew(tmp_path: Path) -> None:
    root = make_digits(tmp_path / "digits", SMALL)
    first = next((root / "train").glob("*/*.png"))
    stamp = first.stat().st_mtime_ns
    make_digits(root, SMALL)
    assert first.stat().st_mtime_ns == stamp
    make_digits(root, DigitsConfig(num_train=20, num_validation=10))
    assert len(list((root / "train").glob("*/*.png"))) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    photo = tmp_path / "mine" / "cats" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_text("precious")
    with pytest.raises(FileExistsError, match="holds something else"):
        make_digits(tmp_path / "mine", SMALL)
    result = CliRunner().invoke(app, ["demo", "--data", str(tmp_path / "mine"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--data" in result.output
    assert photo.read_text() == "precious"


def test_the_shipped_weights_are_small_and_whole() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    load_dense_model()


def test_the_demo_end_to_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_demo, "BATCH_SIZE", 16)  # whose speed is measured
    console = Console(record=True, width=120)

    def demo() -> list[Row]:
        return run_demo(
            data=folder, output=tmp_path, keep_ratio=0.7, steps=2, seed=0, console=console, pairs=2, digits=SMALL
        )

    rows = demo()
    assert [row.name for row in rows] == NAMES
    assert rows[0].gmac_ratio == 1 and rows[1].gmac_ratio > 1.3
    text = console.export_text()
    assert "accuracy" in text and "speed-up ÷ GMAC ratio" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == NAMES
    run = results["runs"][0]
    assert len(run["kept"]) == 2
    with Image.open(tmp_path / "kept_tokens.png") as picture:
        assert picture.width > 300
    weights = Path(run["folder"]) / "tokenprune.safetensors"
    assert "tokenprune.stages.0.scorer.out_conv.4.weight" in load_file(weights)
    # A second call finds the runs made, and trains nothing.
    trained = [weights, *tmp_path.glob("calibrated-*/tokenprune.safetensors")]
    stamps = [file.stat().st_mtime_ns for file in trained]
    demo()
    assert len(stamps) == 2 and [file.stat().st_mtime_ns for file in trained] == stamps


@pytest.mark.slow
def test_a_run_made_from_another_dense_model_is_made_anew(folder: Path, tmp_path: Path) -> None:
    config = SparseConfig(scorer="random", keep_ratio=0.7, steps=1)
    shipped = fine_tune(config, folder, tmp_path)
    assert fine_tune(config, folder, tmp_path) == shipped
    other = tmp_path / "other.safetensors"
    save_dense_model(build_model(), other)
    assert fine_tune(config, folder, tmp_path, other).folder != shipped.folder


@pytest.mark.slow
def test_the_dense_model_is_trained_and_written(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    assert 0 <= train_digits(folder, tmp_path, weights=weights, epochs=2, digits=SMALL) <= 1
    load_dense_model(weights)


def test_the_command_line_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, said in (
        (Interrupted("stopped after step 7 of 9"), "stopped after step 7 of 9"),
        (KeyboardInterrupt(), ""),
    ):

        def stop(error: BaseException = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(command_line, "run_demo", stop)
        result = CliRunner().invoke(app, ["demo"])
        assert result.exit_code == 130
        assert said in result.output and "Run the same command again to go on" in result.output


def test_the_command_line_checks_its_options() -> None:
    result = CliRunner().invoke(app, ["demo", "--keep-ratio", "1.5"])
    assert result.exit_code == 2 and "keep-ratio" in result.output
    assert "Commands" in CliRunner().invoke(app, ["--help"]).output

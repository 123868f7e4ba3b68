"""The digits recipe on a handful of images: data, training loop, demo."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from recipes.digits import __main__ as command_line
from recipes.digits import data as digits_data
from recipes.digits.__main__ import app
from recipes.digits.data import IMAGE_SIZE, DigitsConfig, make_digits
from recipes.digits.demo import Row, run_demo
from recipes.digits.model import WEIGHTS, build_model, load_dense_model, save_dense_model
from recipes.digits.sparse import SparseConfig, fine_tune, parameter_groups, sparse_model
from recipes.engine import Interrupted, Schedule, image_folder_loader, train, write_whole

SMALL = DigitsConfig(num_train=140, num_validation=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", SMALL)


def test_the_folder_is_an_ordinary_image_folder(folder: Path) -> None:
    for split, count in (("train", 140), ("validation", 24)):
        images = sorted((folder / split).glob("*/*.png"))
        assert len(images) == count and {path.name for path in (folder / split).iterdir()} == set("0123456789")
        with Image.open(images[0]) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    pixels, labels = next(iter(image_folder_loader(folder, "validation", image_size=64, batch_size=24, num_workers=0)))
    assert pixels.shape == (24, 3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1 and len(labels.unique()) > 5


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


def test_write_whole_leaves_no_half_written_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fails(partial: Path) -> None:
        partial.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, fails)
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]
    write_whole(target, lambda partial: partial.write_text("new"))
    assert target.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["file"]


def run(folder: Path, state: Path, steps: int, interrupt_at: int | None) -> list[int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    seen: list[int] = []

    def on_step(step: int, parts: Mapping[str, float]) -> None:
        seen.append(step)
        if step == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    def loss(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(outputs, targets)}

    loader = image_folder_loader(folder, "train", image_size=64, batch_size=20, num_workers=0)
    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    train(model, loss, loader, groups, Schedule(steps=steps, warmup_steps=1), state_folder=state,
          description="test", on_step=on_step)  # fmt: skip
    return seen


def test_ctrl_c_keeps_the_state_and_the_next_run_goes_on(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 3 of 5"):
        run(folder, state, 5, interrupt_at=3)
    assert signal.getsignal(signal.SIGINT) is before
    assert (state / "model.safetensors").exists() and [path.name for path in tmp_path.iterdir()] == ["state"]
    assert run(folder, state, 5, interrupt_at=None) == [4, 5]
    assert not state.exists()


def test_a_loss_that_is_not_finite_ends_the_run(folder: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    loader = image_folder_loader(folder, "train", image_size=64, batch_size=20, num_workers=0)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train(model, lambda model, inputs, outputs, targets: {"loss": outputs.sum() * float("nan")}, loader,
              [{"params": list(model.parameters()), "lr": 1e-3}], Schedule(steps=2, warmup_steps=1),
              state_folder=tmp_path / "state", description="test")  # fmt: skip


def test_too_few_images_for_a_batch_are_refused(folder: Path, tmp_path: Path) -> None:
    loader = image_folder_loader(folder, "train", image_size=64, batch_size=200, num_workers=0)
    with pytest.raises(ValueError, match="140 images do not fill a batch of 200"):
        train(nn.Linear(1, 1), lambda *_: {}, loader, [], Schedule(steps=2, warmup_steps=1),
              state_folder=tmp_path / "state", description="test")  # fmt: skip


def test_learning_rates_of_scorers_and_backbone() -> None:
    model = sparse_model(SparseConfig(scorer="predictor", keep_ratio=0.7, steps=1), build_model())
    groups = parameter_groups(model, 0.5)
    grouped = {parameter: group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = grouped[parameter]
        assert group["lr"] == (0.5 if name.startswith("tokenprune.") else 5e-5), name
        assert (group["weight_decay"] > 0) == (parameter.dim() > 1 and name not in model.no_weight_decay()), name


def test_the_shipped_weights_are_small_and_whole() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    load_dense_model()


def test_the_demo_end_to_end(folder: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=120)

    def demo() -> list[Row]:
        return run_demo(
            data=folder, output=tmp_path, keep_ratio=0.7, steps=2, seed=0, console=console, pairs=2, digits=SMALL
        )

    rows = demo()
    assert [row.name for row in rows] == ["dense", "learned", "random", "static"]
    assert rows[0].gmac_ratio == 1 and rows[1].gmac_ratio > 1.3
    text = console.export_text()
    assert "accuracy" in text and "speed-up ÷ GMAC ratio" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["dense", "learned", "random", "static"]
    assert len(results["runs"][0]["kept"]) == 2
    with Image.open(tmp_path / "kept_tokens.png") as picture:
        assert picture.width > 300
    assert "tokenprune.stages.0.scorer.out_conv.4.weight" in load_file(tmp_path / "predictor-0.7-seed0.safetensors")
    # A second call finds the runs made, and trains nothing.
    stamp = (tmp_path / "predictor-0.7-seed0.json").stat().st_mtime_ns
    demo()
    assert (tmp_path / "predictor-0.7-seed0.json").stat().st_mtime_ns == stamp


def test_a_run_made_from_another_dense_model_is_made_anew(folder: Path, tmp_path: Path) -> None:
    config = SparseConfig(scorer="random", keep_ratio=0.7, steps=1)
    validation = image_folder_loader(folder, "validation", image_size=IMAGE_SIZE, batch_size=24, num_workers=0)
    shipped = fine_tune(config, folder, tmp_path, validation)
    assert fine_tune(config, folder, tmp_path, validation) == shipped
    other = tmp_path / "other.safetensors"
    save_dense_model(build_model(), other)
    assert fine_tune(config, folder, tmp_path, validation, other).dense_sha256 != shipped.dense_sha256


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

"""The engine's data: folders, tars, streams and data sets, damaged or with other classes than the weights."""

from __future__ import annotations

import json
import shutil
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor

from recipes.dense import DenseSettings, train_dense
from recipes.dynamicvit import SparseSettings, fine_tune
from recipes.engine.checkpoints import Checkpoints
from recipes.engine.data import DataError, class_indices, loader, number_of_classes, open_images
from recipes.engine.settings import SettingsError, TrainingSettings
from tests.helpers.engine import TINY, sparse


def test_augmentation_depends_on_seed_epoch_and_image_alone(folder: Path) -> None:
    settings = TrainingSettings(**{**TINY, "data_dir": folder, "output": folder})

    def image(index: int, epoch: int = 0, seed: int = 0) -> Tensor:
        images = open_images(settings, training=True)
        images.seed = seed
        loader(images, settings, resolve_data_config({"img_size": 64}), training=True)
        images.set_epoch(epoch)
        torch.rand(3)  # whatever was drawn before
        pixels: Tensor = images[index][0]
        return pixels

    assert torch.equal(image(3), image(3))
    assert not torch.equal(image(3), image(3, epoch=1)) and not torch.equal(image(3), image(3, seed=1))


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """An image folder with an empty file and one that ends in the middle."""
    root = tmp_path / "damaged"
    for split in ("train", "validation"):
        for index, source in enumerate(sorted((folder / split).glob("*/*.png"))):
            target = root / split / source.parent.name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = source.read_bytes()
            cut = {3: 0, 7: len(content) // 2}.get(index, len(content)) if split == "train" else len(content)
            target.write_bytes(content[:cut])
    return root


def test_damaged_images_are_skipped_and_named(damaged: Path) -> None:
    settings = TrainingSettings(**{**TINY, "data_dir": damaged, "output": damaged})
    images = open_images(settings, training=True)
    assert len([images[index] for index in range(len(images))]) == 70
    assert len(images.damaged_names()) == 2 and all(name.endswith(".png") for name in images.damaged_names())
    images.check()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_end_the_run(damaged: Path, tmp_path: Path, workers: int) -> None:
    settings = sparse(damaged, tmp_path / "run", max_damaged=1, num_workers=workers)
    with pytest.raises(DataError, match=r"2 images cannot be read and max_damaged=1: .*png"):
        fine_tune(settings)


def test_a_tar_of_images_is_read(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    images = open_images(
        TrainingSettings(**{**TINY, "data_dir": tmp_path / "train.tar", "output": tmp_path}), training=True
    )
    assert len(images) == 70 and images[0][0].size == (64, 64)


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image folder as a WebDataset of two shards a split."""
    root = tmp_path_factory.mktemp("shards")
    info: dict[str, Any] = {"splits": {}}
    for split in ("train", "validation"):
        images = sorted((folder / split).glob("*/*.png"))
        names = [f"{split}-{shard}.tar" for shard in range(2)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for image in images[shard::2]:
                    tar.add(image, arcname=f"{image.stem}.png")
                    label = root / "label"
                    label.write_text(image.parent.name)
                    tar.add(label, arcname=f"{image.stem}.cls")
        lengths = [len(images[shard::2]) for shard in range(2)]
        info["splits"][split] = {
            "name": split,
            "filenames": names,
            "num_samples": len(images),
            "shard_lengths": lengths,
        }
    (root / "_info.json").write_text(json.dumps(info))
    return root


def streamed(shards: Path, output: Path, **changes: Any) -> SparseSettings:
    return sparse(shards, output, **{"dataset": "wds/digits", "num_classes": 10, "num_workers": 1, **changes})


def test_streams_need_workers_and_a_number_of_classes(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_workers from 1"):
        fine_tune(streamed(shards, tmp_path / "run", num_workers=0))
    with pytest.raises(DataError, match="does not tell its number of classes"):
        fine_tune(streamed(shards, tmp_path / "run", num_classes=None))


@pytest.mark.parametrize("stop", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_on_streamed_tars_goes_on_alike(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    if stop == 5 and tuple(map(int, version("accelerate").split(".")[:2])) < (1, 15):
        pytest.skip("earlier releases go on at another image of a later epoch's stream")
    whole = fine_tune(streamed(shards, tmp_path / "whole")).model.state_dict()
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, accelerator: Any, step: int, kind: str = "last") -> None:
        save(self, accelerator, step, kind)
        if step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoints, "save", save_and_stop)
        fine_tune(streamed(shards, tmp_path / "run", checkpoint_every=1))
    resumed = fine_tune(streamed(shards, tmp_path / "run", checkpoint_every=1, resume=True)).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_hugging_face_data_set_is_read(folder: Path, tmp_path: Path) -> None:
    settings = TrainingSettings(**{**TINY, "dataset": f"hfds/{folder}", "data_dir": tmp_path, "output": tmp_path})
    images = open_images(settings, training=True)
    assert len(images) == 70 and number_of_classes(images, settings) == 10
    pixels, label = images[0]
    assert pixels.size == (64, 64) and label == 0


def test_the_number_of_classes_comes_from_the_data(folder: Path) -> None:
    settings = TrainingSettings(**{**TINY, "data_dir": folder, "output": folder, "num_classes": 7})
    images = open_images(settings, training=True)
    with pytest.raises(DataError, match=r"num_classes=7, but .* has 10 classes"):
        number_of_classes(images, settings)
    with pytest.raises(DataError, match="does not tell its number of classes"):
        number_of_classes(object(), TrainingSettings(**{**TINY, "data_dir": folder, "output": folder}))


def test_a_validation_split_that_lacks_a_class_keeps_the_numbers_of_the_others(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "validation" / "4")
    settings = TrainingSettings(**{**TINY, "data_dir": tmp_path / "data", "output": tmp_path})
    classes = class_indices(open_images(settings, training=True))
    images = open_images(settings, training=False, classes=classes)
    shown = {path.parent.name for path in (tmp_path / "data" / "validation").glob("*/*.png")}
    assert max(map(int, shown)) > 4, "without a class behind the missing one, nothing could be shifted"
    assert {images[index][1] for index in range(len(images))} == {int(name) for name in shown}


def test_weights_for_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", img_size=64, num_classes=7).state_dict(), tmp_path / "dense.pth")
    settings = sparse(folder, tmp_path / "run", checkpoint=tmp_path / "dense.pth")
    with pytest.raises(SettingsError, match=r"do not fit .* 10 classes .*: they are for 7. .* python -m recipes.dense"):
        fine_tune(settings)
    with pytest.raises(SettingsError, match="timm's weights of test_vit do not fit"):
        fine_tune(sparse(folder, tmp_path / "run", pretrained=True))
    (tmp_path / "dense.pth").write_bytes((tmp_path / "dense.pth").read_bytes()[:1000])
    with pytest.raises(SettingsError, match=r"dense\.pth do not fit"):
        fine_tune(settings)


def test_dense_weights_for_other_classes_get_a_new_head(folder: Path, tmp_path: Path) -> None:
    before = timm.create_model("test_vit", img_size=64, num_classes=7).state_dict()
    torch.save({"model": before}, tmp_path / "dense.pth")
    settings = DenseSettings(
        **{**TINY, "data_dir": folder, "output": tmp_path, "checkpoint": tmp_path / "dense.pth", "ema_decay": 0.0,
           "learning_rate": 1e-9, "min_learning_rate": 0.0}
    )  # fmt: skip
    after = train_dense(settings).model.state_dict()
    assert after["head.weight"].shape == (10, 64)
    # Steps of 2e-11 change nothing in float32 but what is zero.
    assert torch.allclose(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"], atol=1e-8)

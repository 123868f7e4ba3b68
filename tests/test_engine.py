"""The training engine on a handful of images: settings, data, steps, checkpoints, resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from typer.testing import CliRunner

import tokenprune
from recipes import deit, dense
from recipes.deit import DeitSettings
from recipes.dense import DenseSettings, train_dense
from recipes.digits.data import DigitsConfig, make_digits
from recipes.digits.presets import DIGITS_SPARSE
from recipes.dynamicvit import SparseSettings, fine_tune, freeze_embeddings
from recipes.engine.checkpoints import Checkpoints, Interrupted, write_whole
from recipes.engine.data import DataError, class_indices, loader, number_of_classes, open_images
from recipes.engine.evaluation import evaluate
from recipes.engine.logbook import read_log
from recipes.engine.models import num_heads
from recipes.engine.optimization import Schedule, parameter_groups
from recipes.engine.randomness import seed_everything
from recipes.engine.settings import SettingsError, TrainingSettings
from recipes.engine.training import make_accelerator, train

# Two epochs of three steps of 20 images: enough for an end of an epoch in the middle of a run.
TINY: dict[str, Any] = {
    "image_size": 64,
    "model": "test_vit",
    "pretrained": False,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "batch_size": 20,
    "num_workers": 0,
    "log_every": 1,
    "tracker": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=70, num_validation=24))


def sparse(folder: Path, output: Path, **changes: Any) -> SparseSettings:
    return SparseSettings(**{**TINY, "frozen_epochs": 0.5, "data_dir": folder, "output": output, **changes})


# Settings


def invoke(module: Any, *arguments: Any) -> Any:
    return CliRunner().invoke(module.app, [str(argument) for argument in arguments])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[DeitSettings]:
    """The settings that the command line of `recipes.deit` makes, in place of a run."""
    found: list[DeitSettings] = []
    monkeypatch.setattr(deit, "fine_tune", lambda settings, console: found.append(settings))
    return found


def test_the_paper_s_schedule_is_the_default(seen: list[DeitSettings], tmp_path: Path) -> None:
    assert invoke(deit, "--data-dir", tmp_path).exit_code == 0
    settings = seen[0]
    assert (settings.epochs, settings.warmup_epochs, settings.frozen_epochs) == (30, 5, 5)
    assert (settings.learning_rate, settings.backbone_factor, settings.weight_decay) == (1e-3, 0.01, 0.05)
    assert (settings.kl_weight, settings.distill_weight, settings.ratio_weight) == (0.5, 0.5, 2)
    assert (settings.mixup, settings.cutmix, settings.label_smoothing, settings.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (settings.ema_decay, settings.drop_path, settings.ratio) == (0.9999, 0.0, 0.7)


def test_what_goes_before_what(seen: list[DeitSettings], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump({"epochs": 7, "ratio_weight": 1.0, "keep_ratio": [0.5], "data_dir": str(tmp_path)})
    )
    assert invoke(deit, "--config", config).exit_code == 0
    assert invoke(deit, "--config", config, "--base").exit_code == 0
    assert invoke(deit, "--base", "--ratio-weight", 3, "--config", config, "--keep-ratio", 0.9).exit_code == 0
    assert [settings.epochs for settings in seen] == [7, 7, 7]
    assert [settings.ratio_weight for settings in seen] == [1.0, 5.0, 3.0]
    assert [settings.model for settings in seen] == ["deit_small_patch16_224", *["deit_base_patch16_224"] * 2]
    assert [settings.ratio for settings in seen] == [0.5, 0.5, 0.9]


def test_settings_come_back_from_what_they_were_saved_as(seen: list[DeitSettings], tmp_path: Path) -> None:
    settings = DeitSettings(
        data_dir=tmp_path, keep_ratio=[0.5, 0.4, 0.4], stages=[3, 6, 9], image_size=96, drop_path=0.1
    )
    (tmp_path / "saved.yaml").write_text(settings.to_yaml())
    assert invoke(deit, "--config", tmp_path / "saved.yaml").exit_code == 0
    assert seen == [settings]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "none"], "--epochs"),
        (["--keep-ratios", "0.7"], "--keep-ratios"),
        (["--warmup-epochs", "30"], "leaves nothing of epochs=30"),
        (["--frozen-epochs", "31"], "frozen_epochs=31.0 is more"),
        (["--batch-size", "7"], "take an even one"),
        (["--width", "256"], "no weights of another width"),
        (["--checkpoint", "nowhere.pth"], "no such file"),
        (["--ema-decay", "1"], "never averages"),
        (["--min-learning-rate", "0.1"], "is above learning_rate"),
        (["--data-dir", "nowhere"], "no such folder"),
    ],
)
def test_bad_settings_end_with_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = invoke(deit, "--data-dir", tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "said"),
    [("epoch: 3", "unknown: epoch"), ("epochs: many", "epochs"), ("- 3", "no mapping"), ("a: [", "is not YAML")],
)
def test_bad_yaml_ends_with_code_2(text: str, said: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    result = invoke(deit, "--data-dir", tmp_path, "--config", config)
    assert result.exit_code == 2 and said in " ".join(result.output.replace("│", " ").split())


# Data


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


@pytest.mark.parametrize("stop", [2, 5])
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


# Steps


def test_learning_rates() -> None:
    schedule = Schedule(steps=100, warmup_steps=10, min_learning_rate=1e-6, frozen_steps=20)
    model = tokenprune.sparsify(timm.create_model("test_vit", img_size=64))
    freeze_embeddings(model)
    scorers = set(model.tokenprune.parameters())
    slow = [parameter for parameter in model.parameters() if parameter not in scorers]
    groups = parameter_groups(model, learning_rate=0.5, weight_decay=0.05, slow=slow, slow_factor=0.01)
    grouped = {parameter: group for group in groups for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if parameter not in grouped} == {
        "cls_token",
        "pos_embed",
    }
    for name, parameter in model.named_parameters():
        if parameter in grouped:
            group = grouped[parameter]
            assert group["full_lr"] == (0.5 if name.startswith("tokenprune.") else 0.005), name
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1 and name != "reg_token"), name
    optimizer = torch.optim.AdamW(groups)
    for step, fraction in ((0, 0.0), (5, 0.5), (10, 1.0), (55, 0.5), (100, 0.0)):
        schedule.set(optimizer, step)
        for group in optimizer.param_groups:
            expected = 1e-6 + (group["full_lr"] - 1e-6) * fraction
            assert group["lr"] == pytest.approx(0.0 if group["waits"] and step < 20 else expected)


def test_heads_of_any_width_divide_it() -> None:
    assert [num_heads(width) for width in (192, 256, 288, 320, 384, 768)] == [3, 4, 4, 5, 6, 12]
    assert [num_heads(width) for width in (32, 64, 130)] == [1, 1, 2]


def test_frozen_weights_stay_and_the_predictors_learn(folder: Path, tmp_path: Path) -> None:
    seed_everything(0)
    fresh = {
        name: value.clone()
        for name, value in timm.create_model("test_vit", img_size=64, num_classes=10).state_dict().items()
    }
    outcome = fine_tune(sparse(folder, tmp_path / "run", frozen_epochs=2.0, ema_decay=0.0))
    after = outcome.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in fresh.items())
    outcome = fine_tune(sparse(folder, tmp_path / "other", frozen_epochs=0.0, ema_decay=0.0))
    after = outcome.model.state_dict()
    assert torch.equal(after["cls_token"], fresh["cls_token"]) and torch.equal(after["pos_embed"], fresh["pos_embed"])
    assert not torch.equal(after["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"])


def test_a_step_with_accumulation_is_a_step_of_the_larger_batch(folder: Path, tmp_path: Path) -> None:
    # Without augmentation, mixup and dropout a dense step has no randomness; images of a step are the same in both.
    plain = {"auto_augment": "", "color_jitter": 0.0, "horizontal_flip": 0.0, "min_crop": 1.0, "random_erasing": 0.0,
             "mixup": 0.0, "cutmix": 0.0, "ema_decay": 0.0, "drop_path": 0.0, "learning_rate": 1e-2}  # fmt: skip

    def weights(name: str, **changes: Any) -> Mapping[str, Tensor]:
        settings = DenseSettings(**{**TINY, **plain, "data_dir": folder, "output": tmp_path / name, **changes})
        return train_dense(settings).model.state_dict()

    once, twice = weights("once", batch_size=20), weights("twice", batch_size=10, accumulation=2)
    for name, value in once.items():
        # AdamW divides by the gradient's size: a rounding error of a vanishing gradient may turn into a step of 1e-5.
        assert torch.allclose(value, twice[name], atol=1e-4), name


def restart_accelerate() -> None:
    """Accelerate keeps precision and compilation for the life of a process; tests begin a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def losses_of(folder: Path, output: Path, **changes: Any) -> list[float]:
    restart_accelerate()
    try:
        fine_tune(sparse(folder, output, ema_decay=0.0, **changes))
    finally:
        restart_accelerate()
    return [line["loss"] for line in read_log(output, "training")]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        # The same arithmetic, once more in the backward pass.
        ({"activation_checkpointing": True}, 1e-5),
        # bfloat16 has 8 bits; the losses are about 2.5, and a decision may fall otherwise.
        ({"mixed_precision": "bf16"}, 0.2),
        # Compiled code draws other random numbers for the decisions.
        pytest.param({"compile": True}, 0.2, marks=pytest.mark.slow),
    ],
)
def test_memory_precision_and_compilation_leave_the_losses(
    folder: Path, tmp_path: Path, changes: dict[str, Any], tolerance: float
) -> None:
    plain, other = losses_of(folder, tmp_path / "plain"), losses_of(folder, tmp_path / "other", **changes)
    assert other == pytest.approx(plain, abs=tolerance)
    assert other != plain or "activation_checkpointing" in changes


def test_a_run_in_bfloat16_ends_in_an_ordinary_model(folder: Path, tmp_path: Path) -> None:
    restart_accelerate()
    try:
        outcome = fine_tune(sparse(folder, tmp_path / "run", ema_decay=0.0, mixed_precision="bf16"))
    finally:
        restart_accelerate()
    assert "forward" not in vars(outcome.model)
    images = torch.randn(2, 3, 64, 64)
    again = tokenprune.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(outcome.model.eval()(images), again(images))


@pytest.mark.parametrize("changes", [{"clip_gradient": 1e-6}, {"drop_path": 0.5}, {"ratio_weight": 5.0}, {"seed": 1}])
def test_settings_change_the_run(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    # The backbone learns from the first step on, so that what it is given shows in the steps that follow.
    options = {"frozen_epochs": 0.0, "learning_rate": 0.1}
    plain = losses_of(folder, tmp_path / "plain", **options)
    assert losses_of(folder, tmp_path / "other", **options, **changes)[1:] != plain[1:]


def test_averaged_weights_are_what_is_evaluated_and_saved(folder: Path, tmp_path: Path) -> None:
    average = fine_tune(sparse(folder, tmp_path / "average", ema_decay=0.5)).model.state_dict()
    last = fine_tune(sparse(folder, tmp_path / "last", ema_decay=0.0)).model.state_dict()
    name = "tokenprune.stages.0.scorer.out_conv.0.weight"
    assert not torch.equal(average[name], last[name])
    assert torch.equal(weights_of(tmp_path / "average")[name], average[name])


def test_logs_and_results_say_what_happened(folder: Path, tmp_path: Path) -> None:
    settings = sparse(folder, tmp_path / "run", keep_ratio=[0.5], tracker="tensorboard")
    outcome = fine_tune(settings)
    steps = read_log(settings.output, "training")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "classification", "kl", "distill", "ratio", "kept_1", "kept_2", "kept_3"} < set(steps[0])
    assert steps[0]["learning_rate_backbone"] == 0 < steps[-1]["learning_rate_backbone"]
    scores = read_log(settings.output, "evaluation")[-1]
    # 16 patches: 8, 4 and 2 of them are kept.
    assert [scores[f"kept_{stage}"] for stage in (1, 2, 3)] == [8 / 16, 4 / 16, 2 / 16]
    assert {"top1", "top5", "dense_top1", "dense_top5"} < set(scores)
    results = json.loads((settings.output / "results.json").read_text())
    assert results["scores"] == dict(outcome.scores) and results["gmacs"]["sparse"] < results["gmacs"]["dense"]
    assert results["settings"] == settings.to_dict() and "torch" in results["versions"]
    assert list((settings.output / "logs").rglob("events.out.tfevents.*"))
    assert yaml.safe_load((settings.output / "settings.yaml").read_text()) == settings.to_dict()


def test_evaluation_counts_every_image_once(folder: Path) -> None:
    settings = TrainingSettings(
        **{**TINY, "data_dir": folder, "output": folder, "batch_size": 7, "mixup": 0, "cutmix": 0}
    )
    images = open_images(settings, training=False)
    batches = loader(images, settings, resolve_data_config({"img_size": 64}), training=False)

    class Fixed(nn.Module):
        """Says class 3 first and class 5 second, whatever it sees."""

        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 10)
            logits[:, 3], logits[:, 5] = 2, 1
            return logits

    accelerator = make_accelerator(settings)
    scores = evaluate(accelerator, Fixed(), accelerator.prepare(batches))
    labels = [images[index][1] for index in range(len(images))]
    assert scores["top1"] == labels.count(3) / 24
    assert scores["top5"] >= (labels.count(3) + labels.count(5)) / 24 and "kept_1" not in scores


def broken(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"loss": outputs.sum() * float("nan")}


def run_plain(folder: Path, output: Path, loss: Any, **changes: Any) -> nn.Module:
    settings = TrainingSettings(
        **{**TINY, "mixup": 0.0, "cutmix": 0.0, "data_dir": folder, "output": output, **changes}
    )
    seed_everything(settings.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    images = open_images(settings, training=True)
    batches = loader(images, settings, resolve_data_config({"img_size": 64}), training=True)
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0)
    train(make_accelerator(settings), model, loss, groups, batches, None, settings, description="", num_classes=10)
    return model


def test_a_loss_that_is_not_finite_ends_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.dynamicvit.Objective.forward", lambda self, *arguments: broken(*arguments))
    result = invoke(deit, "--smoke", "--data-dir", folder, "--output", tmp_path / "run", "--num-workers", 0)
    assert result.exit_code == 1 and "the loss is nan at step 1" in " ".join(result.output.split())


def test_a_loss_that_is_not_finite_ends_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1: .*--clip-gradient"):
        run_plain(folder, tmp_path / "run", broken)
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest() is None


def test_too_few_images_for_a_step_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few training images for one step of 160"):
        run_plain(folder, tmp_path / "run", broken, batch_size=20, accumulation=8)


# Resuming


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


def test_ctrl_c_keeps_the_state_and_the_next_run_goes_on(folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"loss": nn.functional.cross_entropy(outputs, targets)}

    whole = run_plain(folder, tmp_path / "whole", lambda *args: {"loss": nn.functional.cross_entropy(args[2], args[3])})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="Stopped after step 2 of 6"):
        run_plain(folder, tmp_path / "run", loss)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(SettingsError, match="holds a run already; add --resume"):
        run_plain(folder, tmp_path / "run", loss)
    with pytest.raises(SettingsError, match="seed was 0 and is 1"):
        run_plain(folder, tmp_path / "run", loss, resume=True, seed=1)
    resumed = run_plain(folder, tmp_path / "run", loss, resume=True)
    assert len(calls) == 6
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def command(module: str, folder: Path, output: Path, *arguments: str) -> list[str]:
    return ["-m", f"recipes.{module}", "--smoke", "--data-dir", str(folder), "--output", str(output), *arguments]


def weights_of(output: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(output / "tokenprune.safetensors")
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    folder = make_digits(tmp_path / "digits", DigitsConfig(num_train=70, num_validation=24))
    steps = ["--epochs", "6", "--checkpoint-every", "1"]
    subprocess.run([sys.executable, *command("deit", folder, tmp_path / "whole", *steps)], check=True)
    state, log = tmp_path / "killed" / "checkpoints", tmp_path / "killed" / "log.jsonl"
    kills = 0
    while kills < 5:
        started = time.time_ns()
        process = subprocess.Popen([sys.executable, *command("deit", folder, tmp_path / "killed", *steps, "--resume")])
        # Killed sooner or later after it began to write: while it computes, logs or saves.
        while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > started):
            time.sleep(0.01)
        time.sleep(0.05 + 0.13 * kills)
        assert process.poll() is None, "the run ended before it could be killed; give it more steps"
        process.kill()
        process.wait()
        kills += 1
        for checkpoint in (path for path in state.glob("*-*") if path.suffix == ""):
            load_file(checkpoint / "model.safetensors")
            torch.load(checkpoint / "optimizer.bin", weights_only=True)
    subprocess.run([sys.executable, *command("deit", folder, tmp_path / "killed", *steps, "--resume")], check=True)
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == log.read_text()


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(tmp_path: Path) -> None:
    folder = make_digits(tmp_path / "digits", DigitsConfig(num_train=70, num_validation=24))
    one = command("deit", folder, tmp_path / "one", "--accumulation", "2")
    subprocess.run([sys.executable, *one], check=True)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = command("deit", folder, tmp_path / "two")
    subprocess.run([sys.executable, *launch, *two], check=True, env=environment)
    first, second = (read_log(tmp_path / name, "training") for name in ("one", "two"))
    assert len(first) == len(second) == 8
    for line, other in zip(first, second, strict=True):
        for name in set(line) - {"kind"}:
            # Gradients are summed in another order; eight steps leave it at some rounding errors of float32.
            assert line[name] == pytest.approx(other[name], abs=1e-5), (line["step"], name)


# Recipes from the command line


@pytest.mark.parametrize("recipe", [deit, dense])
def test_recipes_explain_themselves(recipe: Any) -> None:
    result = invoke(recipe, "--help")
    assert result.exit_code == 0 and "--smoke" in result.output and "--data-dir" in result.output


def test_digits_settings_fit_the_recipes(tmp_path: Path) -> None:
    settings = SparseSettings(**{**DIGITS_SPARSE, "data_dir": tmp_path, "output": tmp_path})
    assert settings.learning_rate * settings.batch_size / 1024 == pytest.approx(3e-3)
    assert settings.learning_rate * settings.backbone_factor * settings.batch_size / 1024 == pytest.approx(5e-5)

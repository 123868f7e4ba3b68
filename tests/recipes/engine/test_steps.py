"""The engine's steps: learning rates, what is frozen, accumulation, precision, evaluation, losses gone wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.data import resolve_data_config
from torch import Tensor, nn

import tokenprune
from recipes import deit
from recipes.dense import DenseSettings, train_dense
from recipes.dynamicvit import fine_tune, freeze_embeddings
from recipes.engine.checkpoints import Checkpoints
from recipes.engine.data import DataError, loader, open_images
from recipes.engine.evaluation import evaluate
from recipes.engine.logbook import read_log
from recipes.engine.models import num_heads
from recipes.engine.optimization import Schedule, parameter_groups
from recipes.engine.randomness import seed_everything
from recipes.engine.settings import TrainingSettings
from recipes.engine.training import make_accelerator
from tests.helpers.engine import TINY, broken, invoke, losses_of, restart_accelerate, run_plain, sparse, weights_of


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

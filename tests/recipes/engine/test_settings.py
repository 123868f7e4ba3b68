"""The engine's settings: defaults, what goes before what, refusals; and the recipes' command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recipes import deit, dense
from recipes.deit import DeitSettings
from recipes.digits.presets import DIGITS_SPARSE
from recipes.dynamicvit import SparseSettings
from tests.helpers.engine import invoke


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


def test_a_run_leaves_no_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def among_processes(settings: DeitSettings, **options: Any) -> None:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)

    monkeypatch.setattr(deit, "fine_tune", among_processes)
    result = invoke(deit, "--data-dir", tmp_path, "--output", tmp_path / "run")
    assert result.exit_code == 0 and not torch.distributed.is_initialized()


@pytest.mark.parametrize("recipe", [deit, dense])
def test_recipes_explain_themselves(recipe: Any) -> None:
    result = invoke(recipe, "--help")
    assert result.exit_code == 0 and "--smoke" in result.output and "--data-dir" in result.output


def test_digits_settings_fit_the_recipes(tmp_path: Path) -> None:
    settings = SparseSettings(**{**DIGITS_SPARSE, "data_dir": tmp_path, "output": tmp_path})
    assert settings.learning_rate * settings.batch_size / 1024 == pytest.approx(3e-3)
    assert settings.learning_rate * settings.backbone_factor * settings.batch_size / 1024 == pytest.approx(5e-5)

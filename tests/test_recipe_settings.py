"""Settings of training runs: what those of the engine and of the Trainer share, each rule over both."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from inspect import get_annotations
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.models import OptionInfo
from typer.testing import CliRunner

from recipes.ablation import AblationSettings
from recipes.deit import DeitSettings
from recipes.dense import DenseSettings
from recipes.dynamicvit import SparseSettings
from recipes.engine.command_line import command
from recipes.engine.options import annotations_of
from recipes.engine.run_folder import check_folder, write_settings
from recipes.engine.settings import PruningSettings, RunSettings, SettingsError, TrainingSettings
from recipes.huggingface.settings import HfSettings
from recipes.lvvit import LvvitSettings
from recipes.width_scaling import WidthSettings

both = pytest.mark.parametrize("settings_class", [SparseSettings, HfSettings])


def make(settings_class: type[Any], tmp_path: Path, **changes: Any) -> Any:
    """Valid settings but for ``changes``, in which all epochs are ten."""
    needed = {"data_dir": tmp_path, "model": "test_vit", "output": tmp_path / "run", "epochs": 10}
    return settings_class(**{**needed, **changes})


# Rules


@both
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.0, "min_learning_rate": 0.0}, "learning_rate=0 trains nothing"),
        ({"learning_rate": 1e-4, "min_learning_rate": 2e-4}, "min_learning_rate=0.0002 is above learning_rate=0.0001"),
        ({"warmup_epochs": 10.0}, "warmup_epochs=10.0 leaves nothing of epochs=10"),
        ({"frozen_epochs": 10.5}, "frozen_epochs=10.5 is more than epochs=10"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8': choose one of 'no', 'bf16', 'fp16'"),
        ({"tracker": "mlflow"}, "tracker='mlflow': choose one of 'tensorboard', 'wandb', 'none'"),
        ({"learning_rate": math.nan}, "learning_rate=nan: give a finite number, of at least 0"),
        ({"weight_decay": math.inf}, "weight_decay=inf: give a finite number, of at least 0"),
        ({"keep_ratio": [0.7, math.nan]}, "keep_ratio=nan: give a finite number"),
    ],
)
def test_what_contradicts_is_refused(
    settings_class: type[Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        make(settings_class, tmp_path, **changes)


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-6, "min_learning_rate": 1e-6},
        {"min_learning_rate": 0.0},
        {"warmup_epochs": 9.9},
        {"frozen_epochs": 10.0},
        {"horizontal_flip": 1.0},
    ],
    ids=str,
)
def test_the_last_value_before_is_taken(settings_class: type[Any], changes: dict[str, Any], tmp_path: Path) -> None:
    assert make(settings_class, tmp_path, **changes).to_dict().items() >= changes.items()


# The lowest and the highest value of every field that both have and that has one.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "num_workers": (0, None),
    "color_jitter": (0, None),
    "horizontal_flip": (0, 1),
    "min_crop": (0.01, 1),
    "random_erasing": (0, 1),
    "label_smoothing": (0, 0.99),
    "epochs": (1, None),
    "batch_size": (1, None),
    "accumulation": (1, None),
    "learning_rate": (0, None),
    "min_learning_rate": (0, None),
    "warmup_epochs": (0, None),
    "weight_decay": (0, None),
    "clip_gradient": (0, None),
    "seed": (0, None),
    "log_every": (1, None),
    "backbone_factor": (0, None),
    "calibration_steps": (1, None),
    "calibration_rate": (0, None),
    "frozen_epochs": (0, None),
    "kl_weight": (0, None),
    "distill_weight": (0, None),
    "ratio_weight": (0, None),
}


def test_the_ranges_are_all_that_there_are() -> None:
    options = {name: option_of(PruningSettings, name) for name in annotations_of(PruningSettings)}
    bounds = {name: (option.min, option.max) for name, option in options.items() if option is not None}
    assert {name: found for name, found in bounds.items() if found != (None, None)} == RANGES


@both
@pytest.mark.parametrize("name", RANGES)
def test_ranges_hold_in_python_and_on_the_command_line(settings_class: type[Any], name: str, tmp_path: Path) -> None:
    low, high = RANGES[name]
    step = 1 if isinstance(make(settings_class, tmp_path).to_dict()[name], int) else 0.001
    outside = [bound + sign * step for bound, sign in ((low, -1), (high, 1)) if bound is not None]
    for value in outside:
        with pytest.raises(SettingsError, match=f"^{name}={value}: give a finite number"):
            make(settings_class, tmp_path, **{name: value})
        option = f"--{name.replace('_', '-')}"
        result = invoke(settings_class, [], "--data-dir", tmp_path, "--model", "test_vit", f"{option}={value}")
        assert result.exit_code == 2 and f"Invalid value for '{option}'" in words(result), result.output


# Options


def option_of(settings_class: type[Any], name: str) -> OptionInfo | None:
    metadata = getattr(annotations_of(settings_class)[name], "__metadata__", ())
    return next((item for item in metadata if isinstance(item, OptionInfo)), None)


def invoke(settings_class: type[Any], made: list[Any], *arguments: Any) -> Any:
    app = command(settings_class, made.append, help_text=None, presets={})
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def words(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


def test_what_both_have_is_declared_where_both_have_it_from() -> None:
    shared = {field.name for field in fields(TrainingSettings)} & {field.name for field in fields(HfSettings)}
    assert shared == {field.name for field in fields(RunSettings)}
    assert {field.name for field in fields(SparseSettings)} >= {field.name for field in fields(PruningSettings)}


@pytest.mark.parametrize(
    "settings_class",
    [TrainingSettings, SparseSettings, HfSettings, DenseSettings, DeitSettings, LvvitSettings, AblationSettings,
     WidthSettings],
)  # fmt: skip
def test_a_field_is_declared_again_only_where_something_differs(settings_class: type[Any]) -> None:
    def declared(owner: type[Any], name: str) -> Any:
        option, default = option_of(owner, name), next(field.default for field in fields(owner) if field.name == name)
        return default, option and (option.help, option.min, option.max, option.show_default)

    (base, *_) = (owner for owner in settings_class.__mro__[1:] if hasattr(owner, "__dataclass_fields__"))
    inherited = {field.name for field in fields(base)}
    for name in get_annotations(settings_class):
        assert name not in inherited or declared(settings_class, name) != declared(base, name), name


def test_a_field_that_is_declared_again_keeps_its_option_unless_it_has_its_own() -> None:
    inherited, again, own = (option_of(owner, "model") for owner in (TrainingSettings, DeitSettings, LvvitSettings))
    assert inherited is not None and again is not None and own is not None
    assert again.help == inherited.help and "lvvit_t" in str(own.help)
    assert all(option_of(HfSettings, name) is not None for name in annotations_of(HfSettings))
    assert all(option_of(SparseSettings, name) is not None for name in annotations_of(SparseSettings))


def test_a_sparse_run_on_the_engine_has_the_engine_s_defaults() -> None:
    """Both bases of `SparseSettings` have the shared fields; only the engine's has all of the defaults."""
    defaults = {field.name: field.default for field in fields(SparseSettings)}
    assert {field.name: field.default for field in fields(TrainingSettings)}.items() <= defaults.items()
    assert {name for name, default in defaults.items() if default is MISSING} == {"data_dir", "model"}


def test_help_says_what_an_absent_value_means() -> None:
    shown = words(invoke(HfSettings, [], "--help"))
    assert shown.count("[default: (a sixth of all)]") == 2 and "[default: (0.7)]" in shown


# Reading and writing


@both
def test_settings_come_back_from_what_they_were_saved_as(settings_class: type[Any], tmp_path: Path) -> None:
    settings = make(settings_class, tmp_path, keep_ratio=[0.5, 0.4], stages=[3, 6], warmup_epochs=2.5, seed=7)
    (tmp_path / "saved.yaml").write_text(settings.to_yaml())
    made: list[Any] = []
    result = invoke(settings_class, made, "--config", tmp_path / "saved.yaml")
    assert result.exit_code == 0, result.output
    assert made == [settings] and yaml.safe_load(settings.to_yaml()) == settings.to_dict()


@both
def test_a_run_is_continued_under_its_own_settings_alone(settings_class: type[Any], tmp_path: Path) -> None:
    settings = make(settings_class, tmp_path)
    check_folder(settings, holds_checkpoint=False)
    write_settings(settings)
    with pytest.raises(SettingsError, match="run holds a run already; add --resume, or take another --output"):
        check_folder(settings, holds_checkpoint=True)
    with pytest.raises(SettingsError, match=r"epochs was 10 and is 12; .*seed was 0 and is 1"):
        check_folder(make(settings_class, tmp_path, resume=True, seed=1, epochs=12), holds_checkpoint=True)
    check_folder(make(settings_class, tmp_path, resume=True, num_workers=0, log_every=3), holds_checkpoint=True)


@both
def test_learning_rates_grow_with_the_images_of_a_step(settings_class: type[Any], tmp_path: Path) -> None:
    settings = make(settings_class, tmp_path, learning_rate=0.5, batch_size=6, accumulation=4)
    assert settings.images_per_step(num_processes=2) == 48
    assert settings.scaled_learning_rate(512) == 0.25


def test_derived_settings_have_the_same_values_but_for_the_changes(tmp_path: Path) -> None:
    settings = make(AblationSettings, tmp_path, kl_weight=0.25, seeds=2)
    derived = settings.derive(SparseSettings, seed=5)
    assert type(derived) is SparseSettings
    assert derived.to_dict() == {**{name: settings.to_dict()[name] for name in derived.to_dict()}, "seed": 5}


def test_the_static_scorer_s_learning_rate_is_above_0(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="static_learning_rate=0 trains nothing"):
        make(AblationSettings, tmp_path, static_learning_rate=0.0)

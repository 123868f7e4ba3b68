"""The gathered schedule of the recipes: what is calibrated, what is held, what a run goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune
from recipes.dynamicvit import SparseSettings, fine_tune
from recipes.engine.checkpoints import Interrupted
from recipes.engine.logbook import read_log
from recipes.engine.settings import SettingsError
from tests.helpers.engine import sparse

OPTIONS: dict[str, Any] = {"schedule": "gathered", "calibration_steps": 2, "learning_rate": 0.1, "keep_ratio": [0.6]}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[tokenprune.CalibrationReport]:
    """The reports of all calibrations, and the scorers behind them."""
    made: list[Any] = []
    calibrate = tokenprune.calibrate

    def noted(model: Any, *args: Any, **options: Any) -> tokenprune.CalibrationReport:
        report = calibrate(model, *args, **options)
        made.append((report, {name: value.clone() for name, value in model.tokenprune.named_parameters()}))
        return report

    monkeypatch.setattr(tokenprune, "calibrate", noted)
    return made


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_scorers_are_calibrated_and_held_while_the_backbone_learns(
    folder: Path, tmp_path: Path, reports: list[Any], ema_decay: float
) -> None:
    outcome = fine_tune(sparse(folder, tmp_path / "run", ema_decay=ema_decay, **OPTIONS))
    ((report, scorers),) = reports
    assert report.steps == 2
    after = dict(outcome.model.tokenprune.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in scorers.items())
    assert outcome.model.tokenprune.execution == "auto"
    lines = read_log(tmp_path / "run", "training")
    # Not sampled: every image keeps as many at every step.
    assert all(line["kept_1"] == lines[0]["kept_1"] <= 0.6 for line in lines)
    assert all(line["ratio"] == 0 and line["distill"] > 0 for line in lines)
    assert len({line["loss"] for line in lines}) == len(lines)
    images = torch.randn(2, 3, 64, 64)
    again = tokenprune.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(outcome.model.eval()(images), again(images))


@pytest.mark.slow
def test_a_run_that_is_resumed_is_not_calibrated_again(
    folder: Path, tmp_path: Path, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "ema_decay": 0.0, "checkpoint_every": 1}
    whole = fine_tune(sparse(folder, tmp_path / "whole", **options)).model.state_dict()
    from recipes.engine import training

    evaluate, calls = training.evaluate_both, []

    def interrupted(*args: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise Interrupted("here")
        return evaluate(*args, **more)

    monkeypatch.setattr(training, "evaluate_both", interrupted)
    with pytest.raises(Interrupted):
        fine_tune(sparse(folder, tmp_path / "run", **options))
    resumed = fine_tune(sparse(folder, tmp_path / "run", resume=True, **options)).model.state_dict()
    assert len(reports) == 2  # once for each run
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_ctrl_c_while_calibrating_stops_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Report:
        stopped = "interrupted"

    monkeypatch.setattr(tokenprune, "calibrate", lambda *args, **options: Report())
    with pytest.raises(Interrupted, match="while calibrating"):
        fine_tune(sparse(folder, tmp_path / "run", **OPTIONS))


def test_scorers_without_parameters_need_no_calibration(folder: Path, tmp_path: Path, reports: list[Any]) -> None:
    outcome = fine_tune(sparse(folder, tmp_path / "run", scorer="random", **OPTIONS))
    assert not reports and outcome.scores["kept_1"] < 0.6 + 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"activation_checkpointing": True}, "activation_checkpointing"), ({"backbone_factor": 0.0}, "nothing to train"),
     ({"calibration_rate": 0.0}, "calibration_rate=0"),
     ({"schedule": "both"}, "choose one of 'masked', 'gathered'"), ({"calibration_steps": 0}, "calibration_steps=0")],
)  # fmt: skip
def test_settings_that_contradict_it(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        sparse(folder, tmp_path, **{**OPTIONS, **changes})


def test_precision_goes_along(folder: Path, tmp_path: Path) -> None:
    for name, dtype in (("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        settings: SparseSettings = sparse(folder, tmp_path, mixed_precision=name)
        assert settings.autocast is dtype

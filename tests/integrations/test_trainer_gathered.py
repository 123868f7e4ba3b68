"""`SparseTrainer` with ``schedule="gathered"``: calibrated first, then trained with tokens removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune
from tests.helpers.trainer import CHECKPOINTING, KEEP_RATIOS, accuracy, arguments, reloaded, sparse_model, training_logs
from tokenprune.integrations import transformers as integration
from tokenprune.integrations.transformers import SparseTrainer

GATHERED: dict[str, Any] = {"schedule": "gathered", "calibration_steps": 3, "backbone_learning_rate_scale": 0.3}


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def noted(model: Any, images: Any, **options: Any) -> tokenprune.CalibrationReport:
        report = tokenprune.calibrate(model, images, **options)
        made.append((report, {name: value.clone() for name, value in model.tokenprune.named_parameters()}))
        return report

    monkeypatch.setattr(integration, "calibrate", noted)
    return made


@pytest.mark.parametrize("name", ["ViT", "SigLIP, no class token"])
def test_the_backbone_learns_and_the_calibrated_scorers_stay(
    name: str, images: Any, tmp_path: Path, calibrations: list[Any]
) -> None:
    model = sparse_model(name)
    lengths = set()
    last = model.tokenprune.backbone.blocks[-1]
    last.register_forward_pre_hook(
        lambda block, args, kwargs: lengths.add((block.training, args[0].shape[1])), with_kwargs=True
    )
    trainer = SparseTrainer(
        model, arguments(tmp_path, num_train_epochs=8), train_dataset=images, eval_dataset=images,
        compute_metrics=accuracy, **GATHERED,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_accuracy"] == 1.0
    ((report, scorers),) = calibrations
    assert report.steps == 3
    assert all(torch.equal(value, scorers[key]) for key, value in model.tokenprune.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.tokenprune.execution == "auto"
    # In training 8 of 16 patches are left in the last block, as in evaluation.
    assert {length for training, length in lengths if training} == {8 + model.tokenprune.backbone.num_prefix_tokens}
    for logs in training_logs(trainer):
        assert (logs["kept_ratio_0"], logs["kept_ratio_1"]) == KEEP_RATIOS and logs["ratio"] == 0
        assert logs["loss"] == pytest.approx(
            logs["classification"] + 0.5 * logs["kl"] + 0.5 * logs["distill"], abs=1e-4
        )
        assert logs["backbone_learning_rate"] == logs["learning_rate"] == pytest.approx(3e-3)
    trainer.save_model(str(tmp_path / "saved"))
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in reloaded(tmp_path / "saved").state_dict().items()
    )


def test_a_training_that_is_resumed_is_not_calibrated_again(
    images: Any, tmp_path: Path, calibrations: list[Any]
) -> None:
    options = {"num_train_epochs": 2, "save_strategy": "epoch"}
    whole = SparseTrainer(sparse_model(), arguments(tmp_path, **options), train_dataset=images, **GATHERED)
    whole.train()
    again = SparseTrainer(sparse_model(seed=5), arguments(tmp_path, **options), train_dataset=images, **GATHERED)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(calibrations) == 1
    scorers, expected = again.model.tokenprune.state_dict(), whole.model.tokenprune.state_dict()
    assert all(torch.equal(scorers[name], value) for name, value in expected.items())


def test_ctrl_c_while_calibrating_ends_the_training(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Report:
        stopped = "interrupted"

    monkeypatch.setattr(integration, "calibrate", lambda *args, **options: Report())
    trainer = SparseTrainer(sparse_model(), arguments(tmp_path), train_dataset=images, **GATHERED)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "both"}, "choose 'masked' or 'gathered'"),
        ({"calibration_steps": 0}, "calibration_steps=0"),
        ({"freeze_epochs": 1}, "freeze_epochs=1"),
        ({"model_init": sparse_model, "model": None}, "instead of model_init"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTrainer(**{"model": sparse_model(), "args": arguments(tmp_path), **GATHERED, **options})


def test_activation_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activation checkpointing would run blocks again"):
        SparseTrainer(sparse_model(), arguments(tmp_path, **{CHECKPOINTING: True}), **GATHERED)

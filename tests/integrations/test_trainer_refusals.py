"""`SparseTrainer`: what it refuses, when it is made and on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokenprune
from tests.helpers.trainer import BUILDERS, CHECKPOINTING, PARTS, arguments, sparse_model, trained, training_logs
from tokenprune.integrations.transformers import SparseTrainer


def not_sparse() -> nn.Module:
    return BUILDERS["ViT"]()


def of_several_labels() -> nn.Module:
    model = sparse_model()
    model.config.problem_type = "multi_label_classification"
    return model


@pytest.mark.parametrize(
    ("build", "settings", "options", "error", "message"),
    [
        (not_sparse, {}, {}, tokenprune.StateError, r"call tokenprune\.sparsify\(model\) first"),
        (sparse_model, {}, {"teacher": sparse_model()}, tokenprune.StateError, "the teacher is sparsified"),
        (sparse_model, {}, {"teacher": "deit"}, TypeError, "teacher=str: expected the dense model"),
        (sparse_model, {}, {"kl_weight": -1}, ValueError, "kl_weight=-1 is negative"),
        (sparse_model, {}, {"backbone_learning_rate_scale": -1}, ValueError, "scale=-1 is negative"),
        (sparse_model, {}, {"freeze_epochs": -1}, ValueError, "freeze_epochs=-1 is negative"),
        (sparse_model, {}, {"compute_loss_func": print}, ValueError, "pass criterion"),
        (sparse_model, {"label_smoothing_factor": 0.1}, {"criterion": print}, ValueError, "label_smoothing_factor=0.1"),
        (of_several_labels, {}, {}, ValueError, "problem_type='multi_label_classification'.*pass criterion"),
        (
            sparse_model,
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            {},
            ValueError,
            "re-entrant checkpointing loses",
        ),
        (
            sparse_model,
            {},
            {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None), "backbone_learning_rate_scale": 0.1},
            ValueError,
            "has its own learning rates",
        ),
        (sparse_model, {}, {"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_refusals(
    build: Callable[[], nn.Module],
    settings: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        SparseTrainer(build(), arguments(tmp_path, **settings), **options)


def test_ways_to_run_it_that_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = arguments(tmp_path)
    with monkeypatch.context() as two_gpus:
        two_gpus.setattr(transformers.TrainingArguments, "n_gpu", 2)
        with pytest.raises(ValueError, match=r"2 GPUs in one process.*torchrun or accelerate launch"):
            SparseTrainer(sparse_model(), settings)


def test_refusals_on_the_way(images: Any, tmp_path: Path) -> None:
    def unlabelled(items: list[Any]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}

    trainer = SparseTrainer(sparse_model(), arguments(tmp_path), train_dataset=images, data_collator=unlabelled)
    with pytest.raises(ValueError, match=r"no 'labels', only \['pixel_values'\]"):
        trainer.train()

    model = sparse_model()
    few = {"params": list(model.tokenprune.parameters()), "lr": 0.1}
    trainer = SparseTrainer(
        model, arguments(tmp_path), train_dataset=images, optimizer_cls_and_kwargs=(torch.optim.SGD, few)
    )
    with pytest.raises(ValueError, match="arranges the parameters in its own way"):
        trainer.train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu(precision: str, images: Any, tmp_path: Path) -> None:
    weights, trainer = trained(tmp_path, images, 0.3, num_train_epochs=4, use_cpu=False, **{precision: True})
    assert next(trainer.dynamicvit_loss.teacher.parameters()).is_cuda
    assert all(value.is_cuda and value.isfinite().all() for value in weights.values())
    assert all(torch.tensor([logs[name] for name in PARTS]).isfinite().all() for logs in training_logs(trainer))

"""`SparseTrainer` against the formulas, from the first step to the reloaded model, in one process and in two."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import tokenprune
from tests.helpers.trainer import (
    BUILDERS,
    CHECKPOINTING,
    KEEP_RATIOS,
    KEPT,
    NUM_CLASSES,
    PARTS,
    accuracy,
    arguments,
    logits,
    one_step,
    reloaded,
    sparse_model,
    trained,
    training_logs,
)
from tokenprune.integrations.transformers import SparseTrainer


@pytest.mark.parametrize("name", list(BUILDERS))
def test_trains_evaluates_saves_and_reloads(name: str, images: Any, tmp_path: Path) -> None:
    model = sparse_model(name)
    trainer = SparseTrainer(
        model,
        arguments(tmp_path, num_train_epochs=8),
        train_dataset=images,
        eval_dataset=images,
        compute_metrics=accuracy,
        backbone_learning_rate_scale=0.3,
        freeze_epochs=1,
        evaluate_dense=True,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_accuracy"] == 1.0
    assert (after["eval_kept_ratio_0"], after["eval_kept_ratio_1"]) == KEEP_RATIOS
    assert after["eval_dense_accuracy"] == 1.0 and after["eval_dense_loss"] != after["eval_loss"]
    assert not any(key.startswith("eval_dense_kept") for key in after)

    for logs in training_logs(trainer):
        assert set(logs) >= PARTS | KEPT
        total = logs["classification"] + 0.5 * logs["kl"] + 0.5 * logs["distill"] + 2.0 * logs["ratio"]
        assert logs["loss"] == pytest.approx(total, abs=2e-4)  # what older Trainers log is rounded to 1e-4
        assert 0 < logs["kept_ratio_1"] <= logs["kept_ratio_0"] <= 1

    assert not trainer.dynamicvit_loss.teacher.training
    trainer.save_model(str(tmp_path / "saved"))
    keys = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert keys == model.state_dict().keys() and any(key.startswith("tokenprune.stages.0.scorer.") for key in keys)
    assert torch.equal(logits(reloaded(tmp_path / "saved"), images), logits(model, images))
    # transformers itself reads the folder, and gets the dense model.
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    with tokenprune.dense(model):
        assert torch.equal(logits(plain, images), logits(model, images))


def test_losses_are_those_of_the_formulas(images: Any, tmp_path: Path) -> None:
    model = sparse_model()
    teacher = tokenprune.unsparsify(copy.deepcopy(model))
    trainer = SparseTrainer(
        model, arguments(tmp_path, label_smoothing_factor=0.1), kl_weight=0.3, distill_weight=0.7, ratio_weight=1.5
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = tokenprune.DynamicViTLoss(teacher, criterion=criterion, kl_weight=0.3, distill_weight=0.7, ratio_weight=1.5)
    pixels, labels = torch.stack(images[:6]["pixel_values"]), torch.tensor(images[:6]["label"])
    for targets in (labels, torch.nn.functional.one_hot(labels, NUM_CLASSES) * 0.8 + 0.1):
        inputs = {"pixel_values": pixels, "labels": targets}
        model.train()
        torch.manual_seed(3)
        expected = loss(model, {"pixel_values": pixels}, model(pixel_values=pixels), targets)["loss"]
        torch.manual_seed(3)
        got, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        assert torch.equal(got, expected) and outputs["logits"].shape == (6, NUM_CLASSES) and "labels" in inputs
        torch.manual_seed(3)
        # Twice as many labels in the step: this batch is half of it.
        half = trainer.compute_loss(model, inputs, num_items_in_batch=2 * targets.numel())
        torch.testing.assert_close(half, expected / 2)

        model.eval()
        torch.testing.assert_close(
            trainer.compute_loss(model, inputs), criterion(model(pixel_values=pixels).logits, targets)
        )
    own = SparseTrainer(model, arguments(tmp_path), criterion=lambda logits, labels: logits.sum() * 0 + 7.0)
    assert own.compute_loss(model.eval(), inputs) == 7.0


def test_accumulated_batches_are_one_batch(images: Any, tmp_path: Path) -> None:
    whole, whole_logs = one_step(tmp_path, images, 7, per_device_train_batch_size=7)
    # Batches of 4 and 3 images: the mean of their means would be another.
    parts, parts_logs = one_step(tmp_path, images, 7, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for key, value in whole.items():
        # Sums in another order, of a step of length 0.5.
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-6)
    assert whole_logs["kl"] > 0 and whole_logs["distill"] > 0
    for name in ("loss", *PARTS, *KEPT):
        assert parts_logs[name] == pytest.approx(whole_logs[name], abs=1.1e-4), name


def train_one_process(rank: int, port: int, folder: Path, images: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    pruned, _ = trained(folder, images, 0.3, max_steps=3, **options)  # frozen for one step
    checkpointed, _ = trained(folder, images, max_steps=3, **{CHECKPOINTING: True}, **options)
    torch.save((*one_step(folder, images, 8, **options), pruned, checkpointed), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(images: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_one_process, (port, tmp_path, images), nprocs=2)
    (first, logs, *pruned), (second, _, *also_pruned) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs in zip((first, *pruned), (second, *also_pruned), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    start = sparse_model().state_dict()
    assert not any(torch.equal(weights[key], start[key]) for weights in pruned for key in start if "weight" in key)
    whole, whole_logs = one_step(tmp_path, images, 8, per_device_train_batch_size=8)
    for key, value in whole.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)  # sums in another order
    for name in ("loss", *PARTS, *KEPT):
        assert logs[name] == pytest.approx(whole_logs[name], abs=1.1e-4), name

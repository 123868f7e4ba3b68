"""`SparseTrainer` under the Trainer's own options: checkpoints, precision, compilation, data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
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
    sparse_model,
    trained,
    training_logs,
)
from tokenprune.integrations.transformers import SparseTrainer


@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_resuming_goes_on_as_if_nothing_had_happened(name: str, images: Any, tmp_path: Path) -> None:
    def trainer() -> SparseTrainer:
        settings = arguments(tmp_path, num_train_epochs=3, save_strategy="epoch")
        return SparseTrainer(
            sparse_model(name), settings, train_dataset=images, freeze_epochs=2, backbone_learning_rate_scale=0.5
        )

    whole, rest = trainer(), trainer()
    whole.train()
    # At the end of an epoch: within one, the Trainer of old versions takes the images in another order.
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.state.global_step == 9
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key
    for first, second in zip(training_logs(whole)[-6:], training_logs(rest)[-6:], strict=True):
        assert {key: first[key] for key in PARTS | KEPT} == {key: second[key] for key in PARTS | KEPT}


def test_the_best_model_is_loaded_at_the_end(images: Any, tmp_path: Path) -> None:
    settings = arguments(
        tmp_path,
        num_train_epochs=3,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_dense_loss",
        greater_is_better=True,  # so that it is not the last one
    )
    trainer = SparseTrainer(
        sparse_model(), settings, train_dataset=images, eval_dataset=images, evaluate_dense=True, freeze_epochs=0,
        backbone_learning_rate_scale=1.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in trainer.model.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_refused(images: Any, tmp_path: Path) -> None:
    settings = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    SparseTrainer(sparse_model(), settings, train_dataset=images).train()
    other = SparseTrainer(
        tokenprune.sparsify(BUILDERS["ViT"](), (1, 2, 3)), arguments(tmp_path, max_steps=2), train_dataset=images
    )
    with pytest.raises(RuntimeError, match=r"belong to scorers at stages \(1, 2\), and these are at \(1, 2, 3\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    fewer = {name: tensor for name, tensor in safetensors.torch.load_file(weights).items() if "out_conv" not in name}
    safetensors.torch.save_file(fewer, weights, metadata={"format": "pt"})
    same = SparseTrainer(sparse_model(), arguments(tmp_path, max_steps=2), train_dataset=images)
    with pytest.raises(tokenprune.StateError, match=r"12 missing keys \['tokenprune\.stages\.0.*as it was when"):
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_activation_checkpointing_changes_nothing(images: Any, tmp_path: Path) -> None:
    plain, _ = trained(tmp_path, images, max_steps=2)
    checkpointed, trainer = trained(tmp_path, images, max_steps=2, **{CHECKPOINTING: True})
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    for key, value in plain.items():
        # The same kernels run twice; AdamW's first steps blow rounding up to a share of the learning rate.
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-5)


def test_bfloat16_reaches_model_and_teacher(images: Any, tmp_path: Path) -> None:
    teacher, kinds = BUILDERS["ViT"](), []
    next(module for module in teacher.modules() if isinstance(module, nn.Linear)).register_forward_hook(
        lambda module, args, output: kinds.append(output.dtype)
    )
    trainer = SparseTrainer(
        sparse_model(), arguments(tmp_path, bf16=True, max_steps=3), teacher=teacher, train_dataset=images
    )
    trainer.train()
    assert kinds == [torch.bfloat16] * 3
    assert all(torch.tensor(list(logs.values())).isfinite().all() for logs in training_logs(trainer))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_compiled_models_train_and_report(images: Any, tmp_path: Path) -> None:
    plain, plain_trainer = trained(tmp_path, images, max_steps=2)
    compiled, trainer = trained(tmp_path, images, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    assert set(compiled) == set(plain) and hasattr(trainer.dynamicvit_loss.teacher, "_orig_mod")
    assert all(logs["distill"] > 0 for logs in training_logs(trainer))
    for first, second in zip(training_logs(plain_trainer), training_logs(trainer), strict=True):
        assert {key: first[key] for key in KEPT} == {key: second[key] for key in KEPT}


def test_several_data_sets_are_evaluated_one_by_one(images: Any, tmp_path: Path) -> None:
    both = {"first": images.select(range(10)), "second": images.select(range(10, 24))}
    trainer = SparseTrainer(sparse_model(), arguments(tmp_path), eval_dataset=both, evaluate_dense=True)
    metrics = trainer.evaluate()
    expected = {f"eval_{name}_{what}" for name in both for what in ("loss", "dense_loss", "kept_ratio_1")}
    assert expected <= set(metrics) and not any(key.startswith("eval_dense_") for key in metrics)
    assert trainer.predict(both["first"]).metrics["test_kept_ratio_1"] == KEEP_RATIOS[1]


def test_model_init_and_its_teacher(images: Any, tmp_path: Path) -> None:
    trainer = SparseTrainer(
        model_init=lambda: sparse_model(), args=arguments(tmp_path, max_steps=1), train_dataset=images
    )
    first = trainer.dynamicvit_loss
    trainer.train()
    assert trainer.dynamicvit_loss is not first
    fresh = tokenprune.unsparsify(sparse_model()).state_dict()
    teacher = trainer.dynamicvit_loss.teacher
    assert all(torch.equal(value, fresh[key]) for key, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(tokenprune.StateError, match="is not sparsified"):
        SparseTrainer(model_init=BUILDERS["ViT"], args=arguments(tmp_path))


def test_a_model_that_is_not_of_transformers(images: Any, tmp_path: Path) -> None:
    import timm

    model = tokenprune.sparsify(
        timm.models.VisionTransformer(32, 8, embed_dim=32, depth=4, num_heads=2, num_classes=NUM_CLASSES), (1, 2)
    )
    trainer = SparseTrainer(
        model,
        arguments(tmp_path),
        data_collator=lambda items: {
            "x": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["label"] for item in items]),
        },
        train_dataset=images,
        eval_dataset=images,
        compute_metrics=accuracy,
    )
    trainer.train()
    assert {"eval_loss", "eval_accuracy", "eval_kept_ratio_0"} <= set(trainer.evaluate())
    trainer.save_model()
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()

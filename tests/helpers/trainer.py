"""Small models, arguments and runs for `SparseTrainer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tokenprune
from tokenprune.integrations.transformers import SparseTrainer

NUM_CLASSES, NUM_IMAGES = 3, 24
SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_labels": NUM_CLASSES,
    "hidden_dropout_prob": 0.0,
}
KEEP_RATIOS = (0.75, 0.5)  # of 16 patches: 12 and 8
PARTS = {"classification", "kl", "distill", "ratio"}
KEPT = {"kept_ratio_0", "kept_ratio_1"}

CHECKPOINTING = next(  # older versions call it so
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(transformers.TrainingArguments, name)
)

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(intermediate_size=64, **SIZES)),
    "DINOv2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(mlp_ratio=2, **SIZES)),
    "SigLIP, no class token": lambda: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(
            vision_config={**SIZES, "intermediate_size": 64},
            text_config={**dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8),
                         **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)},
            num_labels=NUM_CLASSES,
        )
    ),
}  # fmt: skip


def sparse_model(name: str = "ViT", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tokenprune.sparsify(BUILDERS[name](), (1, 2), KEEP_RATIOS)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**settings, **options})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def training_logs(trainer: SparseTrainer) -> list[dict[str, float]]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def logits(model: nn.Module, images: Any) -> Tensor:
    pixels = torch.stack(images[:4]["pixel_values"])
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


def reloaded(folder: Path) -> nn.Module:
    """What the Trainer saved: weights, architecture and plan all lie in the folder."""
    model: nn.Module = tokenprune.from_pretrained(folder)
    return model


def one_step(folder: Path, images: Any, num_images: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights after one step on so many images, and what was logged; nothing is random."""
    torch.manual_seed(0)
    model = tokenprune.sparsify(BUILDERS["ViT"](), (1, 2), 1.0)  # keeps all, so there is nothing to sample
    torch.manual_seed(1)
    trainer = SparseTrainer(
        model,
        arguments(folder, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, num_train_epochs=1, **options),
        teacher=BUILDERS["ViT"](),
        train_dataset=images.select(range(num_images)),
        backbone_learning_rate_scale=1.0,
        freeze_epochs=0,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return model.state_dict(), training_logs(trainer)[0]


def trained(
    folder: Path, images: Any, freeze_epochs: float = 0.0, **options: Any
) -> tuple[dict[str, Tensor], SparseTrainer]:
    trainer = SparseTrainer(
        sparse_model(),
        arguments(folder, **options),
        train_dataset=images,
        freeze_epochs=freeze_epochs,
        backbone_learning_rate_scale=0.5,
    )
    trainer.train()
    return trainer.model.state_dict(), trainer

"""Train the demo's dense model from scratch and write its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from recipes.digits.data import IMAGE_SIZE, make_digits
from recipes.digits.model import WEIGHTS, build_model, save_dense_model
from recipes.engine import Schedule, evaluate, image_folder_loader, train

LEARNING_RATE = 1.5e-3


def train_dense(data: Path, output: Path, *, weights: Path = WEIGHTS, steps: int = 4000, seed: int = 0) -> float:
    """Train from nothing with cross-entropy.

    Args:
        data: Where the digits image folder is, or is to be made.
        output: Where an interrupted run keeps its state.
        weights: The safetensors file to write.
        steps: Optimisation steps of 128 images.
        seed: Seed of weights and order of images.

    Returns:
        Validation accuracy as a fraction.
    """
    output.mkdir(parents=True, exist_ok=True)
    make_digits(data)
    torch.manual_seed(seed)
    model = build_model()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loader = image_folder_loader(data, "train", image_size=IMAGE_SIZE, batch_size=128, crop_scale=0.7)
    groups = [{**group, "lr": LEARNING_RATE} for group in param_groups_weight_decay(model, weight_decay=0.05)]
    train(
        model,
        lambda model, inputs, outputs, targets: {"loss": criterion(outputs, targets)},
        loader,
        groups,
        Schedule(steps=steps, warmup_steps=min(200, steps // 10)),
        state_folder=output / "dense.state",
        description="dense model",
        seed=seed,
    )
    validation = image_folder_loader(data, "validation", image_size=IMAGE_SIZE, batch_size=250)
    save_dense_model(model, weights)
    return evaluate(model, validation)

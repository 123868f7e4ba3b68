"""What does the training engine cost beside a plain timm loop? ``python -m benchmarks.engine``."""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import tokenprune
from benchmarks.measuring import Device, Name, Pairs, Ratio, environment, report, synchronize
from recipes.digits.data import DigitsConfig, make_digits
from recipes.dynamicvit import Objective, SparseSettings, attached
from recipes.engine.data import loader, open_images
from recipes.engine.models import data_config
from recipes.engine.optimization import parameter_groups
from recipes.engine.training import make_accelerator, train


def main(
    model: Annotated[str, typer.Option(help="A Vision Transformer of timm.")] = "deit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step.")] = 16,
    device: Device = "cpu",
    pairs: Pairs = 21,
    name: Name = "engine-cpu",
) -> None:
    """Time optimisation steps in turn: one of the engine, one of a plain loop that does the same."""
    with tempfile.TemporaryDirectory() as folder:
        ratio = compare(model, batch_size, device, pairs, Path(folder))
    lower, upper = ratio.quartiles
    row = [
        f"{batch_size}",
        f"{statistics.median(ratio.second_seconds):.3f}",
        f"{statistics.median(ratio.first_seconds):.3f}",
        f"**{ratio.median:.3f}** ({lower:.3f} … {upper:.3f})",
    ]
    report(
        name,
        f"{model}, ρ = 0.7, a step with the full loss, AdamW and averaging, medians of {pairs} pairs",
        environment(device, "float32"),
        ("batch", "plain loop, s", "engine, s", "engine ÷ plain (quartiles)"),
        [row],
        [{"batch_size": batch_size, "engine_over_plain": ratio}],
    )


def compare(name: str, batch_size: int, device: str, pairs: int, folder: Path, warmup: int = 3) -> Ratio:
    """Engine ÷ plain steps on the same images with the same arithmetic.

    The plain loop takes a step each time the engine asks for its loss, so that the two alternate; an
    engine's step is all that lies between: loss, backward, optimiser, log, averaging, the next images.
    """
    steps = pairs + warmup + 1
    images = make_digits(folder / "images", DigitsConfig(num_train=steps * batch_size, num_validation=10))
    settings = SparseSettings(
        data_dir=images, model=name, pretrained=False, epochs=1, warmup_epochs=0.1, frozen_epochs=0.0, num_workers=1,
        batch_size=batch_size, auto_augment="", mixup=0.0, cutmix=0.0, tracker="none", output=folder / "run",
    )  # fmt: skip
    torch.manual_seed(0)
    dense = timm.create_model(name)
    plain = _PlainLoop(copy.deepcopy(dense), settings, device)
    model, objective, groups = _sparse(dense, settings)
    engine_seconds: list[float] = []
    plain_seconds: list[float] = []
    began = 0.0

    def loss(model: nn.Module, inputs: Tensor, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        nonlocal began
        synchronize(device)
        if began:
            engine_seconds.append(time.perf_counter() - began)
        start = time.perf_counter()
        plain.step()
        synchronize(device)
        plain_seconds.append(time.perf_counter() - start)
        began = time.perf_counter()
        parts: dict[str, Tensor] = objective(model, inputs, outputs, targets)
        return parts

    objective.to(device)
    batches = loader(open_images(settings, training=True), settings, data_config(settings, model), training=True)
    train(
        make_accelerator(settings), model, loss, groups, batches, None, settings, description="engine", num_classes=1000
    )
    chosen = slice(warmup, warmup + pairs)
    return Ratio(first_seconds=tuple(engine_seconds[chosen]), second_seconds=tuple(plain_seconds[chosen]))


class _PlainLoop:
    """A loop of timm's parts, as anyone would write it."""

    def __init__(self, dense: nn.Module, settings: SparseSettings, device: str) -> None:
        self.device = device
        model, self.objective, groups = _sparse(dense, settings)
        self.model = model.to(device).train()
        self.objective.to(device)
        self.optimizer = create_optimizer_v2(groups, opt="adamw", lr=0.0, weight_decay=settings.weight_decay)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, num_epochs=1000)
        self.average = ModelEmaV3(self.model, decay=settings.ema_decay)
        batches = loader(open_images(settings, training=True), settings, data_config(settings, dense), training=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(batches))
        self.number = 0

    def step(self) -> None:
        images, targets = next(self.batches)
        images, targets = images.to(self.device), targets.to(self.device)
        self.scheduler.step(self.number)
        parts = self.objective(self.model, images, self.model(images), targets)
        parts["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        self.average.update(self.model, step=self.number)


def _sparse(dense: nn.Module, settings: SparseSettings) -> tuple[nn.Module, Objective, list[dict[str, Any]]]:
    teacher = copy.deepcopy(dense)
    model: nn.Module = tokenprune.sparsify(dense)
    scorers = set(attached(model).parameters())
    groups = parameter_groups(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        slow=[parameter for parameter in model.parameters() if parameter not in scorers],
        slow_factor=settings.backbone_factor,
    )
    return model, Objective(teacher, settings), groups


if __name__ == "__main__":
    typer.run(main)

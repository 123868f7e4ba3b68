"""The training loop: one optimisation step after another, evaluated, resumable and interruptible."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

LossFunction = Callable[[nn.Module, Tensor, Any, Tensor], Mapping[str, Tensor]]


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after its state had been saved."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Optimisation steps.
        warmup_steps: Steps of linear warm-up from ``min_learning_rate``, among ``steps``.
        min_learning_rate: Where the cosine ends.
        weight_decay: AdamW's weight decay of parameter groups that do not set their own.
    """

    steps: int
    warmup_steps: int
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.05


def image_folder_loader(
    root: Path,
    split: str,
    *,
    image_size: int,
    batch_size: int,
    crop_scale: float = 1.0,
    num_workers: int = 1,
    seed: int = 0,
) -> DataLoader[Any]:
    """Timm's loader over ``root/split``, an ordinary image folder with one sub-folder a class.

    Args:
        root: The folder that holds the splits.
        split: ``"train"`` (shuffled, random crops, last incomplete batch dropped) or ``"validation"``.
        image_size: Height and width of the images handed out.
        batch_size: Images in a batch.
        crop_scale: Smallest area of a random training crop, as a fraction of the image; 1 = none.
        num_workers: Processes that decode images.
        seed: Seed of the order of training images.
    """
    training = split == "train"
    loader: DataLoader[Any] = create_loader(
        create_dataset("", root=str(root), split=split),
        input_size=(3, image_size, image_size),
        batch_size=batch_size,
        is_training=training,
        no_aug=training and crop_scale == 1.0,
        scale=(crop_scale, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.0,
        color_jitter=None,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=1.0,
        num_workers=num_workers,
        use_prefetcher=False,
        persistent_workers=num_workers > 0,
    )
    loader.generator = torch.Generator().manual_seed(seed)
    if training:
        sampler: Any = loader.sampler
        sampler.generator = loader.generator
    return loader


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Top-1 accuracy of ``model`` in eval mode over all of ``loader``, as a fraction."""
    was_training = model.training
    model.eval()
    correct = total = 0
    for images, targets in loader:
        correct += int((model(images).argmax(dim=-1) == targets).sum())
        total += len(targets)
    model.train(was_training)
    return correct / total


@contextmanager
def _interrupt_flag() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a flag, so that a step is never torn; the second one is immediate."""
    flag = [False]

    def on_interrupt(signum: int, frame: Any) -> None:
        if flag[0]:
            raise KeyboardInterrupt
        flag[0] = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make a file or folder beside ``path`` and rename it: there is never half of it."""
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    try:
        write(partial)
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Counter:
    """The number of finished steps, in a form that Accelerate saves and restores."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def train(
    model: nn.Module,
    loss_function: LossFunction,
    loader: DataLoader[Any],
    parameter_groups: list[dict[str, Any]],
    schedule: Schedule,
    *,
    state_folder: Path,
    description: str,
    seed: int = 0,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> None:
    """Train ``model`` in place.

    Args:
        model: What to train.
        loss_function: Called as ``loss_function(model, inputs, outputs, targets)``; returns named
            scalars, of which ``"loss"`` is minimised and all are logged (``"kept"``, a share of
            tokens, also beside the progress bar).
        loader: Batches of ``(images, targets)``; repeated as often as the schedule needs.
        parameter_groups: Parameters and their learning rates, as torch optimisers take them.
        schedule: How long and how fast.
        state_folder: Where an interrupted run leaves its state, and where the next one finds it.
        description: What the progress bar says.
        seed: Seed of the random decisions made in training.
        on_step: Told the number of each finished step and its loss parts.

    Raises:
        Interrupted: Ctrl-C was pressed; the state lies in ``state_folder``.
        ValueError: The loader has not one batch.
        FloatingPointError: The loss is not finite.
    """
    if len(loader) == 0:
        images: Any = loader.dataset
        raise ValueError(f"{len(images)} images do not fill a batch of {loader.batch_size}; take a smaller batch.")
    accelerator = Accelerator()
    torch.manual_seed(seed)
    optimizer = create_optimizer_v2(parameter_groups, opt="adamw", lr=0.0, weight_decay=schedule.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=schedule.steps - schedule.warmup_steps,
        warmup_epochs=schedule.warmup_steps,
        warmup_lr=schedule.min_learning_rate,
        min_lr=schedule.min_learning_rate,
        warmup_prefix=True,
        step_on_epochs=True,
    )
    counter = _Counter()
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(counter)
    if state_folder.exists():
        accelerator.load_state(str(state_folder))
    wrapped.train()

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with _interrupt_flag() as interrupted, Progress(*columns, transient=True) as progress:
        task = progress.add_task(description, total=schedule.steps, completed=counter.step, status="")
        batches = _repeat(loader)
        while counter.step < schedule.steps:
            images, targets = next(batches)
            scheduler.step(counter.step)
            outputs = wrapped(images)
            parts = loss_function(wrapped, images, outputs, targets)
            accelerator.backward(parts["loss"])
            optimizer.step()
            optimizer.zero_grad()
            counter.step += 1
            logged = {name: float(value.detach()) for name, value in parts.items()}
            if not math.isfinite(logged["loss"]):
                raise FloatingPointError(f"the loss is {logged['loss']} at step {counter.step}: {logged}")
            kept = f", {logged['kept']:.0%} kept" if "kept" in logged else ""
            progress.update(task, advance=1, status=f"loss {logged['loss']:.3f}{kept}")
            if on_step is not None:
                on_step(counter.step, logged)
            if interrupted[0]:
                write_whole(state_folder, lambda partial: accelerator.save_state(str(partial)))
                raise Interrupted(f"stopped after step {counter.step} of {schedule.steps}")
    shutil.rmtree(state_folder, ignore_errors=True)


def _repeat(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader

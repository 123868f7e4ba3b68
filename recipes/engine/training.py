"""The training loop, with evaluation, checkpoints, resuming and Ctrl-C."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    convert_to_fp32,
)
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from recipes.engine.checkpoints import Checkpoints, Interrupted
from recipes.engine.data import DataError, Images, first_batches
from recipes.engine.evaluation import evaluate_both
from recipes.engine.logbook import Logbook
from recipes.engine.optimization import Schedule
from recipes.engine.randomness import seed_everything
from recipes.engine.run_folder import check_folder, continues, write_settings
from recipes.engine.settings import SettingsError, TrainingSettings
from recipes.engine.sharding import Average, Unsharded, autocast, is_sharded, prepare_sharding

LossFunction = Callable[[nn.Module, Tensor, Any, Tensor], Mapping[str, Tensor]]


@dataclass
class Position:
    """The progress of a run, which Accelerate saves and restores.

    Attributes:
        step: Optimisation steps done.
        best: Highest top-1 accuracy so far.
        images: Images per step; a run is resumed only with as many.
    """

    step: int = 0
    best: float = -1.0
    images: int = 0

    def state_dict(self) -> dict[str, float]:
        """The fields as a mapping."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the fields."""
        self.step, self.best, self.images = int(state["step"]), state["best"], int(state["images"])


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """The accelerator that the settings describe; options of ``accelerate launch`` apply too."""
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulation, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
        dynamo_backend="inductor" if settings.compile else None,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=str(settings.output),
    )


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loss_function: LossFunction,
    parameter_groups: list[dict[str, Any]],
    training: DataLoader[Any],
    validation: DataLoader[Any] | None,
    settings: TrainingSettings,
    *,
    description: str,
    num_classes: int,
    frozen_epochs: float = 0.0,
    find_unused_parameters: bool = False,
) -> tuple[nn.Module, dict[str, float]]:
    """Train ``model`` in place.

    Every random number depends only on the seed, the epoch and the position in it. So a run that was
    stopped at any moment and is resumed ends with the same weights, and one on several processes
    sees the same batches as one process that accumulates as many per step.

    Args:
        accelerator: From `make_accelerator`.
        model: What to train.
        loss_function: Called as ``loss_function(model, inputs, outputs, targets)``; returns named
            scalars, of which ``"loss"`` is minimised and all are logged.
        parameter_groups: From `recipes.engine.optimization.parameter_groups`.
        training: Batches of images and class indices.
        validation: Batches to evaluate on after every epoch; ``None`` for no evaluation.
        settings: Everything else. With ``resume``, the run in ``output`` is resumed if there is one.
        description: Label of the progress bar.
        num_classes: Number of classes, for the soft targets of mixup.
        frozen_epochs: Epochs during which groups marked ``"waits"`` have learning rate 0.
        find_unused_parameters: Whether some parameters get no gradient in some steps.

    Returns:
        The trained model, or its EMA if there is one, unwrapped; and its last evaluation.

    Raises:
        Interrupted: Ctrl-C was pressed; the state is saved in ``output``.
        SettingsError: ``output`` holds a run and ``resume`` is off, or a run with other settings.
        DataError: There are too few images for one step.
        FloatingPointError: The loss is not finite.
    """
    prepare_sharding(accelerator, settings)
    checkpoints = Checkpoints(settings.output / "checkpoints")
    batches_per_step = settings.accumulation * accelerator.num_processes
    images_per_step = settings.images_per_step(accelerator.num_processes)
    streamed = isinstance(training.dataset, IterableDataset)
    steps_per_epoch = len(training) // (settings.accumulation if streamed else batches_per_step)
    if settings.steps_per_epoch is not None:
        steps_per_epoch = min(steps_per_epoch, settings.steps_per_epoch)
    if steps_per_epoch == 0:
        raise DataError(
            f"{settings.data_dir} has too few training images for one step of {images_per_step}; take a smaller batch."
        )
    _claim_output(accelerator, checkpoints, settings)

    position = Position(images=images_per_step)
    schedule = Schedule(
        steps=settings.epochs * steps_per_epoch,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        min_learning_rate=settings.min_learning_rate,
        frozen_steps=round(frozen_epochs * steps_per_epoch),
    )
    optimizer = create_optimizer_v2(parameter_groups, opt="adamw", lr=0.0, weight_decay=settings.weight_decay)
    model.to(accelerator.device)
    average = Average(model, decay=settings.ema_decay) if settings.ema_decay else None
    unsharded = Unsharded(model) if is_sharded(accelerator) and average is None else None
    for part in (average, loss_function):
        if isinstance(part, nn.Module):
            part.to(accelerator.device)
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    training, validation = _prepared(accelerator, training), _prepared(accelerator, validation)
    accelerator.register_for_checkpointing(position, *([] if average is None else [average]))
    result_of = average.module if average is not None else model

    newest = checkpoints.newest()
    if newest is not None:
        accelerator.load_state(str(newest))
        if position.images != images_per_step:
            raise SettingsError(
                f"the run in {settings.output} takes {position.images} images per step, this one {images_per_step}; "
                "launch as many processes as before."
            )
    accelerator.init_trackers("logs", config={name: str(value) for name, value in settings.to_dict().items()})
    mixup = _mixup(settings, num_classes)
    scores: dict[str, float] = {}
    with (
        _interrupt_flag() as interrupted,
        Logbook(accelerator, settings.output, steps=schedule.steps, description=description) as log,
    ):
        log.resume_from(position.step)
        if position.step == schedule.steps and validation is not None:
            scores = evaluate_both(accelerator, result_of, validation, batches=settings.validation_batches)
        wrapped.train()
        while position.step < schedule.steps:
            epoch, done = divmod(position.step, steps_per_epoch)
            totals = _Totals(accelerator)
            for place, images, targets in _epoch(accelerator, training, epoch, done, steps_per_epoch, settings):
                seed_everything(settings.seed, epoch, place, 1)
                if mixup is not None:
                    images, targets = mixup(images, targets)
                schedule.set(optimizer, position.step)
                with accelerator.accumulate(wrapped):
                    with autocast(accelerator):
                        # As DistributedDataParallel returns them; FSDP2 and DeepSpeed leave them as they are.
                        outputs = convert_to_fp32(wrapped(images))
                        parts = loss_function(wrapped, images, outputs, targets)
                    accelerator.backward(parts["loss"])
                    if accelerator.sync_gradients and settings.clip_gradient:
                        accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_gradient)
                    optimizer.step()
                    optimizer.zero_grad()
                totals.add(parts)
                if not accelerator.sync_gradients:
                    continue
                position.step += 1
                if average is not None:
                    average.update(model, step=position.step)
                log.advance()
                stop = interrupted[0] and accelerator.num_processes == 1
                saves = settings.checkpoint_every and position.step % settings.checkpoint_every == 0
                ends = position.step % steps_per_epoch == 0
                if stop or saves or ends or position.step % settings.log_every == 0:
                    means = totals.take()
                    _check_finite(means, position.step)
                    rates = {f"learning_rate_{name}": rate for name, rate in _rates(optimizer).items()}
                    log.write("training", position.step, {**means, **rates, "epoch": position.step / steps_per_epoch})
                    stop = interrupted[0] if accelerator.num_processes == 1 else _any(accelerator, interrupted[0])
                if ends and validation is not None:
                    scores = evaluate_both(accelerator, result_of, validation, batches=settings.validation_batches)
                    log.write("evaluation", position.step, scores)
                    _report_damage(log, training)
                    if scores["top1"] > position.best:
                        position.best = scores["top1"]
                        checkpoints.save(accelerator, position.step, "best")
                if ends or saves or stop:
                    checkpoints.save(accelerator, position.step)
                if stop:
                    raise Interrupted(f"Stopped after step {position.step} of {schedule.steps}.")
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    model.__dict__.pop("forward", None)  # left by Accelerate: its autocast, or the bound method
    return result_of if unsharded is None else unsharded.with_weights_of(model), scores


def _claim_output(accelerator: Accelerator, checkpoints: Checkpoints, settings: TrainingSettings) -> None:
    """Write the settings to ``output``, or check that the run there is this one."""
    check_folder(settings, holds_checkpoint=checkpoints.newest() is not None)
    if accelerator.is_main_process and not continues(settings):
        write_settings(settings)
        (settings.output / "log.jsonl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def _prepared(accelerator: Accelerator, loader: DataLoader[Any] | None) -> Any:
    """The loader, sharded over the processes; timm's streamed data sets shard themselves."""
    if loader is not None and isinstance(loader.dataset, IterableDataset):
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
    return None if loader is None else accelerator.prepare(loader)


def _epoch(
    accelerator: Accelerator, loader: Any, epoch: int, done: int, steps: int, settings: TrainingSettings
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The batches left after ``done`` steps of an epoch, each with its position among those of all processes."""
    for owner in (loader, loader.dataset):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
    # Workers that read a stream are restarted every epoch, with seeds drawn here.
    seed_everything(settings.seed, epoch, accelerator.process_index, 2)
    first = done * settings.accumulation
    rest = accelerator.skip_first_batches(loader, first) if first else loader
    for index, (images, targets) in enumerate(first_batches(rest, steps * settings.accumulation - first), start=first):
        yield index * accelerator.num_processes + accelerator.process_index, images, targets


def _mixup(settings: TrainingSettings, num_classes: int) -> Mixup | None:
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )


class _Totals:
    """Sums of the parts of the loss since they were last taken, without synchronising with the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach().float()
            self.sums[name] = value if name not in self.sums else self.sums[name] + value
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means over all processes, of everything since the last call."""
        names = list(self.sums)
        means = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]) / self.count, "mean")
        self.sums, self.count = {}, 0
        return dict(zip(names, means.tolist(), strict=True))


def _check_finite(means: Mapping[str, float], step: int) -> None:
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(
            f"the loss is {means['loss']} at step {step}: {dict(means)}. Checkpoints from before it are "
            "intact. Start a new run with gradient clipping (--clip-gradient 1), bf16 instead of fp16, or another seed."
        )


def _rates(optimizer: Any) -> dict[str, float]:
    return {("backbone" if group["waits"] else "base"): group["lr"] for group in optimizer.param_groups}


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process has the flag set, so that all of them stop at the same step."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def _report_damage(log: Logbook, loader: Any) -> None:
    images = loader.dataset
    if isinstance(images, Images) and images.damaged.any():
        names = images.damaged_names()
        log.say(f"[yellow]{len(names)} damaged image(s) skipped so far:[/] {', '.join(names)}")


@contextmanager
def _interrupt_flag() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a flag, so that no step is left half done; the second one acts at once."""
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

"""The loop: steps of an optimiser, with validations in between, so that the best is known when it ends early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.errors import StateError
from tokenprune.training.batches import Batches, Inputs
from tokenprune.training.calibration_report import Stop
from tokenprune.training.preserving import learning, put_back, snapshot
from tokenprune.training.progress import CalibrationProgress
from tokenprune.training.validation import Validated, Validation

NUM_VALIDATIONS = 10
"""During a run, besides the one before it."""
WARMUP_SHARE = 0.1


class Step(NamedTuple):
    """What a forward pass gave.

    Attributes:
        loss: A scalar.
        kept: The mean fraction of patch tokens left behind the last stage.
    """

    loss: Tensor
    kept: Tensor


@dataclass
class Fit:
    """What one or several runs gave, one after the other.

    Attributes:
        first: The validation before the first step.
        left: The validation of the values that were left in the parameters.
        left_step: The step after which it was made; 0 = before the first.
        losses: The loss of each step.
        stopped: Why it ended.
    """

    first: Validated
    left: Validated
    left_step: int = 0
    losses: list[float] = field(default_factory=list)
    stopped: Stop = "done"


def fit(
    run: Fit,
    forward: Callable[[Inputs], Step],
    trained: Sequence[nn.Parameter],
    batches: Batches,
    validation: Validation,
    *,
    steps: int,
    learning_rate: float,
    num_plans: int | None,
    scale_loss: bool,
    progress: CalibrationProgress,
) -> None:
    """Train parameters with AdamW, a warm-up of a tenth of the steps and a cosine down to 0.

    The last values are left, unless the first were better. Ctrl-C ends the training
    early, and so do images that run out; then the best values that were seen are left.

    Args:
        run: Where the model comes from: what it gave so far, to which is added.
        forward: A pass on a batch, with a gradient.
        trained: What to train.
        batches: What to train on.
        validation: Run ten times on the way, and after the last step.
        steps: How many steps to make.
        learning_rate: Its peak.
        num_plans: By how many of the validation's plans the best is chosen, from the first; ``None`` means all.
        scale_loss: Whether the loss is scaled, as float16 needs it.
        progress: Is told of every step.

    Raises:
        StateError: No gradient reaches any of the parameters.
        FloatingPointError: A loss is not finite.
    """
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=scale_loss)
    start, earlier = run.left, len(run.losses)
    best_values, agreement = snapshot(trained), start.agreements[0]
    every = max(1, math.ceil(steps / NUM_VALIDATIONS))
    try:
        for step in range(1, steps + 1):
            inputs = batches.next()
            if inputs is None:
                run.stopped = "images ended"
            else:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate(step, steps)
                with learning(trained):
                    made = forward(inputs)
                    _check_gradient(made.loss)
                    scaler.scale(made.loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                run.losses.append(_finite(made.loss, earlier + step))
            if inputs is None or step % every == 0 or step == steps:
                found = validation.run()
                agreement = found.agreements[0]
                to_beat = start if step == steps else run.left
                if found.distance(num_plans) < to_beat.distance(num_plans):
                    run.left, run.left_step, best_values = found, len(run.losses), snapshot(trained)
            if inputs is None:
                break
            progress.show(step, loss=run.losses[-1], kept=float(made.kept), agreement=agreement)
    except KeyboardInterrupt:
        run.stopped = "interrupted"
    put_back(trained, best_values)


def rate(step: int, steps: int) -> float:
    """The learning rate at a step, from 1, as a fraction of its peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step <= warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))) / 2


def _check_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise StateError(
            "no gradient reaches what is to be trained: a learned scorer must be probabilistic, and compute its scores "
            "from its parameters without detaching them."
        )


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss is {value} at step {step}; check the images for infinite numbers and NaN, or take a lower "
            "learning_rate. The model is as it was."
        )
    return value

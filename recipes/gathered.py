"""The gathered schedule: scorers are calibrated first, without labels, and held while the backbone trains.

It then trains as inference runs it, with tokens really removed, so that a step costs less than a dense one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

import tokenprune
from recipes.engine.checkpoints import Checkpoints, Interrupted
from recipes.engine.data import loader, open_images
from recipes.engine.models import data_config


def begin(model: Any, settings: Any, stack: ExitStack) -> None:
    """Calibrate a sparsified model, and hold its scorers until the stack is closed.

    A run that is resumed has its scorers in the checkpoint. Of several processes the first one calibrates for all.

    Args:
        model: The sparsified model.
        settings: Those of the run: `recipes.dynamicvit.SparseSettings`.
        stack: What ends the training with tokens removed.

    Raises:
        Interrupted: Ctrl-C was pressed.
    """
    learns = any(True for _ in model.tokenprune.parameters())
    resumes = Checkpoints(settings.output / "checkpoints").newest() is not None
    if learns and not resumes:
        _calibrate(model, settings)
    stack.enter_context(tokenprune.gathered(model))


def _calibrate(model: Any, settings: Any) -> None:
    state = PartialState()
    model.to(state.device)
    found: list[Any] = [None]
    if state.is_main_process:
        images = loader(open_images(settings, training=True), settings, data_config(settings, model), training=True)
        report = tokenprune.calibrate(
            model,
            images,
            steps=settings.calibration_steps,
            learning_rate=settings.calibration_rate,
            autocast=settings.autocast,
            seed=settings.seed,
        )
        found = [(report.stopped, model.tokenprune.state_dict())]
    if state.num_processes > 1:
        broadcast_object_list(found)
    stopped, scorers = found[0]
    if stopped == "interrupted":
        raise Interrupted("Stopped while calibrating, which starts again.")
    model.tokenprune.load_state_dict(scorers)

"""What `calibrate` refuses: models and settings that it could not do anything with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokenprune.api import sparsifier_of, unwrap
from tokenprune.errors import PlanError, StateError, UnsupportedModelError
from tokenprune.pruning.plan import cumulative_ratios
from tokenprune.pruning.stage import Stage
from tokenprune.training.gathered import scorer_parameters


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be calibrated.

    Raises:
        StateError: It is not sparsified, runs dense, is wrapped for several processes, or is trained in parts.
        UnsupportedModelError: It has no weights.
        ValueError: Its weights are in float16, in which an optimiser's steps are lost.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise StateError(
            "calibrate runs in one process; pass the model before DistributedDataParallel wraps it, which then gives "
            "every process the scorers of the first one."
        )
    sparsifier, parameter = sparsifier_of(model), next(unwrap(model).parameters())
    if not sparsifier.enabled:
        raise StateError("the model runs dense here (inside tokenprune.dense); call calibrate outside of it.")
    if sparsifier.backbone.downstream == "any number" and not sparsifier.restores:
        raise StateError(
            "what follows the vision tower takes equally many tokens of each image, and in training they differ; "
            "sparsify and calibrate the tower by itself, or take pruned='preserve'."
        )
    if parameter.device.type == "meta":
        raise UnsupportedModelError(
            f"this {type(unwrap(model)).__name__} is on the meta device; give it weights first."
        )
    if parameter.dtype == torch.float16:
        raise ValueError(
            "the model's weights are in float16, too coarse to be trained; pass it in float32 with "
            "autocast=torch.float16, or in bfloat16."
        )


def trained_parameters(model: nn.Module, train: str, steps: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained first, and what is trained then.

    Args:
        model: A sparsified model.
        train: ``"scorers"``: what `sparsify` added, or of it what requires a gradient, if anything does; then nothing.
            ``"all"``: the same, and then everything that requires a gradient, but for the scorers.
        steps: How many are meant for what comes first; if 0, nothing does.

    Raises:
        StateError: There is nothing to train.
        ValueError: ``train`` is something else.
    """
    if train not in ("scorers", "all"):
        raise ValueError(f"train={train!r}: choose 'scorers' or 'all'.")
    sparsifier = sparsifier_of(model)
    added = [parameter for parameter in sparsifier.parameters() if parameter.is_floating_point()]
    added = [parameter for parameter in added if parameter.requires_grad] or added
    if train == "scorers":
        if not added:
            names = sorted({type(cast(Stage, stage).scorer).__name__ for stage in sparsifier.stages})
            raise StateError(
                f"there is nothing to train: {', '.join(names)} has no parameters. Take scorer='predictor', or "
                "train='all', which trains the backbone around it; or use the model as it is."
            )
        return added, []
    held = {id(parameter) for parameter in scorer_parameters(sparsifier)}
    rest = [one for one in unwrap(model).parameters() if one.requires_grad and id(one) not in held]
    if not any(id(parameter) not in set(map(id, added)) for parameter in rest):
        raise StateError("train='all', but nothing of the backbone requires a gradient; set requires_grad of what may.")
    return added if steps else [], rest


def check_settings(*, lowest: Mapping[str, tuple[int, int]], rates: Mapping[str, float], autocast: Any) -> None:
    """Refuse numbers out of their range.

    Args:
        lowest: Counts by name, each with the least that is allowed.
        rates: Learning rates by name.
        autocast: The dtype, or ``None``.

    Raises:
        ValueError, TypeError: One is.
    """
    for name, (number, least) in lowest.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}={number!r}: expected a number of at least {least}.")
        if number < least:
            raise ValueError(f"{name}={number}: expected a number of at least {least}.")
    for name, rate in rates.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{name}={rate}: expected a finite number above 0.")
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast={autocast!r}: expected torch.bfloat16, torch.float16 or None.")


def checked_range(keep_ratio_range: Sequence[float]) -> tuple[float, float]:
    """The highest and the lowest ρ of a range that is given the other way round.

    Raises:
        PlanError: It is no range.
    """
    if not isinstance(keep_ratio_range, (tuple, list)) or len(keep_ratio_range) != 2:
        raise PlanError(
            f"keep_ratio_range={keep_ratio_range!r}: expected the lowest and the highest keep ratio, as in "
            "(0.4, 0.7), or None for the model's own."
        )
    low, high = keep_ratio_range
    for ratio in (low, high):
        cumulative_ratios(ratio, 1)
    if low > high:
        raise PlanError(f"keep_ratio_range={keep_ratio_range!r}: the lowest keep ratio comes first.")
    return high, low

"""DynamicViT's fine-tuning of a dense timm model: what `recipes.deit`, `recipes.lvvit` and others share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from rich.console import Console
from torch import Tensor, nn

import tokenprune
from recipes import gathered
from recipes.dense import SMOKE as SMOKE_DENSE
from recipes.dense import criterion
from recipes.engine.fitting import Job, Outcome, fit
from recipes.engine.optimization import parameter_groups
from recipes.engine.settings import PruningSettings, SettingsError, TrainingSettings

SMOKE = {**SMOKE_DENSE, "frozen_epochs": 0.5}


@dataclass(frozen=True, kw_only=True)
class SparseSettings(TrainingSettings, PruningSettings):  # in this order: the first one's defaults go before
    """Settings of a run that sparsifies; the defaults are DynamicViT's (arXiv 2106.02034)."""

    frozen_epochs: float = 5.0


def fine_tune(
    settings: SparseSettings,
    *,
    heads: tuple[str, str] | None = None,
    pruned: str = "drop",
    start: Callable[[nn.Module], None] | None = None,
    model_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
    description: str | None = None,
) -> Outcome:
    """Sparsify the dense model and fine-tune it, with the dense model as its teacher.

    With ``schedule="gathered"`` its scorers are calibrated first, and held; see `recipes.gathered`.

    Args:
        settings: Everything that decides the run.
        heads: The two heads of a model that also classifies its patch tokens; see `tokenprune.DynamicViTLoss`.
        pruned: The reduction, as for `tokenprune.sparsify`.
        start: Called with the sparsified model before anything is trained, to give it other weights.
        model_options: As for `recipes.engine.fitting.fit`, as are the errors raised.
        console: Likewise.
        description: Likewise; model and ratio if not given.
    """

    def prepare(model: nn.Module, images_per_step: int) -> Job:
        teacher = copy.deepcopy(model)
        try:
            sparse = tokenprune.sparsify(model, settings.stages, settings.ratio, scorer=settings.scorer, pruned=pruned)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        sparsifier = attached(sparse)
        freeze_embeddings(sparse)
        if start is not None:
            start(sparse)
        scorers = set(sparsifier.parameters())
        if is_gathered:
            gathered.begin(sparse, settings, stack)
        return Job(
            model=sparse,
            loss_function=Objective(teacher, settings, heads),
            parameter_groups=parameter_groups(
                sparse,
                learning_rate=settings.scaled_learning_rate(images_per_step),
                weight_decay=settings.weight_decay,
                slow=[parameter for parameter in sparse.parameters() if parameter not in scorers],
                slow_factor=settings.backbone_factor,
            ),
            frozen_epochs=0.0 if is_gathered else settings.frozen_epochs,
            find_unused_parameters=not is_gathered and 1.0 in sparsifier.keep_probabilities,
        )

    is_gathered = settings.schedule == "gathered"
    with ExitStack() as stack:
        outcome = fit(
            settings,
            prepare,
            description=description or f"{settings.model}, ρ {settings.ratio}",
            model_options=model_options,
            console=console,
        )
    attached(outcome.model).execution = "auto"  # an average of the weights is a copy, made while tokens were removed
    return outcome


class Objective(nn.Module):
    """DynamicViT's loss; the log also gets the fraction of patch tokens that each stage keeps."""

    def __init__(self, teacher: nn.Module, settings: SparseSettings, heads: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.loss = tokenprune.DynamicViTLoss(
            cast(nn.Module, torch.compile(teacher)) if settings.compile else teacher,
            criterion=criterion(settings),
            kl_weight=settings.kl_weight,
            distill_weight=settings.distill_weight,
            ratio_weight=settings.ratio_weight,
            heads=heads,
        )

    def forward(self, model: nn.Module, inputs: Tensor, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The parts of the loss, and ``kept_1``, ``kept_2`` … as fractions."""
        parts: dict[str, Tensor] = self.loss(model, inputs, outputs, targets)
        trace = attached(extract_model_from_parallel(model, keep_torch_compile=False)).trace
        assert trace is not None  # the loss reads it too
        return {**parts, **{f"kept_{stage}": keep.detach().mean() for stage, keep in enumerate(trace.keep, start=1)}}


def freeze_embeddings(model: nn.Module) -> None:
    """Freeze class token and position embedding, as in the paper's schedule."""
    for name in ("cls_token", "pos_embed"):
        parameter = getattr(model, name, None)
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(False)


def attached(model: nn.Module) -> tokenprune.Sparsifier:
    """``model.tokenprune``, with its type."""
    return cast(tokenprune.Sparsifier, model.tokenprune)

"""Gathered training: tokens are really removed, the scorers are held, and the rest of the model learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from tokenprune.api import sparsifier_of
from tokenprune.pruning.executions import default_execution
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.stage import Stage


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While it lasts, a sparsified model trains as inference runs it: pruned tokens are removed, and scorers are held.

    A step then costs less than a dense one. No gradient reaches the decisions, so scorers have to be trained before,
    as `calibrate` does, or to need no training; their parameters do not require gradients here. `DynamicViTLoss` takes
    passes that were made here, as does any loss on what the model returns. The mode is yours: call ``model.train()``.

    Enter it before an optimiser is made and before `DistributedDataParallel` wraps the model, so that both leave the
    scorers out. Activation checkpointing is refused, as it would have to find the decisions again.

    Args:
        model: A sparsified model, possibly wrapped.

    Raises:
        StateError: The model is not sparsified.
    """
    sparsifier = sparsifier_of(model)
    learned = [parameter.requires_grad for parameter in scorer_parameters(sparsifier)]
    with sparsifier.executing(default_execution(training=False)):
        try:
            for parameter in scorer_parameters(sparsifier):
                parameter.requires_grad_(False)
            yield
        finally:
            # FSDP2 may have put others in their place.
            for parameter, learns in zip(scorer_parameters(sparsifier), learned, strict=True):
                parameter.requires_grad_(learns)


def scorer_parameters(sparsifier: Sparsifier) -> list[nn.Parameter]:
    """The parameters of all scorers, without those of reductions."""
    return [parameter for stage in sparsifier.stages for parameter in cast(Stage, stage).scorer.parameters()]

"""How far a pruned model agrees with the dense one, on batches that were held back."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.backbones.probing import eval_mode
from tokenprune.pruning.executions import default_execution
from tokenprune.training.batches import Inputs, num_images
from tokenprune.training.comparison import Comparison, View


class Validated(NamedTuple):
    """What a validation found, as means over images.

    Attributes:
        distances: From the dense model, at each plan; lower = better.
        agreements: With the dense model, at each plan; higher = better.
        kept_ratios: The fraction of patch tokens that each stage kept, at the first plan.
    """

    distances: tuple[float, ...]
    agreements: tuple[float, ...]
    kept_ratios: tuple[float, ...]

    def distance(self, num_plans: int | None = None) -> float:
        """The mean distance over the first plans, so many or all of them."""
        return statistics.fmean(self.distances[:num_plans])


class Validation:
    """Compares a model, as inference runs it, with what it was, dense, when this was made.

    Args:
        comparison: What runs and compares it.
        batches: The inputs.
        plans: The cumulative keep ratios, one a stage, to compare it at.
    """

    def __init__(self, comparison: Comparison, batches: Sequence[Inputs], plans: Sequence[tuple[float, ...]]) -> None:
        self.comparison, self.batches, self.plans = comparison, batches, tuple(plans)
        self.num_images = sum(map(num_images, batches))
        with eval_mode(comparison.model):
            # Without the final tokens, which are not needed here.
            self._dense = [comparison.dense(inputs)._replace(tokens=torch.empty(0)) for inputs in batches]

    @torch.no_grad()
    def run(self) -> Validated:
        """Compare it as it is now. Its keep ratios and its execution are left as they are."""
        comparison, sparsifier = self.comparison, self.comparison.sparsifier
        before, rows, kept = sparsifier.plan.keep_ratios, [], []
        try:
            with eval_mode(comparison.model), sparsifier.executing(default_execution(training=False)):
                for number, plan in enumerate(self.plans):
                    sparsifier.keep_ratio = plan
                    found = []
                    for inputs, dense in zip(self.batches, self._dense, strict=True):
                        view = comparison.pruned(inputs)
                        found.append(_figures(comparison, view, dense) * num_images(inputs))
                        if number == 0 and view.trace is not None:
                            kept.append(torch.stack([keep.mean(dim=1).sum() for keep in view.trace.keep]))
                    rows.append(torch.stack(found).sum(dim=0) / self.num_images)
        finally:
            sparsifier.keep_ratio = before
        figures = torch.stack(rows).cpu()  # (plans, 2)
        return Validated(
            distances=tuple(figures[:, 0].tolist()),
            agreements=tuple(figures[:, 1].tolist()),
            kept_ratios=tuple((torch.stack(kept).sum(dim=0) / self.num_images).tolist()),
        )


def _figures(comparison: Comparison, view: View, dense: View) -> Tensor:
    return torch.stack([comparison.distance(view, dense), comparison.agreement(view, dense)])

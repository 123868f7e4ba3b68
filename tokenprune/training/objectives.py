"""What a step of a calibration minimises."""

from __future__ import annotations

import torch

from tokenprune.pruning.executions import default_execution
from tokenprune.training.batches import Inputs
from tokenprune.training.comparison import Comparison
from tokenprune.training.fitting import Step
from tokenprune.training.levels import levelled

DISTILL_WEIGHT = 0.5
RATIO_WEIGHT = 2.0


class ScorerObjective:
    """The distance of a masked pass, its decisions sampled at a keep ratio of its own, from the dense pass.

    The gradient is that of what has one; it reaches scorers through the decisions, and reductions through the tokens.

    Args:
        comparison: Of the model with itself, dense.
        keep_ratio_range: The lowest and the highest ρ that is drawn; ``None`` for the model's own keep ratios.
        seed: Of the drawing.
    """

    def __init__(self, comparison: Comparison, keep_ratio_range: tuple[float, float] | None, seed: int) -> None:
        self.comparison, self.keep_ratio_range = comparison, keep_ratio_range
        self.plan = comparison.sparsifier.plan
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, inputs: Inputs) -> Step:
        comparison, sparsifier = self.comparison, self.comparison.sparsifier
        teacher = comparison.dense(inputs)
        sparsifier.keep_ratio = self._draw()
        sparsifier.train()
        try:
            with levelled(sparsifier) as scorers, sparsifier.executing(default_execution(training=True)):
                student = comparison.pruned(inputs)
        finally:
            sparsifier.keep_ratio = self.plan.keep_ratios
        assert student.trace is not None
        loss = comparison.distance(student, teacher) + DISTILL_WEIGHT * comparison.token_distance(student, teacher)
        errors = [
            (scorer.share - self.plan.keep_probabilities[stage]).square().mean()
            for stage, scorer in scorers.items()
            if scorer.share is not None
        ]
        if errors:
            loss = loss + RATIO_WEIGHT * torch.stack(errors).mean()
        return Step(loss, student.trace.shares[-1].detach().mean())

    def _draw(self) -> float | tuple[float, ...]:
        if self.keep_ratio_range is None:
            return self.plan.keep_ratios
        low, high = self.keep_ratio_range
        return low + (high - low) * float(torch.rand((), generator=self._generator))


class BackboneObjective:
    """The distance of a pass in which tokens are removed from the dense pass of a frozen copy.

    Args:
        comparison: Of the model.
        teacher: Of the copy, as the model was before its backbone learned.
    """

    def __init__(self, comparison: Comparison, teacher: Comparison) -> None:
        self.comparison, self.teacher = comparison, teacher

    def __call__(self, inputs: Inputs) -> Step:
        comparison, sparsifier = self.comparison, self.comparison.sparsifier
        teacher = self.teacher.dense(inputs)
        sparsifier.eval()
        with sparsifier.executing(default_execution(training=False)):
            student = comparison.pruned(inputs)
        assert student.trace is not None
        loss = comparison.distance(student, teacher) + DISTILL_WEIGHT * comparison.token_distance(student, teacher)
        return Step(loss, student.trace.shares[-1].mean())

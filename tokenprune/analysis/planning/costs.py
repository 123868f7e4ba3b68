"""What plans cost: counted for a few, and interpolated between them, so that a search can try hundreds.

Shapes: N patch tokens, S stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import nn

from tokenprune.analysis.flop_counter import FlopReport, flops, recount
from tokenprune.api import sparsifier_of
from tokenprune.pruning.plan import Plan

Ratios = tuple[float, ...]
Decays = tuple[float, ...]

# The samples that costs are interpolated between: plans of these ρ, and one each that prunes early and late, which tell
# what of a stage's cost comes from the tokens that reach it and what from those that it keeps.
SAMPLED = (0.8, 0.55, 0.3)
NEIGHBOURHOOD = 0.05
FINEST_LEVEL = 1e-9
SMALLEST_RATIO = 1e-6


class PlanCosts:
    """The multiply-adds of one image under every plan of a sparsified model.

    A block costs a + b·n + c·n² for n patch tokens, a stage that is reached by m tokens and keeps n of them
    a + b·m + c·m² + d·m·n: fitted, by segments between stages, to a handful of counts. What is returned to users is
    counted again.

    Args:
        model: The sparsified model; its keep ratio is changed, and it is for the caller to restore it.
        input_size: Channels, height and width of the image.

    Attributes:
        num_patches: N.
        dense: Multiply-adds of the model where it prunes nothing.
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int]) -> None:
        self._model, self._sparsifier = model, sparsifier_of(model)
        self.stages = self._sparsifier.plan.stages
        self._sparsifier.keep_ratio = 1.0
        self._report = report = flops(model, input_size)
        trace = self._sparsifier.trace
        assert trace is not None  # of the pruned pass, which is counted last
        self.num_patches, self.dense = trace.num_patches, report.sparse
        self._counts = {self.num_keep(report.keep_ratios): report}
        self._fit()

    def num_keep(self, ratios: Ratios) -> tuple[int, ...]:
        """Kept patch tokens after each stage."""
        return Plan(stages=self.stages, keep_ratios=ratios).num_keep(self.num_patches)

    def counted(self, ratios: Ratios) -> int:
        """Multiply-adds, as `tokenprune.flops` counts them."""
        return self._counted_report(ratios).sparse

    def _counted_report(self, ratios: Ratios) -> FlopReport:
        kept = self.num_keep(ratios)
        if kept not in self._counts:
            self._sparsifier.keep_ratio = ratios
            self._counts[kept] = recount(self._model, self._report)
        return self._counts[kept]

    def estimated(self, ratios: Ratios) -> float:
        """Multiply-adds, interpolated."""
        kept = self.num_keep(ratios)
        before = (self.num_patches, *kept)
        total = _value(self._rest, _quadratic(kept[-1])) + self._front
        for stage, (reached, left) in enumerate(pairwise(before)):
            total += _value(self._segments[stage], _quadratic(left))
            if left < reached:  # otherwise it does not ask its scorer
                total += _value(self._scoring[stage], _of_both(reached, left))
        return total

    def _fit(self) -> None:
        number = len(self.stages)
        plans = [tuple(rho**power for power in range(1, number + 1)) for rho in SAMPLED]
        plans += [tuple(0.4 * 0.9**stage for stage in range(number)), (*(0.9**n for n in range(1, number)), 0.2)]
        reports = [self._counted_report(plan) for plan in plans]
        kept = [(self.num_patches, *self.num_keep(plan)) for plan in plans]
        bounds = (*self.stages, len(reports[0].dense_blocks))
        self._front = float(sum(reports[0].dense_blocks[: self.stages[0]]))
        self._segments, self._scoring = [], []
        for stage in range(number):
            blocks = slice(*bounds[stage : stage + 2])
            rows = [_quadratic(tokens[stage + 1]) for tokens in kept]
            self._segments.append(_fitted(rows, [sum(report.sparse_blocks[blocks]) for report in reports]))
            rows = [_of_both(*tokens[stage : stage + 2]) for tokens in kept]
            self._scoring.append(_fitted(rows, [report.stages[stage] for report in reports]))
        rests = [report.sparse - sum(report.sparse_blocks) - sum(report.stages) for report in reports]
        self._rest = _fitted([_quadratic(tokens[-1]) for tokens in kept], rests)

    @property
    def cheapest(self) -> int:
        """Multiply-adds of the cheapest plan, which keeps one token."""
        return self.counted((1 / self.num_patches,) * len(self.stages))

    def at_most(self, decays: Decays, budget: float, *, exact: bool = True) -> Ratios:
        """The most expensive plan within a budget of those that divide the pruning among stages in a given way.

        Args:
            decays: How much each stage prunes beside the others: it keeps a fraction exp(-decay · level) of the tokens
                that reach it, and the level is looked for. Equal ones make ρ, ρ², ρ³.
            budget: Multiply-adds.
            exact: Whether to count instead of interpolating.

        Returns:
            The cumulative ratios; those of one token where no plan is cheap enough. Counted ones have as few decimals
            as say how many tokens are kept, and a stage keeps one more where the budget has room.
        """
        cost = self.counted if exact else self.estimated
        low, high = 0.0, math.log(self.num_patches) / min(decays) + 1.0
        if cost(at_level(decays, low)) <= budget:
            return at_level(decays, low)
        if exact:  # a few counts around what the interpolation says, instead of a dozen
            level = _level_of(decays, self.at_most(decays, budget, exact=False))
            below, above = level * (1 - NEIGHBOURHOOD), min(level * (1 + NEIGHBOURHOOD), high)
            low = below if cost(at_level(decays, below)) > budget else low
            high = above if cost(at_level(decays, above)) <= budget else high
        while high - low > FINEST_LEVEL * high:
            middle = (low + high) / 2
            low, high = (low, middle) if cost(at_level(decays, middle)) <= budget else (middle, high)
        return self._filled(at_level(decays, high), budget) if exact else at_level(decays, high)

    def _filled(self, ratios: Ratios, budget: float) -> Ratios:
        """One more token for every stage for which the budget still has room: several may have changed at one level."""
        kept = list(self.num_keep(ratios))
        for stage, number in enumerate(kept):
            more = [*kept[:stage], number + 1, *kept[stage + 1 :]]
            tried = self._keeping(more)
            if more == sorted(more, reverse=True) and more[0] <= self.num_patches and self.estimated(tried) <= budget:
                kept = more if self.counted(tried) <= budget else kept
        return self._keeping(kept)

    def _keeping(self, numbers: Iterable[int]) -> Ratios:
        """Ratios of few decimals that keep so many tokens."""
        return tuple(_shortest(number, self.num_patches) for number in numbers)


def at_level(decays: Decays, level: float) -> Ratios:
    """Cumulative ratios of stages that keep exp(-decay · level) of what reaches them."""
    return tuple(max(math.exp(-level * total), SMALLEST_RATIO) for total in accumulate(decays))


def _shortest(number: int, num_patches: int) -> float:
    """The fraction of ``num_patches`` with the fewest decimals that keeps ``number`` of them."""
    for decimals in range(2, 16):
        ratio = math.ceil(number * 10.0**decimals / num_patches - 1e-6) / 10.0**decimals
        if math.floor(num_patches * ratio + 1e-9) == number:
            return min(ratio, 1.0)
    return number / num_patches


def _level_of(decays: Decays, ratios: Ratios) -> float:
    return -math.log(ratios[-1]) / sum(decays)


def _quadratic(tokens: int) -> tuple[float, ...]:
    return 1.0, float(tokens), float(tokens**2)


def _of_both(reached: int, left: int) -> tuple[float, ...]:
    return 1.0, float(reached), float(reached**2), float(reached * left)


def _fitted(rows: list[tuple[float, ...]], values: Sequence[float]) -> list[float]:
    """The smallest coefficients of least squared error."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    scale = matrix.abs().amax(dim=0)
    solved = torch.linalg.lstsq(matrix / scale, torch.tensor([values], dtype=torch.float64).T, driver="gelsd")
    found: list[float] = (solved.solution[:, 0] / scale).tolist()
    return found


def _value(coefficients: list[float], row: tuple[float, ...]) -> float:
    return sum(coefficient * term for coefficient, term in zip(coefficients, row, strict=True))

"""How pruning is best divided among the stages, by looking at images.

Shapes: B images, S stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from tokenprune.analysis.planning.costs import Decays, PlanCosts, Ratios
from tokenprune.api import sparsifier_of
from tokenprune.training.batches import Inputs, num_images
from tokenprune.training.comparison import Comparison
from tokenprune.training.validation import Validation

FACTORS = (4.0, 2.0, 2.0**0.5, 2.0**0.25)
"""By how much a stage is made to prune more or less beside the others, from the first steps of a search to the last."""
MOST_ROUNDS = 2
"""How often all stages are gone through with steps of one size."""
LEAST_GAIN = 0.05
"""By how much nearer a plan must come on images that were not searched on: less is noise on some hundred of them."""
NUM_BUDGETS = 7
"""How often the range of budgets is halved in the search for the cheapest plan: to 1/128 of it."""


class Found(NamedTuple):
    """How near the pruned model is to the dense one.

    Attributes:
        distance: KL of the outputs, or 1 − cosine of features; lower = better.
        agreement: The share of images with the same best class, or the mean cosine of features.
    """

    distance: float
    agreement: float


class PlanSearch:
    """Compares plans of a sparsified model on images.

    Every other image is searched on. The others decide whether what was found there is better than ρ, ρ², ρ³ ….

    Args:
        model: The sparsified model, without wrappers; its keep ratio is changed, for the caller to restore.
        costs: What its plans cost.
        batches: At least two images.
        tell: Called with what is being done.
    """

    def __init__(
        self, model: nn.Module, costs: PlanCosts, batches: Sequence[Inputs], tell: Callable[[str], None]
    ) -> None:
        self._costs, self._tell = costs, tell
        comparison = Comparison(model, sparsifier_of(model))
        comparison.find_measure(batches[0])
        self._searched, self._held_out = (_Images(comparison, costs, half) for half in halves(batches))
        self.geometric: Decays = (1.0,) * len(costs.stages)

    def decays(self, budget: float) -> Decays:
        """How to divide the pruning among the stages under a budget of multiply-adds.

        Coordinate search: one stage after the other is made to prune more, or less, and the others make up for the
        difference in cost; what brings the outputs nearer to the dense model's is kept, and the steps grow smaller.
        The smooth distance of outputs is searched on, for the agreement of some hundred images moves in jumps.
        """
        best, least = self.geometric, self._distance(self.geometric, budget)
        if len(best) == 1:
            return best
        for factor in FACTORS:
            for _ in range(MOST_ROUNDS):
                improved = False
                for stage in range(len(best)):
                    for change in (factor, 1 / factor):
                        tried = (*best[:stage], best[stage] * change, *best[stage + 1 :])
                        distance = self._distance(tried, budget)
                        if distance < least:
                            best, least, improved = tried, distance, True
                if not improved:
                    break
        return best if self._holds_out(best, budget) else self.geometric

    def _distance(self, decays: Decays, budget: float) -> float:
        self._tell(f"comparing plans of {budget / 1e9:.3g} GMACs: {len(self._searched.found)} tried")
        return self._searched.at(self._costs.at_most(decays, budget, exact=False)).distance

    def _holds_out(self, decays: Decays, budget: float) -> bool:
        """Whether a division is better than the geometric one on images that it was not chosen by."""
        ratios, geometric = self._costs.at_most(decays, budget), self._costs.at_most(self.geometric, budget)
        found, known = self._held_out.at(ratios), self._held_out.at(geometric)
        return found.distance <= (1 - LEAST_GAIN) * known.distance and found.agreement >= known.agreement

    def cheapest(self, agreement: float) -> Ratios:
        """The cheapest plan found that agrees with the dense model on this share of all images.

        The budget at which ρ, ρ², ρ³ … agree is halved down to, the pruning divided anew for that budget, and a lower
        one looked for at which it still agrees.
        """
        dense, lowest = float(self._costs.dense), float(self._costs.cheapest)
        budget = self._lowest_budget(agreement, self.geometric, lowest, dense)
        decays = self.decays(budget)
        if decays != self.geometric and self._agreement(decays, budget) >= agreement:
            budget = self._lowest_budget(agreement, decays, lowest, budget)
            return self._costs.at_most(decays, budget)
        return self._costs.at_most(self.geometric, budget)

    def _lowest_budget(self, agreement: float, decays: Decays, low: float, high: float) -> float:
        """The lowest budget between two at which plans agree; they are taken to agree at the higher one."""
        if self._agreement(decays, low) >= agreement:
            return low
        for _ in range(NUM_BUDGETS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._agreement(decays, middle) >= agreement else (middle, high)
        return high

    def _agreement(self, decays: Decays, budget: float) -> float:
        """On all images, those that were searched on and the others."""
        self._tell(f"comparing a plan of {budget / 1e9:.3g} GMACs")
        ratios = self._costs.at_most(decays, budget)
        both = (self._searched, self._held_out)
        total = sum(images.at(ratios).agreement * images.number for images in both)
        return total / sum(images.number for images in both)


class _Images:
    """Some of the images, and what plans were found to do on them."""

    def __init__(self, comparison: Comparison, costs: PlanCosts, batches: Sequence[Inputs]) -> None:
        self._costs = costs
        self._validation = Validation(comparison, batches, ())
        self.number = self._validation.num_images
        self.found: dict[tuple[int, ...], Found] = {}

    def at(self, ratios: Ratios) -> Found:
        kept = self._costs.num_keep(ratios)
        if kept not in self.found:
            self._validation.plans = (ratios,)
            validated = self._validation.run()
            self.found[kept] = Found(validated.distance(), validated.agreements[0])
        return self.found[kept]


def halves(batches: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Every other image, and the others."""
    even: list[Inputs] = []
    odd: list[Inputs] = []
    seen = 0
    for inputs in batches:
        number = num_images(inputs)
        for part, start in ((even, seen % 2), (odd, (seen + 1) % 2)):
            if start < number:
                part.append(_every_other(inputs, number, start))
        seen += number
    return even, odd


def _every_other(inputs: Inputs, number: int, start: int) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[start::2]
    return {
        name: value[start::2] if isinstance(value, Tensor) and len(value) == number else value
        for name, value in inputs.items()
    }

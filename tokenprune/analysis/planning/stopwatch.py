"""Plans that are as fast as asked, by measurement on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tokenprune.analysis.benchmark import throughput
from tokenprune.analysis.planning.costs import Decays, PlanCosts, Ratios
from tokenprune.api import sparsifier_of
from tokenprune.errors import PlanError

MOST_TRIES = 8
AIM, ACCEPTED = 0.01, 0.03
"""A plan this near to the speed-up that was asked for is taken at once; none further off than this is taken."""
NARROW = 0.002
"""Budgets this near to each other, as a fraction of the dense model's multiply-adds, are told apart by noise alone."""


class Stopwatch:
    """Times a sparsified model under plans.

    Args:
        model: The sparsified model, possibly compiled; its keep ratio is changed, for the caller to restore.
        costs: What its plans cost.
        tell: Called with what is being done.
        settings: Those of `tokenprune.throughput`.
    """

    def __init__(self, model: nn.Module, costs: PlanCosts, tell: Callable[[str], None], **settings: Any) -> None:
        self._model, self._costs, self._tell, self._settings = model, costs, tell, settings

    def budget(self, speedup: float, decays: Decays, start: float) -> float:
        """The multiply-adds under which plans of these decays reach a speed-up.

        Args:
            speedup: Dense ÷ pruned seconds.
            decays: As `PlanCosts.at_most` takes them.
            start: The multiply-adds to begin with.

        Raises:
            PlanError: The cheapest plan is not as fast, or measurements scatter too much to tell.
        """
        cheapest, dense = float(self._costs.cheapest), float(self._costs.dense)
        lower, upper = cheapest, dense
        budget = min(max(start, cheapest), dense)
        tries: list[tuple[float, float, float]] = []  # how far off, the budget, the speed-up
        while len(tries) < MOST_TRIES and upper - lower > NARROW * dense:
            found = self._measured(decays, budget)
            if abs(found / speedup - 1) <= AIM:  # by luck, perhaps
                found = (found + self._measured(decays, budget)) / 2
            tries.append((abs(found / speedup - 1), budget, found))
            if tries[-1][0] <= AIM:
                return budget
            if budget == cheapest and found < speedup:
                raise PlanError(
                    f"speedup={speedup:g} cannot be met here with stages {self._costs.stages}: with one token kept, "
                    f"{found:.2f} was measured."
                )
            lower, upper = (lower, budget) if found < speedup else (budget, upper)
            following = budget * found / speedup
            budget = following if lower < following < upper else (lower + upper) / 2
            if following <= cheapest:
                budget = cheapest
        error, budget, found = min(tries)
        if error > ACCEPTED:
            raise PlanError(
                f"no plan was measured within {ACCEPTED:.0%} of speedup={speedup:g}; nearest was {found:.2f}. Let "
                "nothing else run, measure more pairs, or take larger batches."
            )
        return budget

    def _measured(self, decays: Decays, budget: float) -> float:
        ratios: Ratios = self._costs.at_most(decays, budget, exact=False)
        self._tell(f"measuring a plan of {self._costs.estimated(ratios) / 1e9:.3g} GMACs")
        sparsifier_of(self._model).keep_ratio = ratios
        return throughput(self._model, **self._settings).speedup

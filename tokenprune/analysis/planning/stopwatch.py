"""Plans that are as fast as asked, by measurement on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from torch import nn

from tokenprune.analysis.benchmark import throughput
from tokenprune.analysis.planning.costs import Decays, PlanCosts, Ratios
from tokenprune.api import sparsifier_of
from tokenprune.errors import PlanError

FEWEST_TRIES, MOST_TRIES = 3, 8
AIM, ACCEPTED = 0.01, 0.03
"""Standard errors of a speed-up, as a fraction of it: with the first a search ends, above the second it fails."""
NEAR = 0.1
"""Plans that differ by no more of the dense model's multiply-adds turn what they save into time at one rate."""


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

        One measurement says little: on a busy machine the next one of the same plan may be 10 % off. So no plan is
        taken because its own measurement happened to fit. Each says what part of the saved multiply-adds was saved in
        time; the budget follows from the mean of those taken near it, and is measured in turn, until it is certain.

        Args:
            speedup: Dense ÷ pruned seconds.
            decays: As `PlanCosts.at_most` takes them.
            start: The multiply-adds to begin with.

        Raises:
            PlanError: The cheapest plan is not as fast, or measurements scatter too much to tell.
        """
        cheapest, dense = float(self._costs.cheapest), float(self._costs.dense)
        budget, error = max(start, cheapest), math.inf
        tries: list[tuple[float, float]] = []  # the multiply-adds, which part of those saved was saved in time
        while len(tries) < MOST_TRIES and error > AIM:
            tries.append(self._tried(decays, min(budget, dense * (1 - NEAR / 2))))  # saving nothing tells nothing
            rate = mean(_nearest(tries, budget, NEAR * dense))
            wanted = dense * (1 - (1 - 1 / speedup) / rate) if rate > 0 else 0.0
            budget = min(max(wanted, cheapest), dense)
            rates = _nearest(tries, budget, NEAR * dense)
            if len(rates) >= FEWEST_TRIES:
                found = [1 / (1 - one * (1 - budget / dense)) for one in rates]
                error = stdev(found) / math.sqrt(len(found)) / mean(found)
        if error > ACCEPTED:
            raise PlanError(
                f"measurements scatter too much to tell which plan is within {ACCEPTED:.0%} of speedup={speedup:g}. "
                "Let nothing else run, measure more pairs, or take larger batches."
            )
        if wanted < cheapest:
            raise PlanError(
                f"speedup={speedup:g} cannot be met here with stages {self._costs.stages}: with one token kept, "
                f"{mean(found):.2f} was measured."
            )
        return budget

    def _tried(self, decays: Decays, budget: float) -> tuple[float, float]:
        ratios: Ratios = self._costs.at_most(decays, budget, exact=False)
        cost = self._costs.estimated(ratios)
        self._tell(f"measuring a plan of {cost / 1e9:.3g} GMACs")
        sparsifier_of(self._model).keep_ratio = ratios
        seconds = 1 / throughput(self._model, **self._settings).speedup
        return cost, (1 - seconds) / (1 - cost / self._costs.dense)


def _nearest(tries: list[tuple[float, float]], budget: float, distance: float) -> list[float]:
    """The rates of the budgets within a distance of one, or of the nearest."""
    nearest = min(abs(tried - budget) for tried, _ in tries)
    return [rate for tried, rate in tries if abs(tried - budget) <= max(distance, nearest)]

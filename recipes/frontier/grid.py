"""What is compared: methods, costs and seeds, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Training = Literal["none", "calibrated", "gathered", "masked"]
TRAININGS: dict[Training, str] = {
    "none": "no training",
    "calibrated": "calibrated",
    "gathered": "fine-tuned gathered",
    "masked": "fine-tuned masked",
}
REDUCTIONS = ("drop", "fuse", "merge", "merge_sizes")
TRAINING_FREE = ("random", "cls_attention", "redundancy", "informative")

GATHERED = (("predictor", "drop"), ("predictor", "fuse"))
"""Scorers and reductions whose backbone is trained with tokens removed and scorers held, at both low costs."""
GATHERED_BASELINES = (("static", "drop"), ("random", "drop"))
"""The same at the higher of them alone."""
GATHERED_BESIDE = (("informative", "drop"), ("predictor", "merge_sizes"), ("tome", "merge_sizes"))
"""The same with one seed."""

COSTS = (0.60, 0.48, 0.40, 0.35)
"""Multiply-adds as fractions of the dense model's: those of ρ about 0.66, 0.5, 0.35 and 0.22."""
LOW_COSTS = COSTS[-2:]
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to make a dense model cheaper.

    Attributes:
        scorer: The registered name of the scorer.
        pruned: The registered name of the reduction.
        training: What is trained.
    """

    scorer: str
    pruned: str
    training: Training

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.scorer}, {self.pruned}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: a method at a cost, with a seed.

    Attributes:
        method: The method.
        cost: Multiply-adds as a fraction of the dense model's, at most.
        seed: Seed of what is random.
    """

    method: Method
    cost: float
    seed: int = 0


def points(seeds: int = len(SEEDS)) -> Iterator[Point]:
    """Every point: what needs no training before what does, low costs first, one seed before the others."""
    free = [Method(scorer=scorer, pruned=pruned, training="none") for scorer in TRAINING_FREE for pruned in REDUCTIONS]
    free.append(Method(scorer="tome", pruned="merge_sizes", training="none"))
    for cost in sorted(COSTS):
        yield from (Point(method=method, cost=cost) for method in free)
    for seed in SEEDS[:seeds]:
        if seed:  # everything else that is not trained is the same for every seed
            for method in free:
                if method.scorer == "random":
                    yield from (Point(method=method, cost=cost, seed=seed) for cost in COSTS)
        for scorer, pruned in (*(("predictor", one) for one in REDUCTIONS), ("static", "drop")):
            method = Method(scorer=scorer, pruned=pruned, training="calibrated")
            yield from (Point(method=method, cost=cost, seed=seed) for cost in COSTS)
        beside = GATHERED_BESIDE if seed == SEEDS[0] else ()
        for scorer, pruned in (*GATHERED, *GATHERED_BASELINES, *beside):
            method = Method(scorer=scorer, pruned=pruned, training="gathered")
            costs = LOW_COSTS if (scorer, pruned) in GATHERED else LOW_COSTS[:1]
            yield from (Point(method=method, cost=cost, seed=seed) for cost in costs)
    for seed in SEEDS[:seeds]:
        yield Point(method=Method(scorer="predictor", pruned="drop", training="masked"), cost=LOW_COSTS[0], seed=seed)

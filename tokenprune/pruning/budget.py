"""Budgets: how many tokens a stage keeps of each image, the same number of all or as many as its scores call for.

Shapes: B images, m patch tokens that reach a stage, S stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.padded import Images
from tokenprune.errors import CheckpointError
from tokenprune.pruning.plan import Plan
from tokenprune.tokens import sizes

Budget = Literal["fixed", "adaptive"]
FIXED: Budget = "fixed"
ADAPTIVE: Budget = "adaptive"
BUDGETS: tuple[Budget, ...] = (FIXED, ADAPTIVE)


class Threshold(NamedTuple):
    """By which a stage keeps as many tokens of an image as have a higher score.

    Attributes:
        score: The score that a token to be kept exceeds.
        least: How many are kept of an image at least, whatever their scores.
    """

    score: float
    least: int

    def num_keep(self, scores: Tensor, left: Tensor | None) -> Tensor:
        """How many tokens to keep of each image, (B,) int64.

        Args:
            scores: (B, m), higher = keep.
            left: (B, m), 1 = a token that reached the stage, 0 = none; ``None`` means all are.
        """
        above = scores.detach() > self.score
        if left is None:
            return above.sum(dim=1).clamp(min=self.least, max=scores.shape[1])
        reached = (left > 0).sum(dim=1)
        return (above & (left > 0)).sum(dim=1).clamp(min=self.least).minimum(reached)


class Counts(NamedTuple):
    """How many a stage keeps of each image, whatever the scores: the plan's fraction of its own.

    Attributes:
        numbers: (B,) int64; patch tokens, or merge groups where the model packs images into one sequence.
    """

    numbers: Tensor

    @classmethod
    def of(cls, images: Images, plan: Plan, stage: int) -> Counts:
        """The numbers at a stage."""
        if isinstance(images, PackedImages):
            numbers = [plan.num_keep(number)[stage] for number in images.num_groups]
            return cls(torch.tensor(numbers, device=images.groups.device))
        present = images.present
        # Of every number that there may be, so that none has to be read from the device.
        table = [plan.num_keep(number)[stage] for number in range(sizes(present)[1] + 1)]
        return cls(torch.tensor(table, device=present.device)[present.sum(dim=1).long()])

    def num_keep(self, scores: Tensor, left: Tensor | None) -> Tensor:
        """The numbers."""
        return self.numbers


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """By which the stages of a plan keep different numbers of tokens, as many as planned on average.

    They hold for the ratios that they were calibrated at, since what reaches a stage depends on the stages before it.

    Attributes:
        keep_ratios: The plan's cumulative ratios, one a stage.
        scores: For each stage the score that a token to be kept exceeds; ``None`` for one that keeps all it gets.
        floor_ratio: The fraction of the planned number that is kept of every image, whatever its scores, in (0, 1].
    """

    keep_ratios: tuple[float, ...]
    scores: tuple[float | None, ...]
    floor_ratio: float

    def at(self, stage: int, num_keep: int) -> Threshold | None:
        """The threshold of a stage that keeps ``num_keep`` tokens on average; ``None`` if it has none."""
        score = self.scores[stage] if stage < len(self.scores) else None
        return None if score is None else Threshold(score, max(1, math.floor(num_keep * self.floor_ratio)))

    def to_dict(self) -> dict[str, Any]:
        """As an object of JSON, which `from_dict` reads."""
        return {"keep_ratios": [*self.keep_ratios], "scores": [*self.scores], "floor_ratio": self.floor_ratio}

    @classmethod
    def from_dict(cls, fields: Any, num_stages: int) -> Thresholds:
        """Read what `to_dict` gave.

        Raises:
            CheckpointError: It is something else, or for another number of stages.
        """
        named = isinstance(fields, dict) and set(fields) == {"keep_ratios", "scores", "floor_ratio"}
        if not named or not (
            _are_numbers(fields["keep_ratios"], num_stages) and _are_numbers([fields["floor_ratio"]], 1)
        ):
            raise CheckpointError(f"{fields!r} are no thresholds for {num_stages} stages.")
        scores = fields["scores"]
        if not isinstance(scores, list) or not _are_numbers([0 if one is None else one for one in scores], num_stages):
            raise CheckpointError(f"{scores!r} are no scores of {num_stages} stages.")
        return cls(keep_ratios=tuple(fields["keep_ratios"]), scores=tuple(scores), floor_ratio=fields["floor_ratio"])


def _are_numbers(values: Any, number: int) -> bool:
    numbers = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == number
    return numbers and all(isinstance(one, Real) and not isinstance(one, bool) for one in values)

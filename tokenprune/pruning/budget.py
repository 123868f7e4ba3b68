"""Budgets: how many tokens a stage keeps of each image, the same number of all or as many as its scores call for.

Shapes: B images, m patch tokens that reach a stage.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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

"""Scores at any keep ratio: shifted until as many tokens are as likely to be kept as are to be kept.

Shapes: B images, n patch tokens a stage looks at, N patch tokens of the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.pruning.stage import Stage
from tokenprune.scorers import Candidates, Scorer

_STEPS = 24
"""Of bisection: an interval of 64 shrinks to 4e-6."""
_MARGIN = 32.0
"""Beyond the extreme scores: there even the likeliest token is kept with a probability of 1e-14."""


class Levelled(Scorer):
    """A scorer whose log-odds are shifted, image by image, to those of another keep ratio.

    Its ranking stays what it was, and so does its gradient, but for the part that would move all scores of an image
    alike: so one scorer is trained for any number of ratios, and a loss that would rather keep more tokens has no hold.

    Args:
        scorer: What ranks the tokens; ``probabilistic``.
        ratio: The fraction of the image's patch tokens that is to be kept.

    Attributes:
        share: The share of the tokens that reached the stage which the unshifted log-odds keep, (B,), with a
            gradient; ``None`` where the stage was not asked.
    """

    probabilistic = True

    def __init__(self, scorer: Scorer, ratio: float) -> None:
        super().__init__()
        self.scorer, self.ratio = scorer, ratio
        self.needs_attention = scorer.needs_attention
        self.share: Tensor | None = None

    def forward(self, candidates: Candidates) -> Tensor:
        scores: Tensor = self.scorer(candidates).float()
        left = torch.ones_like(scores) if candidates.keep is None else candidates.keep.detach().to(scores.dtype)
        self.share = (scores.sigmoid() * left).sum(dim=1) / left.sum(dim=1)
        lengths = left.new_tensor(candidates.num_patches) if candidates.lengths is None else candidates.lengths
        return scores + level(scores, left, self.ratio * lengths.reshape(-1, 1))

    def importance(self, scores: Tensor) -> Tensor:
        return self.scorer.importance(scores)


def level(scores: Tensor, left: Tensor, number: float | Tensor) -> Tensor:
    """What to add to an image's log-odds so that so many tokens are expected to be kept: (B, 1).

    Its gradient is that of the solution: raising one score lowers all.

    Args:
        scores: (B, n), log-odds of keeping.
        left: (B, n), 1 = may be kept, 0 = pruned already.
        number: How many are to be kept, of each image (B, 1) or of all; at most all but a thousandth of those left are.
    """
    with torch.no_grad():
        wanted = (left.sum(dim=1, keepdim=True) * (1 - 1e-3)).clamp(max=number)  # (B, 1)
        low = -scores.amax(dim=1, keepdim=True) - _MARGIN
        high = -scores.amin(dim=1, keepdim=True) + _MARGIN
        for _ in range(_STEPS):
            middle = (low + high) / 2
            too_many = ((scores + middle).sigmoid() * left).sum(dim=1, keepdim=True) > wanted
            low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
        found = (low + high) / 2
        probability = (scores + found).sigmoid()
        slope = probability * (1 - probability) * left
        weights = slope / slope.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return found - (weights * (scores - scores.detach())).sum(dim=1, keepdim=True)


@contextmanager
def levelled(sparsifier: Sparsifier) -> Iterator[dict[int, Levelled]]:
    """While it lasts, probabilistic scorers are levelled to the model's keep ratios: those of the stages, by number."""
    stages = [cast(Stage, stage) for stage in sparsifier.stages]
    scorers = [stage.scorer for stage in stages]
    made: dict[int, Levelled] = {}
    try:
        for index, (stage, ratio) in enumerate(zip(stages, sparsifier.plan.keep_ratios, strict=True)):
            if stage.scorer.probabilistic:
                stage.scorer = made[index] = Levelled(stage.scorer, ratio)
        yield made
    finally:
        for stage, scorer in zip(stages, scorers, strict=True):
            stage.scorer = scorer

"""The static baseline: learned positions, the same for every image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, log_odds, register_scorer


class Static(Scorer):
    """One learned log-odds of keeping for each position of the patch grid.

    The "static" row of DynamicViT's ablation (arXiv 2106.02034). On a grid of another size the map
    is interpolated, as position embeddings are.

    Args:
        grid_size: Rows and columns of the patch grid.
        keep_probability: Fraction of tokens that a fresh scorer keeps, in (0, 1].
    """

    probabilistic = True

    def __init__(self, grid_size: tuple[int, int], keep_probability: float = 0.5) -> None:
        super().__init__()
        self.log_odds = nn.Parameter(torch.full(grid_size, log_odds(keep_probability)))
        nn.init.normal_(self.log_odds, mean=log_odds(keep_probability), std=0.02)

    def forward(self, candidates: Candidates) -> Tensor:
        scores = self._scores(candidates.num_patches, candidates.grid)  # (N,)
        return candidates.at_candidates(scores.expand(candidates.patches.shape[0], -1))

    def _scores(self, num_patches: int, grid: tuple[int, int] | None) -> Tensor:
        if grid in (None, tuple(self.log_odds.shape)) and num_patches == self.log_odds.numel():
            return self.log_odds.flatten()
        if grid is None:
            raise ValueError(
                f"the static scorer knows {self.log_odds.numel()} positions and got {num_patches} patch tokens whose "
                "grid is unknown; call the model itself on an image, without dropping patches."
            )
        resized = F.interpolate(self.log_odds[None, None], size=grid, mode="bilinear", antialias=True)
        return resized.flatten()


@register_scorer("static")
def build(context: ScorerContext) -> Static:
    """A `Static` scorer for the model's nominal grid.

    Raises:
        ValueError: The backbone does not say what its grid is.
    """
    if context.grid_size is None:
        raise ValueError('scorer="static" needs the patch grid; give the Backbone a grid_size.')
    return Static(context.grid_size, context.keep_probability)

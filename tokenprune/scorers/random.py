"""The random baseline: other tokens for every image, chosen blindly."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, register_scorer


class Random(Scorer):
    """Uniform random scores, drawn anew in every forward pass.

    The "random" row of DynamicViT's ablation (arXiv 2106.02034). Scores are drawn for the whole
    image and looked up by position, so all executions decide alike under the same seed.
    """

    def forward(self, candidates: Candidates) -> Tensor:
        patches = candidates.patches
        scores = torch.rand(patches.shape[0], candidates.num_patches, device=patches.device)
        return candidates.at_candidates(scores)


@register_scorer("random")
def build(context: ScorerContext) -> Random:
    """A `Random` scorer, the same for every stage."""
    return Random()

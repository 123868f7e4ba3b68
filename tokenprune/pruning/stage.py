"""A stage: one point in the model at which tokens are scored and pruned.

Shapes: B images, n patch tokens that reach the stage, P prefix tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenprune.errors import StateError
from tokenprune.pruning.sampling import sample, top_k
from tokenprune.scorers import Candidates, Scorer


class Stage(nn.Module):
    """Scores the patch tokens in front of one block and decides which go on.

    Attributes:
        scorer: What gives the scores; replace or train it freely.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def mask(self, candidates: Candidates, num_keep: int) -> Tensor:
        """Decide without removing: (B, n) of 1 = kept and 0 = pruned.

        In training, decisions of a probabilistic scorer are sampled and carry a gradient; else the
        ``num_keep`` best are kept.
        """
        scores = self._scores(candidates)
        if self.training and self.scorer.probabilistic:
            return sample(scores, candidates.keep)
        chosen = top_k(scores.detach(), candidates.keep, num_keep)
        return torch.zeros_like(scores).scatter(1, chosen, 1.0)

    def gather(self, candidates: Candidates, num_keep: int) -> Tensor:
        """Decide for removal: (B, num_keep) int64, ascending positions among the n candidates."""
        return top_k(self._scores(candidates).detach(), candidates.keep, num_keep)

    def _scores(self, candidates: Candidates) -> Tensor:
        if self.scorer.needs_attention and candidates.attention is None:
            raise StateError(
                f"{type(self.scorer).__name__} goes by the attention of the block before its stage, which is not "
                "looked at since the scorer was put there later; pass it as tokenprune.sparsify(…, scorer=…)."
            )
        scores: Tensor = self.scorer(candidates)
        expected = candidates.patches.shape[:2]
        if scores.shape != expected:
            raise ValueError(
                f"{type(self.scorer).__name__} returned scores of shape {tuple(scores.shape)}; "
                f"expected {tuple(expected)}, one for each patch token."
            )
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

"""A learned predictor of a single linear layer, for models in which every operation shows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, log_odds, register_scorer
from tokenprune.scorers.rows import Ranking, Rows


class PredictorLinear(Scorer):
    """A linear probe: the score of a token x is v · LayerNorm(x) + b, its log-odds of being kept.

    It sees each token alone, and what attention has written into it. A token costs C multiply-adds, and a stage of a
    frozen model two operations to rank its tokens: the norm and a product.

    Args:
        embed_dim: Width C of the tokens.
        keep_probability: Fraction of tokens that a fresh predictor keeps, in (0, 1].
    """

    probabilistic = True

    def __init__(self, embed_dim: int, keep_probability: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)
        self.linear = nn.Linear(embed_dim, 1)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, log_odds(keep_probability))

    def forward(self, candidates: Candidates) -> Tensor:
        scores: Tensor = self.linear(self.norm(candidates.patches))  # (B, n, 1)
        return scores.squeeze(-1)

    def ranking(self) -> Ranking:
        return _Folded(self)


class _Folded:
    """What a `PredictorLinear` computes, without its bias, which is the same for all."""

    def __init__(self, predictor: PredictorLinear) -> None:
        self._shape, self._eps = predictor.norm.normalized_shape, predictor.norm.eps
        self._weight = predictor.linear.weight[0].clone()

    def __call__(self, rows: Rows) -> Tensor:
        return rows.rank(F.layer_norm(rows.tokens, self._shape, eps=self._eps), self._weight)


@register_scorer("predictor_linear")
def build(context: ScorerContext) -> PredictorLinear:
    """A `PredictorLinear` of the stage's width and keep probability."""
    return PredictorLinear(context.embed_dim, context.keep_probability)

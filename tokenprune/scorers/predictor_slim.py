"""A learned predictor at a fraction of the cost of DynamicViT's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, log_odds, register_scorer
from tokenprune.scorers.folding import LocalAndShared, NormedLayer
from tokenprune.scorers.rows import Ranking, Rows

NARROWING = 8
"""How many times narrower the inside is than the tokens."""


class PredictorSlim(Scorer):
    """A bottleneck that sees each token and the mean of the tokens that are left.

    Of z = ReLU(Linear(LayerNorm(x))), W = C/8 wide, and its mean m over the tokens that are left, the score is
    v · ReLU(A z + B m + c): the log-odds of keeping the token, log p − log(1 − p). It is built for speed: a token
    costs C·W + W² multiply-adds, a twelfth of those of `Predictor`, and a stage fewer operations.

    Args:
        embed_dim: Width C of the tokens.
        keep_probability: Fraction of tokens that a fresh predictor keeps, in (0, 1].
    """

    probabilistic = True

    def __init__(self, embed_dim: int, keep_probability: float = 0.5) -> None:
        super().__init__()
        width = max(8, embed_dim // NARROWING)
        self.norm = nn.LayerNorm(embed_dim)
        self.inner = nn.Linear(embed_dim, width)
        self.local = nn.Linear(width, width, bias=False)
        self.mean = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.mean.bias)
        nn.init.trunc_normal_(self.last.weight, std=0.02)
        nn.init.constant_(self.last.bias, log_odds(keep_probability))

    def forward(self, candidates: Candidates) -> Tensor:
        hidden = F.relu(self.inner(self.norm(candidates.patches)))  # (B, n, W)
        shared = self.mean(candidates.mean(hidden))  # (B, 1, W)
        scores: Tensor = self.last(F.relu(self.local(hidden) + shared))  # (B, n, 1)
        return scores.squeeze(-1)

    def ranking(self) -> Ranking:
        return _Folded(self)


class _Folded:
    """What a `PredictorSlim` computes, with constants folded, and its last bias left out, which is the same for all."""

    def __init__(self, predictor: PredictorSlim) -> None:
        mean = predictor.mean
        self._inner = NormedLayer(predictor.norm, predictor.inner, "relu")
        self._middle = LocalAndShared(predictor.local.weight, mean.weight, mean.bias, "relu")
        self._last = predictor.last.weight[0].clone()

    def __call__(self, rows: Rows) -> Tensor:
        hidden = self._inner(rows.tokens)  # (R, W)
        return rows.rank(self._middle(hidden, rows, hidden), self._last)


@register_scorer("predictor_slim")
def build(context: ScorerContext) -> PredictorSlim:
    """A `PredictorSlim` of the stage's width and keep probability."""
    return PredictorSlim(context.embed_dim, context.keep_probability)

"""DynamicViT's learned local-global predictor."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, log_odds, register_scorer
from tokenprune.scorers.folding import Layer, LocalAndShared, NormedLayer
from tokenprune.scorers.rows import Ranking, Rows


class Predictor(Scorer):
    """A small MLP that sees each token and the mean of the tokens that are left.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034),
    Eq. 1 to 5. Of z = GELU(Linear(LayerNorm(x))) the first half of the channels stays local and the
    second half is averaged over the kept tokens; an MLP turns both into two logits, keep first.

    Deviation: the score is the difference of the two logits, that is log p(keep) − log p(drop).
    It ranks and samples exactly as the paper's log-softmax does.

    Deviation: a fresh predictor keeps a token with the stage's own probability, not with ½, which
    saves many steps of learning the ratio; as in the authors' code, weights start at 0.02·normal.

    Args:
        embed_dim: Width C of the tokens; a multiple of 4.
        keep_probability: Fraction of tokens that a fresh predictor keeps, in (0, 1].

    Raises:
        ValueError: ``embed_dim`` cannot be halved twice.
    """

    probabilistic = True

    def __init__(self, embed_dim: int, keep_probability: float = 0.5) -> None:
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim}: the predictor halves the width twice; it takes a multiple of 4.")
        self.in_conv = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(embed_dim, embed_dim // 2),
            nn.GELU(),
            nn.Linear(embed_dim // 2, embed_dim // 4),
            nn.GELU(),
            nn.Linear(embed_dim // 4, 2),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            last = cast(nn.Linear, self.out_conv[-1])
            last.bias[0] = log_odds(keep_probability)

    def forward(self, candidates: Candidates) -> Tensor:
        hidden: Tensor = self.in_conv(candidates.patches)  # (B, n, C)
        local, other = hidden.chunk(2, dim=-1)  # (B, n, C/2) each
        mean = candidates.mean(other)  # (B, 1, C/2)
        logits: Tensor = self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))  # (B, n, 2)
        return logits[..., 0] - logits[..., 1]

    def ranking(self) -> Ranking:
        return _Folded(self)


class _Folded:
    """What a `Predictor` computes, with constants folded, and its last bias left out, which is the same for all.

    The part of the third layer that sees the mean is computed once an image, and added. Of the two logits only the
    difference is computed.
    """

    def __init__(self, predictor: Predictor) -> None:
        norm, first = cast(nn.LayerNorm, predictor.in_conv[0]), cast(nn.Linear, predictor.in_conv[1])
        second, third, last = (cast(nn.Linear, predictor.out_conv[index]) for index in (0, 2, 4))
        self._first = NormedLayer(norm, first, "gelu")
        local, mean = second.weight.chunk(2, dim=1)
        self._second = LocalAndShared(local, mean, second.bias, "gelu")
        self._third = Layer.of(third, "gelu")
        self._last = last.weight[0] - last.weight[1]

    def __call__(self, rows: Rows) -> Tensor:
        local, other = self._first(rows.tokens).chunk(2, dim=-1)  # (R, C/2) each
        return rows.rank(self._third(self._second(local, rows, other)), self._last)


@register_scorer("predictor")
def build(context: ScorerContext) -> Predictor:
    """A `Predictor` of the stage's width and keep probability."""
    return Predictor(context.embed_dim, context.keep_probability)

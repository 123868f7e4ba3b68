"""Redundancy: a token matters as much as it differs from the others; nothing is learned."""

from __future__ import annotations

from torch import Tensor

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, register_scorer
from tokenprune.scorers.similarity import directions, isolation


class Redundancy(Scorer):
    """1 − the mean cosine similarity of a token to those that are left: what many others say as well goes first.

    The energy of Accelerating Transformers with Spectrum-Preserving Token Merging (PiToMe, arXiv 2405.16148, Eq. 4),
    by which tokens with many near neighbours are merged and isolated ones are protected. It looks at the tokens that
    reach the stage alone, so that it works in every model and in front of every block, and costs next to nothing:
    the mean similarity is the product with the mean direction, and no matrix of pairs is made.

    Deviation: PiToMe takes keys instead of tokens, and bends similarities by ELU(cos − margin). On the digits
    (docs/training-free.md) neither made a difference.
    """

    def forward(self, candidates: Candidates) -> Tensor:
        return isolation(candidates, directions(candidates))


@register_scorer("redundancy")
def build(context: ScorerContext) -> Redundancy:
    """A `Redundancy` scorer, the same for every stage."""
    return Redundancy()

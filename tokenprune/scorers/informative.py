"""Importance × non-redundancy: tokens that are attended to and say what no other one says; nothing is learned."""

from __future__ import annotations

from torch import Tensor

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, register_scorer
from tokenprune.scorers.similarity import directions, isolation, novelty


class Informative(Scorer):
    """Attention × novelty × isolation: a_i · (1 − max_{j: a_j > a_i} c_ij) · (1 − mean_j c_ij).

    a_i is the attention that a token receives, as in `ClassAttention`: in the block before the stage, from the class
    token or, in models without one, from all tokens that are left; c_ij is the cosine similarity of two tokens that
    reach the stage. By attention alone, many patches of one object or texture are kept that say the same. Here a token
    is held back by more important ones that are similar to it, never by less important ones, so that of several equal
    tokens one survives; and what most of the image says as well counts less.

    The first two factors are those of Clustering by fast search and find of density peaks (Rodriguez and Laio, Science
    344, 2014), with attention in the place of density; the third is a factor of `Redundancy`.
    """

    needs_attention = True

    def forward(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None
        units = directions(candidates)
        novel = novelty(candidates, units, candidates.attention)
        return candidates.attention * novel * isolation(candidates, units)


@register_scorer("informative")
def build(context: ScorerContext) -> Informative:
    """An `Informative` scorer, the same for every stage."""
    return Informative()

"""Redundancy: a token matters as much as it differs from the others; nothing is learned."""

from __future__ import annotations

from torch import Tensor

from tokenprune.scorers.base import Candidates, Scorer, ScorerContext, register_scorer
from tokenprune.scorers.similarity import directions, isolation, novelty


class Redundancy(Scorer):
    """Isolation × novelty: e_i · (1 − max_{j: e_j > e_i} c_ij), with e_i = 1 − mean_j c_ij.

    c_ij is the cosine similarity of two tokens that reach the stage. The isolation e is the energy of Accelerating
    Transformers with Spectrum-Preserving Token Merging (PiToMe, arXiv 2405.16148, Eq. 4), by which tokens with many
    near neighbours are merged and isolated ones are protected. By isolation alone, all of a large group of similar
    tokens would go; here the most isolated one of them stands for them, since a token is held back by those alone that
    are more isolated. It looks at the tokens that reach the stage and at nothing else, so that it works in every model
    and in front of every block.

    Deviation: PiToMe takes keys instead of tokens, and bends similarities by ELU(cos − margin). On the digits
    (docs/training-free.md) neither made a difference.
    """

    def forward(self, candidates: Candidates) -> Tensor:
        units = directions(candidates)
        isolated = isolation(candidates, units)
        return isolated * novelty(candidates, units, isolated)


@register_scorer("redundancy")
def build(context: ScorerContext) -> Redundancy:
    """A `Redundancy` scorer, the same for every stage."""
    return Redundancy()

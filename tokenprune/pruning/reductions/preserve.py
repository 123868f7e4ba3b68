"""Pruned tokens come back behind every block, as they were when they were pruned."""

from __future__ import annotations

from tokenprune.pruning.reductions.base import ReductionContext, register_reduction
from tokenprune.pruning.reductions.drop import Drop


class Preserve(Drop):
    """Blocks run without pruned tokens; whatever stands between and behind them gets all.

    For feature maps, hidden states and dense heads. A pruned token keeps the state that it had then: later stages
    neither score it nor bring it back into the blocks.
    """

    restores = True


@register_reduction("preserve")
def build(context: ReductionContext) -> Preserve:
    """A `Preserve`; it needs to know nothing."""
    return Preserve()

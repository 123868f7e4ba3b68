"""The two paths through a part of a block, where every token stays in the sequence.

Shapes: B images, L tokens, K of them that are kept, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokenprune.pruning.executions.base import Execution
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, sizes


class Paths(NamedTuple):
    """Splits the tokens of a block into two paths, and joins them again, by what a stage has decided.

    Attributes:
        execution: How that is carried out.
        selection: What is in force.
        full: The layout of the block's sequence, of all tokens.
    """

    execution: Execution
    selection: Selection
    full: Layout

    def kept(self, tokens: Tensor) -> Tensor:
        """Of all tokens (B, L, C) those on the path of kept ones."""
        return self.execution.resume(tokens, self.selection, self.full)

    def others(self, tokens: Tensor) -> Tensor:
        """Of all tokens (B, L, C) those on the other path."""
        return self.execution.others(tokens, self.selection, self.full)

    def join(self, kept: Tensor, others: Tensor) -> Tensor:
        """All tokens (B, L, C), of what both paths have made of theirs."""
        return self.execution.join(kept, others, self.selection, self.full)

    def fill(self, kept: Tensor) -> Tensor:
        """All tokens (B, L, C), of those on the path of kept ones; the others are 0."""
        zeros = kept.new_zeros(kept.shape[0], self.full.length, sizes(kept)[2])
        return self.execution.restore(kept, self.selection, zeros, self.full)

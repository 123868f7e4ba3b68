"""The default: what is pruned is gone for good."""

from __future__ import annotations

from tokenprune.pruning.reductions.base import Reduced, Reduction, ReductionContext, Split, register_reduction


class Drop(Reduction):
    """Kept tokens go on as they are, the others not at all.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034).
    """

    looks_at_pruned = False

    def forward(self, split: Split) -> Reduced:
        return Reduced(split.patches)


@register_reduction("drop")
def build(context: ReductionContext) -> Drop:
    """A `Drop`; it needs to know nothing."""
    return Drop()

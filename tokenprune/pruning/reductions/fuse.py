"""What a stage prunes is fused into one further token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.functional import compute_dtype
from tokenprune.pruning.reductions.base import Reduced, Reduction, ReductionContext, Split, register_reduction

_LARGEST = 1e30


class Fuse(Reduction):
    """One summary token an image and stage: the mean of what the stage pruned, weighted with its importance.

    Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations (EViT, arXiv
    2202.07800). Later stages neither score nor prune it; a pool over patch tokens counts it as one more.

    Deviation: weights are normalised, so that the token has the scale of the others, and come from whichever scorer
    the stage has: class attention, as in EViT, for ``scorer="cls_attention"``, the probability of keeping for learned
    ones. Where all weights of an image are 0, they count alike.
    """

    num_summary = 1

    def forward(self, split: Split) -> Reduced:
        return Reduced(split.patches, summary=weighted_mean(split.patches, split.pruned, split.importance))


class FusePreserve(Fuse):
    """`Fuse`, with pruned tokens restored behind every block as they were when they were pruned.

    The summary tokens go from block to block beside the sequence, which has all patch tokens.
    """

    restores = True


def weighted_mean(patches: Tensor, pruned: Tensor, importance: Tensor) -> Tensor:
    """The mean (B, 1, C) over the pruned of patches (B, m, C), weighted with importance (B, m); 0 if none is."""
    with torch.autocast(patches.device.type, enabled=False):
        dtype = compute_dtype(patches)
        pruned = pruned.to(dtype)
        # Beside an infinite one, such as that of a token to be kept in any case, none of the others would count.
        weights = importance.to(dtype).clamp(max=_LARGEST) * pruned
        weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, pruned)
        total = weights.sum(dim=1, keepdim=True)
        # Not a smallest number: the gradient of a summary of nothing would be as large as that is small.
        total = torch.where(total > 0, total, torch.ones_like(total))
        return ((weights / total).unsqueeze(1) @ patches.to(dtype)).to(patches.dtype)


@register_reduction("fuse")
def build(context: ReductionContext) -> Fuse:
    """A `Fuse`; it needs to know nothing."""
    return Fuse()


@register_reduction("fuse_preserve")
def build_preserving(context: ReductionContext) -> FusePreserve:
    """A `FusePreserve`; it needs to know nothing."""
    return FusePreserve()

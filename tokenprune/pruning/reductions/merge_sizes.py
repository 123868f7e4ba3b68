"""What a stage prunes is merged into tokens that it keeps, each counting as often as the patches it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.functional import compute_dtype
from tokenprune.pruning.reductions.base import Reduced, Reduction, ReductionContext, Split, register_reduction
from tokenprune.pruning.reductions.merge import most_similar_kept


class MergeSizes(Reduction):
    """Each pruned token i is merged into its host j by the mean weighted with sizes, the patches a token stands for.

    Token Merging: Your ViT But Faster (ToMe, arXiv 2210.09461): y_j = (s_j·x_j + Σ_{i→j} s_i·x_i) / (s_j + Σ s_i), and
    attention is in proportion to sizes, softmax(q·kᵀ/√d + log s). The host is the one that the scorer has chosen, as
    ``scorer="tome"`` does, or else the most similar kept token, as for ``"merge"``. In training a gradient reaches the
    decision on each token through its share in its host; sizes have none.
    """

    def forward(self, split: Split) -> Reduced:
        with torch.autocast(split.patches.device.type, enabled=False):
            patches = split.patches.to(compute_dtype(split.patches))
            hosts = most_similar_kept(patches, split.keep)[0] if split.hosts is None else split.hosts
            sizes = torch.ones_like(patches[..., 0]) if split.sizes is None else split.sizes.to(patches.dtype)
            leaving = sizes * split.pruned.to(patches.dtype)  # (B, m)
            joined = sizes.new_zeros(sizes.shape).scatter_add(1, hosts, leaving)
            brought = _add_up(patches * leaving.unsqueeze(2), hosts)
            # As a step from where the host is, which is none where nobody joins it.
            step = (brought - patches * joined.unsqueeze(2)) / (sizes + joined).unsqueeze(2)
            merged = (patches + step).to(split.patches.dtype)
        places = torch.arange(hosts.shape[1], device=hosts.device)
        found = torch.where(split.pruned.detach() > 0, hosts, places)
        return Reduced(merged, hosts=found, sizes=(sizes + joined).detach())


class MergeSizesPreserve(MergeSizes):
    """`MergeSizes`, with pruned tokens restored behind every block in the state that their host has by then."""

    restores = True


def _add_up(values: Tensor, hosts: Tensor) -> Tensor:
    """For each host the sum of the values (B, m, C) that go to it."""
    return torch.zeros_like(values).scatter_add(1, hosts.unsqueeze(2).expand_as(values), values)


@register_reduction("merge_sizes")
def build(context: ReductionContext) -> MergeSizes:
    """A `MergeSizes`; it needs to know nothing."""
    return MergeSizes()


@register_reduction("merge_sizes_preserve")
def build_preserving(context: ReductionContext) -> MergeSizesPreserve:
    """A `MergeSizesPreserve`; it needs to know nothing."""
    return MergeSizesPreserve()

"""What a stage prunes is folded into the most similar tokens that it keeps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.functional import compute_dtype
from tokenprune.pruning.reductions.base import Reduced, Reduction, ReductionContext, Split, register_reduction
from tokenprune.tokens import select


class Merge(Reduction):
    """Each pruned token i is folded into its host, the kept token j with the highest cosine similarity c_ij.

    A host that the scorer has chosen is taken as it is.

    Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision Transformers (TPS, arXiv
    2304.10716): y_j = (e·x_j + Σ_{i→j} exp(c_ij)·x_i) / (e + Σ_{i→j} exp(c_ij)). Similarities are those of the tokens
    that reach the stage. In training a gradient reaches the decision on each token through its share in its host.
    """

    def forward(self, split: Split) -> Reduced:
        with torch.autocast(split.patches.device.type, enabled=False):
            patches = split.patches.to(compute_dtype(split.patches))
            hosts, similarity = (
                most_similar_kept(patches, split.keep) if split.hosts is None else _chosen(patches, split.hosts)
            )
            shares = similarity.exp() * split.pruned.to(patches.dtype)  # (B, m)
            places = torch.arange(hosts.shape[1], device=hosts.device)
            # A product with the matrix that has a row for each host: deterministic, and counted like any other.
            folded = (hosts.unsqueeze(1) == places.unsqueeze(1)) * shares.unsqueeze(1)  # (B, hosts, guests)
            total = math.e + folded.sum(dim=2, keepdim=True)
            merged = ((math.e * patches + folded @ patches) / total).to(split.patches.dtype)
        return Reduced(merged, hosts=torch.where(split.pruned.detach() > 0, hosts, places))


class MergePreserve(Merge):
    """`Merge`, with pruned tokens restored behind every block in the state that their host has by then.

    So a feature map shows, at the place of a pruned token, what became of the token that it was folded into.
    """

    restores = True


def most_similar_kept(patches: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """For each patch token the position of the kept one that is most similar to it, itself left out: (B, m) int64.

    Args:
        patches: (B, m, C).
        keep: (B, m), 1 = kept.

    Returns:
        The positions, and the cosine similarities (B, m); −∞ where there is no other kept token.
    """
    directions = F.normalize(patches, dim=-1)
    similarity = directions @ directions.transpose(1, 2)  # (B, m, m)
    itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
    closed = (keep.detach() == 0).unsqueeze(1).logical_or(itself)
    best = similarity.masked_fill(closed, -math.inf).max(dim=2)
    return best.indices, best.values


def _chosen(patches: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
    """Hosts (B, m) that the scorer has chosen, and the cosine similarities (B, m) of the patch tokens to theirs."""
    return hosts, F.cosine_similarity(patches, select(patches, hosts), dim=-1)


@register_reduction("merge")
def build(context: ReductionContext) -> Merge:
    """A `Merge`; it needs to know nothing."""
    return Merge()


@register_reduction("merge_preserve")
def build_preserving(context: ReductionContext) -> MergePreserve:
    """A `MergePreserve`; it needs to know nothing."""
    return MergePreserve()

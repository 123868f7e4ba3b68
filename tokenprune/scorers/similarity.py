"""How much a patch token says that others do not say as well.

Shapes: B images, n patch tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.functional import compute_dtype
from tokenprune.scorers.base import Candidates


def directions(candidates: Candidates) -> Tensor:
    """The candidates (B, n, C) at length 1, in single precision at least, without a gradient."""
    patches = candidates.patches.detach()
    return F.normalize(patches.to(compute_dtype(patches)), dim=-1)


def isolation(candidates: Candidates, units: Tensor) -> Tensor:
    """1 − the mean cosine similarity of each candidate to those that are left, itself included: (B, n) in [0, 2].

    Args:
        candidates: The patch tokens.
        units: (B, n, C), their `directions`.
    """
    # The mean of products with all is the product with their mean, so that no matrix of all pairs is needed.
    return 1 - (units * candidates.mean(units)).sum(dim=-1)


def novelty(candidates: Candidates, units: Tensor, importance: Tensor) -> Tensor:
    """1 − the highest cosine similarity of each candidate to one that matters more: (B, n) in [0, 1].

    The most important one has 1. Of several that are alike, the most important one is not held back by the others;
    where they matter alike, the first one is not.

    Args:
        candidates: The patch tokens.
        units: (B, n, C), their `directions`.
        importance: (B, n), higher = matters more.
    """
    with torch.autocast(units.device.type, enabled=False):
        similarity = units @ units.transpose(1, 2)  # (B, n, n)
    mine, others = importance.unsqueeze(2), importance.unsqueeze(1)
    places = torch.arange(importance.shape[1], device=importance.device)
    first = (others == mine).logical_and(places < places.unsqueeze(1))
    matters_more = (others > mine).logical_or(first)  # (B, n, n), [b, i, j]: j more than i
    if candidates.keep is not None:
        matters_more = matters_more.logical_and(candidates.keep.unsqueeze(1) > 0)
    highest = similarity.masked_fill(matters_more.logical_not(), 0).amax(dim=2)
    return (1 - highest).clamp(min=0)  # rounding may take a similarity above 1

"""Decisions: from scores to which tokens are kept.

Shapes: B images, n tokens, k kept ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample(log_odds: Tensor, keep: Tensor | None, uniform: Tensor | None = None) -> Tensor:
    """Sample keep decisions, with a straight-through gradient, never reviving a token.

    Gumbel-softmax over keep and drop at temperature 1 (DynamicViT, arXiv 2106.02034, Eq. 6 and 7).
    With two classes it depends on the difference of the two Gumbel noises alone, a logistic one:
    soft = σ(log-odds + noise). At least one token an image stays kept: the likeliest one left.

    Args:
        log_odds: (B, n), log p(keep) − log p(drop).
        keep: (B, n), earlier decisions, 1 = still there; ``None`` means all are.
        uniform: (B, n), random numbers in [0, 1); drawn here if not given.

    Returns:
        (B, n), exactly 0 or 1 in the dtype of ``log_odds``; its gradient is that of ``soft``.
    """
    uniform = torch.rand_like(log_odds) if uniform is None else uniform
    uniform = uniform.clamp(min=torch.finfo(log_odds.dtype).tiny, max=1 - 2**-24)
    soft = torch.sigmoid(log_odds + uniform.log() - (-uniform).log1p())  # (B, n)
    left = torch.ones_like(soft) if keep is None else keep
    reachable = soft.detach().masked_fill(left == 0, -math.inf)
    hard = torch.zeros_like(soft).scatter(1, reachable.argmax(dim=1, keepdim=True), 1.0)
    hard = torch.maximum(hard, (reachable > 0.5).to(soft.dtype))
    # soft − soft is exactly 0, so the decisions stay exactly 0 or 1 while their gradient is soft's.
    return (hard + (soft - soft.detach())) * left


def counted(scores: Tensor, keep: Tensor | None, counts: Tensor) -> Tensor:
    """The best tokens of each image that are still there, as many as it is to keep.

    Args:
        scores: (B, n); higher = keep.
        keep: (B, n), 1 = still there; ``None`` means all are.
        counts: (B,) int64, how many of each image to keep; at least so many must be there.

    Returns:
        (B, n), 0 or 1 in the dtype of ``scores``.
    """
    order = there_first(scores, keep).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    return (rank < counts.unsqueeze(1)).to(scores.dtype)


def top_k(scores: Tensor, keep: Tensor | None, k: int) -> Tensor:
    """The positions of the ``k`` best tokens that are still there, in ascending order.

    Args:
        scores: (B, n); higher = keep.
        keep: (B, n), 1 = still there; ``None`` means all are. At least ``k`` an image must be.
        k: How many to keep.

    Returns:
        (B, k) int64.
    """
    return there_first(scores, keep).topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def there_first(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Scores (B, n) by which a token that is still there comes before those that are not, though its own be −∞."""
    if keep is None:
        return scores
    return scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(keep == 0, -math.inf)

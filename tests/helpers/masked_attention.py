"""Masked attention as the paper writes it, and tensors to try it on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def formula(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, *, attn_mask: Tensor | None = None, own_key: bool = True
) -> Tensor:
    """Eq. 11 as it stands; the row maximum is that of the keys that count, so nothing underflows."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    visible = keep[:, None, None, :].expand(-1, 1, scores.shape[-2], -1)
    if own_key:
        eye = torch.eye(scores.shape[-1], dtype=scores.dtype)
        visible = eye + (1 - eye) * visible
    top = scores.detach().masked_fill(visible == 0, -math.inf).amax(dim=-1, keepdim=True)
    # Kept keys have no positive exponent; this bounds dropped ones, whose factor is 0 where inf would be NaN.
    weights = torch.exp((scores - top).clamp(max=60)) * visible
    return weights / weights.sum(dim=-1, keepdim=True) @ value


def tensors(queries: int = 7, keys: int = 7, dim: int = 8, value_dim: int = 8, dtype: torch.dtype = torch.float64):
    """Query, key and value as views into one projection, as models hand them over, and keep."""
    packed = torch.randn(2, keys, 3, 3, dim, dtype=dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    if queries != keys:
        query = torch.randn(2, 3, queries, dim, dtype=dtype)
    if value_dim != dim:
        value = torch.randn(2, 3, keys, value_dim, dtype=dtype)
    keep = (torch.rand(2, keys) < 0.5).to(dtype)
    keep[:, 0] = 1
    return [tensor.clone().requires_grad_() for tensor in (query, key, value, keep)]

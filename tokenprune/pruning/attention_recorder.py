"""Watching attention: how much of it each patch token receives, for scorers that go by it.

Shapes: B images, H heads, L queries, K keys, D channels of a query or key, n patch tokens in the
sequence, N patch tokens of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import (
    SOFTMAXES,
    AttentionCall,
    GatherInterception,
    Interception,
    for_each_query_head,
)
from tokenprune.errors import InterceptionError
from tokenprune.functional import additive, compute_dtype, mask_block, masked_weights, score_blocks
from tokenprune.tokens import Layout, sizes


class Watching(Interception):
    """While a block's attention runs: what each patch token receives of it is noted, and nothing changed.

    That is the mean over heads of the class token's weights, or, where there is no class token, of the
    weights of all queries that are kept; taken in single precision at least, without a gradient.

    Args:
        backbone: Says which tokens stand where.
        cutting: What cuts a bias down to the keys that are there, for this one to do alike.

    Attributes:
        num_patches: n; ``None`` while it is switched off.
        noted: (B, n), one for each time that attention was seen.
    """

    def __init__(self, backbone: Backbone, cutting: GatherInterception) -> None:
        super().__init__()
        num_prefix, num_late = backbone.num_prefix_tokens, backbone.num_late_prefix_tokens
        self._num_prefix = (num_prefix, num_prefix + num_late)
        self._num_suffix = backbone.num_suffix_tokens + backbone.num_inner_tokens
        self._class_token = backbone.class_token
        self._cutting = cutting
        self.num_patches: int | None = None
        self._keep: Tensor | None = None
        self.noted: list[Tensor] = []

    def start(self, num_patches: int, keep: Tensor | None) -> None:
        """Switch it on for sequences with n patch tokens, of which those with a 0 in ``keep`` (B, N) are masked."""
        self.num_patches, self._keep, self.noted = num_patches, keep, []
        self.enter()

    def stop(self) -> None:
        """Switch it off."""
        self.leave()
        self.num_patches, self._keep = None, None

    def attention(self, call: AttentionCall) -> Tensor:
        cut, query = self._cutting.cut(call), call.query
        layout = self._layout(sizes(cut.key)[-2])
        if layout is None or cut.is_causal or query.dim() != 4 or sizes(query)[-2] != layout.length:
            raise InterceptionError(
                f"attention of shape {(*sizes(query)[:-1], sizes(cut.key)[-2])} (…, queries, keys) is not one over all "
                f"tokens of an image, of which {self.num_patches} are patches; a scorer that goes by attention cannot "
                "take it. Move the stage, or take another scorer."
            )
        key = for_each_query_head(cut.key, query) if cut.enable_gqa else cut.key
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            dtype = compute_dtype(query)
            bias = None if cut.attn_mask is None else additive(cut.attn_mask, query).to(dtype)
            keep = None if self._keep is None else layout.with_others(self._keep.to(dtype))
            only = 1 if self._from_class_token(layout) else None
            received = received_attention(
                query[..., :only, :].to(dtype), key.to(dtype), keep=keep, bias=bias, scale=cut.scale
            )
            self.noted.append(layout.patches(received))
        return call.run()

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func in SOFTMAXES and isinstance(result, Tensor) and result.dim() == 4:
            _, _, num_queries, num_keys = sizes(result)
            layout = self._layout(num_keys) if num_queries == num_keys else None
            if layout is not None:  # attention that is written out; masking, if any, has been here already
                self.noted.append(layout.patches(self._of_weights(result.detach(), layout)))
        return result

    def _of_weights(self, weights: Tensor, layout: Layout) -> Tensor:
        weights = weights.to(compute_dtype(weights))
        if self._from_class_token(layout):
            return weights[:, :, 0].mean(dim=1)
        return _mean_of_kept(weights, None if self._keep is None else layout.with_others(self._keep.detach()))

    def _from_class_token(self, layout: Layout) -> bool:
        return self._class_token and layout.num_prefix > 0

    def _layout(self, length: int) -> Layout | None:
        """The layout of a sequence of so many tokens; ``None`` if it is not the model's."""
        assert self.num_patches is not None
        num_prefix = length - self.num_patches - self._num_suffix
        return Layout(num_prefix, self.num_patches, self._num_suffix) if num_prefix in self._num_prefix else None


def received_attention(
    query: Tensor, key: Tensor, *, keep: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """How much attention each key receives: the mean over heads and over the queries that are kept.

    A matrix of all queries and keys is only ever made for some images and heads at a time.

    Args:
        query: (B, H, L, D), or (B, H, 1, D) for what one token alone pays, such as the class token.
        key: (B, H, K, D).
        keep: (B, K), 1 = kept; others are neither seen nor, where L = K, counted as queries.
        bias: Added to the scores, four dimensions that broadcast to (B, H, L, K).
        scale: Factor of the products; ``None`` means 1/√D.

    Returns:
        (B, K); of what is kept it sums to 1.
    """
    scale = 1 / math.sqrt(sizes(query)[-1]) if scale is None else scale
    counted = keep
    if sizes(query)[-2] == 1:
        counted, bias = None, None if bias is None else bias[:, :, :1]

    def part(images: slice, heads: slice) -> Tensor:
        scores = query[images, heads] @ key[images, heads].transpose(-1, -2) * scale  # (b, h, L, K)
        if bias is not None:
            scores = scores + mask_block(bias, images, heads)
        seen = scores.new_ones(1) if keep is None else keep[images, None, None]
        return _mean_of_kept(masked_weights(scores, seen), None if counted is None else counted[images])

    blocks = tuple(score_blocks(query, key))
    if len(blocks) == 1:
        return part(*blocks[0])
    num_images, num_heads = sizes(query)[:2]
    received = query.new_zeros(num_images, sizes(key)[-2])
    for images, heads in blocks:
        share = len(range(*heads.indices(num_heads))) / num_heads
        received[images] += part(images, heads) * share
    return received


def _mean_of_kept(weights: Tensor, keep: Tensor | None) -> Tensor:
    """The mean (B, K) over heads and kept queries of weights (B, H, L, K)."""
    if keep is None:
        return weights.mean(dim=(1, 2))
    keep = keep.to(weights.dtype)
    return (weights * keep[:, None, :, None]).sum(dim=2).mean(dim=1) / keep.sum(dim=1, keepdim=True)

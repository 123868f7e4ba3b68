"""The attention that each patch token receives, recorded for scorers that need it.

Shapes: B images, H heads, L queries, K keys, D channels of a query or key, n patch tokens in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.interception import SOFTMAXES, AttentionCall, Interception, for_each_query_head
from tokenprune.errors import InterceptionError
from tokenprune.functional import additive, compute_dtype, mask_block, masked_weights, score_blocks
from tokenprune.pruning.executions.packed_attention import split
from tokenprune.pruning.packing import Packing
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, of_length, sizes


class AttentionRecorder(Interception):
    """While a block's attention runs: what each patch token receives of it is recorded, and nothing changed.

    That is the mean over heads of the class token's weights, or, where there is no class token, of the
    weights of all queries that are kept; taken in single precision at least, without a gradient. It is to be entered
    inside what masks attention, and outside what gathers its bias.

    Args:
        class_token: Whether the first prefix token, if there is one, is a class token.
        segments: Whether the model attends segment by segment of one sequence for all images. What a token receives is
            then that of its segment, times the number of tokens in it, so that 1 is what all receive on average.

    Attributes:
        recorded: (B, n), one for each time that attention was seen.
    """

    def __init__(self, *, class_token: bool, segments: bool = False) -> None:
        super().__init__()
        self._segments: list[Tensor] | None = [] if segments else None
        self._class_token = class_token
        self._selection: Selection | None = None
        self._layouts: tuple[Layout, ...] = ()
        self.recorded: list[Tensor] = []

    def prepare(self, selection: Selection, layouts: Sequence[Layout]) -> AttentionRecorder:
        """Itself, for what is in force, in sequences of these layouts."""
        self._selection, self._layouts, self.recorded = selection, tuple(layouts), []
        self._segments = None if self._segments is None else []
        return self

    def leave(self) -> None:
        super().leave()
        self._selection = None

    def check(self, module: nn.Module) -> None:
        if len(self.recorded) != 1:
            raise InterceptionError(
                f"the attention of {type(module).__name__} passed {len(self.recorded)} times, and not once, through "
                "scaled_dot_product_attention or a softmax over all tokens, so the attention scores of tokens are "
                "unknown; move the stage, or take a scorer that does not need attention scores."
            )

    def attention(self, call: AttentionCall) -> Tensor:
        assert self._selection is not None
        packing = self._selection.packing
        if packing is not None and self._segments is not None:
            self._of_segment(call, packing, self._segments)
            return call.run()
        if packing is not None:  # each image's tokens attend to one another alone
            received = [self._received(part, self._layouts[0], keep=None) for part in split(call, packing)]
            rows = packing.unpack(torch.cat([part.flatten() for part in received]).unsqueeze(0))  # (B, L)
            self.recorded.append(self._layouts[0].patches(rows))
            return call.run()
        query = call.query
        layout = of_length(self._layouts, sizes(call.key)[-2])
        if layout is None or call.is_causal or query.dim() != 4 or sizes(query)[-2] != layout.length:
            raise InterceptionError(
                f"attention of shape {(*sizes(query)[:-1], sizes(call.key)[-2])} (…, queries, keys) is not one over "
                f"all tokens of an image, of which {self._layouts[0].num_patches} are patches; a scorer that needs "
                "attention scores cannot take it. Move the stage, or take another scorer."
            )
        keep = self._visible(layout, compute_dtype(query))
        self.recorded.append(layout.patches(self._received(call, layout, keep=keep)))
        return call.run()

    def _of_segment(self, call: AttentionCall, packing: Packing, done: list[Tensor]) -> None:
        """Take down what the tokens of one more segment receive."""
        start, length = sum(sizes(one)[1] for one in done), sizes(call.key)[-2]
        seen = self._visible(self._layouts[0], compute_dtype(call.query))
        keep = None if seen is None else packing.pack(seen)[:, start : start + length]  # (1, t)
        number = length if keep is None else keep.sum()
        done.append(self._received(call, self._layouts[0], keep=keep) * number)
        rows = packing.unpack_segments(done)  # (B, L)
        if rows is not None:
            self.recorded.append(self._layouts[0].patches(rows))

    def _received(self, call: AttentionCall, layout: Layout, *, keep: Tensor | None) -> Tensor:
        """What each token receives in a call over those of one image, (B, L)."""
        query, key = call.query, for_each_query_head(call.key, call.query) if call.enable_gqa else call.key
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            dtype = compute_dtype(query)
            bias = None if call.attn_mask is None else additive(call.attn_mask, query).to(dtype)
            only = 1 if self._from_class_token(layout) else None
            return received_attention(
                query[..., :only, :].to(dtype), key.to(dtype), keep=keep, bias=bias, scale=call.scale
            )

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func in SOFTMAXES and isinstance(result, Tensor) and result.dim() == 4:
            _, _, num_queries, num_keys = sizes(result)
            layout = of_length(self._layouts, num_keys) if num_queries == num_keys else None
            if layout is not None:  # attention that is written out; masking, if any, has been here already
                self.recorded.append(layout.patches(self._of_weights(result.detach(), layout)))
        return result

    def _of_weights(self, weights: Tensor, layout: Layout) -> Tensor:
        weights = weights.to(compute_dtype(weights))
        if self._from_class_token(layout):
            return weights[:, :, 0].mean(dim=1)
        return _mean_of_kept(weights, self._visible(layout, weights.dtype))

    def _from_class_token(self, layout: Layout) -> bool:
        return self._class_token and layout.num_prefix > 0

    def _visible(self, layout: Layout, dtype: torch.dtype) -> Tensor | None:
        """Which tokens of the sequence are kept, (B, L); ``None`` if all."""
        assert self._selection is not None
        visible = self._selection.visible(layout)
        return None if visible is None else visible.detach().to(dtype)


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

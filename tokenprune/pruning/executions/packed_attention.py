"""Attention of somebody else's code over a packed sequence, split by image.

Shapes: B images, H heads, k tokens of one image, K tokens of the rectangle's rows, T tokens of all images, D channels
of a query or key.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.interception import SOFTMAXES, AttentionCall, Interception, for_each_query_head
from tokenprune.backbones.patterns import gather_mask
from tokenprune.errors import InterceptionError
from tokenprune.pruning.packing import Packing, Part
from tokenprune.tokens import sizes


class PackedAttention(Interception):
    """While a block's attention runs on a packed sequence: each image attends over its own tokens alone.

    Images with equally many tokens attend in one call, as a rectangle. On CUDA, where numbers differ, one kernel for
    all takes its place if it can: `torch.nn.attention.varlen`.

    Attributes:
        packing: How the images stand in the sequence; ``None`` while it is switched off.
        hits: Attention calls seen since it was last prepared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.packing: Packing | None = None
        self.hits = 0

    def prepare(self, packing: Packing) -> PackedAttention:
        """Itself, for a sequence that is packed like this."""
        self.packing, self.hits = packing, 0
        return self

    def leave(self) -> None:
        super().leave()
        self.packing = None

    def check(self, module: nn.Module) -> None:
        if self.hits == 0:
            raise InterceptionError(
                f"the attention of {type(module).__name__} did not pass through scaled_dot_product_attention, so it "
                "could not be split by image; use its fused (SDPA) attention, or another execution."
            )

    def attention(self, call: AttentionCall) -> Tensor:
        assert self.packing is not None
        self.hits += 1
        if takes(call, self.packing):
            return by_kernel(call, self.packing)
        return self.packing.join([part.run() for part in split(call, self.packing)])

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in SOFTMAXES:
            self._refuse_several(args[0] if args else kwargs.get("input"))
        return func(*args, **kwargs)

    def _refuse_several(self, scores: Any) -> None:
        """Refuse a softmax over the tokens of several images; one over those of a single one is as it should be."""
        packing = self.packing
        if packing is None or not isinstance(scores, Tensor) or scores.dim() < 3 or scores.shape[-1] != packing.length:
            return
        self.hits += 1
        if packing.shape[0] > 1:
            raise InterceptionError(
                f"attention is written out, with a softmax over the {packing.length} tokens of all images, and cannot "
                "be split by image; use fused (SDPA) attention, or another execution."
            )


def split(call: AttentionCall, packing: Packing) -> list[AttentionCall]:
    """A call over a packed sequence (1, H, T, D) as one for each part of it, (images, H, k, D).

    Raises:
        InterceptionError: It is another one.
    """
    query, key = call.query, call.key
    if call.is_causal or query.dim() != 4 or {sizes(query)[-2], sizes(key)[-2]} != {packing.length} or len(query) != 1:
        raise InterceptionError(
            f"{'causal ' * call.is_causal}attention of shape {(*sizes(query)[:-1], sizes(key)[-2])} (…, queries, keys) "
            f"is not one over the {packing.length} tokens that a block was given for {packing.shape[0]} images, so it "
            "cannot be split by image; run this model in another execution."
        )
    parts = zip(packing.split(query), packing.split(key), packing.split(call.value), packing.parts, strict=True)
    return [
        call._replace(query=q, key=k, value=v, attn_mask=_mask_of(call.attn_mask, packing, part))
        for q, k, v, part in parts
    ]


def _mask_of(mask: Tensor | None, packing: Packing, part: Part) -> Tensor | None:
    """What a part needs of an attention mask or bias: one of a rectangle's rows, or one row for all keys."""
    if mask is None:
        return None
    num_images, length = packing.shape
    mask = mask[(None,) * (4 - mask.dim())]
    images, _, rows, columns = sizes(mask)
    if columns == packing.length and rows == images == 1:
        keys = mask[..., part.start : part.end].unflatten(-1, (part.num_images, part.length))  # (1, H, 1, images, k)
        split: Tensor = keys.permute(3, 1, 2, 4, 0).squeeze(-1)
        return split
    if columns != length or images not in (1, num_images):
        raise InterceptionError(
            f"the attention mask or bias of shape {tuple(mask.shape)} is not one for {num_images} images of up to "
            f"{length} tokens, so it cannot be split by image; run this model in another execution."
        )
    places = packing.places(part)
    if places is None:
        return mask
    which, positions = places
    return gather_mask(mask if images == 1 else mask.index_select(0, which), positions)


# One kernel for sequences of all lengths


def takes(call: AttentionCall, packing: Packing) -> bool:
    """Whether the kernel takes a call: numbers of tokens that differ, in half precision, without a mask."""
    query, kernel = call.query, fused_kernel()
    if kernel is None or packing.rows is None or not _on_such_a_gpu(query):
        return False
    width = sizes(query)[-1]
    plain = call.attn_mask is None and call.dropout_p == 0 and not call.is_causal and query.dim() == 4
    fits = {sizes(one)[-1] for one in (query, call.key, call.value)} == {width} and width % 8 == 0 and width <= 256
    scales = call.scale is None or math.isclose(call.scale, width**-0.5) or "scale" in _parameters(kernel)
    precision = {query.dtype, call.key.dtype, call.value.dtype}
    return (
        plain
        and fits
        and scales
        and (precision == {torch.float16} or precision == {torch.bfloat16})
        and sizes(query)[-2] == sizes(call.key)[-2] == packing.length
    )


def by_kernel(call: AttentionCall, packing: Packing) -> Tensor:
    """What `torch.nn.attention.varlen` makes of a call that it `takes`: (1, H, T, D)."""
    kernel = fused_kernel()
    assert kernel is not None
    key, value = call.key, call.value
    if call.enable_gqa:
        key, value = (for_each_query_head(tensor, call.query) for tensor in (key, value))
    tokens = [tensor[0].transpose(0, 1) for tensor in (call.query, key, value)]  # (T, H, D) each
    ends = [*accumulate(packing.lengths, initial=0)]
    edges = torch.tensor(ends, dtype=torch.int32, device=call.query.device)
    longest = packing.parts[0].length
    scale = {"scale": call.scale} if call.scale is not None and "scale" in _parameters(kernel) else {}
    result: Tensor = kernel(*tokens, edges, edges, longest, longest, **scale)
    return result.transpose(0, 1).unsqueeze(0)


@lru_cache(maxsize=1)
def fused_kernel() -> Callable[..., Any] | None:
    """`varlen_attn` of torch, of which not every release and build has one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel: Callable[..., Any] = varlen_attn
    return kernel


def _on_such_a_gpu(query: Tensor) -> bool:
    """Whether a call runs where there is the kernel: NVIDIA's GPUs from compute capability 8.0 on."""
    return query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _parameters(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)

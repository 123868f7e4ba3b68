"""DynamicViT's masked attention, with its exact gradient for every keep decision.

By PyTorch's operators, or on NVIDIA's GPUs by kernels of our own, `tokenprune.kernels`.

Shapes: B images, H heads, L queries, K keys, D channels of a query or key, E of a value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# A dropped key's weight exp(score − log-sum-exp of the kept keys) has no upper bound. Its exponent
# is cut here in the backward pass, so that a key which would have dominated leaves a large but
# finite gradient. e^60 times any sensible gradient is far below the largest float32, 3e38.
MAX_EXPONENT = 60.0

# Scores worked on at a time in the backward pass: on a CPU a block that stays in the cache of a
# core (2 MB of float32), elsewhere one that keeps the device busy (256 MB).
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 26

# Whether the kernels are to be used where they can be, and whether Triton interprets them, which it does anywhere.
_kernels_wanted = os.environ.get("TOKENPRUNE_KERNELS", "1") != "0"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Attention in which a dropped key is invisible to every query but its own.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034),
    Eq. 11: with scores a_ij and G_ij = 1 if i = j, else keep_j,
    weight_ij = exp(a_ij) G_ij / Σ_k exp(a_ik) G_ik.

    The result equals attention over the kept keys alone, while the gradient reaches every entry
    of ``keep``, those of dropped keys included: it says what the output would gain from a key that
    is not there. No L×K matrix is kept for the backward pass.

    Deviation: the authors add 1e-6 to numerator and denominator and subtract the row maximum over
    all keys, which underflows where a dropped key dominates. Here rows are normalised by the
    log-sum-exp of the keys that count, and nothing is added.

    Args:
        query: (B, H, L, D).
        key: (B, H, K, D).
        value: (B, H, K, E).
        keep: (B, K), 1 = kept, 0 = dropped, over all keys, prefix tokens included. Values between
            weigh a key. Where L = K, query i always sees key i.
        scale: Factor of the products; ``None`` means 1/√D.
        dropout_p: Probability with which a weight is dropped.
        attn_mask: Broadcastable to (B, H, L, K): boolean, ``True`` = may attend, or a float bias
            added to the scores, which receives its gradient.

    Returns:
        (B, H, L, E), in the dtype of ``value``.

    Raises:
        ValueError: A shape does not fit; the message states the shapes.
    """
    return attend(
        query,
        key,
        value,
        keep,
        own_key=query.shape[-2] == key.shape[-2],
        scale=scale,
        dropout_p=dropout_p,
        attn_mask=attn_mask,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    own_key: bool,
    scale: float | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """`masked_attention` with ``own_key`` given: whether query i always sees key i."""
    _check_shapes(query, key, value, keep)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # as autocast does with the inputs of SDPA itself
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:
        attn_mask = additive(attn_mask, query)
    fused = dropout_p == 0 and _kernels_take(query, key, value)
    if not torch.is_grad_enabled():
        if fused:
            kernel = torch.ops.tokenprune.masked_attention
            return cast(Tensor, kernel(query, key, value, keep, attn_mask, own_key, scale)[0])
        bias = _bias(keep, attn_mask, query, own_key)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    if dropout_p > 0 or 0 in query.shape[:2]:  # of nothing, PyTorch's kernel ends the process
        inputs = (query, key, value, keep, attn_mask, own_key, scale, dropout_p)
        return checkpoint(_written_out, *inputs, use_reentrant=False)
    return cast(Tensor, _MaskedAttention.apply(query, key, value, keep, attn_mask, own_key, scale, fused))


@contextmanager
def without_kernels() -> Iterator[None]:
    """Masked attention by PyTorch's own operators inside, on every device, to compare with or to go without Triton.

    The environment variable ``TOKENPRUNE_KERNELS=0``, set before tokenprune is imported, does so everywhere. A backward
    pass is of the kind of its forward pass. As the flags of `torch.backends`, this one is that of the whole process.
    """
    global _kernels_wanted
    before, _kernels_wanted = _kernels_wanted, False
    try:
        yield
    finally:
        _kernels_wanted = before


def _kernels_take(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention over these is by our own kernels, for which the device, the dtype and the widths decide."""
    if not _kernels_wanted or not (query.dtype == key.dtype == value.dtype):
        return False
    if 0 in query.shape or 0 in value.shape:
        return False
    most: int = _most_channels(query.device, query.dtype)
    return max(query.shape[3], value.shape[3]) <= most


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _most_channels(device: torch.device, dtype: torch.dtype) -> int:
    """Of how many channels our kernels take heads there; 0 where they do not run, as without Triton."""
    if device.type != "cuda" and not _INTERPRETED:
        return 0
    try:
        from tokenprune import kernels
    except ImportError:
        return 0
    return kernels.most_channels(device, dtype)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> None:
    fits = (
        query.dim() == key.dim() == value.dim() == 4
        and keep.shape == (key.shape[0], key.shape[2])
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3]
    )
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in (("query", query), ("key", key), ("value", value), ("keep", keep))
        )
        raise ValueError(
            f"masked attention takes query (B, H, L, D), key (B, H, K, D), value (B, H, K, E) and keep (B, K); "
            f"got {shapes}."
        )


def additive(attn_mask: Tensor, query: Tensor) -> Tensor:
    """A boolean or additive mask as four dimensions of numbers to add to the scores."""
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    return attn_mask[(None,) * (4 - attn_mask.dim())].to(query.dtype)


def _bias(keep: Tensor, attn_mask: Tensor | None, query: Tensor, own_key: bool) -> Tensor:
    """What is added to the scores, (B, 1 or H, 1 or L, K): the mask, and log keep off the diagonal."""
    log_keep = keep.detach().to(query.dtype).log()[:, None, None, :]  # (B, 1, 1, K)
    if own_key:
        log_keep = log_keep.expand(-1, 1, keep.shape[-1], -1).clone(memory_format=torch.contiguous_format)
        log_keep.diagonal(dim1=2, dim2=3).zero_()
    return log_keep if attn_mask is None else log_keep + attn_mask.detach()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums over keys are taken: single precision at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    attn_mask: Tensor | None,
    own_key: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The formula written out, differentiated by autograd, for what no fused kernel does: dropout."""
    with torch.autocast(query.device.type, enabled=False):
        dtype = compute_dtype(query)
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale  # (B, H, L, K)
        if attn_mask is not None:
            scores = scores + attn_mask
        weights = masked_weights(scores, visible(keep.to(dtype), own_key=own_key)[:, None])
        weights = F.dropout(weights, dropout_p)
        return (weights @ value.to(dtype)).to(value.dtype)


def masked_softmax(scores: Tensor, keep: Tensor, *, own_key: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The weights of `masked_attention`, for attention that is written out, where the scores are known.

    Args:
        scores: (B, H, L, K) or (B·H, L, K), with any bias and mask added.
        keep: (B, K), see `masked_attention`.
        own_key: Whether query i always sees key i.
        dtype: Of the weights; ``None`` means that of `torch.softmax`.
    """
    if dtype is None:
        autocast = torch.is_autocast_enabled(scores.device.type)
        dtype = torch.promote_types(scores.dtype, torch.float32) if autocast else scores.dtype
    compute = compute_dtype(scores)
    with torch.autocast(scores.device.type, enabled=False):
        if scores.dim() == 3:
            keep = keep.repeat_interleave(scores.shape[0] // keep.shape[0], dim=0)
        seen = visible(keep.to(compute), own_key=own_key)  # (B, 1 or L, K)
        return masked_weights(scores.to(compute), seen if scores.dim() == 3 else seen[:, None]).to(dtype)


def visible(keep: Tensor, *, own_key: bool) -> Tensor:
    """How much of each key each query sees, (B, L, K), or (B, 1, K) where all see the same; from ``keep`` (B, K)."""
    if not own_key:
        return keep[:, None, :]
    diagonal = torch.eye(keep.shape[-1], dtype=torch.bool, device=keep.device)
    return torch.where(diagonal, 1.0, keep[:, None, :])


def masked_weights(scores: Tensor, seen: Tensor) -> Tensor:
    """exp(score) · seen, normalised over the keys; a row that may see nothing gives 0, as with SDPA."""
    top = scores.detach().masked_fill(seen == 0, -math.inf).amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (scores - top).clamp(max=MAX_EXPONENT).exp() * seen
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


class _MaskedAttention(torch.autograd.Function):
    """A fused kernel forward; backward our own, or five products a block of heads; nothing of size L×K is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep: Tensor,
        attn_mask: Tensor | None,
        own_key: bool,
        scale: float,
        fused: bool,
    ) -> Tensor:
        output: Tensor
        if fused:
            kernel = torch.ops.tokenprune.masked_attention
            output, log_sum_exp = kernel(query, key, value, keep, attn_mask, own_key, scale)
        else:
            output, log_sum_exp = _by_sdpa(query, key, value, _bias(keep, attn_mask, query, own_key), scale)
        ctx.save_for_backward(query, key, value, keep, attn_mask, output, log_sum_exp)
        ctx.own_key, ctx.scale, ctx.fused = own_key, scale, fused
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep, attn_mask, output, log_sum_exp = ctx.saved_tensors
        if ctx.fused and not ctx.needs_input_grad[4]:  # a mask that learns needs the slopes of all scores
            grads = torch.ops.tokenprune.masked_attention_backward(
                grad, query, key, value, keep, attn_mask, output, log_sum_exp, ctx.own_key, ctx.scale
            )
            return *grads, None, None, None, None
        operands = (grad, query, key, value, output, log_sum_exp)
        with torch.autocast(query.device.type, enabled=False):
            blocks = tuple(score_blocks(query, key))
            if len(blocks) == 1:  # without the cost of cutting and copying, which counts where all is small
                *grads, grad_keep, slopes = _backward_block(operands, keep, attn_mask, ctx.own_key, ctx.scale)
                grad_mask = slopes.sum_to_size(attn_mask.shape).to(attn_mask.dtype) if ctx.needs_input_grad[4] else None
                return *grads, grad_keep, grad_mask, None, None, None

            grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
            grad_keep = torch.zeros_like(keep)
            grad_mask = torch.zeros_like(attn_mask) if ctx.needs_input_grad[4] else None
            for images, heads in blocks:
                bias = None if attn_mask is None else mask_block(attn_mask, images, heads)
                *block, block_keep, slopes = _backward_block(
                    [tensor[images, heads] for tensor in operands], keep[images], bias, ctx.own_key, ctx.scale
                )
                for whole, part in zip(grads, block, strict=True):
                    whole[images, heads] = part
                grad_keep[images] += block_keep
                if grad_mask is not None:
                    target = mask_block(grad_mask, images, heads)
                    target += slopes.sum_to_size(target.shape).to(target.dtype)
        return *grads, grad_keep, grad_mask, None, None, None


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp (B, H, L) of its scores, in one kernel where PyTorch's returns both."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return cast(
            tuple[Tensor, Tensor],
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, False, attn_mask=bias, scale=scale
            ),
        )
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    dtype = compute_dtype(query)
    log_sum_exp = query.new_empty(query.shape[:-1], dtype=dtype)
    with torch.autocast(query.device.type, enabled=False):
        for images, heads in score_blocks(query, key):
            scores = query[images, heads].to(dtype) @ key[images, heads].to(dtype).transpose(-1, -2) * scale
            log_sum_exp[images, heads] = (scores + mask_block(bias, images, heads)).logsumexp(dim=-1)
    log_sum_exp.masked_fill_(log_sum_exp == -math.inf, 0)  # of a row that sees nothing, as the kernels have it
    return output, log_sum_exp


def score_blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of images and heads whose scores are worked on together."""
    num_images, num_heads = query.shape[:2]
    if torch.compiler.is_compiling():  # the compiler fuses and schedules by itself
        yield slice(0, num_images), slice(0, num_heads)
        return
    budget = (_CPU_BLOCK if query.device.type == "cpu" else _DEVICE_BLOCK) // (query.shape[-2] * key.shape[-2])
    images = min(num_images, max(1, budget // num_heads))
    heads = num_heads if images > 1 else min(num_heads, max(1, budget))
    for image in range(0, num_images, images):
        for head in range(0, num_heads, heads):
            yield slice(image, image + images), slice(head, head + heads)


def mask_block(mask: Tensor, images: slice, heads: slice) -> Tensor:
    """The part of a (B or 1, H or 1, L or 1, K) mask that belongs to a block."""
    return mask[images if mask.shape[0] > 1 else slice(None), heads if mask.shape[1] > 1 else slice(None)]


def _backward_block(
    operands: Sequence[Tensor], keep: Tensor, bias: Tensor | None, own_key: bool, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value (b, h, …) and keep (b, K), and those of the scores (b, h, L, K).

    With W_ij = exp(a_ij)/Z_i and t_ij = W_ij (g_i·v_j − δ_i): ∂v_j = Σ_i W_ij G_ij g_i,
    ∂a_ij = G_ij t_ij, ∂keep_j = Σ_{i≠j} t_ij. G is a factor of columns but for the diagonal, so it
    multiplies what the products take or give, never a matrix of scores.
    """
    dtype, keep_dtype, compute = operands[1].dtype, keep.dtype, compute_dtype(operands[1])
    grad, query, key, value, output, log_sum_exp = (tensor.to(compute) for tensor in operands)
    shape = query.shape[:2]
    keep_column = keep.to(compute)[:, None, :, None].expand(*shape, -1, 1).flatten(0, 1)  # (b·h, K, 1)
    delta = (grad * output).sum(dim=-1, keepdim=True).flatten(0, 1)  # (b·h, L, 1)
    grad, query, key, value, log_sum_exp = (tensor.flatten(0, 1) for tensor in (grad, query, key, value, log_sum_exp))

    weights = torch.baddbmm(log_sum_exp.unsqueeze(-1), query, key.transpose(1, 2), beta=-1, alpha=scale)
    if bias is not None:
        weights += bias.expand(*shape, *weights.shape[1:]).flatten(0, 1)
    weights = weights.clamp_(max=MAX_EXPONENT).exp_()
    slopes = torch.baddbmm(delta, grad, value.transpose(1, 2), beta=-1).mul_(weights)
    scaled_column = keep_column * scale
    grad_value = torch.bmm(weights.transpose(1, 2), grad).mul_(keep_column)
    grad_key = torch.bmm(slopes.transpose(1, 2), query).mul_(scaled_column)
    grad_query = torch.bmm(slopes, key * scaled_column)
    grad_keep = slopes.sum(dim=1)  # (b·h, K)
    if own_key:
        own_weight, own_slope = (matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1) for matrix in (weights, slopes))
        grad_keep -= own_slope.squeeze(-1)
        dropped = 1 - keep_column
        grad_value.addcmul_(own_weight * dropped, grad)
        own_share = own_slope * dropped
        grad_key.addcmul_(own_share, query, value=scale)
        grad_query.addcmul_(own_share, key, value=scale)
    if bias is not None:
        factor = keep_column.transpose(1, 2).expand_as(slopes)
        if own_key:
            factor = factor.clone()
            factor.diagonal(dim1=1, dim2=2).fill_(1.0)
        slopes = slopes * factor
    results = (part.view(*shape, *part.shape[1:]).to(dtype) for part in (grad_query, grad_key, grad_value))
    grad_keep, slopes = grad_keep.view(*shape, -1).sum(dim=1), slopes.view(*shape, *slopes.shape[1:])
    return *results, grad_keep.to(keep_dtype), slopes

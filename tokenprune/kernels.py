"""Triton kernels of masked attention: one forward, two backward, and no matrix of scores in memory.

Shapes: B images, H heads, L queries, K keys, D channels of a query or key, E of a value. What they compute, and when
they are chosen: `tokenprune.functional`, which imports this file where they can run, since Triton is not everywhere.

The forward kernel takes a block of queries over all keys with a running maximum (FlashAttention-2, arXiv 2307.08691)
and leaves the log-sum-exp of every row. Backward, scores are computed again: a block of queries goes over all keys for
its gradient, then a block of keys over all queries for those of key, value and keep. No sum is taken by atomic
additions, so gradients are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels count in powers of two. The weight of a dropped key is cut as in `tokenprune.functional`: at e^60.
LOG2_E = tl.constexpr(math.log2(math.e))
MAX_EXPONENT = tl.constexpr(60.0 * math.log2(math.e))


class Blocks(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        queries: Rows of queries worked on together, a power of two.
        keys: Keys worked on together, a power of two.
        warps: Of 32 threads.
        stages: Of blocks that are fetched while one is worked on.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Config(NamedTuple):
    """The blocks of each kernel."""

    forward: Blocks
    query: Blocks
    key: Blocks


# By bytes of a number and padded channels. Fixed, not tuned at the first call: sequences of a ViT have 50 to 1500
# tokens, of any number, and every new length would tune again. They are the largest of those tried that, compiled for
# compute capability 8.0 and 9.0, spill next to no registers. On each they fit into its shared memory: on 8.6,
# 8.9 and 12.0 that is 99 KB.
CONFIGS = {
    (2, 64): Config(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(32, 64, 4, 3)),
    (2, 128): Config(Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    (2, 256): Config(Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    (4, 64): Config(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (4, 128): Config(Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1)),
}


def most_channels(device: torch.device, dtype: torch.dtype) -> int:
    """How wide heads may be, of queries and of values: 0 where the kernels do not run at all.

    They run on NVIDIA's GPUs from compute capability 8.0 on; of older ones, Triton no longer uses the tensor cores. In
    Triton's interpreter they run anywhere, but for bfloat16, of which it multiplies the bits.
    """
    if triton.knobs.runtime.interpret:
        runs = dtype != torch.bfloat16
    else:
        runs = device.type == "cuda" and torch.version.hip is None
        runs = runs and torch.cuda.get_device_capability(device) >= (8, 0)
    if not runs or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return 0
    return max(width for size, width in CONFIGS if size == dtype.itemsize)


def padded(channels: int) -> int:
    """Channels as a block has them: a power of two, and at least the 16 that a product needs."""
    return max(16, 1 << (channels - 1).bit_length())


# Numbers whose divisibility makes no kernel faster, so that it is not compiled anew for another length.
_ANY = ("H", "L", "K", "keep_image", "bias_image", "bias_head", "bias_row")


@triton.jit
def _load(base, rows, stride, num_rows, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of channels, (rows, WIDTH), with 0 behind the last row and channel."""
    channels = tl.arange(0, WIDTH)
    there = (rows < num_rows)[:, None] & (channels < CHANNELS)[None, :]
    return tl.load(base + rows[:, None] * stride + channels[None, :], mask=there, other=0.0)


@triton.jit
def _store(base, rows, stride, num_rows, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, tile):
    channels = tl.arange(0, WIDTH)
    there = (rows < num_rows)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(base + rows[:, None] * stride + channels[None, :], tile.to(base.dtype.element_ty), mask=there)


@triton.jit
def _scores(query, key, factor, bias, rows, columns, bias_row, bias_column, num_rows, num_columns,
            BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of a block, mask added, times log2(e)."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
    if BIAS:
        there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        added = tl.load(
            bias + rows[:, None].to(tl.int64) * bias_row + columns[None, :].to(tl.int64) * bias_column,
            mask=there,
            other=0.0,
        )
        scores += added.to(tl.float32) * LOG2_E
    return scores


@triton.jit(do_not_specialize=_ANY)
def _forward_kernel(
    query, key, value, keep, bias, output, log_sum_exp,
    query_image, query_head, query_row, key_image, key_head, key_row, value_image, value_head, value_row,
    keep_image, keep_column, bias_image, bias_head, bias_row, bias_column,
    output_image, output_head, output_row,
    H, L, K, scale,
    OWN_KEY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries; programs of a head stand side by side and share its keys."""
    blocks = tl.cdiv(L, QUERIES)
    head_of_all = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    image, head = head_of_all // H, head_of_all % H
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    keep += image * keep_image
    bias += image * bias_image + head * bias_head
    query_tile = _load(query + image * query_image + head * query_head, rows, query_row, L, D, WIDTH_D)

    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH_E), tl.float32)
    for start in range(0, K, KEYS):
        columns = start + tl.arange(0, KEYS)
        key_tile = _load(key, columns, key_row, K, D, WIDTH_D)
        value_tile = _load(value, columns, value_row, K, E, WIDTH_E)
        kept = tl.load(keep + columns * keep_column, mask=columns < K, other=0.0).to(tl.float32)
        log_seen = tl.where(kept > 0, tl.log2(tl.where(kept > 0, kept, 1.0)), -float("inf"))[None, :]
        if OWN_KEY:
            log_seen = tl.where(rows[:, None] == columns[None, :], 0.0, log_seen)
        # With log G the maximum is one over the keys that count, so that nothing underflows beside a dropped key.
        scores = log_seen + _scores(
            query_tile, key_tile, scale * LOG2_E, bias, rows, columns, bias_row, bias_column, L, K, BIAS, PRECISION
        )
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # of rows that have not seen a key yet
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(value_tile.dtype), value_tile, result, input_precision=PRECISION)
        top = higher

    empty = total == 0  # a row that sees nothing gives 0, as if its denominator were 1
    result = result / tl.where(empty, 1.0, total)[:, None]
    _store(output + image * output_image + head * output_head, rows, output_row, L, E, WIDTH_E, result)
    logarithm = tl.where(empty, 0.0, (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)
    tl.store(log_sum_exp + head_of_all * L + rows, logarithm, mask=rows < L)


@triton.jit(do_not_specialize=_ANY)
def _query_kernel(
    grad, query, key, value, keep, bias, output, log_sum_exp, delta, grad_query,
    grad_image, grad_head, grad_row, query_image, query_head, query_row, key_image, key_head, key_row,
    value_image, value_head, value_row, keep_image, keep_column, bias_image, bias_head, bias_row, bias_column,
    output_image, output_head, output_row, result_image, result_head, result_row,
    H, L, K, scale,
    OWN_KEY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, Σ_j W_ij G_ij (g_i·v_j − δ_i) k_j, and δ_i = g_i·o_i for `_key_kernel`."""
    blocks = tl.cdiv(L, QUERIES)
    head_of_all = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    image, head = head_of_all // H, head_of_all % H
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    keep += image * keep_image
    bias += image * bias_image + head * bias_head
    query_tile = _load(query + image * query_image + head * query_head, rows, query_row, L, D, WIDTH_D)
    grad_tile = _load(grad + image * grad_image + head * grad_head, rows, grad_row, L, E, WIDTH_E)
    output_tile = _load(output + image * output_image + head * output_head, rows, output_row, L, E, WIDTH_E)
    row_delta = tl.sum(grad_tile.to(tl.float32) * output_tile.to(tl.float32), 1)
    tl.store(delta + head_of_all * L + rows, row_delta, mask=rows < L)
    total = tl.load(log_sum_exp + head_of_all * L + rows, mask=rows < L, other=0.0) * LOG2_E

    result = tl.zeros((QUERIES, WIDTH_D), tl.float32)
    for start in range(0, K, KEYS):
        columns = start + tl.arange(0, KEYS)
        key_tile = _load(key, columns, key_row, K, D, WIDTH_D)
        value_tile = _load(value, columns, value_row, K, E, WIDTH_E)
        kept = tl.load(keep + columns * keep_column, mask=columns < K, other=0.0).to(tl.float32)
        scores = _scores(
            query_tile, key_tile, scale * LOG2_E, bias, rows, columns, bias_row, bias_column, L, K, BIAS, PRECISION
        )
        seen = kept[None, :]
        if OWN_KEY:
            seen = tl.where(rows[:, None] == columns[None, :], 1.0, seen)
        weights = tl.exp2(tl.minimum(scores - total[:, None], MAX_EXPONENT)) * seen
        slopes = weights * (tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION) - row_delta[:, None])
        result = tl.dot(slopes.to(key_tile.dtype), key_tile, result, input_precision=PRECISION)
    result *= scale
    _store(grad_query + image * result_image + head * result_head, rows, result_row, L, D, WIDTH_D, result)


@triton.jit(do_not_specialize=_ANY)
def _key_kernel(
    grad, query, key, value, keep, bias, log_sum_exp, delta, grad_key, grad_value, grad_keep,
    grad_image, grad_head, grad_row, query_image, query_head, query_row, key_image, key_head, key_row,
    value_image, value_head, value_row, keep_image, keep_column, bias_image, bias_head, bias_row, bias_column,
    key_result_image, key_result_head, key_result_row, value_result_image, value_result_head, value_result_row,
    H, L, K, scale,
    OWN_KEY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, and of keep: Σ_i≠j W_ij (g_i·v_j − δ_i), which no G multiplies."""
    blocks = tl.cdiv(K, KEYS)
    head_of_all = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    image, head = head_of_all // H, head_of_all % H
    grad += image * grad_image + head * grad_head
    query += image * query_image + head * query_head
    bias += image * bias_image + head * bias_head
    key_tile = _load(key + image * key_image + head * key_head, columns, key_row, K, D, WIDTH_D)
    value_tile = _load(value + image * value_image + head * value_head, columns, value_row, K, E, WIDTH_E)
    kept = tl.load(keep + image * keep_image + columns * keep_column, mask=columns < K, other=0.0).to(tl.float32)

    key_result = tl.zeros((KEYS, WIDTH_D), tl.float32)
    value_result = tl.zeros((KEYS, WIDTH_E), tl.float32)
    keep_result = tl.zeros((KEYS,), tl.float32)
    for start in range(0, L, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        query_tile = _load(query, rows, query_row, L, D, WIDTH_D)
        grad_tile = _load(grad, rows, grad_row, L, E, WIDTH_E)  # 0 behind the last row, which so adds nothing
        row_delta = tl.load(delta + head_of_all * L + rows, mask=rows < L, other=0.0)
        total = tl.load(log_sum_exp + head_of_all * L + rows, mask=rows < L, other=0.0) * LOG2_E
        scores = _scores(  # (keys, queries), so that their products with queries and gradients need no transposing
            key_tile, query_tile, scale * LOG2_E, bias, columns, rows, bias_column, bias_row, K, L, BIAS, PRECISION
        )
        weights = tl.exp2(tl.minimum(scores - total[None, :], MAX_EXPONENT))
        slopes = weights * (tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION) - row_delta[None, :])
        seen = kept[:, None]
        if OWN_KEY:
            own = columns[:, None] == rows[None, :]
            seen = tl.where(own, 1.0, seen)
            keep_result += tl.sum(tl.where(own, 0.0, slopes), 1)
        else:
            keep_result += tl.sum(slopes, 1)
        value_result = tl.dot((weights * seen).to(grad_tile.dtype), grad_tile, value_result, input_precision=PRECISION)
        key_result = tl.dot((slopes * seen).to(query_tile.dtype), query_tile, key_result, input_precision=PRECISION)
    key_result *= scale
    _store(grad_key + image * key_result_image + head * key_result_head, columns, key_result_row, K, D, WIDTH_D,
           key_result)  # fmt: skip
    _store(grad_value + image * value_result_image + head * value_result_head, columns, value_result_row, K, E, WIDTH_E,
           value_result)  # fmt: skip
    tl.store(grad_keep + head_of_all * K + columns, keep_result, mask=columns < K)


@torch.library.custom_op("tokenprune::masked_attention", mutates_args=())
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, bias: Tensor | None, own_key: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked attention (B, H, L, E) and the log-sum-exp (B, H, L) of its scores, in float32.

    An operator of its own, so that compiled code calls it as a whole; it has no gradient but through
    `tokenprune.functional`.

    Args:
        query: (B, H, L, D), in a dtype of `most_channels`, as ``key`` (B, H, K, D) and ``value`` (B, H, K, E).
        key: See above; all three may be views.
        value: See above.
        keep: (B, K).
        bias: What is added to the scores, broadcastable to (B, H, L, K).
        own_key: Whether query i always sees key i.
        scale: Factor of the products.
    """
    query, key, value = (_in_rows(tensor) for tensor in (query, key, value))
    output, log_sum_exp = _outputs(query, value)
    columns = _columns(query, key, keep, bias)
    tensors = (query, key, value, *columns, output, log_sum_exp)
    strides = (*_strides(query, key, value), *_strides_of_columns(*columns), *_strides(output))
    _launch(_forward_kernel, "forward", tensors, strides, (query, key, value), bias, own_key, scale)
    return output, log_sum_exp


@torch.library.custom_op("tokenprune::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, bias: Tensor | None, output: Tensor,
    log_sum_exp: Tensor, own_key: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and keep, from that of the output and from what `masked_attention` returned."""
    grad, query, key, value, output = (_in_rows(tensor) for tensor in (grad, query, key, value, output))
    grad_query, grad_key, grad_value = (_empty(tensor) for tensor in (query, key, value))
    delta = torch.empty_like(log_sum_exp)
    grad_keep = log_sum_exp.new_empty(key.shape[:3])  # of each head
    columns = _columns(query, key, keep, bias)
    inputs = (grad, query, key, value, *columns)
    strides = (*_strides(grad, query, key, value), *_strides_of_columns(*columns))
    call = ((query, key, value), bias, own_key, scale)
    of_query = (*inputs, output, log_sum_exp, delta, grad_query)
    _launch(_query_kernel, "query", of_query, (*strides, *_strides(output, grad_query)), *call)
    of_key = (*inputs, log_sum_exp, delta, grad_key, grad_value, grad_keep)
    _launch(_key_kernel, "key", of_key, (*strides, *_strides(grad_key, grad_value)), *call)
    return grad_query, grad_key, grad_value, grad_keep.sum(dim=1).to(keep.dtype)


@masked_attention.register_fake
def _(query, key, value, keep, bias, own_key, scale):
    return _outputs(query, value)


@masked_attention_backward.register_fake
def _(grad, query, key, value, keep, bias, output, log_sum_exp, own_key, scale):
    return *(_empty(tensor) for tensor in (query, key, value)), keep.new_empty(keep.shape)


def _launch(
    kernel: Any, name: str, tensors: Sequence[Tensor], strides: Sequence[int],
    operands: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, own_key: bool, scale: float,
) -> None:  # fmt: skip
    """Run a kernel, whose name is that of its blocks, over all blocks of all heads."""
    query, _, value = operands
    num_images, num_heads, num_queries, channels = query.shape
    num_keys, value_channels = value.shape[2:]
    blocks: Blocks = getattr(CONFIGS[query.dtype.itemsize, padded(max(64, channels, value_channels))], name)
    num_blocks = triton.cdiv(num_keys, blocks.keys) if name == "key" else triton.cdiv(num_queries, blocks.queries)
    with torch.cuda.device_of(query):
        kernel[(num_images * num_heads * num_blocks,)](
            *tensors,
            *strides,
            num_heads,
            num_queries,
            num_keys,
            scale,
            OWN_KEY=own_key,
            BIAS=bias is not None,
            PRECISION=_precision(),
            D=channels,
            E=value_channels,
            WIDTH_D=padded(channels),
            WIDTH_E=padded(value_channels),
            QUERIES=blocks.queries,
            KEYS=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,  # of Triton's default, which is to change, it warns
        )


def _precision() -> str:
    """Of products in float32: as that of PyTorch's own on CUDA."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _in_rows(tensor: Tensor) -> Tensor:
    """The tensor with its channels side by side and rows in reach of 32 bits, which views into a projection have."""
    fits = tensor.stride(3) == 1 and tensor.stride(2) * tensor.shape[2] < 1 << 31
    return tensor if fits else tensor.contiguous()


def _columns(query: Tensor, key: Tensor, keep: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What belongs to keys: keep, and the bias (B, H, L, K), or where there is none any tensor."""
    keep = keep if keep.is_floating_point() else keep.float()
    return keep, query if bias is None else bias.expand(*query.shape[:3], key.shape[2])


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _strides_of_columns(keep: Tensor, bias: Tensor) -> tuple[int, ...]:
    return (*keep.stride(), *bias.stride())


def _empty(like: Tensor) -> Tensor:
    """For a result (B, H, L, C), which lies in memory as (B, L, H, C), as the layers around attention have it."""
    num_images, num_heads, length, channels = like.shape
    return like.new_empty(num_images, length, num_heads, channels).transpose(1, 2)


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    num_images, num_heads, length, _ = query.shape
    output = query.new_empty(num_images, length, num_heads, value.shape[3]).transpose(1, 2)
    return output, query.new_empty(num_images, num_heads, length, dtype=torch.float32)

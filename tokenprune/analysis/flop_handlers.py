"""What each operator of a traced model counts, where fvcore by itself does not know it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# Operators that move, compare or reduce numbers and multiply-add none, or too few to matter (one or
# a few operations an element). Any other operator that fvcore does not know is an error.
_WEIGHTLESS = frozenset(
    f"aten::{name}"
    for name in """
    _shape_as_tensor _to_copy _upsample_bicubic2d_aa _upsample_bilinear2d_aa abs adaptive_avg_pool1d add add_
    addcmul alias amax arange argmax argsort as_strided avg_pool2d bernoulli bincount bitwise_and broadcast_tensors
    bucketize cat ceil chunk clamp clamp_min clone col2im constant_pad_nd contiguous copy copy_ cos cummax cumsum
    detach div div_ dropout embedding empty empty_like eq erf exp expand expand_as eye feature_dropout fill_ flatten
    flip floor floor_divide full full_like gather ge gelu gelu_ gt hardtanh im2col index index_copy index_copy_
    index_put index_put_ index_select is_nonzero item l1_loss le lift_fresh linalg_vector_norm linspace log log1p
    log_softmax logical_and logical_not logical_or lt masked_fill masked_fill_ max max_pool2d maximum mean meshgrid
    min minimum movedim mul mul_ narrow ne neg new_empty new_full new_ones new_zeros nonzero norm numel numpy_T
    one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle pow prod rand rand_like randint randn
    randperm reciprocal relu relu_ remainder repeat repeat_interleave reshape reshape_as resize_ resolve_conj
    resolve_neg roll round rsqrt rsub scalar_tensor scatter scatter_ scatter_add scatter_reduce searchsorted select
    selu sigmoid sigmoid_ sign silu silu_ sin size slice slice_scatter softmax softplus sort split split_with_sizes
    sqrt square squeeze stack std sub sub_ sum t tanh tensor_split tile to topk transpose tril triu type_as unbind
    unflatten uniform_ unique_consecutive unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var
    view view_as view_as_complex view_as_real where zero_ zeros zeros_like
    """.split()  # noqa: SIM905 (a line a name would hide the rest of the file)
)

Handler = Callable[[list[Any], list[Any]], int]


def is_weightless(operator: str) -> bool:
    """Whether an operator does no multiply-adds, or too few to matter."""
    return operator in _WEIGHTLESS or operator.startswith("prim::")


def _shape(value: Any) -> list[int]:
    return value.type().sizes() or []


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Query · keyᵀ and weights · value of a scaled dot-product attention."""
    *batch, num_queries, query_dim = _shape(inputs[0])
    num_keys, value_dim = _shape(inputs[1])[-2], _shape(inputs[2])[-1]
    return int(math.prod(batch) * num_queries * num_keys * (query_dim + value_dim))


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> int:
    """A convolution whose padding is a word: output pixels · weights."""
    batch, _, *pixels = _shape(outputs[0])
    return int(batch * math.prod(pixels) * math.prod(_shape(inputs[1])))


def _rms_norm(inputs: list[Any], outputs: list[Any]) -> int:
    """As fvcore counts a LayerNorm: 5 an element."""
    return 5 * math.prod(_shape(inputs[0]))


def _interpolation(inputs: list[Any], outputs: list[Any]) -> int:
    """Two neighbours for each output."""
    return 2 * math.prod(_shape(outputs[0]))


def _embedding_bag(inputs: list[Any], outputs: list[Any]) -> int:
    """Entries · width: the weighted sums of entries of a table, by which positions are interpolated."""
    return int(math.prod(_shape(inputs[1])) * _shape(inputs[0])[-1])


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    """Batch · rows · inner · columns."""
    batch, rows, inner = _shape(inputs[1])
    return int(batch * rows * inner * _shape(inputs[2])[-1])


HANDLERS: dict[str, Handler] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_convolution_mode": _convolution_mode,
    "aten::baddbmm": _baddbmm,
    "aten::embedding_bag": _embedding_bag,
    "aten::upsample_linear1d": _interpolation,
    "aten::rms_norm": _rms_norm,
}
"""What counts the multiply-adds of an operator that fvcore does not know, by the operator's name."""

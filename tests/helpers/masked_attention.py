"""Masked attention as the paper writes it, tensors to try it on, and the places where it is tried."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.helpers.tolerances import FORMULA, KERNELS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Place:
    """Where the function runs, beside the formula in double precision on the CPU."""

    device: str
    dtype: torch.dtype
    tolerance: float

    def take(self, tensor: Tensor) -> Tensor:
        """A leaf there, with the strides of the tensor, in the place's dtype if it is one of numbers."""
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.detach().to(self.device, dtype).requires_grad_(tensor.requires_grad)


def interpreter_fault() -> str:
    """What is wrong with Triton's interpreter itself, of whatever release beside whatever NumPy; nothing, usually."""
    import triton

    @triton.jit
    def loop(length):
        for _ in range(length):
            pass

    try:
        loop[(1,)](2)
    except triton.runtime.errors.InterpreterError as error:
        return f"the interpreter of Triton {triton.__version__} fails: {error}"
    return ""


# Triton interprets only what is imported under TRITON_INTERPRET=1: `test_kernels.py` starts such a process.
KERNELS_ON_GPU = pytest.param(
    Place("cuda", torch.float32, KERNELS),
    id="cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)
KERNEL_PLACES = [KERNELS_ON_GPU]
if INTERPRETED:
    fault = interpreter_fault()
    interpreted = pytest.param(
        Place("cpu", torch.float32, KERNELS), id="interpreter", marks=pytest.mark.skipif(bool(fault), reason=fault)
    )
    KERNEL_PLACES.append(interpreted)
PLACES = [pytest.param(Place("cpu", torch.float64, FORMULA), id="cpu"), *KERNEL_PLACES]


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
    top = top.masked_fill(top == -math.inf, 0)
    # Kept keys have no positive exponent; this bounds dropped ones, whose factor is 0 where inf would be NaN.
    weights = torch.exp((scores - top).clamp(max=60)) * visible
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1) @ value


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

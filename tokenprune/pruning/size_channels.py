"""Attention in proportion to sizes without a bias: log s as channels of queries and keys.

Shapes: B images, H heads, L queries, K keys, D channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.backbones.interception import AttentionCall, Interception
from tokenprune.pruning.proportional_attention import ProportionalAttention
from tokenprune.tokens import sizes

MAX_WIDTH = 256  # of PyTorch's flash kernel


class SizeChannels(Interception):
    """Turns the bias that `ProportionalAttention` adds into channels, where that gives the call a faster kernel.

    It is to be entered outside of `ProportionalAttention` and of what records attention or keys, which see the call as
    it was.
    """

    def __init__(self, proportional: ProportionalAttention) -> None:
        super().__init__()
        self._proportional = proportional

    def attention(self, call: AttentionCall) -> Tensor:
        log_sizes = self._proportional.alone
        if log_sizes is None or not pays(call):
            return call.run()
        output: Tensor = with_channels(call, log_sizes).run()[..., : sizes(call.value)[-1]]
        return output


def pays(call: AttentionCall) -> bool:
    """Whether a call has a faster kernel without a bias: PyTorch's flash kernel, on CUDA, in half precision."""
    dtypes = {_dtype(tensor) for tensor in (call.query, call.key, call.value)}
    width = sizes(call.query)[-1]
    half = dtypes == {torch.float16} or dtypes == {torch.bfloat16}
    return half and on_gpu(call.query) and width == sizes(call.value)[-1] and _widened(width) <= MAX_WIDTH


def on_gpu(tensor: Tensor) -> bool:
    """Whether calls on a device may gain: CUDA's, where alone the kernels of SDPA differ by whether there is a bias."""
    return tensor.is_cuda


def with_channels(call: AttentionCall, log_sizes: Tensor) -> AttentionCall:
    """The call without its mask, and with log s, (B or 1, K) in single precision, in channels of queries and keys.

    softmax(q·kᵀ·scale + log s) = softmax(q⁺·k⁺ᵀ·scale), with a channel c of all queries and log s / (c·scale) of a key.
    The constant c is the power of two next to 1/scale, so that no precision is lost in it, and the key's number is
    split over two channels, of which the second has what rounding takes from the first. The width is padded to a
    multiple of eight, as flash kernels want it; values get as many channels, of zeros.
    """
    query, key, value = (tensor.to(_dtype(tensor)) for tensor in (call.query, call.key, call.value))
    width = sizes(query)[-1]
    scale = width**-0.5 if call.scale is None else call.scale
    constant = 2.0 ** round(-math.log2(scale))
    numbers = (log_sizes / (constant * scale))[:, None, :, None]  # (B, 1, K, 1)
    first = numbers.to(key.dtype)
    second = (numbers - first).to(key.dtype)
    padding = _widened(width) - width - 2
    shape = (*sizes(key)[:-1], 1)
    key = torch.cat([F.pad(key, (0, padding)), first.expand(shape), second.expand(shape)], dim=-1)
    query = F.pad(F.pad(query, (0, padding)), (0, 2), value=constant)
    value = F.pad(value, (0, padding + 2))
    return call._replace(query=query, key=key, value=value, attn_mask=None, scale=scale)


def _widened(width: int) -> int:
    return -(-(width + 2) // 8) * 8


def _dtype(tensor: Tensor) -> torch.dtype:
    """In which SDPA would take a tensor."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

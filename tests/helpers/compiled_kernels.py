"""Our kernels, compiled for a GPU that is not there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tokenprune import kernels

# What a block of threads may have of shared memory, in bytes, by compute capability (CUDA C++ Programming Guide).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class _Driver:
    """Says that there is a GPU of a compute capability."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int, patch: pytest.MonkeyPatch):
    """Inside, a launch compiles its kernel for that capability and stops there; the compiled ones are in the list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, **options: Any) -> Any:
        compiled.append(run(self, *args, **{**options, "warmup": True}))
        return compiled[-1]

    with patch.context() as inside:
        inside.setattr(JITFunction, "run", only_compile)
        inside.setattr(driver, "_active", _Driver(capability))
        yield compiled


def launch(dtype: torch.dtype, channels: int, *, own_key: bool, masked: bool, length: int = 33) -> None:
    """Call both operators as attention does, on views into one projection."""
    packed = torch.randn(2, length, 3, 2, channels, dtype=dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    keep = torch.ones(2, length)
    bias = torch.zeros(2, 1, 1, length, dtype=dtype) if masked else None
    output, log_sum_exp = kernels.masked_attention(query, key, value, keep, bias, own_key, 0.1)
    arguments = (query, key, value, keep, bias, output, log_sum_exp, own_key, 0.1)
    kernels.masked_attention_backward(output, *arguments)

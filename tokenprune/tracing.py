"""Whether a model runs, or code is made of it."""

from __future__ import annotations

import torch


def is_tracing() -> bool:
    """Whether TorchScript traces a model, where sizes are tensors."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def becomes_code() -> bool:
    """Whether a compiler, an exporter or TorchScript makes code of a pass, so that its tensors belong to it alone."""
    return torch.compiler.is_compiling() or is_tracing()

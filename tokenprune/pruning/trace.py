"""The record of a forward pass: what was decided, on which grid, with what in the end.

Shapes: B images, N patch tokens of the whole image, n kept ones, P prefix tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass
class Trace:
    """What happened in the last forward pass of a sparsified model.

    Attributes:
        execution: How it ran.
        num_patches: N, the patch tokens of each image before any pruning.
        num_prefix_tokens: P.
        grid: Rows and columns of patches, ``None`` where the image's size was not seen.
        indices: In ``gather`` execution one (B, n) int64 tensor a stage: the kept tokens' positions
            in the original row-major patch grid, ascending. Empty in ``mask`` execution.
        tokens: The final normalised tokens, prefix first, then the N patch tokens, then any suffix,
            (B, L, C); recorded in ``mask`` execution while gradients are enabled, for losses.
    """

    execution: Literal["mask", "gather"]
    num_patches: int
    num_prefix_tokens: int
    grid: tuple[int, int] | None = None
    indices: list[Tensor] = field(default_factory=list)
    tokens: Tensor | None = None
    _keep: list[Tensor] = field(default_factory=list)

    @property
    def keep(self) -> tuple[Tensor, ...]:
        """One (B, N) float tensor a stage, 1 = kept, 0 = pruned; in training a gradient reaches it."""
        if self.execution == "mask":
            return tuple(self._keep)
        return tuple(
            torch.zeros(kept.shape[0], self.num_patches, device=kept.device).scatter_(1, kept, 1.0)
            for kept in self.indices
        )

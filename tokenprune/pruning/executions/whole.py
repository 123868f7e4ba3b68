"""An execution in which every token stays in the sequence, whatever is decided on it.

Shapes: B images, N patch tokens, m of them that reach a stage, n kept ones, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.backbones.interception import Interception
from tokenprune.pruning.executions.base import Execution
from tokenprune.pruning.executions.paths import Paths
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout


class Whole(Execution):
    """Decides as another execution does, and leaves sequence and attention as they are.

    What a decision means is up to a reduction that keeps the sequence whole: it splits the tokens inside of blocks, by
    the `inner` execution.

    Args:
        inner: The execution that decides.
    """

    def __init__(self, inner: Execution) -> None:
        super().__init__(inner.backbone)
        self.inner = inner
        self.trains = inner.trains  # type: ignore[misc]

    def begin(self) -> None:
        self.inner.begin()

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return self.inner.keeps_all(num_keep, num_reached, probability=probability, sampled=sampled)

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        return self.inner.pass_all(before, tokens)

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        selection = self.inner.decide(scores, before, num_keep, sampled=sampled)
        selection = selection.replace(layout=before.layout)
        if selection.indices is None:
            return selection
        return selection.replace(others=_others(selection.indices, before.layout.num_patches))

    def reached(self, values: Tensor, before: Selection) -> Tensor:
        if before.all_kept or before.indices is None:
            return values
        indices = before.indices
        return values.gather(
            1, indices.view(*indices.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        )

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        return tokens

    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        return tokens

    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        return tokens

    def paths(self, selection: Selection, full: Layout) -> Paths:
        return Paths(self.inner, selection, full)

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None

    def output(self, value: Any, trace: Trace, num_keep: Sequence[int], stages: Sequence[int]) -> Any:
        return value


def _others(indices: Tensor, num_patches: int) -> Tensor:
    """The positions (B, N − n) in the grid that are not among (B, n), ascending."""
    kept = torch.zeros(indices.shape[0], num_patches, device=indices.device).scatter(1, indices, 1.0)
    return kept.topk(num_patches - indices.shape[1], dim=1, largest=False, sorted=False).indices.sort(dim=1).values

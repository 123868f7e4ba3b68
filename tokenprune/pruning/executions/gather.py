"""The execution of inference: pruned tokens are removed, and later blocks run on a shorter sequence.

Shapes: B images, N patch tokens, m of them that reach a stage, n kept ones, L tokens before any pruning, K tokens of
the sequence as it is, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.backbones.backbone import Backbone
from tokenprune.pruning.executions.base import Execution, register_execution
from tokenprune.pruning.sampling import counted, top_k
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.side_inputs import SideInputs
from tokenprune.tokens import Layout, restore, rows, select, sizes


@register_execution("gather")
class Gather(Execution):
    """Keeps the n best tokens of every image, and gathers what belongs to them."""

    removes = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._inputs = SideInputs(backbone.token_inputs, backbone.neutral_inputs)

    def begin(self) -> None:
        self._inputs.forget()

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return num_keep >= num_reached

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        if before.indices is not None:
            return before.replace(chosen=None, scores=None, attention=None)
        everything = torch.arange(before.layout.num_patches, device=tokens.device).expand(tokens.shape[0], -1)
        return before.replace(indices=everything)

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        assert isinstance(num_keep, int)
        chosen = top_k(scores.detach(), None, num_keep)  # (B, n)
        self._inputs.forget()
        indices = chosen if before.indices is None else before.indices.gather(1, chosen)
        layout = before.layout.replace(num_patches=num_keep)
        return before.replace(layout=layout, indices=indices, chosen=chosen, all_kept=False)

    def by_number(self, scores: Tensor, before: Selection, num_keep: Tensor, most: int) -> Selection:
        """The selection where images keep different numbers (B,), up to ``most``: rows are that long."""
        self._inputs.forget()
        keep = counted(scores.detach(), before.present, num_keep)  # (B, m)
        chosen = keep.argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, n), the kept ones first
        return before.replace(
            layout=before.layout.replace(num_patches=most),
            indices=chosen if before.indices is None else before.indices.gather(1, chosen),
            present=keep.gather(1, chosen),
            chosen=chosen,
            all_kept=False,
        )

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        assert selection.chosen is not None
        return select(tokens, before.layout.positions(selection.chosen))

    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        if selection.all_kept or selection.indices is None:
            return tokens
        return select(tokens, full.positions(selection.indices))

    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        if selection.all_kept or selection.indices is None:
            return tokens
        if selection.present is not None:  # what only fills a row stays as it was
            there = selection.layout.replace(num_prefix=full.num_prefix, num_summary=0).with_others(selection.present)
            before = select(everything, full.positions(selection.indices))
            tokens = torch.where(there.unsqueeze(-1) > 0, tokens, before)
        restored = restore(tokens, full.positions(selection.indices), everything)
        if selection.hosts is None:
            return restored
        return full.with_patches(restored, select(full.patches(restored), selection.hosts))

    def others(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        assert selection.others is not None
        return select(tokens, selection.others + full.num_prefix)

    def join(self, kept: Tensor, others: Tensor, selection: Selection, full: Layout) -> Tensor:
        assert selection.indices is not None and selection.others is not None
        batch, length, width = kept.shape[0], full.length, sizes(kept)[2]
        # Into a fresh tensor: each token is written once.
        joined = kept.new_empty(batch * length, width)
        for part, positions in (
            (kept, full.positions(selection.indices)),
            (others, selection.others + full.num_prefix),
        ):
            joined.index_copy_(0, rows(positions, length), part.flatten(0, 1))
        return joined.view(batch, length, width)

    def side_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], selection: Selection, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if selection.all_kept else self._inputs.gather(args, kwargs, names, selection, full)

    def gathered(self) -> tuple[Tensor, ...]:
        return self._inputs.tables()

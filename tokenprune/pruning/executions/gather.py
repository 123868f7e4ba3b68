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
from tokenprune.tokens import Layout, restore, select, sizes


@register_execution("gather")
class Gather(Execution):
    """Keeps the n best tokens of every image, and gathers what belongs to them."""

    removes = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._inputs = SideInputs(backbone.token_inputs, backbone.neutral_inputs)
        self._positions: Tensor | None = None

    def begin(self) -> None:
        self._inputs.forget()

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return num_keep >= num_reached

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        if before.indices is not None:
            return before.replace(chosen=None, scores=None, attention=None)
        return before.replace(indices=self._all_positions(tokens, before.layout.num_patches))

    def _all_positions(self, tokens: Tensor, number: int) -> Tensor:
        """(B, N), the positions of all patch tokens; the same tensor in every pass, as long as it fits."""
        (batch, *_), found = sizes(tokens), self._positions
        if torch.compiler.is_compiling():
            return torch.arange(number, device=tokens.device).expand(batch, -1)
        if found is None or (*found.shape, found.device) != (batch, number, tokens.device):
            with torch.inference_mode(False):  # a later pass may ask for gradients
                found = self._positions = torch.arange(number, device=tokens.device).expand(batch, -1)
        return found

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
        positions = torch.cat([full.positions(selection.indices), selection.others + full.num_prefix], dim=1)  # (B, L)
        # Rows are read from both one after the other, which is faster than writing them to their places.
        batch, length, num_kept = kept.shape[0], full.length, kept.shape[1]
        numbers = torch.arange(length, device=kept.device).expand_as(positions)
        places = torch.empty_like(positions).scatter(1, positions, numbers)
        image = torch.arange(batch, device=kept.device).unsqueeze(1)
        first, second = places + num_kept * image, places + (batch - 1 - image) * num_kept + length * image
        found = torch.where(places < num_kept, first, second).flatten()  # (B·L)
        both = torch.cat([kept.flatten(0, 1), others.flatten(0, 1)])
        return both.index_select(0, found).view(batch, length, sizes(kept)[2])

    def side_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], selection: Selection, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if selection.all_kept else self._inputs.gather(args, kwargs, names, selection, full)

    def gathered(self) -> tuple[Tensor, ...]:
        return self._inputs.tables()

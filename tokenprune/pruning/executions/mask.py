"""The execution of training: pruned tokens stay for as long as a gradient asks for them, invisible to the others.

Shapes: B images, N patch tokens, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.backbones.adaptations import Adaptation
from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import Interception
from tokenprune.pruning.executions.base import Execution, register_execution
from tokenprune.pruning.executions.masked_attention import BlockAttention
from tokenprune.pruning.executions.masked_output import without_pruned
from tokenprune.pruning.executions.masked_tail import MaskedTail
from tokenprune.pruning.recomputation import recomputing
from tokenprune.pruning.sampling import counted, sample, top_k
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.side_inputs import SideInputs
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout, restore, select

# What adaptations do that goes by where in its sequence a token stands.
_BY_POSITION = ("around_attention", "attention_layouts", "install_inside")


@register_execution("mask")
class Mask(Execution):
    """Masks attention and pooling, so that a gradient reaches every decision.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Eq. 10 and 11.

    Where decisions are sampled, a token stays for the blocks behind the stage that has pruned it, where its keys and
    values say what it would have brought. Behind the next stage it is left out: no other token sees it, and since no
    stage revives a token, no gradient reaches its decision or its state from there. Rows are as long as the image with
    most tokens left needs. Behind the last block it stands in its place again, as zeros. Outputs and gradients are
    those of the whole sequence; compiled code, whose lengths must not depend on the images, runs on that.
    """

    trains = True
    intercepts = True
    by_image = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._attention = BlockAttention()
        self._tail = MaskedTail()
        self._inputs = SideInputs(backbone.token_inputs, backbone.neutral_inputs)
        self._shortens = all(
            getattr(type(one), name) is getattr(Adaptation, name)
            for one in backbone.adaptations
            for name in _BY_POSITION
        )

    def begin(self) -> None:
        self._inputs.forget()

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return probability == 1.0 if sampled else num_keep >= num_reached

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        if before.keep is not None:
            return before.replace(chosen=None, scores=None, attention=None)
        return before.replace(keep=tokens.new_ones(tokens.shape[0], before.layout.num_patches))

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        left = before.left
        if sampled:
            keep = sample(scores, left, _noise(scores, before))
        elif isinstance(num_keep, Tensor):
            keep = counted(scores.detach(), left, num_keep)
        else:
            chosen = top_k(scores.detach(), left, num_keep)
            keep = torch.zeros_like(scores).scatter(1, chosen, 1.0)
            if left is not None:  # of which fewer than are to be kept may be left behind a stage that sampled
                keep = keep * (left > 0)
        self._inputs.forget()
        if before.keep is None or before.indices is None:
            return before.replace(keep=keep, all_kept=False)
        on_grid = torch.zeros_like(before.keep).scatter(1, before.indices, keep)
        return before.replace(keep=on_grid, present=keep, chosen=None, all_kept=False)

    def shorten(self, selection: Selection, before: Selection) -> Selection:
        left, keep = before.left, selection.left
        if not self._shortens or left is None or keep is None or torch.compiler.is_compiling():
            return selection
        there = left.detach() > 0
        most = int(there.sum(dim=1).max())
        if most == there.shape[1]:
            return selection
        chosen = there.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, n), those left first
        return selection.replace(
            layout=selection.layout.replace(num_patches=most),
            indices=chosen if before.indices is None else before.indices.gather(1, chosen),
            present=keep.gather(1, chosen),
            chosen=chosen,
        )

    def complete(self, tokens: Tensor, selection: Selection, layout: Layout) -> Tensor:
        if selection.indices is None or selection.keep is None:
            return tokens
        full = layout.replace(num_patches=selection.keep.shape[1])
        nothing = tokens.new_zeros(tokens.shape[0], full.length, tokens.shape[2])
        return restore(tokens, full.positions(selection.indices), nothing)

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        return tokens if selection.chosen is None else select(tokens, before.layout.positions(selection.chosen))

    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        return tokens

    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        if selection.all_kept or selection.keep is None:
            return tokens
        kept = full.with_others(selection.keep).unsqueeze(-1).to(tokens.dtype)  # (B, L, 1)
        if selection.hosts is not None:
            # Padding, which is its own host, is restored as it was.
            patches = full.patches(torch.where(kept.detach() > 0, tokens, everything))
            everything = full.with_patches(everything, select(patches, selection.hosts))
        return tokens * kept + everything * (1 - kept)

    def side_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], selection: Selection, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not selection.layout.num_summary and selection.indices is None:
            return None
        if recomputing():  # from the last block to the first, with fewer summary tokens from stage to stage
            self._inputs.forget()
        return self._inputs.gather(args, kwargs, names, selection, full)

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.all_kept else self._attention.prepare(selection, layouts)

    def mask_weights(self, weights: Tensor) -> Tensor | None:
        return self._attention.mask_weights(weights)

    def tail(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.all_kept else self._tail.prepare(selection, layouts)

    def output(self, value: Any, trace: Trace, num_keep: Sequence[int], stages: Sequence[int]) -> Any:
        return without_pruned(value, trace, num_keep, stages)


def _noise(scores: Tensor, before: Selection) -> Tensor | None:
    """The random numbers of decisions on scores (B, m), drawn on the grid where some of its tokens are left out.

    So decisions do not depend on how many are. ``None`` where all are there.
    """
    if before.keep is None or before.indices is None:
        return None
    return torch.rand(before.keep.shape, dtype=scores.dtype, device=scores.device).gather(1, before.indices)

"""The execution of training: all tokens stay, and pruned ones are invisible to the others.

Shapes: B images, N patch tokens, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
from tokenprune.tokens import Layout, select


@register_execution("mask")
class Mask(Execution):
    """Masks attention and pooling, so that a gradient reaches every decision.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Eq. 10 and 11.
    """

    trains = True
    intercepts = True
    by_image = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._attention = BlockAttention()
        self._tail = MaskedTail()
        self._inputs = SideInputs(backbone.token_inputs, backbone.neutral_inputs)

    def begin(self) -> None:
        self._inputs.forget()

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return probability == 1.0 if sampled else num_keep >= num_reached

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        if before.keep is not None:
            return before.replace(scores=None, attention=None)
        return before.replace(keep=tokens.new_ones(tokens.shape[0], before.layout.num_patches))

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        if sampled:
            keep = sample(scores, before.keep)
        elif isinstance(num_keep, Tensor):
            keep = counted(scores.detach(), before.keep, num_keep)
        else:
            chosen = top_k(scores.detach(), before.keep, num_keep)
            keep = torch.zeros_like(scores).scatter(1, chosen, 1.0)
            if before.keep is not None:  # of which fewer than are to be kept may be left behind a stage that sampled
                keep = keep * (before.keep > 0)
        self._inputs.forget()
        return before.replace(keep=keep, all_kept=False)

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        return tokens

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
        if not selection.layout.num_summary:
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

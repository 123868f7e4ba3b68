"""The execution of variable length: pruned tokens are removed, and blocks run on one sequence for all images.

Shapes: B images, m patch tokens that reach a stage, n kept ones, the most of any image, K = P + n + S + Q tokens of a
row, T tokens of all images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.backbones.adaptations import Adaptation
from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import Interception
from tokenprune.pruning.executions.base import register_execution
from tokenprune.pruning.executions.gather import Gather
from tokenprune.pruning.executions.masked_output import of_blocks
from tokenprune.pruning.executions.masked_tail import MaskedTail
from tokenprune.pruning.executions.packed_attention import PackedAttention
from tokenprune.pruning.packing import Packing
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout


@register_execution("varlen")
class Varlen(Gather):
    """As `Gather`, but images may keep different numbers of tokens, and are not padded to the longest in blocks.

    From the first stage on that prunes, a block is given the tokens of all images as one sequence (1, T, C), so that
    whatever looks at each token by itself runs on exactly as many as there are. Attention is split by image. Stages,
    and what stands behind the last block, get a row for each image again, as long as the longest; of the others' rows
    the end is hidden from scorers, reductions, and pooling.
    """

    intercepts = True
    by_image = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._attention = PackedAttention()
        self._tail = MaskedTail()

    @classmethod
    def obstacles(cls, backbone: Backbone) -> tuple[str, ...]:
        found = list(backbone.packing_obstacles)
        if any(type(one).attention_layouts is not Adaptation.attention_layouts for one in backbone.adaptations):
            found.append("blocks attend over other sequences than the one that they are given")
        return tuple(dict.fromkeys(found))

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        before = before.replace(packing=None)
        if isinstance(num_keep, int) and before.present is None:
            return super().decide(scores, before, num_keep, sampled=sampled)
        if isinstance(num_keep, int):  # no more than are left, behind a stage that went by the image
            assert before.present is not None
            num_keep = before.present.sum(dim=1).long().clamp(max=num_keep)
        return self.by_number(scores, before, num_keep, int(num_keep.max()))

    def lay_out(self, selection: Selection) -> Selection:
        if selection.all_kept or selection.packing is not None:
            return selection
        assert selection.indices is not None
        seen = selection.visible(selection.layout)  # (B, K)
        if seen is None:
            return selection.replace(packing=Packing.of_equal(len(selection.indices), selection.layout.length))
        return selection.replace(packing=Packing.of(seen))

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.packing is None else self._attention.prepare(selection.packing)

    def tail(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        if selection.packing is None or selection.packing.rows is None:
            return None
        return self._tail.prepare(selection, layouts)

    def hidden(self, value: Any, trace: Trace, stages: Sequence[int]) -> Any:
        def unpack(tokens: Tensor, stage: int) -> Tensor:
            packing = None if stage < 0 else trace.selections[stage].packing
            packed = packing is not None and tokens.dim() == 3 and tokens.shape[:2] == (1, packing.length)
            return packing.unpack(tokens) if packing is not None and packed else tokens

        return of_blocks(value, unpack, stages)

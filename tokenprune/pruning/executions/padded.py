"""Executions in a model that is given images of different sizes as rows of patches, padded to the longest.

Shapes: B images, N patch tokens of a row, padding included, m of them that reach a stage, n kept ones, the most of any
image, L tokens before any pruning, K tokens of the sequence as it is, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import Interception
from tokenprune.backbones.padded import Images, PaddedImages
from tokenprune.pruning.executions.base import Execution
from tokenprune.pruning.executions.gather import Gather
from tokenprune.pruning.executions.mask import Mask
from tokenprune.pruning.executions.masked_attention import BlockAttention
from tokenprune.pruning.executions.masked_tail import MaskedTail
from tokenprune.pruning.executions.varlen import Varlen
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout


class _OfPadded(Execution):
    """Padding is there as a pruned token is: not scored, not kept, and not seen."""

    by_image = True

    def start(self, layout: Layout, images: Images | None) -> Selection:
        assert isinstance(images, PaddedImages)
        everything = super().start(layout, images)
        if not self.removes:
            return everything.replace(keep=images.present)
        indices = torch.arange(layout.num_patches, device=images.present.device).expand_as(images.present)
        return everything.replace(indices=indices, present=images.present)

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return probability == 1.0


class MaskOfPadded(_OfPadded, Mask):
    """As `Mask`, of images of different sizes."""


class VarlenOfPadded(_OfPadded, Varlen):
    """As `Varlen`, of images of different sizes."""


class GatherOfPadded(_OfPadded, Gather):
    """As `Gather`, of images of different sizes: rows are as long as the longest may be, and the rest is masked.

    Numbers of tokens are never read from the device, so that the model can be compiled and exported.
    """

    intercepts = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._attention = BlockAttention()
        self._tail = MaskedTail()

    def decide_up_to(
        self, scores: Tensor, before: Selection, num_keep: Tensor, most: int, *, sampled: bool
    ) -> Selection:
        return self.by_number(scores, before, num_keep, most)

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.all_kept else self._attention.prepare(selection, layouts)

    def tail(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.all_kept else self._tail.prepare(selection, layouts)

"""Executions in a model that packs the images of a batch into one sequence itself, and splits attention by lengths.

Scorers and decisions see a rectangle, a row for each image; blocks run on the sequence.

Shapes: B images, P prefix tokens of each, N patch tokens of the largest of them, m of these that reach a stage, n kept
ones, the most of any image, G merge groups, the most of any image, T tokens of all images, t of them that are kept, C
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import Interception
from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.padded import Images
from tokenprune.errors import InterceptionError
from tokenprune.pruning.executions.base import Execution
from tokenprune.pruning.executions.masked_attention import MaskedAttention
from tokenprune.pruning.packing import Packing, Part
from tokenprune.pruning.sampling import counted, sample
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.side_inputs import SideInputs
from tokenprune.tokens import Layout


class OfPacked(Execution):
    """What both have in common: where the images stand, and decisions on whole merge groups.

    A group's score is the mean of its tokens'. Of each image that fraction of its own groups is kept.
    """

    runs_packed = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        assert backbone.packed is not None
        self.lengths = frozenset(backbone.packed.lengths)

    def start(self, layout: Layout, images: Images | None) -> Selection:
        assert isinstance(images, PackedImages)
        self._images = images
        slots = images.places.flatten().argsort(stable=True)[: images.length]  # (T,)
        packing = Packing((len(images.lengths), layout.length), (Part(0, 1, images.length),), slots)
        return Selection(layout, all_kept=True, packing=packing)

    def keeps_all(self, num_keep: int, num_reached: int, *, probability: float, sampled: bool) -> bool:
        return probability == 1.0

    def pass_all(self, before: Selection, tokens: Tensor) -> Selection:
        return before.replace(chosen=None, scores=None, attention=None)

    def from_hosts(self, tokens: Tensor, selection: Selection) -> Tensor:
        """All tokens of the sequence (1, T, C), each patch token in the state of its host, if the selection has any."""
        if selection.hosts is None:
            return tokens
        places = self._images.places[:, self._images.num_prefix :]  # (B, N)
        sources = torch.arange(tokens.shape[1] + 1, device=places.device)  # the last one, of what fills rows
        sources = sources.scatter(0, places.flatten(), places.gather(1, selection.hosts).flatten())
        return tokens.index_select(1, sources[:-1])

    def kept(self, scores: Tensor, before: Selection, num_keep: Tensor, *, sampled: bool) -> Tensor:
        """Which of the tokens that reached a stage are kept, (B, m), whole groups of them.

        Args:
            scores: (B, m).
            before: What reached the stage.
            num_keep: (B,) int64, how many groups of each image to keep where decisions are not sampled.
            sampled: Whether decisions are sampled.
        """
        groups, left = self._images.groups, before.left
        assert left is not None
        if before.indices is not None:
            groups = groups.gather(1, before.indices)  # (B, m)
        left = left.to(scores.dtype)
        shape = (len(scores), max(self._images.num_groups))
        there = (left.detach() > 0).to(scores.dtype)
        number = scores.new_zeros(shape).scatter_add(1, groups, there).clamp(min=1)  # (B, G)
        means = scores.new_zeros(shape).scatter_add(1, groups, scores.masked_fill(there == 0, 0)) / number
        reached = scores.new_zeros(shape).scatter_add(1, groups, left) / number  # of one group all or none
        keep = sample(means, reached) if sampled else counted(means.detach(), reached, num_keep)
        return keep.gather(1, groups) * there


class RemovingOfPacked(OfPacked):
    """Pruned tokens are removed; lengths, rotary tables and other inputs follow, and attention is the model's own."""

    removes = True
    by_image = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._inputs = SideInputs(backbone.token_inputs, {})
        self._ends: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        self._forget()

    def start(self, layout: Layout, images: Images | None) -> Selection:
        everything = super().start(layout, images)
        indices = torch.arange(layout.num_patches, device=self._images.groups.device)
        return everything.replace(indices=indices.expand_as(self._images.groups), present=self._images.present)

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        assert isinstance(num_keep, Tensor) and before.indices is not None
        self._forget()
        keep = self.kept(scores.detach(), before, num_keep, sampled=False)  # (B, m)
        most = int(keep.sum(dim=1).max())
        chosen = keep.argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, n), the kept ones first
        return before.replace(
            layout=before.layout.replace(num_patches=most),
            indices=before.indices.gather(1, chosen),
            present=keep.gather(1, chosen),
            chosen=chosen,
            all_kept=False,
            packing=None,
        )

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        assert selection.chosen is not None
        chosen = selection.chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
        return before.layout.with_patches(tokens, before.layout.patches(tokens).gather(1, chosen))

    def lay_out(self, selection: Selection) -> Selection:
        if selection.packing is not None:
            return selection
        assert selection.indices is not None and selection.present is not None
        layout = selection.layout
        places = self._images.places.gather(1, layout.positions(selection.indices))  # (B, P + n)
        places = places.masked_fill(layout.with_others(selection.present) == 0, self._images.length).flatten()
        number = int((places < self._images.length).sum())
        rows, slots = (found[:number] for found in places.sort(stable=True))  # (t,)
        shape = (len(selection.indices), layout.length)
        return selection.replace(packing=Packing(shape, (Part(0, 1, number),), slots), rows=rows)

    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        return tokens if selection.rows is None else tokens.index_select(1, selection.rows)

    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        if selection.rows is None:
            return tokens
        return self.from_hosts(everything.index_copy(1, selection.rows, tokens), selection)

    def side_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], selection: Selection, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if selection.rows is None:
            return None
        # One row of tokens, whose indices are places in the sequence.
        all_images = Selection(Layout(0, len(selection.rows)), indices=selection.rows.unsqueeze(0))
        args, kwargs = self._inputs.gather(args, kwargs, names, all_images, Layout(0, self._images.length))
        for name in self.lengths:
            place = names.index(name) if name in names else len(args)
            if place < len(args):
                args = (*args[:place], self._of_kept(args[place], selection.rows), *args[place + 1 :])
            elif isinstance(kwargs.get(name), Tensor):
                kwargs = {**kwargs, name: self._of_kept(kwargs[name], selection.rows)}
        return args, kwargs

    def _of_kept(self, ends: Tensor, rows: Tensor) -> Tensor:
        """Cumulative lengths of the kept tokens, segments of which none is left taken out."""
        for source, known in self._ends:
            if source is ends:
                return known
        found: Tensor = torch.searchsorted(rows, ends.to(rows.dtype)).to(ends.dtype).unique_consecutive()
        self._ends.append((ends, found))
        return found

    def _forget(self) -> None:
        self._inputs.forget()
        self._ends = []


class MaskingOfPacked(OfPacked):
    """All tokens stay, and of each segment's keys the pruned ones are invisible to the others."""

    trains = True
    intercepts = True
    by_image = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self._attention = SegmentAttention()

    def start(self, layout: Layout, images: Images | None) -> Selection:
        return super().start(layout, images).replace(keep=self._images.present)

    def decide(self, scores: Tensor, before: Selection, num_keep: int | Tensor, *, sampled: bool) -> Selection:
        assert isinstance(num_keep, Tensor)
        keep = self.kept(scores if sampled else scores.detach(), before, num_keep, sampled=sampled)
        return before.replace(keep=keep, all_kept=False)

    def remove(self, tokens: Tensor, before: Selection, selection: Selection) -> Tensor:
        return tokens

    def resume(self, tokens: Tensor, selection: Selection, full: Layout) -> Tensor:
        return tokens

    def restore(self, tokens: Tensor, selection: Selection, everything: Tensor, full: Layout) -> Tensor:
        if selection.all_kept:
            return tokens
        kept = self._in_sequence(selection).unsqueeze(-1).to(tokens.dtype)  # (1, T, 1)
        if selection.hosts is not None:
            everything = self.from_hosts(torch.where(kept.detach() > 0, tokens, everything), selection)
        return tokens * kept + everything * (1 - kept)

    def attention(self, selection: Selection, layouts: Sequence[Layout]) -> Interception | None:
        return None if selection.all_kept else self._attention.of(self._in_sequence(selection))

    def _in_sequence(self, selection: Selection) -> Tensor:
        """The decisions on all tokens, in the blocks' order: (1, T)."""
        assert selection.keep is not None and selection.packing is not None
        return selection.packing.pack(selection.layout.with_others(selection.keep))


class SegmentAttention(MaskedAttention):
    """While a block attends, segment by segment: pruned tokens are invisible to all but themselves.

    Calls are taken to come in the order of the segments, or to be one over all of them, with a mask; their lengths must
    add up to those of the sequence.
    """

    own_key = True
    where = "the attention of a masked block"

    def __init__(self) -> None:
        super().__init__()
        self._keep: Tensor | None = None
        self._done = 0

    def of(self, keep: Tensor) -> SegmentAttention:
        """Itself, for decisions (1, T)."""
        self._keep, self._done, self.hits = keep, 0, 0
        return self

    def leave(self) -> None:
        super().leave()
        self._length = 0 if self._keep is None else self._keep.shape[1]
        self._keep = None

    def lookup(self, length: int) -> Tensor | None:
        if self._keep is None or self._done + length > self._keep.shape[1]:
            return None
        self._done += length
        return self._keep[:, self._done - length : self._done]

    def _visible_keys(self, num_keys: int) -> Tensor:
        seen = self.lookup(num_keys)
        if seen is None:
            raise InterceptionError(
                f"{self.where} runs over {num_keys} more keys than the images have tokens, so that which of them are "
                "pruned is unknown."
            )
        self.hits += 1
        return seen

    def softmax(
        self,
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        square = input.dim() in (3, 4) and input.shape[-1] == input.shape[-2]
        return super().softmax(input, dim, _stacklevel, dtype) if square else None

    def check(self, module: nn.Module) -> None:
        if self.hits == 0 or self._done != self._length:
            raise InterceptionError(
                f"the attention of {type(module).__name__} passed {self._done} of {self._length} tokens through "
                "scaled_dot_product_attention, segment by segment, so pruned tokens could not be masked; use "
                "attn_implementation='sdpa' to train, or set model.tokenprune.execution = 'gather'."
            )

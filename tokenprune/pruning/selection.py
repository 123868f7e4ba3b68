"""A selection: what a stage has decided, what it was decided from, and the sequence that goes on.

Shapes: B images, m patch tokens that reach the stage, n of them kept, N patch tokens of the whole image, S summary
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.pruning.packing import Packing
from tokenprune.pruning.recording import Recorded
from tokenprune.tokens import Layout, replaced


class Selection(NamedTuple):
    """The tokens in force behind a stage. Of ``indices`` and ``keep`` an execution sets the one that it goes by.

    It sets both where only tokens have been removed that had been pruned before the stage: then ``keep`` is on the
    grid, and ``present`` holds the same decisions on the rows that go on.

    Attributes:
        layout: Of the sequence that goes on: with n patch tokens where others were removed, with all N where they
            stay.
        indices: (B, n) int64, ascending positions of the kept tokens in the image's row-major patch grid; where images
            keep different numbers, n is the largest of them, and further positions, of pruned tokens, stand behind.
        present: (B, n), 1 for a kept token, 0 for any other in the row, where images keep different numbers; ``None``
            where all keep n.
        keep: (B, N), 1 = kept, 0 = pruned; in training a gradient reaches it.
        all_kept: Whether nothing has been pruned yet, so that there is nothing to carry out.
        others: (B, N − n) int64, ascending positions of the others in the grid, where these stay in the sequence and
            ``indices`` is set.
        chosen: (B, n) int64, the kept ones' positions among those that reached the stage, where ``indices`` is set.
        summaries: (B, S), 0 for a summary token that holds nothing; ``None`` if all hold something.
        hosts: (B, N) int64, for each patch token of the grid the one whose state it takes when it is restored;
            ``None`` where each takes its own.
        scores: (B, m), higher = keep; ``None`` where the stage did not ask its scorer.
        attention: (B, m), what the scorer was told of the attention in the block before, where it asks for it.
        keys: (B, m, D), what it was told of the keys.
        sizes: (B, n), or (B, N) where all stay: how many patches each patch token stands for; ``None`` where each
            stands for one.
        notes: In the same shape, what the scorer has noted for the next stage; ``None`` if nothing.
        packing: How the images stand in one sequence while blocks run; ``None`` where each has a row of its own.
        rows: (t,) int64, where the model itself packs images and tokens are removed: the places in its sequence of
            those that are left, ascending; ``None`` if all are.
    """

    layout: Layout
    indices: Tensor | None = None
    present: Tensor | None = None
    keep: Tensor | None = None
    all_kept: bool = False
    others: Tensor | None = None
    chosen: Tensor | None = None
    summaries: Tensor | None = None
    hosts: Tensor | None = None
    scores: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    sizes: Tensor | None = None
    notes: Tensor | None = None
    packing: Packing | None = None
    rows: Tensor | None = None

    def replace(self, **changes: Any) -> Selection:
        """A selection with other entries."""
        return replaced(self, changes)

    @property
    def recorded(self) -> Recorded:
        """What the scorer was told of attention."""
        return Recorded(self.attention, self.keys)

    def visible(self, layout: Layout) -> Tensor | None:
        """Which tokens of a sequence (B, L) others may see; ``None`` if all."""
        left = self.left
        return None if self.all_kept or left is None else layout.with_others(left, self.summaries)

    def pack(self, tokens: Tensor) -> Tensor:
        """Of the sequences (B, K, C) that go on what blocks run on: the same, or one for all images."""
        return tokens if self.packing is None else self.packing.pack(tokens)

    def unpack(self, tokens: Tensor) -> Tensor:
        """Of what blocks run on the sequences (B, K, C) again."""
        return tokens if self.packing is None else self.packing.unpack(tokens)

    @property
    def indices_in_blocks(self) -> Tensor | None:
        """The positions in the grid of the patch tokens that blocks get: (B, n), or (1, T) in one sequence."""
        return self.indices if self.indices is None or self.packing is None else self.packing.pack(self.indices)

    @property
    def left(self) -> Tensor | None:
        """(B, n), 1 = a patch token that is left in the sequence that goes on, 0 = none; ``None`` if all are."""
        return self.keep if self.present is None else self.present

    def of_kept(self, values: Tensor | None) -> Tensor | None:
        """Values (B, m) of what reached the stage, as those of the patch tokens in the sequence that goes on."""
        return values if values is None or self.chosen is None else values.gather(1, self.chosen)

    def keep_of_grid(self, num_patches: int) -> Tensor:
        """(B, N), 1 = kept, whichever way it was decided."""
        if self.keep is not None:
            return self.keep
        assert self.indices is not None
        keep = torch.zeros(self.indices.shape[0], num_patches, device=self.indices.device)
        return keep.scatter_(1, self.indices, 1.0 if self.present is None else self.present.to(keep.dtype))

    def indices_by_image(self) -> Tensor | tuple[Tensor, ...] | None:
        """The kept tokens' positions, (B, n), or (n,) for each image; ``None`` where they are not known by number."""
        if self.keep is not None:
            return None
        if self.indices is None or self.present is None:
            return self.indices
        return tuple(row[kept > 0] for row, kept in zip(self.indices, self.present, strict=True))

    def indices_of_grid(self, num_keep: int) -> Tensor:
        """(B, n), the positions of the ``num_keep`` kept tokens that every image has, whichever way it was decided."""
        if self.keep is None:
            assert self.indices is not None
            return self.indices
        return self.keep.argsort(dim=1, descending=True, stable=True)[:, :num_keep]

    def split(self, before: Selection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those that reached the stage, after ``before``, as kept and as pruned by it: (B, m) of 0 and 1 each."""
        if self.chosen is None:
            assert self.left is not None
            keep = self.left.to(dtype)
        else:
            batch, reached = self.chosen.shape[0], before.layout.num_patches
            kept = 1.0 if self.present is None else self.present.to(dtype)
            keep = torch.zeros(batch, reached, device=self.chosen.device, dtype=dtype).scatter(1, self.chosen, kept)
        return keep, (1.0 if before.left is None else before.left.to(dtype)) - keep

    def completed(self) -> Selection:
        """The selection of the sequence with all patch tokens, where ``keep`` says which of them are kept."""
        if self.keep is None or self.indices is None:
            return self
        layout = self.layout.replace(num_patches=self.keep.shape[1])
        return self.replace(layout=layout, indices=None, present=None, chosen=None)

    def with_summaries(self, number: int, pruned: Tensor) -> Selection:
        """The selection of a sequence with so many further summary tokens, made of the ``pruned`` (B, m)."""
        layout = self.layout.replace(num_summary=self.layout.num_summary + number)
        if self.left is None:  # tokens are removed by their number, so that there always are some to be summed up
            return self.replace(layout=layout)
        holds = (pruned.detach().amax(dim=1, keepdim=True) > 0).to(pruned.dtype).expand(-1, number)  # (B, number)
        summaries = holds if self.summaries is None else torch.cat([self.summaries, holds], dim=1)
        return self.replace(layout=layout, summaries=summaries)

    def grid_scores(self, before: Selection, num_patches: int) -> Tensor | None:
        """The scores as (B, N) single precision, NaN for patches that did not reach the stage; ``None`` unasked."""
        if self.scores is None:
            return None
        scores = self.scores.detach().float()
        if before.left is not None:
            scores = scores.masked_fill(before.left == 0, torch.nan)
        if before.indices is not None:
            return scores.new_full((len(scores), num_patches), torch.nan).scatter(1, before.indices, scores)
        return scores


def compose_hosts(before: Selection, hosts: Tensor, num_patches: int) -> Tensor:
    """For each patch token of the grid the one it is folded into by now, (B, N).

    Args:
        before: What reached the stage.
        hosts: (B, m), for each of these the position among them of the one it is folded into, itself if in none.
        num_patches: N.
    """
    if before.indices is not None:
        everyone = torch.arange(num_patches, device=hosts.device).expand(hosts.shape[0], -1)
        hosts = everyone.scatter(1, before.indices, before.indices.gather(1, hosts))
    return hosts if before.hosts is None else hosts.gather(1, before.hosts)

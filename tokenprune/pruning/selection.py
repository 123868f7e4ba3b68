"""A selection: what a stage has decided, what it was decided from, and the sequence that goes on.

Shapes: B images, m patch tokens that reach the stage, n of them kept, N patch tokens of the whole image, S summary
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.pruning.recording import Recorded
from tokenprune.tokens import Layout, replaced


class Selection(NamedTuple):
    """The tokens in force behind a stage. Of ``indices`` and ``keep`` an execution sets the one that it goes by.

    Attributes:
        layout: Of the sequence that goes on: with n patch tokens where the others were removed, with all N where
            they stay.
        indices: (B, n) int64, ascending positions of the kept tokens in the image's row-major patch grid.
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
    """

    layout: Layout
    indices: Tensor | None = None
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

    def replace(self, **changes: Any) -> Selection:
        """A selection with other entries."""
        return replaced(self, changes)

    @property
    def recorded(self) -> Recorded:
        """What the scorer was told of attention."""
        return Recorded(self.attention, self.keys)

    def visible(self, layout: Layout) -> Tensor | None:
        """Which tokens of a sequence (B, L) others may see; ``None`` if all."""
        if self.all_kept or self.keep is None:
            return None
        return layout.with_others(self.keep, self.summaries)

    def of_kept(self, values: Tensor | None) -> Tensor | None:
        """Values (B, m) of what reached the stage, as those of the patch tokens in the sequence that goes on."""
        return values if values is None or self.chosen is None else values.gather(1, self.chosen)

    def keep_of_grid(self, num_patches: int) -> Tensor:
        """(B, N), 1 = kept, whichever way it was decided."""
        if self.keep is not None:
            return self.keep
        assert self.indices is not None
        keep = torch.zeros(self.indices.shape[0], num_patches, device=self.indices.device)
        return keep.scatter_(1, self.indices, 1.0)

    def indices_of_grid(self, num_keep: int) -> Tensor:
        """(B, n), the positions of the ``num_keep`` kept tokens that every image has, whichever way it was decided."""
        if self.indices is not None:
            return self.indices
        assert self.keep is not None
        return self.keep.argsort(dim=1, descending=True, stable=True)[:, :num_keep]

    def split(self, before: Selection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those that reached the stage, after ``before``, as kept and as pruned by it: (B, m) of 0 and 1 each."""
        if self.keep is not None:
            keep = self.keep.to(dtype)
            return keep, (1.0 if before.keep is None else before.keep.to(dtype)) - keep
        assert self.chosen is not None
        batch, reached = self.chosen.shape[0], before.layout.num_patches
        keep = torch.zeros(batch, reached, device=self.chosen.device, dtype=dtype).scatter(1, self.chosen, 1.0)
        return keep, 1 - keep

    def with_summaries(self, number: int, pruned: Tensor) -> Selection:
        """The selection of a sequence with so many further summary tokens, made of the ``pruned`` (B, m)."""
        layout = self.layout.replace(num_summary=self.layout.num_summary + number)
        if self.keep is None:  # tokens are removed by their number, so that there always are some to be summed up
            return self.replace(layout=layout)
        holds = (pruned.detach().amax(dim=1, keepdim=True) > 0).to(pruned.dtype).expand(-1, number)  # (B, number)
        summaries = holds if self.summaries is None else torch.cat([self.summaries, holds], dim=1)
        return self.replace(layout=layout, summaries=summaries)

    def grid_scores(self, before: Selection, num_patches: int) -> Tensor | None:
        """The scores as (B, N) single precision, NaN for patches that did not reach the stage; ``None`` unasked."""
        if self.scores is None:
            return None
        scores = self.scores.detach().float()
        if before.keep is not None:
            return scores.masked_fill(before.keep == 0, torch.nan)
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

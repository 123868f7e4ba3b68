"""The record of a forward pass: what was decided, on which grid, with what in the end.

Shapes: B images, N patch tokens of the whole image, n kept ones, P prefix tokens, S summary tokens, Q suffix tokens,
L = P + N + S + Q, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.padded import Images
from tokenprune.pruning.budget import Counts, Threshold, Thresholds
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout


@dataclass
class Trace:
    """What happened in the last forward pass of a sparsified model.

    Attributes:
        execution: The name of the execution it ran in.
        start: What reached the first stage: everything.
        num_prefix_tokens: P, those that join on the way included.
        grid: Rows and columns of patches, ``None`` where the image's size was not seen.
        selections: What each stage has decided, one a stage that was reached.
        restored: Whether pruned tokens were restored behind every block, or never left the sequence.
        whole: Whether they never left it, and went on by another path.
        anew: Whether every stage decided on all patch tokens, whatever the one before had decided.
        thresholds: By which images keep different numbers of tokens; ``None`` where all keep as many.
        images: The images of the pass, where they are of different sizes, in one sequence or in padded rows.
        tokens: The final normalised tokens, laid out as `layout` says, (B, L, C); recorded for losses in training
            mode, and in executions that train, while gradients are enabled.
    """

    execution: str
    start: Selection
    num_prefix_tokens: int
    grid: tuple[int, int] | None = None
    selections: list[Selection] = field(default_factory=list)
    restored: bool = False
    whole: bool = False
    anew: bool = False
    thresholds: Thresholds | None = None
    images: Images | None = None
    tokens: Tensor | None = None

    def threshold(self, stage: int, num_keep: int) -> Threshold | None:
        """By which a stage keeps ``num_keep`` tokens of an image on average; ``None`` where it keeps so many of all."""
        return None if self.thresholds is None else self.thresholds.at(stage, num_keep)

    def counts(self, stage: int, plan: Plan) -> Counts | None:
        """How many a stage keeps of each image; ``None`` where all are of one size."""
        return None if self.images is None else Counts.of(self.images, plan, stage)

    @property
    def num_patches(self) -> int:
        """N, the patch tokens of each image before any pruning."""
        return self.start.layout.num_patches

    @property
    def full_layout(self) -> Layout:
        """The sequence behind the last block as it would be had nothing been pruned."""
        return self.start.layout.replace(num_prefix=self.num_prefix_tokens)

    @property
    def layout(self) -> Layout:
        """The sequence behind the last block as it is."""
        if self.restored or not self.selections:
            return self.full_layout
        return self.selections[-1].layout.replace(num_prefix=self.num_prefix_tokens)

    @property
    def keep(self) -> tuple[Tensor, ...]:
        """One (B, N) float tensor a stage, 1 = kept, 0 = pruned; in training a gradient reaches it."""
        return tuple(selection.keep_of_grid(self.num_patches) for selection in self.selections)

    @property
    def shares(self) -> tuple[Tensor, ...]:
        """One (B,) float tensor a stage, the share of its own patch tokens that is kept of each image."""
        if self.images is None:
            return tuple(keep.mean(dim=1) for keep in self.keep)
        return tuple(keep.sum(dim=1) / self.images.present.sum(dim=1) for keep in self.keep)

    @property
    def indices(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Where tokens are removed, one (B, n) int64 tensor a stage: the kept tokens' positions in the grid.

        Where images keep different numbers, a stage has a tuple of B tensors (n,) instead, so that
        ``indices[stage][image]`` is the same either way. Positions count in the original row-major patch grid,
        ascending; in a packed sequence, in the order in which the tower is given an image's patches. Empty in
        executions in which all tokens stay.
        """
        found = (selection.indices_by_image() for selection in self.selections)
        return tuple(indices for indices in found if indices is not None)

    @property
    def groups(self) -> tuple[Tensor, ...]:
        """Where the model packs images: for each image the merge groups that all stages have kept, (g,) int64.

        A group is what becomes one output of the tower behind the blocks; those of an image are numbered from 0, row
        by row. Ascending. Of an image of which nothing is pruned, all; empty for a model that packs none.
        """
        if not isinstance(self.images, PackedImages):
            return ()
        kept = (self.selections[-1] if self.selections else self.start).keep_of_grid(self.num_patches)  # (B, N)
        rows = zip(self.images.groups, kept, strict=True)
        return tuple(groups[keep > 0].unique() for groups, keep in rows)

    @property
    def scores(self) -> tuple[Tensor | None, ...]:
        """What each stage decided by, (B, N), higher = keep, NaN for patches that did not reach it.

        ``None`` for a stage that keeps all it gets, and does not ask its scorer.
        """
        before = [self.start] * len(self.selections) if self.anew else [self.start, *self.selections]
        return tuple(
            selection.grid_scores(reached, self.num_patches)
            for selection, reached in zip(self.selections, before, strict=False)
        )


def image_size_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images (…, H, W) that a model is given; ``None`` where it is given something else."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4:
            return value.shape[-2], value.shape[-1]
    return None

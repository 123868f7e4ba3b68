"""The levels of a hierarchy: blocks over grids of tokens that become coarser from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tokenprune.errors import PlanError


class Level(NamedTuple):
    """The blocks of a hierarchy over tokens of the same number and width.

    Attributes:
        start: The number of its first block, among all blocks of the model.
        stop: The number behind its last block.
        embed_dim: The tokens' width C.
        patch_size: Height and width in pixels of what a token stands for; ``None`` where unknown.
        grid_size: Rows and columns of tokens at the model's nominal image size; ``None`` where unknown.
    """

    start: int
    stop: int
    embed_dim: int
    patch_size: tuple[int, int] | None = None
    grid_size: tuple[int, int] | None = None

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Hierarchy:
    """What makes a model a hierarchy, whose blocks need the full grid of tokens.

    Attributes:
        levels: The levels in which its blocks stand, from the finest grid to the coarsest.
        number: Of the one that stages stand in.
        obstacle: Why no token can be taken out of the model's sequence, a sentence for its users; ``None`` for the
            general reason.
    """

    levels: Sequence[Level]
    number: int = 0
    obstacle: str | None = None

    @property
    def level(self) -> Level:
        """The level that stages stand in."""
        return self.levels[self.number]

    def for_stages(self, stages: Sequence[int] | None) -> Hierarchy:
        """The same, with the level that these stages stand in.

        Raises:
            PlanError: They stand in several levels.
        """
        try:
            named = {*(stages or ())}
        except TypeError:  # no numbers in a sequence, which the plan refuses
            return self
        found = [number for number, level in enumerate(self.levels) if named & {*level.blocks}]
        if len(found) > 1:
            listed = ", ".join(f"{level.start} … {level.stop - 1}" for level in self.levels)
            raise PlanError(
                f"stages={tuple(stages or ())} stand in {len(found)} levels of a hierarchy, and tokens of one are not "
                f"those of another; name blocks of one level: {listed}."
            )
        return replace(self, number=found[0]) if found else self

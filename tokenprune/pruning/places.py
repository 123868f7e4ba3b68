"""Where the blocks of a model stand among the stages of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.stage import Stage


class Place(NamedTuple):
    """Where a block stands among the stages.

    Attributes:
        block: Its index.
        stage: The last stage in front of it; -1 if there is none.
        starts: Whether that stands right in front of it.
        inside: The stage that stands inside it, between attention and MLP, if there is one.
        awaited_by: The stage inside it or right behind it whose scorer needs something of its attention, if there is
            one.
        names: The names of the block's parameters, in order.
    """

    block: int
    stage: int
    starts: bool
    inside: int | None
    awaited_by: int | None
    names: tuple[str, ...]

    @property
    def behind(self) -> int:
        """The last stage that the tokens have passed which it gives; -1 if there is none."""
        return self.stage if self.inside is None else self.inside


def places(plan: Plan, backbone: Backbone, stages: Sequence[nn.Module]) -> list[Place]:
    """The place of every block, in a hierarchy of those in the level of the stages."""
    inside = stands_inside(stages)
    found = []
    for index in backbone.reach:
        block = backbone.blocks[index]
        stage, behind = (stage_into(plan, one, inside=inside) for one in (index, index + 1))
        here = behind > stage and inside
        asks = behind > stage and cast(Stage, stages[behind]).scorer.needs_recording
        names = tuple(inspect.signature(block.forward).parameters)
        starts = stage >= 0 and plan.stages[stage] == index
        found.append(Place(index, stage, starts, behind if here else None, behind if asks else None, names))
    return found


def stands_inside(stages: Sequence[nn.Module]) -> bool:
    """Whether stages stand inside of blocks, all of them as the first one."""
    return cast(Stage, stages[0]).scorer.inside_block


def stage_into(plan: Plan, block: int, *, inside: bool) -> int:
    """The last stage that the tokens have passed which a block gets; -1 if there is none."""
    return stage_before(plan, block - 1 if inside else block)


def stage_before(plan: Plan, block: int) -> int:
    """The last stage in front of a block or of one before it, or inside of these; -1 if there is none."""
    return sum(start <= block for start in plan.stages) - 1

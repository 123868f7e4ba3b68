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
        awaited_by: The stage right behind it whose scorer needs its attention scores, if there is one.
        names: The names of the block's parameters, in order.
    """

    block: int
    stage: int
    starts: bool
    awaited_by: int | None
    names: tuple[str, ...]


def places(plan: Plan, backbone: Backbone, stages: Sequence[nn.Module]) -> list[Place]:
    """The place of every block, in a hierarchy of those in the level of the stages."""
    found = []
    for index in backbone.reach:
        block = backbone.blocks[index]
        stage, behind = stage_before(plan, index), stage_before(plan, index + 1)
        asks = behind > stage and cast(Stage, stages[behind]).scorer.needs_attention
        names = tuple(inspect.signature(block.forward).parameters)
        starts = stage >= 0 and plan.stages[stage] == index
        found.append(Place(index, stage, starts, behind if asks else None, names))
    return found


def stage_before(plan: Plan, block: int) -> int:
    """The last stage in front of a block or of one before it; -1 if there is none."""
    return sum(start <= block for start in plan.stages) - 1

"""The pass that a model is running: its state, and what adaptations and reductions ask of it.

Shapes: B images, n kept patch tokens, L tokens before any pruning, K tokens of the sequence as it is, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.packed import PackedImages
from tokenprune.backbones.padded import Images
from tokenprune.pruning.attention_scopes import AttentionScopes
from tokenprune.pruning.budget import Thresholds
from tokenprune.pruning.executions import (
    AUTO,
    Execution,
    Paths,
    Whole,
    execution_class,
    execution_of,
    executions,
)
from tokenprune.pruning.frozen import FrozenImage, FrozenStage
from tokenprune.pruning.pass_state import PassState
from tokenprune.pruning.places import stage_before, stage_into, stands_inside
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.recomputation import NOTHING, recomputing
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.side_inputs import SideInputs
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout


class CurrentPass(nn.Module):
    """What is known while a model runs. It is the `RunningModel` of the backbone's adaptations.

    Attributes:
        stages: The stages, each with its scorer and its reduction.
        backbone: What the model looks like.
        trace: The record of the last forward pass; ``None`` before the first one and after an unpruned one.
        enabled: Whether the model runs pruned.
    """

    def __init__(self, plan: Plan, backbone: Backbone, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.backbone = backbone
        self.trace: Trace | None = None
        self.enabled = True
        self._plan = plan
        self._execution = AUTO
        self._inside = stands_inside(stages)
        self._frozen: tuple[FrozenStage, ...] | None = None
        self._prepare()

    @property
    def restores(self) -> bool:
        """Whether pruned tokens are restored behind every block: the reduction does so, or the model needs them."""
        return self._restores

    @property
    def thresholds_in_force(self) -> Thresholds | None:
        """By which stages keep different numbers of tokens of images; ``None`` where they keep as many of all."""
        return None

    # Decisions are kept by stage: activation checkpointing runs a block again, in the backward pass, and must then find
    # what was in force when it ran first.

    def _prepare(self) -> None:
        reductions = [cast(Stage, stage).reduction for stage in self.stages]
        needs_all = self.backbone.downstream == "all tokens" or self.backbone.packed is not None
        self._restores = needs_all or any(one.restores for one in reductions)
        self._whole = any(one.whole for one in reductions)
        self._anew = self._whole and any(one.anew for one in reductions)
        self._restoring = self._restores and not self._whole
        self._executions: dict[tuple[str, bool], Execution] = {}
        for name in executions():  # now, so that what is compiled of the first pass serves the second one too
            if not execution_class(name).obstacles(self.backbone):
                self._execution_of(name, None)
        self._scopes = AttentionScopes(self.backbone)
        self._pass = PassState()
        self.recomputed = NOTHING
        self._frozen_image = FrozenImage()
        self._frozen_inputs = SideInputs(self.backbone.token_inputs, self.backbone.neutral_inputs)

    _LIVE: ClassVar[list[str]] = [
        "trace", "_executions", "_scopes", "_sum", "_pass", "recomputed", "_frozen_image", "_frozen_inputs",
    ]  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._LIVE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.trace = None
        self._prepare()

    def _execution_of(self, name: str, images: Images | None) -> Execution:
        """The model's execution of a name, for those images where they are of different sizes."""
        kind = (name, images is not None)
        if kind not in self._executions:
            execution = execution_of(name, self.backbone, images)
            self._executions[kind] = Whole(execution) if self._whole else execution
        return self._executions[kind]

    def _selection(self, stage: int) -> Selection | None:
        """What is in force behind a stage; ``None`` in front of the first one, and in a pass without pruning."""
        selections = (self.recomputed if recomputing() else self._pass.state).selections
        return selections[stage] if self._pass.running is not None and 0 <= stage < len(selections) else None

    def _full_layout(self, block: int) -> Layout:
        """The sequence that a block would get had nothing been pruned."""
        assert self.trace is not None
        return self.backbone.layout_at(self.trace.start.layout, block)

    @property
    def keep_probabilities(self) -> tuple[float, ...]:
        """For each stage the fraction that it keeps of the tokens that it scores, in (0, 1]."""
        return self._plan.keep_ratios if self._anew else self._plan.keep_probabilities

    # What adaptations and reductions ask

    def paths(self, block: int) -> Paths | None:
        """How a block's tokens are split into two paths; ``None`` where all of them are kept."""
        selection, running = self._selection(stage_before(self._plan, block)), self._pass.running
        if selection is None or running is None or selection.all_kept:
            return None
        return running.paths(selection, self._full_layout(block))

    def kept_indices(self, block: int) -> Tensor | None:
        """(B, n) int64, the positions in the grid of the patch tokens that a block gets; ``None`` if all."""
        selection = self._selection(stage_into(self._plan, block, inside=self._inside))
        return None if selection is None or selection.all_kept else selection.indices_in_blocks

    def survival(self, block: int) -> list[Tensor] | None:
        """How long the tower has kept what each image token is made of, in the last pass: for each image (n,).

        Higher = longer, and among those kept as long, of a higher score. ``None`` after a pass without pruning.

        Args:
            block: The side of the square of patches that an image token is made of; where the model packs images, it is
                a merge group.
        """
        trace = self.trace
        if trace is None or not trace.selections:
            return None
        kept = torch.stack([keep.detach() for keep in trace.keep]).sum(dim=0)  # (B, N)
        if isinstance(trace.images, PackedImages):
            rows = zip(trace.images.num_groups, trace.images.lengths, trace.images.groups, kept, strict=True)
            return [row.new_zeros(n).scatter_(0, groups[:length], row[:length]) for n, length, groups, row in rows]
        if (scores := trace.scores[-1]) is not None:
            ranks = scores.detach().nan_to_num(nan=-torch.inf).argsort(dim=1).argsort(dim=1)
            kept = kept + ranks / ranks.shape[1]
        side = math.isqrt(trace.num_patches)
        height, width = trace.grid or (side, side)
        squares = kept.unflatten(1, (height // block, block, width // block, block))
        return list(squares.sum(dim=(2, 4)).flatten(1))

    def full_length(self) -> int | None:
        """L, where tokens are removed in this pass; ``None`` where all stay."""
        running, trace = self._pass.running, self.trace
        return None if running is None or trace is None or not running.removes else trace.start.layout.length

    def mask_weights(self, weights: Tensor) -> Tensor | None:
        """Finished attention weights (B, K, K, H) with those of pruned tokens at 0; ``None`` where all are seen."""
        running = self._pass.running
        return None if running is None or not self._scopes.entered else running.mask_weights(weights)

    def drops(self) -> bool:
        """Whether tokens are missing behind a block, for good."""
        return self.enabled and not self._restores and not self._plan.keeps_all

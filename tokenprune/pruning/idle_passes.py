"""Passes in which nothing is pruned: all of them is recorded at once, and the record stands for those made like it.

Shapes: B images, L tokens before any pruning, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.pruning.current_pass import CurrentPass
from tokenprune.pruning.executions import Execution
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import becomes_code


class IdlePasses(CurrentPass):
    """Knows when hooks have nothing to do any more in a pass, at keep ratio 1."""

    def _idles_again(self, args: tuple[Any, ...]) -> bool:
        """Whether a pass is idle as the last one was, whose record then stands, given the first block's arguments."""
        if becomes_code():  # which then has no guard for what other passes have left
            return False
        now, idled = self._pass, self._pass.idled
        if idled is None or not args or not (self.enabled and now.in_tower) or now.images is not None:
            return False
        manner, running, trace = idled
        if not isinstance(args[0], Tensor) or manner != self._manner(args[0]):
            return False
        now.open = now.idle = True
        if self.trace is not trace:
            self.trace, now.running = trace, running
        return True

    def _idles(self, running: Execution, trace: Trace, tokens: Tensor) -> bool:
        """Whether a pass on a sequence (B, L, C) is idle; all stages are then recorded."""
        now = self._pass
        if not (now.in_tower and self._plan.keeps_all and now.images is None) or self._inside:
            return False
        if torch.is_grad_enabled() and (running.trains or self.training):  # then more is to be recorded
            return False
        number, sampled = trace.num_patches, running.trains and self.training
        if not running.keeps_all(number, number, probability=1.0, sampled=sampled):
            return False
        selection = running.pass_all(trace.start, tokens)
        for block in self._plan.stages:
            layout = self.backbone.layout_at(selection.layout, block)
            trace.selections.append(selection if layout is selection.layout else selection.replace(layout=layout))
        if not becomes_code():
            now.idled = self._manner(tokens), running, trace
        return True

    def _manner(self, tokens: Tensor) -> tuple[Any, ...]:
        """All by which passes on sequences (B, L, C) are idle or not, and have one record or another."""
        return (
            self._plan, self._execution, self.thresholds_in_force, self.training, torch.is_grad_enabled(),
            self._pass.image_size, tokens.shape, tokens.device, type(tokens),
        )  # fmt: skip

"""Applying the decisions of stages to the tokens of a block, in either execution.

Shapes: B images, P prefix tokens, N patch tokens, n of them left, Q suffix tokens, L = P + N + Q,
K = P + n + Q, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.side_inputs import SideInputs
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.trace import Trace
from tokenprune.scorers import Candidates
from tokenprune.tokens import Layout, find_tokens, put_back, replace_tokens, select, sizes


class Decisions(NamedTuple):
    """What had been decided in front of a block in `mask` execution; entry s is stage s's.

    Attributes:
        keep: (B, N) each.
        masks: The same, or ``None`` while nothing is pruned.
        received: (B, N) each, what the stage's scorer was told of the attention in the block before;
            ``None`` where it does not ask.
    """

    keep: tuple[Tensor, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    received: tuple[Tensor | None, ...] = ()

    def upto(self, stage: int) -> Decisions:
        """Those of the stages up to one, that one included."""
        return Decisions(self.keep[: stage + 1], self.masks[: stage + 1], self.received[: stage + 1])


class Pruning:
    """What the blocks of one model get and give while its tokens are pruned."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.side_inputs = SideInputs(backbone.token_inputs)
        self._waiting: Tensor | None = None
        self._grid: tuple[int, ...] | None = None

    def forget(self) -> None:
        """Forget what belongs to a forward pass."""
        self.side_inputs.forget()
        self._waiting = None

    def find(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The tokens (B, L, C) among the arguments of a block."""
        tokens = find_tokens(block, args, kwargs, as_grid=self.backbone.grid_tokens)
        if not self.backbone.grid_tokens:
            return tokens
        self._grid = tuple(sizes(tokens)[1:3])
        return tokens.flatten(1, 2)

    def full_layout(self, num_patches: int) -> Layout:
        """The layout of the sequence that the first block gets."""
        return Layout(self.backbone.num_prefix_tokens, num_patches, self.backbone.num_suffix_tokens)

    def mask(
        self,
        stage: int,
        module: Stage,
        plan: Plan,
        trace: Trace,
        decided: Decisions,
        tokens: Tensor,
        received: Tensor | None,
    ) -> Decisions:
        """Have a stage decide in `mask` execution, on tokens (B, L, C), after what was decided before."""
        before = decided.keep[stage - 1] if stage > 0 else None
        if plan.keep_probabilities[stage] == 1.0:
            keep = tokens.new_ones(tokens.shape[0], trace.num_patches) if before is None else before
            mask = decided.masks[stage - 1] if stage > 0 else None
        else:
            candidates = _candidates(tokens, self._layout(tokens, trace.num_patches), before, None, trace, received)
            mask = keep = module.mask(candidates, plan.num_keep(trace.num_patches)[stage])
        return Decisions((*decided.keep, keep), (*decided.masks, mask), (*decided.received, received))

    def gather(
        self, stage: int, module: Stage, plan: Plan, trace: Trace, tokens: Tensor, received: Tensor | None
    ) -> Tensor:
        """Have a stage decide in `gather` execution, and remove: of tokens (B, K, C) those that go on.

        With ``put_back`` the tokens that a block is given are all of them, (B, L, C).
        """
        before = trace.indices[stage - 1] if stage > 0 else None
        tokens = self.left(tokens, before, trace)
        num_left = trace.num_patches if before is None else sizes(before)[1]
        num_keep = plan.num_keep(trace.num_patches)[stage]
        if num_keep >= num_left:
            everything = torch.arange(num_left, device=tokens.device).expand(tokens.shape[0], -1)
            trace.indices.append(everything if before is None else before)
            return tokens
        layout = self._layout(tokens, num_left)
        candidates = _candidates(tokens, layout, None, before, trace, received)
        chosen = module.gather(candidates, num_keep)  # (B, num_keep)
        trace.indices.append(chosen if before is None else before.gather(1, chosen))
        return select(tokens, layout.positions(chosen))

    def left(self, tokens: Tensor, indices: Tensor | None, trace: Trace) -> Tensor:
        """The tokens that a block runs on, of those it is given: with ``put_back`` these are all, and wait."""
        if not self.backbone.put_back:
            return tokens
        self._waiting = tokens
        if indices is None or sizes(indices)[1] == trace.num_patches:
            return tokens
        return select(tokens, self._layout(tokens, trace.num_patches).positions(indices))

    def wait(self, tokens: Tensor) -> None:
        """Keep all tokens (B, L, C) of a block for `complete`."""
        self._waiting = tokens if self.backbone.put_back else None

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with other tokens."""
        return replace_tokens(args, kwargs, tokens, as_grid=self.backbone.grid_tokens)

    def shorten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...], indices: Tensor, trace: Trace
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with its side inputs cut down to the patch tokens left, ``indices`` (B, n)."""
        if len(args) + len(kwargs) > 1 and sizes(indices)[1] < trace.num_patches:
            layout = self.full_layout(trace.num_patches)
            args, kwargs = self.side_inputs.shorten(args, kwargs, names, indices, layout)
        name = self.backbone.position_input
        if name is not None:
            place = names.index(name)
            if place < len(args):
                args = (*args[:place], indices, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: indices}
        return args, kwargs

    def complete(self, tokens: Tensor, keep: Tensor | None, indices: Tensor | None) -> Tensor | None:
        """All tokens after a block: those that it gave, and those that waited as they were before it.

        Args:
            tokens: What the block gave, (B, L, C) in `mask` and (B, K, C) in `gather` execution; or grids.
            keep: (B, N), in `mask` execution; ``None`` while nothing is pruned.
            indices: (B, n), in `gather` execution.

        Returns:
            (B, L, C), or a grid of them where the block takes grids; ``None`` if none waited.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        if self._grid is None:
            return self._completed(tokens, waiting, keep, indices)
        completed: Tensor = self._completed(tokens.flatten(1, 2), waiting, keep, indices).unflatten(1, self._grid)
        return completed

    def _completed(self, tokens: Tensor, waiting: Tensor, keep: Tensor | None, indices: Tensor | None) -> Tensor:
        if indices is not None and sizes(tokens)[1] < sizes(waiting)[1]:
            num_others = sizes(tokens)[1] - sizes(indices)[1]
            layout = self._layout(waiting, sizes(waiting)[1] - num_others)
            return put_back(tokens, layout.positions(indices), waiting)
        if keep is None:
            return tokens
        kept = self._layout(waiting, keep.shape[1]).with_others(keep).unsqueeze(-1).to(tokens.dtype)  # (B, L, 1)
        return tokens * kept + waiting * (1 - kept)

    def _layout(self, tokens: Tensor, num_patches: int) -> Layout:
        """The layout of a sequence with so many patch tokens: all others stand in front, but for the suffix."""
        num_suffix = self.backbone.num_suffix_tokens
        return Layout(sizes(tokens)[1] - num_patches - num_suffix, num_patches, num_suffix)


def _candidates(
    tokens: Tensor,
    layout: Layout,
    keep: Tensor | None,
    indices: Tensor | None,
    trace: Trace,
    received: Tensor | None,
) -> Candidates:
    return Candidates(
        patches=layout.patches(tokens),
        prefix=tokens[:, : layout.num_prefix],
        keep=keep,
        indices=indices,
        num_patches=trace.num_patches,
        grid=trace.grid,
        attention=received,
    )

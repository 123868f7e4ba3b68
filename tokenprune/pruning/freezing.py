"""Freezing: hooks and modes give way to the few that inference at fixed keep ratios needs, until they are put back.

Shapes: B images, N patch tokens of the whole image, n of them that reach a stage, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.adaptations import Adaptation
from tokenprune.errors import StateError
from tokenprune.pruning.frozen import FrozenStage
from tokenprune.pruning.hooks import PruningHooks
from tokenprune.pruning.plan import num_kept
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import find_tokens, replace_tokens


class FreezingHooks(PruningHooks):
    """Hooks that can be exchanged for those of a frozen model, which prune in front of stages and do nothing else."""

    @property
    def frozen(self) -> bool:
        """Whether the model is frozen; see `tokenprune.freeze`."""
        return self._frozen is not None

    def freezing_obstacles(self, trial: Trace | None) -> list[str]:
        """Why a model cannot be frozen; empty if it can.

        Args:
            trial: The record of a pass in `gather` execution; ``None`` if nothing was pruned in it.
        """
        stages = [cast(Stage, stage) for stage in self.stages]
        found = []
        if any(one.reduction.looks_at_pruned or one.reduction.whole for one in stages) or self._restores:
            found.append("pruned tokens are not simply dropped")
        if any(one.scorer.needs_recording for one in stages):
            found.append("its scorers need something of attention")
        if self._hands_on_kept():
            found.append("what follows its vision tower is handed the kept tokens")
        kinds = {type(one).__name__ for one in self.backbone.adaptations if self._acts(one)}
        if kinds:
            found.append(f"its blocks need more than tokens ({', '.join(sorted(kinds))})")
        if self.backbone.packed is not None:
            found.append("all images of a batch are packed into one sequence")
        if trial is None:
            found.append("the model runs dense")
        elif self._running is not None and self._running.gathered():
            found.append("its blocks are given something that has an entry for each token, such as rotary tables")
        return found

    def _acts(self, adaptation: Adaptation) -> bool:
        """Whether an adaptation has hooks that run with the blocks."""
        blocks = [self.backbone.blocks[index] for index in self.backbone.reach]
        handles = [*adaptation.install_outside(blocks, self), *adaptation.install_inside(blocks, self)]
        for handle in handles:
            handle.remove()
        return bool(handles) or adaptation in self._scopes.adapting

    def frozen_stages(self, trial: Trace, kind: type[FrozenStage] = FrozenStage) -> tuple[FrozenStage, ...]:
        """The stages as inference needs them, for sequences such as those of a pass."""
        before = [trial.start, *trial.selections[:-1]]
        layouts = [
            self.backbone.layout_at(one.layout, block) for one, block in zip(before, self._plan.stages, strict=True)
        ]
        return tuple(kind(cast(Stage, stage), layout) for stage, layout in zip(self.stages, layouts, strict=True))

    def _install_frozen(self) -> Iterator[RemovableHandle]:
        assert self._frozen is not None
        for number, (index, ratio) in enumerate(zip(self._plan.stages, self._plan.keep_ratios, strict=True)):
            if ratio < 1 or number == 0:  # the first one counts the patches of an image
                block = self.backbone.blocks[index]
                yield block.register_forward_pre_hook(partial(self._before_frozen, number), with_kwargs=True)

    def _before_frozen(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of a block at which a stage stands."""
        frozen = self._frozen
        if not self.enabled or frozen is None:
            return None
        if self.training:
            raise StateError("a frozen model runs in eval mode alone; call tokenprune.unfreeze(model) to train it.")
        if len(args) + len(kwargs) > 1:
            _check_alone(block, (*args[1:], *kwargs.values()) if args else [*kwargs.values()][1:])
        tokens, stage = find_tokens(block, args, kwargs), frozen[number]
        if number == 0:
            self._frozen_image = stage.num_patches(tokens), None
        num_patches, indices = self._frozen_image
        num_keep = num_kept(num_patches, self._plan.keep_ratios[number])
        if num_keep >= stage.num_patches(tokens):
            return None
        grid = self.backbone.grid_of(num_patches, None)
        tokens, indices = stage.prune(tokens, num_keep, indices=indices, num_patches=num_patches, grid=grid)
        self._frozen_image = num_patches, indices if number + 1 < len(frozen) else None
        return replace_tokens(args, kwargs, tokens)


def _check_alone(block: nn.Module, others: Sequence[Any]) -> None:
    """Refuse what a block is given besides tokens, which may have an entry for each of them.

    Raises:
        StateError: There is a tensor.
    """
    if any(isinstance(one, (Tensor, tuple, list)) and _holds_tensor(one) for one in others):
        raise StateError(
            f"{type(block).__name__} is given more tensors than tokens, such as a mask, and was not when the model was "
            "frozen; call tokenprune.unfreeze(model) to run it like that."
        )


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))

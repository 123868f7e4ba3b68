"""Freezing: hooks and modes give way to the few that inference at fixed keep ratios needs, until they are put back.

Shapes: B images, N patch tokens of the whole image, n of them that are left, L tokens before any pruning, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.adaptations import Removed, Scope
from tokenprune.errors import StateError
from tokenprune.pruning.frozen import FrozenImage, FrozenStage
from tokenprune.pruning.hooks import PruningHooks
from tokenprune.pruning.places import Place, places, stage_before
from tokenprune.pruning.plan import num_kept
from tokenprune.pruning.recording import Recorded
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.trace import Trace
from tokenprune.tokens import Layout, find_tokens, replace_tokens


class FreezingHooks(PruningHooks):
    """Hooks that can be exchanged for those of a frozen model, which prune in front of stages.

    Where something asks afterwards which tokens are left, they also gather what blocks are given besides tokens, and
    answer the backbone's adaptations. They record attention where scorers ask for it.
    """

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
        reductions = {type(one.reduction).__name__ for one in stages if one.reduction.restores or one.reduction.whole}
        scorers = {type(one.scorer).__name__ for one in stages if one.scorer.inside_block}
        if reductions:
            found.append(f"pruned tokens are still needed behind their stage ({', '.join(sorted(reductions))})")
        elif self._restores:
            found.append("what stands between or behind its blocks needs every token, so that pruned ones are restored")
        if scorers:
            found.append(f"its stages stand inside of blocks ({', '.join(sorted(scorers))})")
        if self.backbone.packed is not None:
            found.append("all images of a batch are packed into one sequence")
        if trial is None:
            found.append("the model runs dense")
        elif trial.images is not None and self.backbone.packed is None:
            found.append(_PADDED)
        elif not scorers and any(one.sizes is not None for one in trial.selections):
            found.append("tokens count in attention by how many they stand for")
        elif not scorers and any(one.notes is not None for one in trial.selections):
            found.append("its scorers hand notes on to those of later stages")
        return found

    def frozen_stages(self, trial: Trace, kind: type[FrozenStage] = FrozenStage) -> tuple[FrozenStage, ...]:
        """The stages as inference needs them, for sequences such as those of a pass that has just been made."""
        before = [trial.start, *trial.selections[:-1]]
        layouts = [
            self.backbone.layout_at(one.layout, block) for one, block in zip(before, self._plan.stages, strict=True)
        ]
        tracked = (
            (self._pass.running is not None and bool(self._pass.running.gathered()))
            or self._adapts()
            or any(cast(Stage, stage).scorer.needs_recording for stage in self.stages)
        )
        return tuple(
            kind(cast(Stage, stage), layout, tracked=tracked, ordered=self._hands_on_kept())
            for stage, layout in zip(self.stages, layouts, strict=True)
        )

    def _adapts(self) -> bool:
        """Whether adaptations act while blocks run."""
        blocks = [self.backbone.blocks[index] for index in self.backbone.reach]
        handles = [
            handle
            for one in self.backbone.adaptations
            for handle in (*one.install_outside(blocks, self), *one.install_inside(blocks, self))
        ]
        for handle in handles:
            handle.remove()
        return bool(handles or self._scopes.adapting)

    def _install_frozen(self, tower: nn.Module) -> Iterator[RemovableHandle]:
        """Put the hooks of a frozen model into the module that embeds images and runs the blocks."""
        assert self._frozen is not None
        blocks, tracked = [self.backbone.blocks[index] for index in self.backbone.reach], self._frozen[0].tracked
        if tracked:
            for adaptation in self.backbone.adaptations:
                yield from adaptation.install_outside(blocks, self)
        if self.backbone.patch_mask is not None:
            yield tower.register_forward_pre_hook(self._refuse_padded, with_kwargs=True)
        for place, block in zip(places(self._plan, self.backbone, list(self.stages)), blocks, strict=True):
            prunes = place.stage >= 0 and self._plan.keep_ratios[place.stage] < 1
            if place.starts and (prunes or place.stage == 0):  # the first one counts the patches of an image
                yield block.register_forward_pre_hook(partial(self._before_frozen, place), with_kwargs=True)
            elif tracked and prunes:
                yield block.register_forward_pre_hook(partial(self._for_those_left, place), with_kwargs=True)
            asked = place.awaited_by is not None and self._frozen[place.awaited_by].needs_recording
            if asked:
                yield block.register_forward_pre_hook(partial(self._before_asked, place), with_kwargs=True)
            if asked or (prunes and self._scopes.adapting):
                for attention in self.backbone.attention_modules(place.block):
                    yield attention.register_forward_pre_hook(partial(self._before_frozen_attention, place))
                    yield attention.register_forward_hook(partial(self._after_attention, place), always_call=True)
        if tracked:
            for adaptation in self.backbone.adaptations:
                yield from adaptation.install_inside(blocks, self)
            yield blocks[-1].register_forward_hook(self._after_frozen)

    def _before_frozen(
        self, place: Place, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of a block at which a stage stands."""
        frozen = self._frozen
        if not self.enabled or frozen is None:
            return None
        if self.training:
            raise StateError("a frozen model runs in eval mode alone; call tokenprune.unfreeze(model) to train it.")
        tokens, stage = find_tokens(block, args, kwargs), frozen[place.stage]
        # What an earlier pass has left is not even looked at: compiled code would have a guard for it.
        num_patches, indices, num_summary = FrozenImage() if place.stage == 0 else self._frozen_image
        number = stage.num_patches(tokens, num_summary)
        if num_patches == 0 or (indices is not None and indices.shape[1] != number):
            num_summary, indices = 0, None  # nothing has been pruned of them
            num_patches = number = stage.num_patches(tokens, 0)
        num_keep = num_kept(num_patches, self._plan.keep_ratios[place.stage])
        if num_keep < number:
            if not stage.tracked and len(args) + len(kwargs) > 1:
                _check_alone(block, (*args[1:], *kwargs.values()) if args else [*kwargs.values()][1:])
            tokens, indices = stage.prune(
                tokens, number, num_keep, indices=indices, num_patches=num_patches,
                grid=self.backbone.grid_of(num_patches, None),
                recorded=self._scopes.take_recorded() if stage.needs_recording else Recorded(),
            )  # fmt: skip
            num_summary += stage.num_summary
            args, kwargs = replace_tokens(args, kwargs, tokens)
            self._frozen_inputs.forget()
        asked = stage.tracked or place.stage + 1 < len(frozen)
        self._frozen_image = FrozenImage(num_patches, indices if asked else None, num_summary)
        return self._for_those_left(place, block, args, kwargs) or (args, kwargs)

    def _for_those_left(
        self, place: Place, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of a block behind a stage: what it is given besides tokens, for those that are left."""
        if self._frozen is None or not self._frozen[0].tracked or len(args) + len(kwargs) < 2:
            return None
        found = self._left(place)
        if found is None:
            return None
        left, full = found
        if find_tokens(block, args, kwargs).shape[1] != left.layout.length:  # somebody calls it by itself
            return None
        return self._frozen_inputs.gather(args, kwargs, place.names, left, full)

    def _left(self, place: Place) -> tuple[Selection, Layout] | None:
        """What is left in front of a block, and the whole sequence; ``None`` if nothing has been pruned of it."""
        _, indices, num_summary = self._frozen_image
        if not self.enabled or indices is None:
            return None
        full = self._full_layout(place.block)
        layout = full.replace(num_patches=indices.shape[1], num_summary=num_summary)
        return Selection(layout, indices=indices), full

    def _before_asked(self, place: Place, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of a block whose attention the scorer behind it asks for."""
        if not self.enabled or self._frozen is None:
            return
        self._scopes.take_recorded()  # of a block that somebody has called by itself
        if place.stage < 0:
            others = self.backbone.num_prefix_at(place.block) + self.backbone.num_suffix_tokens
            self._frozen_image = FrozenImage(find_tokens(block, args, kwargs).shape[1] - others)

    def _before_frozen_attention(self, place: Place, attention: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.enabled or self._frozen is None:
            return
        asked = place.awaited_by is not None and self._frozen[place.awaited_by].needs_recording
        found, asker = self._left(place), self._asker(place) if asked else None
        full = self._full_layout(place.block)
        scopes: list[Scope] = []
        if asker is not None:
            seen = Selection(full, all_kept=True) if found is None else found[0]
            scopes += self._scopes.of_selection(seen, self.backbone.attention_layouts(seen.layout, place.block), asker)
        if found is not None and self._scopes.adapting:
            assert found[0].indices is not None
            removed = Removed(full.positions(found[0].indices), full.length, self._frozen_inputs.tables())
            scopes += self._scopes.of_adaptations(attention, removed)
        if scopes:
            self._scopes.enter(scopes)

    def _after_frozen(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the last block: one that somebody calls by itself afterwards runs as it is."""
        if self._frozen is not None:
            self._frozen_image = FrozenImage()
            self._frozen_inputs.forget()

    def _refuse_padded(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse images of different sizes, of which a frozen model would keep equally many tokens."""
        if self.enabled and self._frozen is not None and self.backbone.images(tower, args, kwargs) is not None:
            raise StateError(f"{_PADDED}; call tokenprune.unfreeze(model) to run it like that.")

    # What adaptations ask

    def kept_indices(self, block: int) -> Tensor | None:
        if self._frozen is None:
            return super().kept_indices(block)
        return self._frozen_image.indices if self.enabled and stage_before(self._plan, block) >= 0 else None

    def full_length(self) -> int | None:
        if self._frozen is None:
            return super().full_length()
        return self._full_layout(0).length if self.enabled and self._frozen_image.num_patches else None

    def _full_layout(self, block: int) -> Layout:
        if self._frozen is None:
            return super()._full_layout(block)
        backbone, num_patches = self.backbone, self._frozen_image.num_patches
        layout = Layout(backbone.num_prefix_tokens, num_patches, num_suffix=backbone.num_suffix_tokens)
        return backbone.layout_at(layout, block)


_PADDED = "images of different sizes are rows of patches, padded to the longest"


def _check_alone(block: nn.Module, others: Sequence[Any]) -> None:
    """Refuse what a block is given besides tokens, which may have an entry for each of them.

    Raises:
        StateError: There is a tensor.
    """
    if any(isinstance(one, (Tensor, tuple, list)) and _holds_tensor(one) for one in others):
        raise StateError(
            f"{type(block).__name__} is given more tensors than tokens, such as a mask, and was not when the model was "
            "frozen; call tokenprune.unfreeze(model) to run it like that, or freeze it with such inputs."
        )


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))

"""The hooks that prune a model's tokens while it runs.

What depends on how decisions are carried out is asked of the pass's `Execution`, what a stage decides of its `Stage`.

Shapes: B images, P prefix tokens, N patch tokens, m of them that reach a stage, n kept ones, L tokens before any
pruning, K tokens of the sequence as it is, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.adaptations import Removed, Scope
from tokenprune.pruning import checks
from tokenprune.pruning.executions import Execution, chosen_execution
from tokenprune.pruning.idle_passes import IdlePasses
from tokenprune.pruning.places import Place, places, stage_before
from tokenprune.pruning.recomputation import NOTHING, State, recomputing, remember
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.token_sum import TokenSum
from tokenprune.pruning.trace import Trace, image_size_of
from tokenprune.scorers import Scorer
from tokenprune.tokens import find_tokens, output_tokens, replace_output_tokens, replace_tokens


class PruningHooks(IdlePasses):
    """Stages, and the hooks that ask them while a model runs.

    The hooks are bound methods of this module, which is a part of the model, so that copies and pickles of the model
    have hooks of their own.
    """

    def _install_hooks(self, tower: nn.Module) -> Iterator[RemovableHandle]:
        """Put the hooks into the module that embeds images and runs the blocks, one after the other."""
        blocks, first = [self.backbone.blocks[index] for index in self.backbone.reach], self._plan.stages[0]
        for adaptation in self.backbone.adaptations:
            yield from adaptation.install_outside(blocks, self)
        yield tower.register_forward_pre_hook(self._before_tower, with_kwargs=True)
        yield tower.register_forward_hook(self._after_tower, always_call=True)
        yield blocks[0].register_forward_pre_hook(self._before_first_block, with_kwargs=True)
        for place, block in zip(places(self._plan, self.backbone, list(self.stages)), blocks, strict=True):
            if place.block >= first:
                yield block.register_forward_pre_hook(partial(self._before_block, place), with_kwargs=True)
                # In front of hooks that collect hidden states, so that these see what the next block sees.
                yield block.register_forward_hook(partial(self._after_block, place), prepend=True)
            if (place.block >= first and not self._whole) or place.awaited_by is not None:
                for attention in self.backbone.attention_modules(place.block):
                    yield attention.register_forward_pre_hook(partial(self._before_attention, place))
                    yield attention.register_forward_hook(partial(self._after_attention, place), always_call=True)
        yield blocks[-1].register_forward_hook(self._after_last_block)
        if self.backbone.final_norm is not None:
            yield self.backbone.final_norm.register_forward_hook(self._after_final_norm)
        for adaptation in self.backbone.adaptations:
            yield from adaptation.install_inside(blocks, self)
        for stage in self.stages:
            yield from cast(Stage, stage).reduction.install(self)

    def _prepare(self) -> None:
        super()._prepare()
        self._sum = TokenSum(self._prune_inside)

    # Hooks

    def _before_tower(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        checks.check_no_replica(model)
        self._close()
        now = self._pass
        now.in_tower, now.grad_enabled, now.image_size = True, torch.is_grad_enabled(), image_size_of(args, kwargs)
        # With the sequence whole, all images have as many tokens on either path.
        now.images = self.backbone.images(model, args, kwargs) if self.enabled and not self._whole else None
        if self._inside and now.images is not None:
            checks.refuse_sizes()

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self._pass
        now.in_tower, now.image_size, now.images = False, None, None
        if now.idle:
            now.idle = now.open = False
            return None
        running, trace = now.running, self.trace
        self._close()
        if output is None or running is None or trace is None or self._restores or not trace.selections:
            return None
        stages = [stage_before(self._plan, index) for index in range(len(self.backbone.blocks))]
        output = running.hidden(output, trace, stages)
        if self._hands_on_kept():
            output = running.output(output, trace, self._plan.num_keep(trace.num_patches), stages)
        return output

    def _hands_on_kept(self) -> bool:
        """Whether the vision tower hands on the kept tokens alone."""
        return self.backbone.downstream == "any number" and not self._restores

    def _before_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() or self._idles_again(args):
            return
        now, backbone = self._pass, self.backbone
        self.trace, now.running, now.state, now.open, now.idle = None, None, NOTHING, False, False
        images = now.images
        frozen = self._frozen is not None  # never, but code that was compiled of this hook then has a guard for it
        if not self.enabled or frozen or (backbone.packed is not None and images is None):
            return
        tokens = find_tokens(block, args, kwargs, packed=self.backbone.packed is not None)
        layout, thresholds = checks.layout_of(block, tokens, backbone, images), self.thresholds_in_force
        name = chosen_execution(self._execution, training=self.training, by_image=thresholds is not None)
        running = self._execution_of(name, images)
        if running.trains and self.training and self._hands_on_kept():
            checks.refuse_training_in_place()
        running.begin()
        self._scopes.close()
        self.trace = Trace(
            execution=name,
            start=running.start(layout, images),
            num_prefix_tokens=backbone.num_prefix_at(len(backbone.blocks)),
            grid=None if images is not None else backbone.grid_of(layout.num_patches, now.image_size),
            restored=self._restores,
            whole=self._whole,
            anew=self._anew,
            thresholds=thresholds,
            images=images,
        )
        now.running, now.open = running, True
        now.idle = self._idles(running, self.trace, tokens)

    def _before_block(
        self, place: Place, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of a block behind a stage, which may stand right in front of it."""
        if self._pass.idle:
            return None
        again, running, trace = recomputing(), self._pass.running, self.trace
        if not (again or self._is_next(place, block)) or running is None or trace is None:
            return None
        checks.check_recomputed(running, trace.execution, block)
        if not place.starts and not self._restoring:
            return self._side_inputs(place, running, args, kwargs)
        given = tokens = find_tokens(block, args, kwargs, packed=self.backbone.packed is not None)  # (B, K, C)
        state = self.recomputed if again else self._pass.state
        passed, alone = place.stage - (1 if place.starts else 0), place.starts and self._anew
        before = trace.start if passed < 0 or alone else state.selections[passed]
        if self._restoring:
            tokens = self._resume(place, running, tokens, before, state)
        rectangles, now = self._restoring and not running.runs_packed, before
        if place.starts:
            tokens = tokens if rectangles else before.unpack(tokens)
            if running.trains:
                self._check_grad(block)
            tokens, now = self._prune(place.stage, place.block, tokens, before)
        if place.starts or rectangles:
            tokens = now.pack(tokens)
        if tokens is not given:
            args, kwargs = replace_tokens(args, kwargs, tokens)
        return self._side_inputs(place, running, args, kwargs) or (args, kwargs)

    def _prune(self, stage: int, block: int, tokens: Tensor, before: Selection) -> tuple[Tensor, Selection]:
        """Of the sequence (B, K, C) that reaches a stage, in front of a block or inside it, what goes on."""
        again, running, trace = recomputing(), cast(Execution, self._pass.running), cast(Trace, self.trace)
        counts = self._plan.num_keep(trace.num_patches)
        tokens, selection = cast(Stage, self.stages[stage]).prune(
            tokens,
            before.replace(layout=self.backbone.layout_at(before.layout, block)),
            running,
            trace,
            num_keep=counts[stage],
            num_reached=trace.num_patches if stage == 0 or self._anew else counts[stage - 1],
            probability=self.keep_probabilities[stage],
            recorded=self.recomputed.selections[stage].recorded if again else self._scopes.take_recorded(),
            threshold=trace.threshold(stage, counts[stage]) or trace.counts(stage, self._plan),
        )
        selection = running.lay_out(selection)
        if not again:
            now = self._pass
            now.state = now.state.replace(selections=(*now.state.selections, selection))
            trace.selections.append(selection)
        return tokens, selection

    def _prune_inside(self, place: Place, tokens: Tensor) -> Tensor:
        """Of the tokens that a block has between attention and MLP what goes on."""
        assert place.inside is not None and self.trace is not None
        before = self._selection(place.stage)
        before = self.trace.start if before is None else before
        tokens, selection = self._prune(place.inside, place.block, before.unpack(tokens), before)
        return selection.pack(tokens)

    def _is_next(self, place: Place, block: nn.Module) -> bool:
        """Whether the pass has come to a block; one that somebody calls by itself runs as it is."""
        now = self._pass
        decided = len(now.state.selections) if now.open else -1
        if decided == place.stage + (0 if place.starts else 1):
            return True
        if now.in_tower and self.enabled:
            checks.refuse_order(block, place.block)
        return False

    def _resume(self, place: Place, running: Execution, tokens: Tensor, before: Selection, state: State) -> Tensor:
        """Of all tokens (B, L, C) those that a block runs on, summary tokens included; all are remembered."""
        self._pass.everything, self._pass.entry = tokens, state
        layout = self.backbone.layout_at(before.layout, place.block).replace(num_summary=0)
        tokens = running.resume(tokens, before, self._full_layout(place.block))
        return tokens if state.summaries is None else layout.with_summaries(tokens, state.summaries)

    def _side_inputs(
        self, place: Place, running: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A block's arguments, what it is given besides tokens for those it runs on; ``None`` if nothing changes."""
        selection = self._selection(place.stage) if len(args) + len(kwargs) > 1 else None
        if selection is None:
            return None
        full = self._full_layout(place.block)
        return running.side_inputs(args, kwargs, place.names, selection, full)

    def _before_attention(self, place: Place, attention: nn.Module, args: tuple[Any, ...]) -> None:
        if self._pass.idle:
            return
        running, trace = self._pass.running, self.trace
        if running is None or trace is None:
            return
        selection, layouts = self._selection(place.stage), self.backbone.attention_layouts
        seen = trace.start if selection is None or self._whole else selection
        if not (running.intercepts or place.awaited_by is not None or self._scopes.adapting or seen.sizes is not None):
            return
        if place.inside is not None:
            checks.refuse_recomputing_inside(attention)
        scopes: list[Scope] = []
        if selection is not None:
            masking = running.attention(selection, layouts(selection.layout, place.block))
            if masking is not None:
                self._check_grad(attention)
                self._pass.attended = True
                scopes.append(masking)
        scopes += self._scopes.of_selection(seen, layouts(seen.layout, place.block), self._asker(place))
        if self._scopes.adapting and selection is not None and selection.indices is not None and running.removes:
            checks.check_recomputed(running, trace.execution, attention)
            full = self._full_layout(place.block)
            removed = Removed(full.positions(selection.indices), full.length, running.gathered())
            scopes += self._scopes.of_adaptations(attention, removed)
        if scopes:
            self._scopes.enter(scopes)

    def _after_attention(self, place: Place, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pass.idle:
            return
        if self._scopes.entered:
            self._scopes.leave(attention, failed=output is None)  # None: an exception is passing through
        if output is not None and self._pass.open and place.inside == len(self._pass.state.selections):
            self._sum.begin(place, output_tokens(output))

    def _asker(self, place: Place) -> Scorer | None:
        """The scorer that will ask what the attention of a block was; what is recorded is kept for recomputations."""
        stage = place.awaited_by
        if stage is None or self.keep_probabilities[stage] == 1 or recomputing():
            return None
        return cast(Stage, self.stages[stage]).scorer

    def _check_grad(self, module: nn.Module) -> None:
        expected = self._pass.in_tower and self._pass.grad_enabled
        checks.check_grad(module, expected=expected, enabled=torch.is_grad_enabled())

    def _after_block(self, place: Place, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._pass.idle:
            return None
        self._sum.end(block)
        running = self._pass.running
        if running is None or not (self._restoring or running.trains or running.intercepts):
            return None
        masked, selection = self._selection(place.stage), self._selection(place.behind)
        if selection is None:
            return None
        given = tokens = output_tokens(output)
        if (self._restoring or place.block == self.backbone.reach[-1]) and not running.runs_packed:
            tokens = selection.unpack(tokens)
        if self._restoring:
            if self._pass.everything is None:  # a block that somebody called by itself
                return None
            tokens = self._restore(place, running, tokens, selection)
        elif place.block == self.backbone.reach[-1]:
            tokens = running.complete(tokens, selection, self.backbone.layout_at(selection.layout, place.block))
            if self.trace is not None and not recomputing():
                self.trace.selections[-1] = self.trace.selections[-1].completed()
        if running.intercepts and masked is not None and not masked.all_kept and not torch.compiler.is_compiling():
            checks.check_attended(block, self._pass.attended)
            self._pass.attended = False
        if running.trains and not torch.compiler.is_compiling():
            state = self.recomputed if recomputing() else self._pass.state
            found = State(state.selections[: place.stage + 1], self._pass.entry.summaries if self._restoring else None)
            remember(self, tokens, found)
        return None if tokens is given else replace_output_tokens(output, tokens)

    def _restore(self, place: Place, running: Execution, tokens: Tensor, selection: Selection) -> Tensor:
        """All tokens (B, L, C) behind a block: those it gave (B, K, C), and the others as they were before it."""
        now = self._pass
        everything, now.everything = now.everything, None
        assert everything is not None
        layout = self.backbone.layout_at(selection.layout, place.block)
        if layout.num_summary:
            if not recomputing():
                now.state = now.state.replace(summaries=layout.summaries(tokens))
            tokens = layout.without_summaries(tokens)
        return running.restore(tokens, selection, everything, self._full_layout(place.block))

    def _after_last_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        now = self._pass
        if now.idle or recomputing():
            return
        if self.backbone.final_norm is None:
            self._record_tokens(output_tokens(output))
        now.open = now.open and now.in_tower
        running, trace = now.running, self.trace
        if not now.in_tower:  # a block that somebody calls by itself afterwards runs as it is
            now.state = NOTHING
        if running is None or trace is None or self._restores or not trace.selections:
            return
        tail = running.tail(trace.selections[-1], self.backbone.tail_layouts(trace.layout))
        if tail is None:
            return
        if now.in_tower:
            now.tail = tail
            tail.enter()
        else:
            checks.warn_of_pruned()

    def _after_final_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self._pass.idle:
            self._record_tokens(output)

    def _record_tokens(self, tokens: Tensor) -> None:
        running, trace = self._pass.running, self.trace
        if running is not None and trace is not None and torch.is_grad_enabled() and (running.trains or self.training):
            packed = self.backbone.packed is not None and tokens.dim() == 2
            trace.tokens = trace.start.unpack(tokens.unsqueeze(0) if packed else tokens)

    def _close(self) -> None:
        """Leave what is still entered: the tail's as a rule, a block's after an interrupted pass."""
        if self._sum.entered:
            self._sum.end(None)
        self._scopes.close()
        self._pass.end()

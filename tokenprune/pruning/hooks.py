"""The hooks that prune a model's tokens while it runs.

Shapes: B images, P prefix tokens, N patch tokens, n of them left, Q suffix tokens, L = P + N + Q, C channels.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbones.backbone import Backbone
from tokenprune.errors import InterceptionError, StateError
from tokenprune.pruning.attention import AttentionPatch
from tokenprune.pruning.executions.outputs import without_pruned
from tokenprune.pruning.executions.pooling import TailInterception
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.pruning import Decisions, Pruning
from tokenprune.pruning.stage import Stage
from tokenprune.pruning.trace import Trace
from tokenprune.scorers import Scorer
from tokenprune.tokens import output_tokens, sizes

Execution = Literal["auto", "mask", "gather"]


class PruningHooks(nn.Module):
    """Stages, and the hooks that ask them while a model runs.

    The hooks are bound methods of this module, which is a part of the model, so that copies and pickles of the model
    have hooks of their own.

    Attributes:
        stages: The stages, each with its scorer.
        backbone: What the model looks like.
        trace: The record of the last forward pass; ``None`` before the first one and after an unpruned one.
        enabled: Whether the model runs pruned.
    """

    def __init__(self, plan: Plan, backbone: Backbone, scorers: Sequence[Scorer]) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(scorer) for scorer in scorers])
        self.backbone = backbone
        self.trace: Trace | None = None
        self.enabled = True
        self._plan = plan
        self._execution: Execution = "auto"
        self._prepare()

    def _install_hooks(self, tower: nn.Module) -> Iterator[RemovableHandle]:
        """Put the hooks into the module that embeds images and runs the blocks, one after the other."""
        blocks, first = self.backbone.blocks, self._plan.stages[0]
        yield tower.register_forward_pre_hook(self._before_tower, with_kwargs=True)
        yield tower.register_forward_hook(self._after_tower, always_call=True)
        yield blocks[0].register_forward_pre_hook(self._before_first_block, with_kwargs=True)
        for index in range(first, len(blocks)):
            names = tuple(inspect.signature(blocks[index].forward).parameters)
            number = self._stage_before(index)
            before_block = partial(self._before_block, number, self._plan.stages[number] == index, names)
            yield blocks[index].register_forward_pre_hook(before_block, with_kwargs=True)
            # In front of hooks that collect hidden states, so that these see what the next block sees.
            after_block = partial(self._after_block, number)
            yield blocks[index].register_forward_hook(after_block, prepend=True)
        for index in range(len(blocks)):
            watcher = self._watcher_of(index)
            for attention in self.backbone.attention_modules(index) if index >= first or watcher is not None else ():
                before_attention = partial(self._before_attention, self._stage_before(index), watcher)
                yield attention.register_forward_pre_hook(before_attention)
                yield attention.register_forward_hook(self._after_attention, always_call=True)
        for module, keyword in self.backbone.length_inputs:
            yield module.register_forward_pre_hook(partial(self._before_counting, keyword), with_kwargs=True)
        for mixer in self.backbone.weight_mixers:
            yield mixer.register_forward_hook(self._after_weight_mixer)
        yield blocks[-1].register_forward_hook(self._after_last_block)
        if self.backbone.final_norm is not None:
            yield self.backbone.final_norm.register_forward_hook(self._after_final_norm)

    def _stage_before(self, index: int) -> int:
        """The last stage in front of block ``index`` or of one before it."""
        return sum(start <= index for start in self._plan.stages) - 1

    def _watcher_of(self, index: int) -> int | None:
        """The stage behind block ``index`` whose scorer goes by its attention, if there is one."""
        number = self._stage_before(index + 1)
        starts = number >= 0 and self._plan.stages[number] == index + 1
        return number if starts and cast(Stage, self.stages[number]).scorer.needs_attention else None

    # State of one forward pass. Decisions are kept by stage: activation checkpointing runs a block
    # again, in the backward pass, and must then find what was in force when it ran first.

    def _prepare(self) -> None:
        backbone = self.backbone
        self._pruning = Pruning(backbone)
        self._attention = AttentionPatch(backbone)
        self._tail = TailInterception()
        self._tail.num_prefix = backbone.num_prefix_tokens + backbone.num_late_prefix_tokens
        self._tail.num_suffix, self._tail.num_tail = backbone.num_suffix_tokens, backbone.num_tail_tokens
        self._in_tower = False
        self._attended = False
        self._image_size: tuple[int, int] | None = None
        self._grad_enabled = False
        self._decisions = Decisions()
        self._recomputed_decisions = Decisions()

    def __getstate__(self) -> dict[str, Any]:
        live = ("trace", "_pruning", "_attention", "_tail", "_decisions", "_recomputed_decisions")
        return {name: value for name, value in self.__dict__.items() if name not in live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.trace = None
        self._prepare()

    def _current_decisions(self) -> Decisions:
        return self._recomputed_decisions if _recomputing() else self._decisions

    # Hooks

    def _before_tower(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(model, "_is_replica", False):
            raise StateError(
                "nn.DataParallel makes copies whose hooks belong to the original model; use DistributedDataParallel."
            )
        self._close_interceptions()
        self._in_tower = True
        self._grad_enabled = torch.is_grad_enabled()
        self._image_size = next(
            (
                (value.shape[-2], value.shape[-1])
                for value in (*args, *kwargs.values())
                if isinstance(value, Tensor) and value.dim() == 4
            ),
            None,
        )

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._in_tower, self._image_size = False, None
        self._close_interceptions()
        trace = self.trace
        if output is None or not self.backbone.leave_pruned or trace is None or trace.execution != "mask":
            return None
        counts = self._plan.num_keep(trace.num_patches)
        stages = [self._stage_before(index) for index in range(len(self.backbone.blocks))]
        return without_pruned(output, trace.keep, counts, stages, self.backbone.num_suffix_tokens)

    def _before_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _recomputing():
            return
        self.trace, self._decisions = None, Decisions()
        if not self.enabled:
            return
        tokens = self._pruning.find(block, args, kwargs)
        if tokens.shape[2] != self.backbone.embed_dim:
            raise StateError(
                f"{type(block).__name__} got tokens of width {tokens.shape[2]}, and the Backbone says "
                f"embed_dim={self.backbone.embed_dim}."
            )
        num_others = self.backbone.num_prefix_tokens + self.backbone.num_suffix_tokens
        num_patches = sizes(tokens)[1] - num_others
        if num_patches < 1:
            raise StateError(
                f"{type(block).__name__} got {tokens.shape[1]} tokens, and {num_others} are "
                "prefix tokens; there is no patch token to prune."
            )
        by_mode: Literal["mask", "gather"] = "mask" if self.training else "gather"
        execution = by_mode if self._execution == "auto" else self._execution
        if execution == "mask" and self.training and self.backbone.leave_pruned:
            raise StateError(
                "in training, images keep different numbers of tokens, and what follows the vision tower takes equally "
                "many of each: train the tower by itself, or set model.tokenprune.execution = 'gather', in which "
                "scorers do not learn."
            )
        self._pruning.forget()
        self._attention.close()
        self.trace = Trace(
            execution=execution,
            num_patches=num_patches,
            num_prefix_tokens=self.backbone.num_prefix_tokens + self.backbone.num_late_prefix_tokens,
            grid=self._grid(num_patches),
        )

    def _grid(self, num_patches: int) -> tuple[int, int] | None:
        backbone = self.backbone
        if self._image_size is not None and backbone.patch_size is not None:
            (height, width), (patch_height, patch_width) = self._image_size, backbone.patch_size
            for grid in (
                (height // patch_height, width // patch_width),
                (-(-height // patch_height), -(-width // patch_width)),  # images padded to whole patches
            ):
                if grid[0] * grid[1] == num_patches:
                    return grid
            return None
        if backbone.grid_size is not None and math.prod(backbone.grid_size) == num_patches:
            return backbone.grid_size
        return None

    def _before_block(
        self,
        number: int,
        starts: bool,
        names: tuple[str, ...],
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of a block behind stage ``number``, which stands right in front of it if it ``starts`` there."""
        trace, pruning = self.trace, self._pruning
        if not self.enabled or trace is None:
            return None
        waits = self.backbone.put_back
        if trace.execution == "mask":
            if starts or waits:
                tokens = pruning.find(block, args, kwargs)  # (B, L, C)
                pruning.wait(tokens)
            if starts:
                self._check_grad(block)
                decided = self._current_decisions()
                received = decided.received[number] if _recomputing() else self._attention.take_received()
                stage = cast(Stage, self.stages[number])
                decisions = pruning.mask(number, stage, self._plan, trace, decided, tokens, received)
                if not _recomputing():
                    self._decisions = decisions
                    trace._keep.append(decisions.keep[-1])
            return None
        self._check_not_recomputed(block)
        if starts:
            pruning.side_inputs.forget()
            tokens, received = pruning.find(block, args, kwargs), self._attention.take_received()
            stage = cast(Stage, self.stages[number])
            tokens = pruning.gather(number, stage, self._plan, trace, tokens, received)
        elif waits:
            tokens = pruning.left(pruning.find(block, args, kwargs), trace.indices[number], trace)
        elif len(args) + len(kwargs) == 1 and self.backbone.position_input is None:
            return None  # tokens alone, which are those that are left
        if starts or waits:
            args, kwargs = pruning.replace(args, kwargs, tokens)
        return pruning.shorten(args, kwargs, names, trace.indices[number], trace)

    def _before_attention(self, stage: int, watcher: int | None, attention: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.enabled or self.trace is None:
            return
        if self.trace.execution == "gather" and watcher is None and not self._attention.cuts:
            return
        mask = self._mask_of(stage)
        if mask is not None:
            self._check_grad(attention)
            self._attended = True
            self._attention.mask(mask)
        elif stage >= 0 and self._attention.cuts and self._gathers():
            self._check_not_recomputed(attention)
            layout = self._pruning.full_layout(self.trace.num_patches)
            self._attention.cut(attention, self.trace.indices[stage], layout, self._pruning.side_inputs.tables())
        if watcher is not None and self._asks(watcher):
            left = self.trace.indices[stage] if stage >= 0 and self._gathers() else None
            self._attention.watch(self.trace.num_patches if left is None else sizes(left)[1])

    def _after_attention(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._attention.entered:
            self._attention.leave(attention, failed=output is None)  # None: an exception is passing through

    def _asks(self, number: int) -> bool:
        """Whether a stage's scorer will be asked in this pass; what it was told is kept for recomputations."""
        running = self.enabled and self.trace is not None and not _recomputing()
        return (
            running
            and self._plan.keep_probabilities[number] < 1
            and cast(Stage, self.stages[number]).scorer.needs_attention
        )

    def _before_counting(
        self, keyword: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.trace is None or not self._gathers() or kwargs.get(keyword) is None:
            return None
        return args, {**kwargs, keyword: self._pruning.full_layout(self.trace.num_patches).length}

    def _after_weight_mixer(self, mixer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._attention.mix(output)

    def _gathers(self) -> bool:
        return self.enabled and self.trace is not None and self.trace.execution == "gather"

    def _mask_of(self, stage: int) -> Tensor | None:
        """The decisions (B, N) in force after a stage in `mask` execution; ``None`` while nothing is pruned."""
        if not self.enabled or self.trace is None or self.trace.execution != "mask":
            return None
        masks = self._current_decisions().masks
        return masks[stage] if 0 <= stage < len(masks) else None

    def _after_block(self, stage: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.enabled or self.trace is None:
            return None
        if self.trace.execution == "gather" and not self.backbone.put_back:
            return None
        mask = self._mask_of(stage)
        indices = self.trace.indices[stage] if self._gathers() else None
        completed = self._pruning.complete(output_tokens(output), mask, indices)
        if mask is not None and not torch.compiler.is_compiling():
            self._check_attended(block)
            tokens = output_tokens(output) if completed is None else completed
            if tokens.requires_grad:
                # This gradient is the first thing known of the block in the backward pass, so a block
                # that is recomputed there finds the decisions of the forward pass it belongs to, even
                # if another one in training has run since. The reference is weak: a hook lives as long as the graph.
                decisions = self._current_decisions().upto(stage)
                tokens.register_hook(partial(_restore, weakref.ref(self), decisions))
        if completed is None:
            return None
        return (completed, *output[1:]) if isinstance(output, tuple) else completed

    def _check_attended(self, block: nn.Module) -> None:
        if not self._attended:
            raise InterceptionError(
                f"{type(block).__name__} never called the attention modules it was described with, so pruned tokens "
                "could not be masked; name in Backbone.attentions the modules that it calls (not their forward)."
            )
        self._attended = False

    def _after_last_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _recomputing():
            return
        if self.backbone.final_norm is None:
            self._record_tokens(output_tokens(output))
        mask = self._mask_of(len(self._plan.stages) - 1)
        if mask is None or self.backbone.put_back:
            return
        if self._in_tower:
            self._tail.keep = mask
            self._tail.enter()
        else:
            warnings.warn(
                "a method of a sparsified model was called in mask execution without calling the model itself: its "
                "tokens include pruned ones, which model.tokenprune.trace.keep[-1] tells apart before they are pooled.",
                stacklevel=2,
            )

    def _after_final_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._record_tokens(output)

    def _record_tokens(self, tokens: Tensor) -> None:
        if self.trace is not None and self.trace.execution == "mask" and torch.is_grad_enabled():
            self.trace.tokens = tokens

    def _close_interceptions(self) -> None:
        """Leave what is still entered: the tail's as a rule, a block's after an interrupted pass."""
        self._attention.close()
        if self._tail.keep is not None:
            self._tail.leave()
            self._tail.keep = None
        self._pruning.forget()

    def _check_not_recomputed(self, module: nn.Module) -> None:
        if _recomputing():  # the tokens left are those of the latest forward pass, which need not be this one's
            raise StateError(
                f"activation checkpointing runs {type(module).__name__} again in gather execution; train in mask "
                "execution, or without checkpointing."
            )

    def _check_grad(self, module: nn.Module) -> None:
        if self._in_tower and self._grad_enabled and not torch.is_grad_enabled():
            raise StateError(
                f"{type(module).__name__} runs without gradients inside a forward pass with them: re-entrant "
                "activation checkpointing loses the gradients of the keep decisions. Use use_reentrant=False."
            )


def _restore(hooks: weakref.ref[PruningHooks], decisions: Decisions, grad: Tensor) -> None:
    alive = hooks()
    if alive is not None:
        alive._recomputed_decisions = decisions


def _recomputing() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

"""The Sparsifier: hooks in somebody else's model that prune its tokens while it runs.

Shapes: B images, P prefix tokens, N patch tokens, n of them left, Q suffix tokens, L = P + N + Q, C channels.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.backbone import Backbone, Setting
from tokenprune.errors import InterceptionError, StateError
from tokenprune.grid_methods import GridMethod
from tokenprune.interception import BlockInterception, GatherInterception, TailInterception
from tokenprune.outputs import without_pruned
from tokenprune.plan import Plan
from tokenprune.scorers import Candidates, Scorer
from tokenprune.side_inputs import SideInputs, gather_tokens
from tokenprune.stage import Stage
from tokenprune.tokens import Layout, find_tokens, output_tokens, put_back, replace_tokens, select
from tokenprune.trace import Trace

Execution = Literal["auto", "mask", "gather"]


class _Decisions(NamedTuple):
    """What had been decided in front of a block in `mask` execution; entry s is stage s's.

    Attributes:
        keep: (B, N) each.
        masks: The same, or ``None`` while nothing is pruned.
    """

    keep: tuple[Tensor, ...] = ()
    masks: tuple[Tensor | None, ...] = ()


class Sparsifier(nn.Module):
    """Attached to a model as ``model.tokenprune`` by `tokenprune.sparsify`; holds all that it adds.

    One forward pass at a time may run on a model: its record is kept here.

    Attributes:
        stages: The stages, each with its scorer.
        backbone: What the model looks like.
        trace: The record of the last forward pass; ``None`` before the first one and after an
            unpruned one.
        enabled: Whether the model runs pruned; see `disabled`.
    """

    def __init__(self, plan: Plan, backbone: Backbone, scorers: Sequence[Scorer]) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(scorer) for scorer in scorers])
        self.trace: Trace | None = None
        self.backbone = backbone
        self._plan = plan
        self._execution: Execution = "auto"
        self.enabled = True
        self._handles: list[RemovableHandle] = []
        self._previous_settings: list[Setting] = []
        self._side_inputs = SideInputs(backbone.token_inputs)
        self._make_interceptions()
        self._forget_forward()

    # What users set and read

    @property
    def plan(self) -> Plan:
        """Where is pruned and how much is kept."""
        return self._plan

    @property
    def keep_ratio(self) -> tuple[float, ...]:
        """The cumulative keep ratios, one a stage; set to a number or a sequence to change them.

        Raises:
            PlanError: On setting ratios that make no plan; nothing is changed.
        """
        return self._plan.keep_ratios

    @keep_ratio.setter
    def keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        self._plan = self._plan.with_keep_ratio(keep_ratio)

    @property
    def execution(self) -> Execution:
        """``"auto"`` (mask in training mode, gather in eval mode), ``"mask"`` or ``"gather"``.

        Raises:
            ValueError: On setting anything else.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution not in ("auto", "mask", "gather"):
            raise ValueError(f"execution={execution!r}: choose 'auto', 'mask' or 'gather'.")
        self._execution = execution

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts, the model runs unpruned."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    # Attaching and detaching

    def attach(self, model: nn.Module) -> None:
        """Install everything in ``model``, or, if anything fails, nothing."""
        try:
            for setting in self.backbone.settings:
                previous = Setting(owner=setting.owner, name=setting.name, value=getattr(setting.owner, setting.name))
                setattr(setting.owner, setting.name, setting.value)
                self._previous_settings.append(previous)
            for name in self.backbone.grid_methods:
                self._tower(model).__dict__[name] = GridMethod(self, self._tower(model), name)
            self._handles += self._install_hooks(model)
            model.add_module("tokenprune", self)
        except BaseException:
            self.detach(model)
            raise

    def detach(self, model: nn.Module) -> None:
        """Take everything out of ``model`` again."""
        self._close_interceptions()
        for handle in self._handles:
            handle.remove()
        for setting in reversed(self._previous_settings):
            setattr(setting.owner, setting.name, setting.value)
        for name in self.backbone.grid_methods:
            self._tower(model).__dict__.pop(name, None)
        model._modules.pop("tokenprune", None)
        self._handles, self._previous_settings, self.trace = [], [], None

    def _tower(self, model: nn.Module) -> nn.Module:
        return model if self.backbone.tower is None else self.backbone.tower

    def _install_hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        blocks, first = self.backbone.blocks, self._plan.stages[0]
        tower = self._tower(model)
        yield tower.register_forward_pre_hook(self._before_tower, with_kwargs=True)
        yield tower.register_forward_hook(self._after_tower, always_call=True)
        yield blocks[0].register_forward_pre_hook(self._before_first_block, with_kwargs=True)
        for index in range(first, len(blocks)):
            names = tuple(inspect.signature(blocks[index].forward).parameters)
            yield blocks[index].register_forward_pre_hook(partial(self._before_block, index, names), with_kwargs=True)
            stage = self._stage_before(index)
            for attention in self.backbone.attention_modules(index):
                yield attention.register_forward_pre_hook(partial(self._before_attention, stage))
                yield attention.register_forward_hook(partial(self._after_attention, stage), always_call=True)
            # In front of hooks that collect hidden states, so that these see what the next block sees.
            yield blocks[index].register_forward_hook(partial(self._after_block, stage), prepend=True)
        for mixer in self.backbone.weight_mixers:
            yield mixer.register_forward_hook(self._after_weight_mixer)
        yield blocks[-1].register_forward_hook(self._after_last_block)
        if self.backbone.final_norm is not None:
            yield self.backbone.final_norm.register_forward_hook(self._after_final_norm)

    def _stage_before(self, index: int) -> int:
        """The last stage in front of block ``index`` or of one before it."""
        return sum(start <= index for start in self._plan.stages) - 1

    def _make_interceptions(self) -> None:
        backbone = self.backbone
        num_prefix, num_late = backbone.num_prefix_tokens, backbone.num_late_prefix_tokens
        self._block_interception = BlockInterception()
        self._block_interception.num_prefix = (num_prefix, num_prefix + num_late) if num_late else (num_prefix,)
        self._block_interception.num_suffix = backbone.num_suffix_tokens + backbone.num_inner_tokens
        self._gather_interception = GatherInterception()
        self._tail_interception = TailInterception()
        self._tail_interception.num_prefix = num_prefix + num_late
        self._tail_interception.num_suffix = backbone.num_suffix_tokens
        self._tail_interception.num_tail = backbone.num_tail_tokens

    # State of one forward pass. Decisions are kept by stage: activation checkpointing runs a block
    # again, in the backward pass, and must then find what was in force when it ran first.

    def _forget_forward(self) -> None:
        self._in_tower = False
        self._attended = False
        self._image_size: tuple[int, int] | None = None
        self._grad_enabled = False
        self._waiting: Tensor | None = None
        self._full_tables: list[Tensor] = []
        self._decisions = _Decisions()
        self._recomputed_decisions = _Decisions()

    def __getstate__(self) -> dict[str, Any]:
        live = {"trace", "_decisions", "_recomputed_decisions", "_waiting", "_full_tables", "_image_size"}
        live |= {"_block_interception", "_gather_interception", "_tail_interception", "_side_inputs"}
        return {name: value for name, value in self.__dict__.items() if name not in live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.trace = None
        self._side_inputs = SideInputs(self.backbone.token_inputs)
        self._make_interceptions()
        self._forget_forward()

    def _current_decisions(self) -> _Decisions:
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
        self.trace, self._decisions = None, _Decisions()
        if not self.enabled:
            return
        tokens = self._find_tokens(block, args, kwargs)
        if tokens.shape[2] != self.backbone.embed_dim:
            raise StateError(
                f"{type(block).__name__} got tokens of width {tokens.shape[2]}, and the Backbone says "
                f"embed_dim={self.backbone.embed_dim}."
            )
        num_others = self.backbone.num_prefix_tokens + self.backbone.num_suffix_tokens
        num_patches = tokens.shape[1] - num_others
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
        self._side_inputs.forget()
        self.trace = Trace(
            execution=execution,
            num_patches=num_patches,
            num_prefix_tokens=self.backbone.num_prefix_tokens,
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

    def _find_tokens(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return find_tokens(block, args, kwargs, as_grid=self.backbone.grid_tokens)

    def _layout(self, tokens: Tensor, num_patches: int) -> Layout:
        """The layout of a sequence with so many patch tokens: all other tokens stand in front, but for the suffix."""
        num_suffix = self.backbone.num_suffix_tokens
        return Layout(tokens.shape[1] - num_patches - num_suffix, num_patches, num_suffix)

    def _before_block(
        self, index: int, names: tuple[str, ...], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        trace = self.trace
        if not self.enabled or trace is None:
            return None
        stage = self._stage_before(index)
        starts = self._plan.stages[stage] == index
        if trace.execution == "mask":
            if starts or self.backbone.put_back:
                tokens = self._find_tokens(block, args, kwargs)  # (B, L, C)
                if starts:
                    self._check_grad(block)
                    self._mask(stage, trace, tokens)
                self._waiting = tokens if self.backbone.put_back else None
            return None
        if starts:
            self._side_inputs.forget()
        if starts or self.backbone.put_back:
            tokens = self._gather(stage, trace, self._find_tokens(block, args, kwargs), decide=starts)
            args, kwargs = replace_tokens(args, kwargs, tokens, as_grid=self.backbone.grid_tokens)
        return self._shorten_side_inputs(trace, trace.indices[stage], names, args, kwargs)

    def _shorten_side_inputs(
        self, trace: Trace, indices: Tensor, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        backbone = self.backbone
        if len(args) + len(kwargs) > 1 and indices.shape[1] < trace.num_patches:
            layout = Layout(backbone.num_prefix_tokens, trace.num_patches, backbone.num_suffix_tokens)
            args, kwargs = self._side_inputs.shorten(args, kwargs, names, indices, layout)
        if backbone.position_input is not None:
            place = names.index(backbone.position_input)
            if place < len(args):
                args = (*args[:place], indices, *args[place + 1 :])
            else:
                kwargs = {**kwargs, backbone.position_input: indices}
        return args, kwargs

    def _mask(self, stage: int, trace: Trace, tokens: Tensor) -> None:
        decisions = self._current_decisions()
        before = decisions.keep[stage - 1] if stage > 0 else None
        if self._plan.keep_probabilities[stage] == 1.0:
            keep = tokens.new_ones(tokens.shape[0], trace.num_patches) if before is None else before
            mask = decisions.masks[stage - 1] if stage > 0 else None
        else:
            candidates = self._candidates(tokens, self._layout(tokens, trace.num_patches), before, None, trace)
            mask = keep = self._stage(stage).mask(candidates, self._plan.num_keep(trace.num_patches)[stage])
        if not _recomputing():
            self._decisions = _Decisions((*decisions.keep, keep), (*decisions.masks, mask))
            trace._keep.append(keep)

    def _gather(self, stage: int, trace: Trace, tokens: Tensor, *, decide: bool) -> Tensor:
        """The tokens that go on; with ``put_back`` those that do not wait in ``tokens``, which has all of them."""
        before = (trace.indices[stage - 1] if stage > 0 else None) if decide else trace.indices[stage]
        if self.backbone.put_back:
            full = self._layout(tokens, trace.num_patches)
            self._waiting = tokens
            if before is not None:
                tokens = select(tokens, full.positions(before))
        num_left = trace.num_patches if before is None else before.shape[1]
        if not decide:
            return tokens
        num_keep = self._plan.num_keep(trace.num_patches)[stage]
        if num_keep >= num_left:
            everything = torch.arange(num_left, device=tokens.device).expand(tokens.shape[0], -1)
            self._record_indices(stage, trace, everything if before is None else before)
            return tokens
        layout = self._layout(tokens, num_left)
        chosen = self._stage(stage).gather(self._candidates(tokens, layout, None, before, trace), num_keep)
        self._record_indices(stage, trace, chosen if before is None else before.gather(1, chosen))
        return select(tokens, layout.positions(chosen))

    def _record_indices(self, stage: int, trace: Trace, indices: Tensor) -> None:
        if stage == len(trace.indices):  # activation checkpointing comes here once more
            trace.indices.append(indices)

    def _stage(self, index: int) -> Stage:
        return cast(Stage, self.stages[index])

    def _candidates(
        self, tokens: Tensor, layout: Layout, keep: Tensor | None, indices: Tensor | None, trace: Trace
    ) -> Candidates:
        return Candidates(
            patches=layout.patches(tokens),
            prefix=tokens[:, : layout.num_prefix],
            keep=keep,
            indices=indices,
            num_patches=trace.num_patches,
            grid=trace.grid,
        )

    def _before_attention(self, stage: int, attention: nn.Module, args: tuple[Any, ...]) -> None:
        mask = self._mask_of(stage)
        if mask is not None:
            self._check_grad(attention)
            self._attended = True
            self._block_interception.keep, self._block_interception.hits = mask, 0
            self._block_interception.enter()
        elif self._gathers():
            backbone = self.backbone
            if backbone.biased_attention or backbone.token_tables or backbone.shared_token_inputs:
                self._shorten_attention(stage, attention)

    def _shorten_attention(self, stage: int, attention: nn.Module) -> None:
        trace, backbone = self.trace, self.backbone
        assert trace is not None
        layout = Layout(backbone.num_prefix_tokens, trace.num_patches, backbone.num_suffix_tokens)
        positions = layout.positions(trace.indices[stage])
        if backbone.biased_attention or backbone.shared_token_inputs:
            self._gather_interception.positions = positions
            self._gather_interception.tables = self._side_inputs.tables() if backbone.shared_token_inputs else ()
            self._gather_interception.length = layout.length
            self._gather_interception.enter()
        for table in backbone.token_tables:
            if table.owner is attention:
                full = getattr(attention, table.name)
                if full is None or full.shape[table.pattern.split().index("n")] != layout.length:
                    full = table.build(layout.length)
                self._full_tables.append(full)
                setattr(attention, table.name, gather_tokens(full, table.pattern, positions))

    def _restore_attention(self, attention: nn.Module) -> None:
        if self._gather_interception.positions is not None:
            self._gather_interception.leave()
            self._gather_interception.positions = None
        if self._full_tables:
            for table in self.backbone.token_tables:
                if table.owner is attention:
                    setattr(attention, table.name, self._full_tables.pop(0))

    def _after_attention(self, stage: int, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._restore_attention(attention)
        interception = self._block_interception
        if interception.keep is None:
            return
        interception.leave()
        interception.keep = None
        if interception.hits == 0 and output is not None:  # None: an exception is passing through
            raise InterceptionError(
                f"the attention of {type(attention).__name__} passed neither through scaled_dot_product_attention nor "
                "through a softmax over all tokens, so pruned tokens could not be masked; use its fused (SDPA) "
                "attention."
            )

    def _after_weight_mixer(self, mixer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._block_interception.keep is None else self._block_interception.mix(output)

    def _gathers(self) -> bool:
        return self.enabled and self.trace is not None and self.trace.execution == "gather"

    def _mask_of(self, stage: int) -> Tensor | None:
        """The decisions (B, N) in force after a stage in `mask` execution; ``None`` while nothing is pruned."""
        if not self.enabled or self.trace is None or self.trace.execution != "mask":
            return None
        masks = self._current_decisions().masks
        return masks[stage] if stage < len(masks) else None

    def _after_block(self, stage: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        mask = self._mask_of(stage)
        if mask is not None and not torch.compiler.is_compiling():
            self._check_attended(block)
            tokens = output_tokens(output)
            if tokens.requires_grad:
                # This gradient is the first thing known of the block in the backward pass, so a block
                # that is recomputed there finds the decisions of the forward pass it belongs to, even
                # if another one in training has run since. The reference is weak: a hook lives as long as the graph.
                decisions = self._current_decisions()
                upto = _Decisions(decisions.keep[: stage + 1], decisions.masks[: stage + 1])
                tokens.register_hook(partial(_restore, weakref.ref(self), upto))
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        tokens = self._put_back(stage, output_tokens(output), waiting, mask)
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def _put_back(self, stage: int, tokens: Tensor, waiting: Tensor, mask: Tensor | None) -> Tensor:
        """All tokens after a block: those that it was given, the others as they were before it."""
        assert self.trace is not None
        layout = self._layout(waiting, self.trace.num_patches)
        if self.trace.execution == "gather":
            return put_back(tokens, layout.positions(self.trace.indices[stage]), waiting)
        if mask is None:
            return tokens
        keep = layout.with_others(mask).unsqueeze(-1).to(tokens.dtype)  # (B, L, 1)
        return tokens * keep + waiting * (1 - keep)

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
            self._tail_interception.keep = mask
            self._tail_interception.enter()
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
        for masking in (self._block_interception, self._tail_interception):
            if masking.keep is not None:
                masking.leave()
                masking.keep = None
        if self._gather_interception.positions is not None:
            self._gather_interception.leave()
            self._gather_interception.positions = None
        self._waiting = None

    def _check_grad(self, module: nn.Module) -> None:
        if self._in_tower and self._grad_enabled and not torch.is_grad_enabled():
            raise StateError(
                f"{type(module).__name__} runs without gradients inside a forward pass with them: re-entrant "
                "activation checkpointing loses the gradients of the keep decisions. Use use_reentrant=False."
            )


def _restore(sparsifier: weakref.ref[Sparsifier], decisions: _Decisions, grad: Tensor) -> None:
    alive = sparsifier()
    if alive is not None:
        alive._recomputed_decisions = decisions


def _recomputing() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

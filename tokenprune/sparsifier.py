"""The Sparsifier: hooks in somebody else's model that prune its tokens while it runs.

Shapes: B images, N patch tokens, n of them left, P prefix tokens, L = P + N, C channels.
"""

from __future__ import annotations

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
from tokenprune.interception import BlockInterception, TailInterception
from tokenprune.plan import Plan
from tokenprune.scorers import Candidates, Scorer
from tokenprune.side_inputs import shorten
from tokenprune.stage import Stage
from tokenprune.trace import Trace

Execution = Literal["auto", "mask", "gather"]


class _Decisions(NamedTuple):
    """What had been decided in front of a block in `mask` execution; entry s is stage s's.

    Attributes:
        keep: (B, N) each.
        keys: (B, L) each: ``keep`` with ones for the prefix tokens; ``None`` while nothing is pruned.
    """

    keep: tuple[Tensor, ...] = ()
    keys: tuple[Tensor | None, ...] = ()


class Sparsifier(nn.Module):
    """Attached to a model as ``model.tokenprune`` by `tokenprune.sparsify`; holds all that it adds.

    One forward pass at a time may run on a model: its record is kept here.

    Attributes:
        stages: The stages, each with its scorer.
        backbone: What the model looks like.
        trace: The record of the last forward pass; ``None`` before the first one and after an
            unpruned one.
    """

    def __init__(self, plan: Plan, backbone: Backbone, scorers: Sequence[Scorer]) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(scorer) for scorer in scorers])
        self.trace: Trace | None = None
        self.backbone = backbone
        self._plan = plan
        self._execution: Execution = "auto"
        self._enabled = True
        self._handles: list[RemovableHandle] = []
        self._previous_settings: list[Setting] = []
        self._block_interception = BlockInterception()
        self._tail_interception = TailInterception()
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
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    # Attaching and detaching

    def attach(self, model: nn.Module) -> None:
        """Install everything in ``model``, or, if anything fails, nothing."""
        try:
            for setting in self.backbone.settings:
                previous = Setting(owner=setting.owner, name=setting.name, value=getattr(setting.owner, setting.name))
                setattr(setting.owner, setting.name, setting.value)
                self._previous_settings.append(previous)
            for name in self.backbone.grid_methods:
                model.__dict__[name] = GridMethod(self, model, name)
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
            model.__dict__.pop(name, None)
        model._modules.pop("tokenprune", None)
        self._handles, self._previous_settings, self.trace = [], [], None

    def _install_hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        blocks, first = self.backbone.blocks, self._plan.stages[0]
        yield model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        yield model.register_forward_hook(self._after_model, always_call=True)
        yield blocks[0].register_forward_pre_hook(self._before_first_block, with_kwargs=True)
        for stage, index in enumerate(self._plan.stages):
            yield blocks[index].register_forward_pre_hook(partial(self._at_stage, stage), with_kwargs=True)
        for index in range(first, len(blocks)):
            yield blocks[index].register_forward_pre_hook(self._before_pruned_block, with_kwargs=True)
            stage = sum(start <= index for start in self._plan.stages) - 1
            for attention in self.backbone.attention_modules(index):
                yield attention.register_forward_pre_hook(partial(self._before_attention, stage))
                yield attention.register_forward_hook(partial(self._after_attention, stage), always_call=True)
            yield blocks[index].register_forward_hook(partial(self._after_block, stage))
        yield blocks[-1].register_forward_hook(self._after_last_block)
        if self.backbone.final_norm is not None:
            yield self.backbone.final_norm.register_forward_hook(self._after_final_norm)

    # State of one forward pass. Decisions are kept by stage: activation checkpointing runs a block
    # again, in the backward pass, and must then find what was in force when it ran first.

    def _forget_forward(self) -> None:
        self._in_model = False
        self._attended = False
        self._image_size: tuple[int, int] | None = None
        self._grad_enabled = False
        self._decisions = _Decisions()
        self._recomputed_decisions = _Decisions()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(
            trace=None,
            _in_model=False,
            _image_size=None,
            _decisions=_Decisions(),
            _recomputed_decisions=_Decisions(),
            _block_interception=BlockInterception(),
            _tail_interception=TailInterception(),
        )
        return state

    def _current_decisions(self) -> _Decisions:
        return self._recomputed_decisions if _recomputing() else self._decisions

    # Hooks

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(model, "_is_replica", False):
            raise StateError(
                "nn.DataParallel makes copies whose hooks belong to the original model; use DistributedDataParallel."
            )
        self._close_interceptions()
        self._in_model = True
        self._grad_enabled = torch.is_grad_enabled()
        self._image_size = next(
            (
                (value.shape[-2], value.shape[-1])
                for value in (*args, *kwargs.values())
                if isinstance(value, Tensor) and value.dim() == 4
            ),
            None,
        )

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_model, self._image_size = False, None
        self._close_interceptions()

    def _before_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _recomputing():
            return
        self.trace, self._decisions = None, _Decisions()
        if not self._enabled:
            return
        tokens = _tokens(block, args, kwargs)
        if tokens.shape[2] != self.backbone.embed_dim:
            raise StateError(
                f"{type(block).__name__} got tokens of width {tokens.shape[2]}, and the Backbone says "
                f"embed_dim={self.backbone.embed_dim}."
            )
        num_patches = tokens.shape[1] - self.backbone.num_prefix_tokens
        if num_patches < 1:
            raise StateError(
                f"{type(block).__name__} got {tokens.shape[1]} tokens, and {self.backbone.num_prefix_tokens} are "
                "prefix tokens; there is no patch token to prune."
            )
        by_mode: Literal["mask", "gather"] = "mask" if self.training else "gather"
        self.trace = Trace(
            execution=by_mode if self._execution == "auto" else self._execution,
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

    def _at_stage(
        self, stage: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        trace = self.trace
        if not self._enabled or trace is None:
            return None
        tokens = _tokens(block, args, kwargs)  # (B, L or P + n, C)
        if trace.execution == "mask":
            self._check_grad(block)
            self._mask(stage, trace, tokens)
            return None
        return _with_tokens(args, kwargs, self._gather(stage, trace, tokens))

    def _before_pruned_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        trace = self.trace
        if not self._enabled or trace is None or trace.execution != "gather":
            return None
        if not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            return None
        num_prefix = trace.num_prefix_tokens
        return shorten(args, kwargs, _with_prefix(trace.indices[-1], num_prefix), num_prefix + trace.num_patches)

    def _mask(self, stage: int, trace: Trace, tokens: Tensor) -> None:
        decisions = self._current_decisions()
        before = decisions.keep[stage - 1] if stage > 0 else None
        if self._plan.keep_probabilities[stage] == 1.0:
            keep = tokens.new_ones(tokens.shape[0], trace.num_patches) if before is None else before
            keys = decisions.keys[stage - 1] if stage > 0 else None
        else:
            candidates = self._candidates(tokens, before, None, trace)
            keep = self._stage(stage).mask(candidates, self._plan.num_keep(trace.num_patches)[stage])
            keys = torch.cat([keep.new_ones(keep.shape[0], trace.num_prefix_tokens), keep], dim=1)
        if not _recomputing():
            self._decisions = _Decisions((*decisions.keep, keep), (*decisions.keys, keys))
            trace._keep.append(keep)

    def _gather(self, stage: int, trace: Trace, tokens: Tensor) -> Tensor:
        num_prefix = trace.num_prefix_tokens
        num_keep = self._plan.num_keep(trace.num_patches)[stage]
        before = trace.indices[stage - 1] if stage > 0 else None
        num_left = tokens.shape[1] - num_prefix
        if num_keep >= num_left:
            everything = torch.arange(num_left, device=tokens.device).expand(tokens.shape[0], -1)
            trace.indices.append(everything if before is None else before)
            return tokens
        candidates = self._candidates(tokens, None, before, trace)
        chosen = self._stage(stage).gather(candidates, num_keep)  # (B, num_keep)
        trace.indices.append(chosen if before is None else before.gather(1, chosen))
        return _select(tokens, _with_prefix(chosen, num_prefix))

    def _stage(self, index: int) -> Stage:
        return cast(Stage, self.stages[index])

    def _candidates(self, tokens: Tensor, keep: Tensor | None, indices: Tensor | None, trace: Trace) -> Candidates:
        num_prefix = trace.num_prefix_tokens
        return Candidates(
            patches=tokens[:, num_prefix:],
            prefix=tokens[:, :num_prefix],
            keep=keep,
            indices=indices,
            num_patches=trace.num_patches,
            grid=trace.grid,
        )

    def _before_attention(self, stage: int, attention: nn.Module, args: tuple[Any, ...]) -> None:
        keys = self._keys(stage)
        if keys is not None:
            self._check_grad(attention)
            self._attended = True
            self._block_interception.keep, self._block_interception.hits = keys, 0
            self._block_interception.enter()

    def _after_attention(self, stage: int, attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        interception = self._block_interception
        if interception.keep is None:
            return
        interception.leave()
        interception.keep = None
        if interception.hits == 0 and output is not None:  # None: an exception is passing through
            raise InterceptionError(
                f"the attention of {type(attention).__name__} did not pass through scaled_dot_product_attention, so "
                "pruned tokens could not be masked; use its fused (SDPA) attention, and do not ask for attention "
                "weights in training."
            )

    def _keys(self, stage: int) -> Tensor | None:
        if not self._enabled or self.trace is None or self.trace.execution != "mask":
            return None
        keys = self._current_decisions().keys
        return keys[stage] if stage < len(keys) else None

    def _after_block(self, stage: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._keys(stage) is None or torch.compiler.is_compiling():
            return
        if not self._attended:
            raise InterceptionError(
                f"{type(block).__name__} never called the attention modules it was described with, so pruned tokens "
                "could not be masked; name in Backbone.attentions the modules that it calls (not their forward)."
            )
        self._attended = False
        tokens = output[0] if isinstance(output, tuple) else output
        if tokens.requires_grad:
            # This gradient is the first thing known of the block in the backward pass, so a block
            # that is recomputed there finds the decisions of the forward pass it belongs to, even
            # if another one in training has run since. The reference is weak: a hook lives as long as the graph.
            decisions = self._current_decisions()
            upto = _Decisions(decisions.keep[: stage + 1], decisions.keys[: stage + 1])
            tokens.register_hook(partial(_restore, weakref.ref(self), upto))

    def _after_last_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _recomputing():
            return
        if self.backbone.final_norm is None:
            self._record_tokens(output[0] if isinstance(output, tuple) else output)
        keys = self._keys(len(self._plan.stages) - 1)
        if keys is None:
            return
        if self._in_model:
            self._tail_interception.keep = keys
            self._tail_interception.num_prefix_tokens = self.backbone.num_prefix_tokens
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
        for interception in (self._block_interception, self._tail_interception):
            if interception.keep is not None:
                interception.leave()
                interception.keep = None

    def _check_grad(self, module: nn.Module) -> None:
        if self._in_model and self._grad_enabled and not torch.is_grad_enabled():
            raise StateError(
                f"{type(module).__name__} runs without gradients inside a forward pass with them: re-entrant "
                "activation checkpointing loses the gradients of the keep decisions. Use use_reentrant=False."
            )


class GridMethod:
    """Stands in for a method of the model that reshapes tokens into a grid, and refuses while some are missing."""

    def __init__(self, sparsifier: Sparsifier, model: nn.Module, name: str) -> None:
        self.sparsifier, self.model, self.name = sparsifier, model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.sparsifier._enabled and any(ratio < 1 for ratio in self.sparsifier.keep_ratio):
            raise StateError(
                f"{type(self.model).__name__}.{self.name} needs the full grid of tokens, and this model drops some. "
                "Call it inside tokenprune.dense(model)."
            )
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


def _with_prefix(patches: Tensor, num_prefix_tokens: int) -> Tensor:
    """Positions of patch tokens (B, n) as positions in the sequence, behind those of the prefix: (B, P + n)."""
    prefix = torch.arange(num_prefix_tokens, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([prefix, patches + num_prefix_tokens], dim=1)


def _select(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens (B, K, C) at each image's own positions (B, K), of tokens (B, L, C)."""
    batch, length, _ = tokens.shape
    # Whole rows of one long sequence are copied several times as fast as torch.gather picks numbers.
    rows = positions + length * torch.arange(batch, device=positions.device).unsqueeze(1)
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


def _restore(sparsifier: weakref.ref[Sparsifier], decisions: _Decisions, grad: Tensor) -> None:
    alive = sparsifier()
    if alive is not None:
        alive._recomputed_decisions = decisions


def _recomputing() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _tokens(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tokens = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise StateError(f"{type(block).__name__} got {got} where tokens of shape (B, L, C) were expected.")
    return tokens


def _with_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (tokens, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: tokens}

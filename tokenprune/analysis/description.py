"""What a model is, inferred from what it does: how it pools its tokens, how positions enter, what its blocks are given.

Shapes: B images, L tokens of a sequence, K keys, C channels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.api import dense, sparsifier_of
from tokenprune.backbones.adaptations import AttentionBias
from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import SOFTMAXES, AttentionCall, Interception
from tokenprune.backbones.patterns import besides_tokens, names_with_entries
from tokenprune.pruning.trace import Trace


class Description(NamedTuple):
    """What a model is: fields of a `SupportedModel`.

    Attributes:
        pooling: What becomes of the tokens after the last block.
        position_encoding: How positions enter.
        side_inputs: Names of the blocks' inputs that have an entry for each token.
    """

    pooling: str
    position_encoding: str
    side_inputs: tuple[str, ...]


def describe_behaviour(model: nn.Module, arguments: Mapping[str, Any]) -> Description:
    """Run a sparsified model in eval mode, pruned and dense, and say what it is.

    Args:
        model: The model.
        arguments: The keyword arguments of its forward pass.
    """
    sparsifier = sparsifier_of(model)
    with torch.no_grad():
        model(**arguments)
        trace = sparsifier.trace
        assert trace is not None
        if trace.whole:  # nothing is gathered, and whatever stands behind the blocks gets every token
            return Description("all tokens, in place", _position_encoding(model), ())
        with dense(model):
            side_inputs = _side_inputs(model, arguments, sparsifier.backbone, trace, sparsifier.plan.stages[0])
            pooling = _pooling(model, arguments, sparsifier.backbone, trace)
    return Description(pooling, _position_encoding(model), side_inputs)


def _side_inputs(
    model: nn.Module, arguments: Mapping[str, Any], backbone: Backbone, trace: Trace, first: int
) -> tuple[str, ...]:
    """What of the arguments of the blocks from ``first`` on has an entry for each token, besides tokens."""
    found: set[str] = set()

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        full = backbone.layout_at(trace.start.layout, list(backbone.blocks).index(block))
        besides = besides_tokens(args, kwargs, tuple(inspect.signature(block.forward).parameters))
        if backbone.packed is None:
            found.update(names_with_entries(besides, backbone.token_inputs, full, tokens.shape[0]))
        else:  # all images are one row
            found.update(name for name in besides if name in (*backbone.token_inputs, *backbone.packed.lengths))

    with ExitStack() as hooks:
        for block in backbone.blocks[first:]:
            # In front of the hooks of adaptations, which may give a block what the model does not.
            hooks.callback(block.register_forward_pre_hook(look, with_kwargs=True, prepend=True).remove)
        model(**arguments)
    if any(isinstance(adaptation, AttentionBias) for adaptation in backbone.adaptations):
        found.add("bias")
    return tuple(sorted(found))


def _pooling(model: nn.Module, arguments: Mapping[str, Any], backbone: Backbone, trace: Trace) -> str:
    """How tokens become an output: what is seen of it, and otherwise what takes single tokens."""
    if backbone.downstream == "all tokens":
        return "all tokens, restored"
    pools = _Pools({layout.length for layout in backbone.tail_layouts(trace.full_layout)})
    tower = model if backbone.tower is None else backbone.tower
    with ExitStack() as hooks:
        hooks.callback(pools.leave)
        hooks.callback(backbone.blocks[-1].register_forward_hook(lambda *_: pools.enter()).remove)
        hooks.callback(tower.register_forward_hook(lambda *_: pools.leave()).remove)
        model(**arguments)
    seen = [kind for kind in _KINDS if kind in pools.seen]
    if seen:
        return " and ".join(seen)
    return "class token" if trace.num_prefix_tokens else "tokens as they are"


class _Pools(Interception):
    """From the last block to the end of the forward pass: what is done over all tokens of a sequence at once.

    Args:
        lengths: How many tokens a sequence may have there.
    """

    def __init__(self, lengths: Collection[int]) -> None:
        super().__init__()
        self.lengths = lengths
        self.seen: set[str] = set()
        self.entered = False

    def enter(self) -> None:
        super().enter()
        self.entered = True

    def leave(self) -> None:
        if self.entered:
            super().leave()
        self.entered = False

    def attention(self, call: AttentionCall) -> Tensor:
        if call.key.shape[-2] in self.lengths:
            self.seen.add(_ATTENTION)
        return call.run()

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0] if args else kwargs.get("input")
        if isinstance(tensor, Tensor):
            if func in SOFTMAXES and tensor.dim() in (3, 4) and tensor.shape[-1] in self.lengths:
                self.seen.add(_ATTENTION)
            if func in _REDUCTIONS and self._along_tokens(tensor, args, kwargs):
                self.seen.add(_REDUCTIONS[func])
            if func is F.adaptive_avg_pool1d and self._is_over_tokens(tensor, 2):
                self.seen.add(_MEAN)
        return func(*args, **kwargs)

    def _along_tokens(self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        return len(dims) == 1 and isinstance(dims[0], int) and self._is_over_tokens(tensor, dims[0])

    def _is_over_tokens(self, tensor: Tensor, dim: int) -> bool:
        """Whether a dimension counts tokens, of (B, L, C), or of (B, C, L) if C is no number of tokens."""
        if tensor.dim() != 3 or dim % 3 == 0 or tensor.shape[dim] not in self.lengths:
            return False
        return dim % 3 == 1 or tensor.shape[1] not in self.lengths


_MEAN, _MAXIMUM, _ATTENTION = _KINDS = ("mean or maximum", "maximum", "attention")
_REDUCTIONS: dict[Callable[..., Any], str] = {
    torch.mean: _MEAN,
    Tensor.mean: _MEAN,
    torch.amax: _MEAN,
    Tensor.amax: _MEAN,
    torch.max: _MAXIMUM,
    Tensor.max: _MAXIMUM,
}

_POSITIONS = {
    "rotary": r"rope|rotary|inv_freq|freqs_ci",
    "relative bias": r"rel_pos|relpos|relative_position|rel_indices",
    "learned": r"pos_embed|position_embed|pos_emb|positional_embed|pos_encode",
}


def _position_encoding(model: nn.Module) -> str:
    """What the names of modules, parameters and buffers say of positions."""
    names = [type(module).__name__ for module in model.modules()]
    names += [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    text = " ".join(names).lower()
    return " and ".join(kind for kind, pattern in _POSITIONS.items() if re.search(pattern, text)) or "none"

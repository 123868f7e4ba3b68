"""Finding out what a model looks like by running it once: its blocks, its prefix tokens, its final norm.

Structure counts, names do not: a list of modules that is called once and in order, each module on
tokens (B, L, C) that it returns in the same shape, with attention over all of them, is a list of
blocks. Tokens that do not depend on the image are prefix or suffix tokens.

Shapes: B images, P prefix tokens, N patch tokens, Q suffix tokens, L = P + N + Q, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.backbones.adaptations import Adaptation, AttentionBias, Setting, WrittenOutAttention
from tokenprune.backbones.backbone import outermost_attention
from tokenprune.backbones.interception import SOFTMAXES, AttentionCall, Interception
from tokenprune.backbones.patterns import besides_tokens, names_with_entries
from tokenprune.backbones.probing import eval_mode
from tokenprune.errors import UnsupportedModelError
from tokenprune.tokens import Layout


class Structure(NamedTuple):
    """What was found: attributes of a `Backbone` of the same names.

    Attributes:
        blocks: The transformer blocks in the order they run.
        num_prefix_tokens: P.
        num_suffix_tokens: Q.
        embed_dim: C.
        final_norm: The norm whose input is the last block's output, if it norms all tokens.
        attentions: For each block the modules in which it attends over all tokens; the block itself
            where none is named after attention.
        token_inputs: The names of the blocks' parameters, besides tokens, that have an entry for each token; where
            images are packed, with which of their dimensions counts tokens.
        adaptations: An `AttentionBias`, where attention adds a bias for each pair of tokens by itself, and a
            `WrittenOutAttention`, where its softmax is its own.
    """

    blocks: tuple[nn.Module, ...]
    num_prefix_tokens: int
    num_suffix_tokens: int
    embed_dim: int
    final_norm: nn.Module | None
    attentions: tuple[tuple[nn.Module, ...], ...]
    token_inputs: Mapping[str, Sequence[str] | None]
    adaptations: tuple[Adaptation, ...]


@dataclass
class _List:
    """A list of modules, and how they were called."""

    name: str
    modules: tuple[nn.Module, ...]
    order: list[int] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    num_keys: list[set[int]] = field(default_factory=list)
    besides: list[dict[str, Any]] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    written_out: bool = False
    first: Tensor | None = None
    last: Tensor | None = None
    attention_before: bool = False


def observe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    num_images: int = 2,
    settings: Sequence[Setting] = (),
    first_list: bool = False,
    packed: bool = False,
    frames: bool = False,
    num_merged: int = 1,
    num_late_prefix_tokens: int = 0,
    num_inner_tokens: int = 0,
) -> Structure:
    """Run a model on different images and say what it looks like.

    Weights, modes and random state are left as they are.

    Args:
        model: The model, or the tower of it that runs the blocks.
        inputs: Keyword arguments of its forward pass.
        num_images: How many images are in them; tokens have one row for each, or for each of its
            frames, in order.
        settings: What must be set on the model for the blocks to be seen as they will run.
        first_list: Take the first of several lists of blocks, such as an encoder in front of a decoder.
        packed: Expect the tokens of all images in one sequence, (1, T, C) or (T, C), with attention split in any way.
            Of a list in which some modules do not attend, those that do are the blocks.
        num_merged: Of packed tokens, how many neighbours become one between two blocks.
        frames: Accept several rows an image.
        num_late_prefix_tokens: Prefix tokens that join on the way.
        num_inner_tokens: Keys that blocks add to those of their tokens.

    Raises:
        UnsupportedModelError: The model could not be run, or has no flat list of blocks with global
            attention; the message says what it has.
    """
    name = type(model).__name__
    lists = [
        _List(path, tuple(module.children()))
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    normed: list[tuple[nn.Module, Tensor, Tensor]] = []
    with _looking(model, settings), ExitStack() as hooks:
        observer = _Observer()
        for candidate in lists:
            for index, module in enumerate(candidate.modules):
                enter, leave = _record(candidate, index, observer, packed)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
                for attention in outermost_attention(module):
                    hooks.callback(attention.register_forward_pre_hook(observer.enter_attention).remove)
                    hooks.callback(attention.register_forward_hook(observer.leave_attention).remove)
        for norm in norms:
            hooks.callback(
                norm.register_forward_hook(lambda module, args, out: _note(normed, module, args, out)).remove
            )
        try:
            with observer, torch.no_grad():
                model(**inputs)
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} could not be run on example images to see what it looks like "
                f"({type(error).__name__}: {error}); pass tokenprune.sparsify(model, backbone=tokenprune.Backbone(…))."
            ) from error

    reasons = {
        candidate.name: _why_not(
            candidate, num_images, packed, frames, num_merged, num_late_prefix_tokens, num_inner_tokens
        )
        for candidate in lists
    }
    found = [candidate for candidate in lists if reasons[candidate.name] is None]
    found = [one for one in found if not any(one.name.startswith(f"{other.name}.") for other in found)]
    found.sort(key=lambda one: one.attention_before)
    if not found or found[0].attention_before:
        reasons.update({one.name: "come after other attention, as the last stage of a hierarchy does" for one in found})
        raise UnsupportedModelError(_refusal(name, [(one, reasons[one.name] or "") for one in lists]))
    outer = next((other for other in lists if _is_stage_of(found[0], other)), None)
    if outer is not None:
        raise UnsupportedModelError(
            f"{name} has no flat list of blocks over (B, L, C) tokens: {found[0].name} is one of several stages."
        )
    if len(found) > 1 and not first_list:
        listed = ", ".join(one.name for one in found)
        raise UnsupportedModelError(
            f"{name} has several lists of blocks ({listed}): what stands between them may need every token, as the "
            "stages of a hierarchy, branches and decoders do."
        )
    blocks = found[0]
    assert blocks.first is not None
    num_prefix, num_suffix = _fixed_tokens(blocks.first, num_images)
    if num_prefix == blocks.first.shape[1]:
        raise UnsupportedModelError(
            f"the tokens of this {name} are the same for every image, so its prefix tokens cannot be inferred; give it "
            "weights, or pass tokenprune.sparsify(model, backbone=tokenprune.Backbone(…))."
        )
    full = Layout(num_prefix, blocks.first.shape[1] - num_prefix - num_suffix, num_suffix=num_suffix)
    num_rows = blocks.first.shape[0]
    # Where images are packed, every token is restored behind a block, so that others may stand between them.
    modules = tuple(one for one, attends in zip(blocks.modules, blocks.num_keys, strict=True) if attends or not packed)
    named = [names_with_entries(inputs, {}, full, num_rows) for inputs in blocks.besides]
    return Structure(
        blocks=modules,
        num_prefix_tokens=num_prefix,
        num_suffix_tokens=num_suffix,
        embed_dim=blocks.first.shape[2],
        final_norm=next(
            (norm for norm, before, after in normed if before is blocks.last and after.shape == before.shape), None
        ),
        attentions=tuple(_attentions(block, blocks, observer.attended, packed) for block in modules),
        token_inputs=_packed_inputs(blocks, full.length) if packed else dict.fromkeys(chain.from_iterable(named)),
        adaptations=(
            *((AttentionBias(),) if _has_bias(blocks) else ()),
            *((WrittenOutAttention(),) if blocks.written_out else ()),
        ),
    )


def _has_bias(blocks: _List) -> bool:
    """Whether attention was given a bias for each pair of tokens that no block was given from outside."""
    given = {tensor.untyped_storage().data_ptr() for inputs in blocks.besides for tensor in _tensors(inputs)}
    lengths = {length for _, length, *_ in blocks.inputs}
    return any(
        bias.dim() >= 2
        and bias.shape[-1] == bias.shape[-2]
        and bias.shape[-1] in lengths
        and bias.untyped_storage().data_ptr() not in given
        for bias in blocks.biases
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _packed_inputs(blocks: _List, length: int) -> dict[str, tuple[str, ...] | None]:
    """Which arguments of blocks have an entry for each token of a packed sequence, and along which dimension."""
    found: dict[str, tuple[str, ...] | None] = {}
    for inputs in blocks.besides:
        for name, value in inputs.items():
            for tensor in _tensors(value):
                shape = [*tensor.shape]
                if length not in shape or name in found:
                    continue
                letters = ["n" if axis == shape.index(length) else "acdefg"[axis] for axis in range(len(shape))]
                is_mask = len(shape) == 4 and shape[-2:] == [length, length]
                found[name] = None if is_mask else (f"{' '.join(letters)} -> {' '.join(letters)}",)
    return found


def _attentions(
    block: nn.Module, blocks: _List, attended: Mapping[nn.Module, set[int]], packed: bool
) -> tuple[nn.Module, ...]:
    """The modules of a block in which it attends over all tokens: as many keys as in most of them."""
    lengths = {length for _, length, *_ in blocks.inputs}
    named = [module for module in outermost_attention(block) if attended.get(module)]
    over_all = [module for module in named if packed or any(number >= min(lengths) for number in attended[module])]
    return tuple(over_all) or (block,)


class _Observer(Interception):
    """Sees every attention, and over how many keys it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[set[int]] = []
        self.blocks: list[_List] = []
        self.attended: dict[nn.Module, set[int]] = {}
        self.hits = 0

    def enter_attention(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(self.attended.setdefault(module, set()))

    def leave_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running.pop()

    def attention(self, call: AttentionCall) -> Tensor:
        self._note(call.key.shape[-2])
        if call.attn_mask is not None:
            for blocks in self.blocks:
                blocks.biases.append(call.attn_mask)
        return call.run()

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0] if args else kwargs.get("input")
        if func in SOFTMAXES and isinstance(tensor, Tensor) and tensor.dim() > 2:
            self._note(tensor.shape[-1])
            for blocks in self.blocks:
                blocks.written_out |= tensor.shape[-1] == tensor.shape[-2]
        return func(*args, **kwargs)

    def _note(self, num_keys: int) -> None:
        self.hits += 1
        for seen in self.running:
            seen.add(num_keys)


def _record(
    candidate: _List, index: int, observer: _Observer, packed: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that record what module ``index`` of a list gets, returns and attends over."""
    names = tuple(inspect.signature(candidate.modules[index].forward).parameters)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        candidate.besides.append(besides_tokens(args, kwargs, names))
        observer.blocks.append(candidate)
        tokens = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        tokens = tokens.unsqueeze(0) if packed and tokens is not None and tokens.dim() == 2 else tokens
        candidate.order.append(index)
        candidate.inputs.append(() if tokens is None else tuple(tokens.shape))
        candidate.num_keys.append(set())
        observer.running.append(candidate.num_keys[-1])
        if not candidate.order[1:]:
            candidate.first, candidate.attention_before = tokens, observer.hits > 0

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        observer.running.pop()
        observer.blocks.pop()
        tokens = next(iter(output), None) if isinstance(output, tuple) else output
        candidate.last = tokens if isinstance(tokens, Tensor) else None
        shape = () if candidate.last is None else tuple(candidate.last.shape)
        candidate.outputs.append((1, *shape) if packed and len(shape) == 2 else shape)

    return enter, leave


def _note(normed: list[tuple[nn.Module, Tensor, Tensor]], norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        normed.append((norm, args[0], output))


def _why_not(
    candidate: _List, num_images: int, packed: bool, frames: bool, num_merged: int, num_late: int, num_inner: int
) -> str | None:
    """What keeps a list from being one of blocks; ``None`` if nothing does."""
    if candidate.order != list(range(len(candidate.modules))):
        return "not called once and in order"
    shape = candidate.inputs[0]
    if len(shape) == 4:
        return f"take grids of shape {shape}, as windows, convolutions and hierarchies do"
    if len(shape) == 2:
        return f"take the tokens of all images in one sequence of shape {shape}"
    if len(shape) != 3:
        return "take no tokens"
    lengths = {length for _, length, *_ in (*candidate.inputs, *candidate.outputs)} if _all_tokens(candidate) else set()
    expected = {shape[1], shape[1] + num_late, shape[1] // num_merged}
    if not lengths or not lengths <= expected or candidate.inputs[-1][2] != shape[2]:
        return "change the number of tokens or their width, as a hierarchy does"
    if shape[1] == num_images and shape[0] != num_images:
        return f"take tokens of shape {shape}, the sequence in front of the batch"
    if packed:
        if shape[0] != 1:
            return f"take tokens of shape {shape}, which are not one sequence for all images"
        return None if any(candidate.num_keys) else "do not attend"
    if not (shape[0] == num_images or (frames and shape[0] % num_images == 0)):
        return f"take tokens of shape {shape}, which are not one sequence for each of {num_images} images"
    for (_, length, _), num_keys in zip(candidate.inputs, candidate.num_keys, strict=True):
        if not any(length <= number <= length + num_inner for number in num_keys):
            return f"attend over {sorted(num_keys) or 'no'} keys instead of all {length} tokens"
    return None


def _is_stage_of(blocks: _List, outer: _List) -> bool:
    """Whether a list of blocks is inside a module of another list, of which others attend as well."""
    return (
        blocks.name.startswith(f"{outer.name}." if outer.name else "")
        and outer is not blocks
        and (sum(bool(num_keys) for num_keys in outer.num_keys) > 1)
    )


def _all_tokens(candidate: _List) -> bool:
    return all(
        len(shape) == 3 and shape[2] == candidate.inputs[0][2] for shape in (*candidate.inputs, *candidate.outputs)
    )


def _refusal(name: str, lists: list[tuple[_List, str]]) -> str:
    """The reason of the list that comes nearest to being one of blocks: the one with the most attention in it."""
    attending = [(one, reason) for one, reason in lists if one.inputs and any(one.num_keys)]
    if not attending:
        return f"{name} has no list of blocks with attention."
    one, reason = max(attending, key=lambda pair: (pair[1] != "not called once and in order", len(pair[0].order)))
    return f"{name} has no flat list of blocks over (B, L, C) tokens: those of {one.name or 'the model'} {reason}."


def _fixed_tokens(tokens: Tensor, num_images: int) -> tuple[int, int]:
    """How many tokens at the beginning and at the end are the same in all images."""
    if tokens.shape[0] == 1:
        return 0, 0
    images = tokens.unflatten(0, (num_images, -1))  # (images, frames, L, C)
    same = (images == images[:1]).all(dim=0).all(dim=0).all(dim=-1).tolist()  # L of them
    num_prefix = same.index(False) if False in same else len(same)
    num_suffix = same[::-1].index(False) if False in same else 0
    return num_prefix, num_suffix


@contextmanager
def _looking(model: nn.Module, settings: Sequence[Setting]) -> Iterator[None]:
    """For a while, the model in eval mode and with settings applied; the random state is left as it was."""
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    try:
        for setting in settings:
            setting.apply()
        with eval_mode(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for setting in reversed(settings):
            setting.undo()

"""What in a block may be a part that treats tokens one by one.

Candidates are pairs of linear layers, or of 1 × 1 convolutions, that a block calls one after the other, from the width
of its tokens to a larger one and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from tokenprune.backbones.module_calls import Recording, linear_widths
from tokenprune.backbones.token_wise import TokenWise
from tokenprune.backbones.token_wise_trial import is_token_wise_norm


class FoundPart(NamedTuple):
    """A part that was found in a block.

    Attributes:
        part: The part.
        shape: Of its input when it was found.
        cost: Its multiply-adds then.
    """

    part: TokenWise
    shape: tuple[int, ...]
    cost: int


def has_candidates(block: nn.Module, recording: Recording) -> bool:
    """Whether a block calls two linear layers that may be a part."""
    return bool(candidates(block, recording))


def candidates(block: nn.Module, recording: Recording) -> list[list[FoundPart]]:
    """For each pair of linear layers in a block that may be a part: the forms it may have, the best first."""
    called = recording.inside(block)
    linear = [module for module in called if linear_widths(module) is not None]
    found = []
    for before, after in pairwise(linear):
        pair = _pair(before, after, recording)
        if pair is not None:
            found.append(list(_forms(block, pair, before, after, called, recording)))
    return [forms for forms in found if forms]


def _pair(before: nn.Module, after: nn.Module, recording: Recording) -> FoundPart | None:
    """Two layers as a part, if their widths and shapes are those of one."""
    first, last = recording.calls[before], recording.calls[after]
    (width, hidden), (back, out) = linear_widths(before) or (0, 0), linear_widths(after) or (0, 0)
    shapes = (first.shape, first.output_shape, last.shape, last.output_shape)
    if (
        width != out
        or hidden <= width
        or hidden not in (back, 2 * back)
        or any(len(one) not in (3, 4) for one in shapes)
    ):
        return None
    channels_first = isinstance(before, nn.Conv2d)
    if channels_first != isinstance(after, nn.Conv2d) or first.shape != last.output_shape:
        return None
    num_tokens = torch.Size(first.shape).numel() // width
    cost = num_tokens * (width * hidden + back * out)
    part = TokenWise(first=before, last=after, embed_dim=width, channels_first=channels_first)
    return FoundPart(part, first.shape, cost)


def _forms(
    block: nn.Module,
    pair: FoundPart,
    before: nn.Module,
    after: nn.Module,
    called: list[nn.Module],
    recording: Recording,
) -> Iterator[FoundPart]:
    """A pair as the whole module that it is in, or by itself, each with the norm in front of it or without."""
    names, calls = recording.names, recording.calls
    start, end = calls[before].number, calls[after].number
    between = [module for module in called if start < calls[module].number < end and not any(module.children())]
    mixes = any(_may_mix(module) for module in between)
    whole = _common(block, before, after, recording)
    forms = [] if mixes else [pair.part] if whole is None else [replace(pair.part, first=whole, last=whole), pair.part]
    for form in forms:
        norm = calls[form.first].norm
        inside = norm is not None and names[norm].startswith(f"{names[block]}." if names[block] else "")
        if norm is not None and inside and calls[norm].times == 1:
            yield pair._replace(part=replace(form, first=norm))
        yield pair._replace(part=form)
    if mixes:
        mixed = replace(pair.part, mixing=(before, after))
        norm = calls[before].norm or (None if whole is None else calls[whole].norm)
        if norm in called and is_token_wise_norm(norm, pair.shape, channels_first=mixed.channels_first):
            yield pair._replace(part=replace(mixed, first=norm))
        yield pair._replace(part=mixed)


def _may_mix(module: nn.Module) -> bool:
    """Whether a module between the two linear layers has weights that may see more than one token at a time."""
    has_weights = next(module.parameters(recurse=False), None) is not None
    return has_weights and "norm" not in type(module).__name__.lower().replace("responsenorm", "")


def _common(block: nn.Module, before: nn.Module, after: nn.Module, recording: Recording) -> nn.Module | None:
    """The smallest module inside a block that holds both layers, if it takes and gives what these do."""
    names, calls = recording.names, recording.calls
    holding = [
        module
        for module in recording.inside(block)
        if module is not block and all(names[one].startswith(f"{names[module]}.") for one in (before, after))
    ]
    if not holding:
        return None
    smallest = max(holding, key=lambda module: len(names[module]))
    fits = calls[smallest].shape == calls[before].shape and calls[smallest].output_shape == calls[after].output_shape
    return smallest if fits else None

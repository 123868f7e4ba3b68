"""Side inputs: what a block takes besides its tokens, gathered for the tokens that are left.

Rotary tables, relative-position biases, attention and padding masks, position ids: some have one
entry a token, and those go where the token goes.

Shapes: B images, H heads, L tokens before any pruning, D numbers a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.backbones.patterns import (
    MASK,
    AxisPatterns,
    axes,
    gather_mask,
    gather_tokens,
    open_mask,
    pattern_of,
    token_axis,
)
from tokenprune.errors import StateError
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, becomes_code, sizes


class SideInputs:
    """The side inputs of the blocks of one model, gathered once for all blocks that get the same ones.

    Attributes:
        patterns: What is known of them; for others it is inferred from names and shapes.
        neutral: See `Backbone.neutral_inputs`.
    """

    def __init__(self, patterns: AxisPatterns, neutral: Mapping[str, Sequence[float]]) -> None:
        self.patterns, self.neutral = patterns, neutral
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Forget what was gathered: other tokens are left now."""
        self._gathered = []

    def tables(self) -> tuple[Tensor, ...]:
        """What is left of those that have an entry a token."""
        return tuple(result for source, result in self._gathered if result is not source)

    def gather(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], selection: Selection, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with everything that has an entry a token for the tokens of the sequence as it is.

        Args:
            args: Positional arguments; the first one is the tokens, and stays.
            kwargs: Keyword arguments; without positional ones, the first tensor is the tokens.
            names: The names of the block's parameters, in order.
            selection: What is left; all tokens, where it has no ``indices``.
            full: The sequence before any pruning.

        Raises:
            StateError: There are summary tokens, and something has an entry a token that these cannot have.
        """
        tokens = None if args else next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        gathered = tuple(
            value if index == 0 else self._gather(value, names[index] if index < len(names) else "", selection, full)
            for index, value in enumerate(args)
        )
        return gathered, {
            name: value if name == tokens else self._gather(value, name, selection, full)
            for name, value in kwargs.items()
        }

    def _gather(
        self, value: Any, name: str, selection: Selection, full: Layout, place: tuple[int, int] = (0, 1)
    ) -> Any:
        """What there is of an input, which is the first, second … of so many of its name, for the tokens left."""
        if isinstance(value, (tuple, list)):
            return type(value)(
                self._gather(item, name, selection, full, (index, len(value))) for index, item in enumerate(value)
            )
        if not isinstance(value, Tensor):
            return value
        for source, result in self._gathered:
            if source is value:
                return result
        result = self._entries(value, name, selection, full, place)
        self._gathered.append((value, result))
        return result

    def _entries(self, value: Tensor, name: str, selection: Selection, full: Layout, place: tuple[int, int]) -> Tensor:
        indices = selection.indices
        decided = selection.keep if indices is None else indices
        assert decided is not None
        num_images = sizes(decided)[0]
        pattern = pattern_of(value, name, self.patterns, full, num_images)
        if pattern is None:
            if selection.packing is not None and value.dim() > 1 and 1 < num_images == sizes(value)[0]:
                raise StateError(
                    f"the blocks are given {name!r}, of shape {tuple(value.shape)}, with an entry for each image, and "
                    "all images in one sequence; run this model in another execution."
                )
            return value
        if selection.layout.num_summary:
            _check_open(value, name, pattern)
        if pattern == MASK:
            mask = value if indices is None else gather_mask(value, full.positions(indices))
            start = full.num_prefix + selection.layout.num_patches
            number = selection.layout.num_summary
            return open_mask(mask, start, number) if number else mask
        if indices is None:
            return value
        for_all = sizes(value)[token_axis(axes(pattern)[0])] == full.length
        gathered = gather_tokens(value, pattern, full.positions(indices) if for_all else indices)
        if selection.packing is None:
            return gathered
        numbers, (index, number) = self.neutral.get(name, ()), place
        share = len(numbers) // number
        return _packed(gathered, name, pattern, selection, numbers[index * share : (index + 1) * share])


def _packed(gathered: Tensor, name: str, pattern: str, selection: Selection, neutral: Sequence[float]) -> Tensor:
    """An entry for each token of a packed sequence, of those for each token of an image's row.

    Where only patch tokens have one, a block takes it that the first P tokens have none. In a packed sequence that is
    true of one image alone, so that the prefix tokens of the others are given one that is neutral.

    Raises:
        StateError: What is neutral is unknown.
    """
    packing, layout, (_, right) = selection.packing, selection.layout, axes(pattern)
    assert packing is not None
    if "b" not in right:  # one image, and one row of tokens
        return gathered
    axis, width = token_axis(right), sizes(gathered)[-1]
    if sizes(gathered)[axis] == packing.shape[1]:
        return packing.pack(gathered, axis)
    if not neutral or width % len(neutral) or layout.num_prefix + layout.num_patches != layout.length:
        raise StateError(
            f"the blocks are given {name!r}, with an entry for each patch token and none for the others, and all "
            "images in one sequence; run this model in another execution, or say in Backbone.neutral_inputs which "
            "entry changes nothing."
        )
    shape = [*sizes(gathered)]
    shape[axis] = layout.num_prefix
    entry = gathered.new_tensor(neutral).repeat_interleave(width // len(neutral))
    packed = packing.pack(torch.cat([entry.expand(shape), gathered], dim=axis), axis)
    return packed.narrow(axis, layout.num_prefix, packing.length - layout.num_prefix)


def _check_open(value: Tensor, name: str, pattern: str) -> None:
    """Refuse what has an entry a token other than a mask that hides nothing, in which summary tokens are seen as well.

    Raises:
        StateError: It says what it is.
    """
    known = not becomes_code()
    if pattern == MASK and value.dtype == torch.bool and (not known or bool(value.all())):
        return
    what = "hides some tokens" if pattern == MASK and value.dtype == torch.bool else "has an entry for each token"
    raise StateError(
        f"the blocks are given {name!r}, which {what}, and a token that is the summary of several has none; choose a "
        "reduction that adds no token, such as pruned='merge', 'drop' or 'preserve'."
    )

"""Side inputs: what a block takes besides its tokens, gathered for the tokens that are left.

Rotary tables, relative-position biases, attention and padding masks, position ids: some have one
entry a token, and those go where the token goes.

Shapes: B images, H heads, L tokens before any pruning, D numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.backbones.patterns import (
    MASK,
    AxisPatterns,
    axes,
    gather_mask,
    gather_tokens,
    pattern_of,
    token_axis,
)
from tokenprune.tokens import Layout, sizes


class SideInputs:
    """The side inputs of the blocks of one model, gathered once for all blocks that get the same ones.

    Attributes:
        patterns: What is known of them; for others it is inferred from names and shapes.
    """

    def __init__(self, patterns: AxisPatterns) -> None:
        self.patterns = patterns
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Forget what was gathered: other tokens are left now."""
        self._gathered = []

    def tables(self) -> tuple[Tensor, ...]:
        """What is left of those that have an entry a token."""
        return tuple(result for source, result in self._gathered if result is not source)

    def gather(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], indices: Tensor, full: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with everything that has an entry a token gathered for those left.

        Args:
            args: Positional arguments; the first one is the tokens, and stays.
            kwargs: Keyword arguments; without positional ones, the first tensor is the tokens.
            names: The names of the block's parameters, in order.
            indices: (B, n) int64, the patch tokens that are left.
            full: The sequence before any pruning.
        """
        tokens = None if args else next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        gathered = tuple(
            value if index == 0 else self._gather(value, names[index] if index < len(names) else "", indices, full)
            for index, value in enumerate(args)
        )
        return gathered, {
            name: value if name == tokens else self._gather(value, name, indices, full)
            for name, value in kwargs.items()
        }

    def _gather(self, value: Any, name: str, indices: Tensor, full: Layout) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._gather(item, name, indices, full) for item in value)
        if not isinstance(value, Tensor):
            return value
        for source, result in self._gathered:
            if source is value:
                return result
        result = self._entries(value, name, indices, full)
        self._gathered.append((value, result))
        return result

    def _entries(self, value: Tensor, name: str, indices: Tensor, full: Layout) -> Tensor:
        positions = {full.length: lambda: full.positions(indices), full.num_patches: lambda: indices}
        pattern = pattern_of(value, name, self.patterns, full, sizes(indices)[0])
        if pattern is None:
            return value
        if pattern == MASK:
            return gather_mask(value, positions[full.length]())
        return gather_tokens(value, pattern, positions[sizes(value)[token_axis(axes(pattern)[0])]]())

"""Side inputs: what a block takes besides its tokens, cut down to the tokens that are left.

Rotary tables, relative-position biases, attention and padding masks, position ids: some have one
entry a token, and those go where the token goes.

Shapes: B images, H heads, L tokens before any pruning, K tokens that are left, D numbers a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from einops import repeat
from torch import Tensor

from tokenprune.tokens import Layout, sizes

Layouts = Mapping[str, Sequence[str]]
"""For names of a block's parameters: patterns such as ``"n d -> b 1 n d"``, one a number of dimensions.

On the left what the model gives, on the right what each image gets: ``b`` images, ``n`` and ``m``
tokens, any other letter as it is. An axis that is new on the right is repeated. Without ``b`` on the
right, all images are one row of tokens.
"""

_TABLES = {2: "n d -> b 1 n d", 3: "b n d -> b n d", 4: "b h n d -> b h n d"}


class SideInputs:
    """The side inputs of the blocks of one model, cut once for all blocks that get the same ones.

    Attributes:
        layouts: What is known of them; for others a layout is told from names and shapes.
    """

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self._cut: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Forget what was cut: other tokens are left now."""
        self._cut = []

    def tables(self) -> tuple[Tensor, ...]:
        """What is left of those that were cut."""
        return tuple(result for source, result in self._cut if result is not source)

    def shorten(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Sequence[str],
        indices: Tensor,
        layout: Layout,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with everything that has an entry a token cut down to those left.

        Args:
            args: Positional arguments; the first one is the tokens, and stays.
            kwargs: Keyword arguments; without positional ones, the first tensor is the tokens.
            names: The names of the block's parameters, in order.
            indices: (B, n) int64, the patch tokens that are left.
            layout: The sequence before any pruning.
        """
        tokens = None if args else next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        shortened = tuple(
            value if index == 0 else self._shorten(value, names[index] if index < len(names) else "", indices, layout)
            for index, value in enumerate(args)
        )
        return shortened, {
            name: value if name == tokens else self._shorten(value, name, indices, layout)
            for name, value in kwargs.items()
        }

    def _shorten(self, value: Any, name: str, indices: Tensor, layout: Layout) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._shorten(item, name, indices, layout) for item in value)
        if not isinstance(value, Tensor):
            return value
        for source, result in self._cut:
            if source is value:
                return result
        result = self._cut_down(value, name, indices, layout)
        self._cut.append((value, result))
        return result

    def _cut_down(self, value: Tensor, name: str, indices: Tensor, layout: Layout) -> Tensor:
        lengths = {layout.length: layout.positions(indices), layout.num_patches: indices}
        shape, batch = sizes(value), sizes(indices)[0]
        if name in self.layouts:
            pattern = next((one for one in self.layouts[name] if len(_axes(one)[0]) == len(shape)), None)
            kept = None if pattern is None else lengths.get(shape[_token_axis(_axes(pattern)[0])])
            return value if pattern is None or kept is None else gather_tokens(value, pattern, kept)
        of_images = len(shape) == 2 and shape[0] == batch and shape[1] in lengths
        if of_images and (shape[0] != shape[1] if "mask" in name else not value.is_floating_point()):
            return gather_tokens(value, "b n -> b n", lengths[shape[1]])
        if _is_mask(value, name, layout.length):
            return gather_mask(value, lengths[layout.length])
        if len(shape) in _TABLES and shape[-2] in lengths:
            per_head = len(shape) == 3 and shape[0] not in (1, batch)
            pattern = "h n d -> b h n d" if per_head else _TABLES[len(shape)]
            return gather_tokens(value, pattern, lengths[shape[-2]])
        return value


def gather_tokens(value: Tensor, pattern: str, kept: Tensor) -> Tensor:
    """Each image's own entries of something that has one entry a token.

    Args:
        value: As the left side of ``pattern`` says.
        pattern: See `Layouts`.
        kept: (B, K) int64.

    Returns:
        As the right side says, with K tokens.
    """
    left, right = _axes(pattern)
    if "b" not in right and "n" in right:  # all images are one row of tokens
        return value.index_select(right.index("n"), kept[0])
    batch, num_kept = sizes(kept)
    if "b" in left and sizes(value)[left.index("b")] == 1:
        value = value.expand(*(batch if axis == "b" else -1 for axis in left))
    value = repeat(value, pattern, b=batch)
    for axis in (index for index, letter in enumerate(right) if letter in "nm"):
        shape = [1] * value.dim()
        shape[0], shape[axis] = batch, num_kept
        size = [*sizes(value)]
        size[axis] = num_kept
        value = value.gather(axis, kept.view(shape).expand(size))
    return value


def gather_mask(mask: Tensor, kept: Tensor) -> Tensor:
    """The rows and columns of an attention mask or bias that belong to the kept tokens.

    Args:
        mask: Broadcastable to (B, H, L, L), boolean or additive.
        kept: (B, K) int64.

    Returns:
        (B, H or 1, K or 1, K).
    """
    mask = mask[(None,) * (4 - mask.dim())]
    return gather_tokens(mask, "b h n m -> b h n m" if sizes(mask)[2] > 1 else "b h i m -> b h i m", kept)


def _axes(pattern: str) -> tuple[list[str], list[str]]:
    left, _, right = pattern.partition("->")
    return left.split(), right.split()


def _token_axis(axes: list[str]) -> int:
    return axes.index("n" if "n" in axes else "m")


def _is_mask(value: Tensor, name: str, num_tokens: int) -> bool:
    """Whether it has a column for each token: by its shape, and by its name where a table could look the same."""
    shape = sizes(value)
    if len(shape) not in (2, 3, 4) or shape[-1] != num_tokens:
        return False
    if shape[-2] != num_tokens:
        return shape[-2] == 1 and len(shape) != 3
    named = any(word in name for word in ("mask", "bias", "rel_pos"))
    return len(shape) == 4 or not value.is_floating_point() or named

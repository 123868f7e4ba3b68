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

from tokenprune.tokens import Layout

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
        self._cut: list[tuple[str, Tensor, Tensor]] = []

    def forget(self) -> None:
        """Forget what was cut: other tokens are left now."""
        self._cut = []

    def tables(self) -> tuple[Tensor, ...]:
        """What is left of those that were cut."""
        return tuple(result for _, source, result in self._cut if result is not source)

    def names(self) -> tuple[str, ...]:
        """The names of those that were cut."""
        return tuple(dict.fromkeys(name for name, source, result in self._cut if result is not source))

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
        for _, source, result in self._cut:
            if source is value:
                return result
        result = self._cut_down(value, name, indices, layout)
        self._cut.append((name, value, result))
        return result

    def _cut_down(self, value: Tensor, name: str, indices: Tensor, layout: Layout) -> Tensor:
        lengths = {layout.length: layout.positions(indices), layout.num_patches: indices}
        if name in self.layouts:
            pattern = next((p for p in self.layouts[name] if _left_rank(p) == value.dim()), None)
            axis = None if pattern is None else _axes(pattern)[0].index("n" if "n" in _axes(pattern)[0] else "m")
            if pattern is None or axis is None or value.shape[axis] not in lengths:
                return value
            return gather_tokens(value, pattern, lengths[value.shape[axis]])
        batch = indices.shape[0]
        of_images = value.dim() == 2 and value.shape[0] == batch and value.shape[1] in lengths
        if of_images and (value.shape[0] != value.shape[1] if "mask" in name else not value.is_floating_point()):
            return gather_tokens(value, "b n -> b n", lengths[value.shape[1]])
        if _is_mask(value, name, layout.length):
            return gather_mask(value, lengths[layout.length])
        if value.dim() in _TABLES and value.shape[-2] in lengths:
            per_head = value.dim() == 3 and value.shape[0] not in (1, batch)
            pattern = "h n d -> b h n d" if per_head else _TABLES[value.dim()]
            return gather_tokens(value, pattern, lengths[value.shape[-2]])
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
    batch, num_kept = kept.shape
    if "b" in left and value.shape[left.index("b")] == 1:
        value = value.expand(*(batch if axis == "b" else -1 for axis in left))
    value = repeat(value, pattern, b=batch)
    for axis in (index for index, letter in enumerate(right) if letter in "nm"):
        shape = [1] * value.dim()
        shape[0], shape[axis] = batch, num_kept
        size = [*value.shape]
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
    return gather_tokens(mask, "b h n m -> b h n m" if mask.shape[2] > 1 else "b h i m -> b h i m", kept)


def _left_rank(pattern: str) -> int:
    return len(_axes(pattern)[0])


def _axes(pattern: str) -> tuple[list[str], list[str]]:
    left, _, right = pattern.partition("->")
    return left.split(), right.split()


def _is_mask(value: Tensor, name: str, num_tokens: int) -> bool:
    """Whether it has a column for each token: by its shape, and by its name where a table could look the same."""
    if value.dim() not in (2, 3, 4) or value.shape[-1] != num_tokens:
        return False
    if value.shape[-2] == num_tokens:
        return (
            value.dim() == 4
            or not value.is_floating_point()
            or any(word in name for word in ("mask", "bias", "rel_pos"))
        )
    return value.shape[-2] == 1 and value.dim() != 3

"""Patterns: which axes of a tensor count tokens, and what each image gets of it for the tokens that are left.

A pattern such as ``"n d -> b 1 n d"`` has on the left what a model gives, on the right what each image gets: ``b``
images, ``n`` and ``m`` tokens, any other letter as it is. An axis that is new on the right is repeated. Without
``b`` on the right, all images are one row of tokens.

Shapes: B images, H heads, L tokens before any pruning, K tokens that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from tokenprune.tokens import Layout, sizes

AxisPatterns = Mapping[str, Sequence[str] | None]
"""For names of a block's parameters, one pattern for each number of dimensions; ``None`` infers it from the shape."""

_TABLES = {2: "n d -> b 1 n d", 3: "b n d -> b n d", 4: "b h n d -> b h n d"}


def gather_tokens(value: Tensor, pattern: str, kept: Tensor) -> Tensor:
    """Each image's own entries of something that has one entry a token.

    Args:
        value: As the left side of ``pattern`` says.
        pattern: See the top of this file.
        kept: (B, K) int64.

    Returns:
        As the right side says, with K tokens.
    """
    left, right = axes(pattern)
    if "b" not in right and "n" in right:  # all images are one row of tokens
        return value.index_select(right.index("n"), kept[0])
    batch, num_kept = sizes(kept)
    images = left.index("b") if "b" in left else None
    if images is None or sizes(value)[images] == 1:
        counting = [axis for axis, letter in enumerate(left) if letter in "nm"]
        if counting[-1] - counting[0] < len(counting):  # tokens, or both tokens of a pair side by side
            return _of_all_images(value, left, right, kept)
        if images is not None:
            value = value.expand(*(batch if axis == "b" else -1 for axis in left))
    value = repeat(value, pattern, b=batch)
    for axis in (index for index, letter in enumerate(right) if letter in "nm"):
        shape = [1] * value.dim()
        shape[0], shape[axis] = batch, num_kept
        size = [*sizes(value)]
        size[axis] = num_kept
        value = value.gather(axis, kept.view(shape).expand(size))
    return value


def _of_all_images(value: Tensor, left: list[str], right: list[str], kept: Tensor) -> Tensor:
    """`gather_tokens` of what all images share: whole rows, of tokens or of pairs, are copied faster than numbers."""
    if "b" in left:
        value, left = value.squeeze(left.index("b")), [axis for axis in left if axis != "b"]
    counting = [axis for axis, letter in enumerate(left) if letter in "nm"]
    first, last = counting[0], counting[-1]
    rows = kept if first == last else kept.unsqueeze(2) * sizes(value)[last] + kept.unsqueeze(1)
    found = value.flatten(first, last).index_select(first, rows.flatten()).unflatten(first, sizes(rows))
    # An axis for images now stands in front of the first one of tokens.
    gathered: Tensor = rearrange(found, f"{' '.join([*left[:first], 'b', *left[first:]])} -> {' '.join(right)}")
    return gathered


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


def open_mask(mask: Tensor, start: int, number: int) -> Tensor:
    """A boolean mask with further tokens, which see and are seen by all that any token sees.

    Args:
        mask: Broadcastable to (B, H, K, K), ``True`` = may attend.
        start: In front of which token they are to stand.
        number: S, how many.

    Returns:
        (…, K + S or 1, K + S).
    """
    for axis in (-1, -2) if sizes(mask)[-2] > 1 else (-1,):
        shape = [*sizes(mask)]
        shape[axis] = number
        before, behind = mask.narrow(axis, 0, start), mask.narrow(axis, start, sizes(mask)[axis] - start)
        mask = torch.cat([before, mask.new_ones(shape), behind], dim=axis)
    return mask


def axes(pattern: str) -> tuple[list[str], list[str]]:
    """The letters on the left and on the right of a pattern."""
    left, _, right = pattern.partition("->")
    return left.split(), right.split()


def is_pattern(pattern: object) -> bool:
    """Whether it is a pattern: letters on both sides, tokens among them, and nothing new on the right but images."""
    if not isinstance(pattern, str) or pattern.count("->") != 1:
        return False
    left, right = axes(pattern)
    letters = all(axis == "1" or (len(axis) == 1 and axis.islower()) for axis in left + right)
    once = len({*left}) == len(left) and len({*right} - {"1"}) == len([axis for axis in right if axis != "1"])
    return letters and once and bool({*left} & {"n", "m"}) and {*left} <= {*right} <= {*left, "b", "1"}


def token_axis(letters: list[str]) -> int:
    """Which axis counts tokens."""
    return letters.index("n" if "n" in letters else "m")


MASK = "mask"
"""In place of a pattern: an attention mask or bias, broadcastable to (B, H, L, L)."""


def pattern_of(value: Tensor, name: str, patterns: AxisPatterns, full: Layout, num_images: int) -> str | None:
    """What a side input is, if it has an entry a token: a pattern or `MASK`; otherwise ``None``."""
    lengths, shape = (full.length, full.num_patches), sizes(value)
    given = patterns.get(name)
    if given is not None:
        pattern = next((one for one in given if len(axes(one)[0]) == len(shape)), None)
        return pattern if pattern is not None and shape[token_axis(axes(pattern)[0])] in lengths else None
    of_images = len(shape) == 2 and shape[0] == num_images and shape[1] in lengths
    if of_images and (shape[0] != shape[1] if "mask" in name else not value.is_floating_point()):
        return "b n -> b n"
    if _is_mask(value, name, full.length):
        return MASK
    if len(shape) in _TABLES and shape[-2] in lengths:
        per_head = len(shape) == 3 and shape[0] not in (1, num_images)
        return "h n d -> b h n d" if per_head else _TABLES[len(shape)]
    return None


def besides_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a block besides its tokens, by name.

    Args:
        args: Positional arguments, tokens first.
        kwargs: Keyword arguments; without positional ones, the first tensor is the tokens.
        names: The names of the block's parameters, in order.
    """
    tokens = None if args else next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    positional = {
        names[index] if index < len(names) else f"argument {index}": args[index] for index in range(1, len(args))
    }
    return {**positional, **{name: value for name, value in kwargs.items() if name != tokens}}


def names_with_entries(
    inputs: Mapping[str, Any], patterns: AxisPatterns, full: Layout, num_images: int
) -> tuple[str, ...]:
    """Which of a block's arguments besides its tokens have an entry for each of them.

    Args:
        inputs: As `besides_tokens` gives them.
        patterns: What is known of them.
        full: The sequence before any pruning.
        num_images: B.
    """

    def has_entries(name: str, value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(has_entries(name, item) for item in value)
        return isinstance(value, Tensor) and pattern_of(value, name, patterns, full, num_images) is not None

    return tuple(name for name, value in inputs.items() if has_entries(name, value))


def _is_mask(value: Tensor, name: str, num_tokens: int) -> bool:
    """Whether it has a column for each token: by its shape, and by its name where a table could look the same."""
    shape = sizes(value)
    if len(shape) not in (2, 3, 4) or shape[-1] != num_tokens:
        return False
    if shape[-2] != num_tokens:
        return shape[-2] == 1 and len(shape) != 3
    named = any(word in name for word in ("mask", "bias", "rel_pos"))
    return len(shape) == 4 or not value.is_floating_point() or named

"""Side inputs: what a block takes besides its tokens, cut down to the tokens that are left.

Shapes: B images, H heads, L tokens before any pruning, K tokens that are left.
"""

from __future__ import annotations

from typing import Any

from einops import repeat
from torch import Tensor


def shorten(
    args: tuple[Any, ...], kwargs: dict[str, Any], kept: Tensor, num_tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with every attention mask over all tokens cut down to those left.

    Args:
        args: Positional arguments; the first one is the tokens, and stays.
        kwargs: Keyword arguments; without positional ones, the first tensor is the tokens.
        kept: (B, K) int64, positions of the tokens that are left among all.
        num_tokens: L.
    """

    def cut(value: Any) -> Any:
        return gather_mask(value, kept) if _is_mask(value, num_tokens) else value

    if args:
        return (args[0], *(cut(value) for value in args[1:])), {name: cut(value) for name, value in kwargs.items()}
    tokens = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {name: value if name == tokens else cut(value) for name, value in kwargs.items()}


def gather_mask(mask: Tensor, kept: Tensor) -> Tensor:
    """The rows and columns of an attention mask that belong to the kept tokens.

    Args:
        mask: Broadcastable to (B, H, L, L), boolean or additive.
        kept: (B, K) int64.

    Returns:
        (B, H or 1, K or 1, K).
    """
    mask = mask[(None,) * (4 - mask.dim())].expand(kept.shape[0], -1, -1, -1)
    _, num_heads, num_rows, num_columns = mask.shape
    if num_rows > 1:
        mask = mask.gather(2, repeat(kept, "b k -> b h k l", h=num_heads, l=num_columns))  # (B, H, K, L)
        num_rows = kept.shape[1]
    return mask.gather(3, repeat(kept, "b k -> b h r k", h=num_heads, r=num_rows))  # (B, H, K or 1, K)


def _is_mask(value: Any, num_tokens: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() in (2, 3, 4)
        and value.shape[-1] == num_tokens
        and value.shape[-2] in ((num_tokens,) if value.dim() == 3 else (1, num_tokens))
    )

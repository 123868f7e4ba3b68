"""The parts of blocks that treat tokens one by one, and their tokens as sequences, whatever shape they come in.

Shapes: B images, L tokens, K of them, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenprune.tokens import sizes


@dataclass(frozen=True, kw_only=True)
class TokenWise:
    """A part of a block that treats tokens one by one, such as its MLP with the norm in front of it.

    It begins with what ``first`` gets and ends with what ``last`` gives, in the shape (B, L, C), (B, H, W, C) or
    (B, C, H, W). What runs between them runs as well on some of the tokens, in a row of their own.

    Attributes:
        first: The module whose first argument is the part's input.
        last: The module whose output is the part's output; it may be the same one.
        embed_dim: C, of its input and its output.
        channels_first: Whether tokens come as (B, C, H, W).
        mixing: A module of the part and a later one between which tokens are mixed all the same, as by a depthwise
            convolution or a response norm: there all places are filled, and those of missing tokens hold 0. ``None``
            where they are mixed nowhere.
    """

    first: nn.Module
    last: nn.Module
    embed_dim: int
    channels_first: bool = False
    mixing: tuple[nn.Module, nn.Module] | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that it names."""
        return (self.first, self.last, *(self.mixing or ()))


def as_sequence(tokens: Tensor, *, channels_first: bool) -> Tensor:
    """Tokens (B, L, C), (B, H, W, C) or, with ``channels_first``, (B, C, H, W) as (B, L, C)."""
    if channels_first:
        return tokens.flatten(2).transpose(1, 2)
    return tokens if tokens.dim() == 3 else tokens.flatten(1, -2)


def in_shape(sequence: Tensor, shape: Sequence[int], *, channels_first: bool) -> Tensor:
    """A sequence (B, L, C) in the shape that tokens had, with channels of its own number.

    A sequence of another number of tokens comes in a row: (B, K, C), (B, 1, K, C) or (B, C, K, 1).
    """
    batch, length, width = sizes(sequence)
    if channels_first:
        full = shape[2] * shape[3] == length
        places = (shape[2], shape[3]) if full else (length, 1)
        return sequence.transpose(1, 2).reshape(batch, width, *places)
    if len(shape) == 3:
        return sequence
    full = shape[1] * shape[2] == length
    return sequence.reshape(batch, *((shape[1], shape[2]) if full else (1, length)), width)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among a module's arguments; ``None`` if there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)

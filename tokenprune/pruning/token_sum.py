"""The place inside a block where tokens are merged: behind its attention, in front of its MLP.

Shapes: B images, K tokens of the sequence as it is, C channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.interception import Interception
from tokenprune.errors import InterceptionError
from tokenprune.pruning.places import Place

_SUMS = (
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
    operator.add,
    operator.iadd,
)


class TokenSum(Interception):
    """From the end of a block's attention to the end of the block: the first sum of tokens is what goes on pruned.

    A block adds what its attention gave to the tokens it got, before or behind a norm, a scale or a dropout, and the
    sum is what its MLP and its second residual take. So whatever the block does with it, it does to the tokens that
    are left.

    Args:
        prune: What goes on of the tokens (B, K, C) inside a block, given its place.
    """

    def __init__(self, prune: Callable[[Place, Tensor], Tensor]) -> None:
        super().__init__()
        self._prune = prune
        self._place: Place | None = None
        self._shape: tuple[int, ...] = ()
        self.entered = False

    def begin(self, place: Place, attended: Tensor) -> None:
        """Wait for a sum of the shape of what attention gave, (B, K, C).

        Raises:
            InterceptionError: It gave something else.
        """
        if attended.dim() != 3:
            raise InterceptionError(
                f"the attention of block {place.block} gave {tuple(attended.shape)} instead of tokens (B, L, C), which "
                "cannot be merged between attention and MLP; take another scorer, which prunes in front of blocks."
            )
        self._place, self._shape = place, tuple(attended.shape)
        self.entered = True
        self.enter()

    def end(self, block: nn.Module | None) -> None:
        """Stop waiting.

        Args:
            block: The block that has ended; ``None`` if it was interrupted.

        Raises:
            InterceptionError: It never added up what attention gave.
        """
        if not self.entered:
            return
        self.entered = False
        self.leave()
        if block is not None and self._place is not None:
            raise InterceptionError(
                f"{type(block).__name__} never added what its attention gave to its tokens, so that these cannot be "
                "merged between attention and MLP; take another scorer, which prunes in front of blocks."
            )

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        place = self._place
        if place is None or func not in _SUMS or not _adds_tokens(args, self._shape):
            return result
        self._place = None
        return self._prune(place, result)


def _adds_tokens(args: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether two tensors of this shape are added."""
    return len(args) == 2 and all(isinstance(one, Tensor) and tuple(one.shape) == shape for one in args)

"""The tokens of all images, as a ranking is given them.

Shapes: B images, K tokens in the sequence of each, n of them patch tokens that are left, C and W channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The tokens that reach a stage of a frozen model.

    Prefix, suffix and summary tokens are among them, so that nothing is cut out of the sequence before it is ranked.
    Operators of PyTorch are quickest with all tokens one below the other. What is compiled or exported is given the
    sequences as they are, so that the graph is free of views, and has the products that runtimes know best.

    Attributes:
        tokens: (B·K, C), image below image; or (B, K, C), in what a compiler makes.
        num_images: B.
        others: (B·K,) or (K,), −inf for a token that is no patch token, 0 for one that is; `rank` adds it.
        shares: (1, K), 1/n for a patch token, 0 for any other.
    """

    tokens: Tensor
    num_images: int
    others: Tensor
    shares: Tensor

    @property
    def of_one(self) -> bool:
        """Whether they are of a single image, in rows."""
        return self.num_images == 1 and self.tokens.dim() == 2

    def by_image(self, values: Tensor) -> Tensor:
        """Values of tokens as (B, K, W)."""
        return values if values.dim() == 3 else values.view(self.num_images, -1, values.shape[1])

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values of tokens over the patch tokens of an image, (B, 1, W); of rows `of_one`, (1, W)."""
        return torch.mm(self.shares, values) if self.of_one else torch.matmul(self.shares, self.by_image(values))

    def rank(self, values: Tensor, weight: Tensor) -> Tensor:
        """The products of values of tokens and a weight (W,), one for each; −inf for what is no patch token."""
        others = self.others
        if values.dtype != weight.dtype:  # under autocast
            others, weight = others.to(values.dtype), weight.to(values.dtype)
        if values.dim() == 3:
            return (values @ weight.unsqueeze(1)).squeeze(2) + others
        return torch.addmv(others, values, weight)


Ranking = Callable[[Rows], Tensor]
"""Of tokens, a number for each: those of an image's patch tokens rank these as scores do, all others are −inf."""

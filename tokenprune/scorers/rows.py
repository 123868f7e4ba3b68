"""The tokens of all images, one a row, as a ranking is given them.

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

    Attributes:
        tokens: (B·K, C), image below image.
        num_images: B.
        others: (B·K,), −inf for a token that is no patch token, 0 for one that is; `rank` adds it.
        shares: (1, K), 1/n for a patch token, 0 for any other.
    """

    tokens: Tensor
    num_images: int
    others: Tensor
    shares: Tensor

    @property
    def of_one(self) -> bool:
        """Whether they are of a single image. What is compiled is for any number of them."""
        return not torch.compiler.is_compiling() and self.num_images == 1

    def by_image(self, values: Tensor) -> Tensor:
        """Values (B·K, W) as (B, K, W)."""
        return values.view(self.num_images, -1, values.shape[1])

    def mean(self, values: Tensor) -> Tensor:
        """The mean (B, W) of values (B·K, W) over the patch tokens of an image."""
        if self.of_one:
            return torch.mm(self.shares, values)
        return torch.matmul(self.shares, self.by_image(values)).squeeze(1)

    def rank(self, values: Tensor, weight: Tensor) -> Tensor:
        """(B·K,), the products of values (B·K, W) and a weight (W,); −inf for what is no patch token."""
        others = self.others
        if values.dtype != weight.dtype:  # under autocast
            others, weight = others.to(values.dtype), weight.to(values.dtype)
        return torch.addmv(others, values, weight)


Ranking = Callable[[Rows], Tensor]
"""Of tokens (B·K, C), numbers (B·K,) that rank an image's patch tokens as their scores do, and −inf for all others."""

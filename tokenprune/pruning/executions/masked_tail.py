"""Pooling behind the last block that does not see pruned tokens, although they are there.

Shapes: B images, L tokens of a sequence, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import InterceptionError
from tokenprune.pruning.executions.masked_attention import MaskedAttention


class MaskedTail(MaskedAttention):
    """From the last block to the end of the forward pass: pooling sees kept tokens only.

    Means and maxima over the token dimension and attention pools are covered, over all tokens as
    over patch tokens alone.
    """

    own_key = False  # a pool's query is not one of the tokens; where it is, rows of pruned tokens are not used
    where = "attention after the last block"

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reduction = _REDUCTIONS.get(func)
        if reduction is not None:
            result = self.reduce(reduction, *args, **kwargs)
            if result is not None:
                return result
        if func in _MAXIMA_WITH_INDICES:
            args = self.without_pruned(*args, **kwargs)
        if func is torch.adaptive_avg_pool1d and args[1:] in ((1,), ((1,),), ([1],)):
            result = self.reduce(_mean, args[0], -1, True)
            if result is not None:
                return result
        if func in _UNKNOWN_REDUCTIONS and self.seen_by_reduction(*args, **kwargs) is not None:
            raise InterceptionError(
                f"behind the last block {func.__name__} reduces all tokens, of which some are pruned; means, maxima "
                "and attention can be masked; downstream='all tokens' in the Backbone is for everything else."
            )
        return super().other(func, args, kwargs)

    def without_pruned(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The arguments of a maximum over tokens with pruned tokens at −∞, or any others as they are."""
        found = self.seen_by_reduction(*args, **kwargs) if args else None
        return args if found is None else (args[0].masked_fill(found[0] == 0, -math.inf), *args[1:])

    def reduce(self, reduction: Callable[[Tensor, Tensor, int], Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """The kept-only reduction, or ``None`` where the call does not reduce tokens."""
        found = self.seen_by_reduction(*args, **kwargs)
        if found is None:
            return None
        keep, dim = found
        tokens = args[0] if args else kwargs["input"]
        keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        result = reduction(tokens, keep, dim)
        return result if keepdim else result.squeeze(dim)

    def seen_by_reduction(self, *args: Any, **kwargs: Any) -> tuple[Tensor, int] | None:
        """The decisions on the tokens that a call reduces over, (B, L, 1) or (B, 1, L), and along which dimension.

        ``None`` where it does not reduce tokens. Tokens are (B, L, C), or (B, C, L) if C is no number of tokens.
        """
        tokens = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        if isinstance(dim, (tuple, list)) and len(dim) == 1:
            dim = dim[0]
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or dim not in (1, -2, 2, -1):
            return None
        keep, other = self.lookup(tokens.shape[dim]), self.lookup(tokens.shape[3 - dim % 3])
        along = int(dim % 3)
        if keep is None or tokens.shape[0] != keep.shape[0] or (along == 2 and other is not None):
            return None
        return keep.unsqueeze(3 - along), along


def _mean(tokens: Tensor, keep: Tensor, dim: int) -> Tensor:
    keep = keep.to(torch.promote_types(tokens.dtype, torch.float32))
    mean = (tokens * keep).sum(dim=dim, keepdim=True) / keep.sum(dim=dim, keepdim=True).clamp(min=1)
    return mean.to(tokens.dtype)


def _maximum(tokens: Tensor, keep: Tensor, dim: int) -> Tensor:
    return tokens.masked_fill(keep == 0, -math.inf).amax(dim=dim, keepdim=True)


_REDUCTIONS: dict[Callable[..., Any], Callable[[Tensor, Tensor, int], Tensor]] = {
    torch.mean: _mean,
    Tensor.mean: _mean,
    torch.amax: _maximum,
    Tensor.amax: _maximum,
}
_MAXIMA_WITH_INDICES = (torch.max, Tensor.max)
# A sum is not among them: with the weights of an attention pool, which are 0 for pruned tokens, it is right.
_UNKNOWN_REDUCTIONS = tuple(
    getattr(owner, name)
    for name in ("std", "var", "median", "logsumexp", "topk", "sort", "cumsum", "prod", "norm")
    for owner in (torch, Tensor)
)

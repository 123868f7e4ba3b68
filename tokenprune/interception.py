"""Interception: attention and pooling of somebody else's code, made to see kept tokens only.

A `TorchFunctionMode` that is active while a module runs sees every torch function the module
calls, and answers the few that mix tokens in its own way. Nothing outside that call is touched.

Shapes: B images, N patch tokens, P prefix tokens, L = P + N, K keys, C channels.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenprune.errors import InterceptionError
from tokenprune.functional import attend


def _without_override_check(function: Callable[..., Any]) -> types.FunctionType:
    """The function itself, in a namespace where it does not ask whether it is overridden.

    `F.multi_head_attention_forward` hands itself to the active mode before it does anything. To run
    it *with* the mode, so that the attention inside is seen, the question must be answered by no.
    """
    namespace = {**function.__globals__, "has_torch_function": _no_torch_function}
    del namespace["__name__"]  # the compiler takes a named namespace for the module of that name
    copy = types.FunctionType(
        function.__code__,
        namespace,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no_torch_function(tensors: object) -> bool:
    return False


_multi_head_attention_forward = _without_override_check(F.multi_head_attention_forward)


class _Interception(TorchFunctionMode):
    """What interception of blocks and of the tail have in common: the way to the attention call."""

    def enter(self) -> None:
        """Switch it on, outside of a ``with``: by one hook, for another to switch off."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Switch it off again."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Attention weights are not computed: the path that returns them does not use SDPA.
            with self:
                return _multi_head_attention_forward(*args, **{**kwargs, "need_weights": False})
        return self.other(func, args, kwargs)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Stands in for `F.scaled_dot_product_attention`, with its signature."""
        if is_causal or enable_gqa:
            raise InterceptionError(
                "causal attention and grouped queries cannot be masked; no ViT is known to use them."
            )
        keep, own_key = self.keep_of_keys(key.shape[-2])
        return attend(query, key, value, keep, own_key=own_key, scale=scale, dropout_p=dropout_p, attn_mask=attn_mask)

    def keep_of_keys(self, num_keys: int) -> tuple[Tensor, bool]:
        """The (B, K) decisions for ``num_keys`` keys, and whether a query always sees its own key."""
        raise NotImplementedError


class BlockInterception(_Interception):
    """While a block's attention runs: pruned tokens are invisible to all but themselves.

    Attributes:
        keep: (B, L) decisions over all tokens, prefix tokens included.
        hits: Attention calls seen since it was last set to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keep: Tensor | None = None
        self.hits = 0

    def keep_of_keys(self, num_keys: int) -> tuple[Tensor, bool]:
        assert self.keep is not None
        if num_keys != self.keep.shape[1]:
            raise InterceptionError(
                f"a masked block attends over {num_keys} keys while it was given {self.keep.shape[1]} tokens; "
                "which of them are pruned cannot be told."
            )
        self.hits += 1
        return self.keep, True


class TailInterception(_Interception):
    """From the last block to the end of the forward pass: pooling sees kept tokens only.

    Means and maxima over the token dimension and attention pools are covered, over all tokens as
    over patch tokens alone.

    Attributes:
        keep: (B, L) decisions over all tokens, prefix tokens included.
        num_prefix_tokens: P.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keep: Tensor | None = None
        self.num_prefix_tokens = 0

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reduction = _REDUCTIONS.get(func)
        if reduction is not None:
            result = self.reduce(reduction, *args, **kwargs)
            if result is not None:
                return result
        if func in _MAXIMA_WITH_INDICES:
            args = self.without_pruned(*args, **kwargs)
        return func(*args, **kwargs)

    def without_pruned(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The arguments of a maximum over tokens with pruned tokens at −∞, or any others as they are."""
        keep = self.keep_of_reduction(*args, **kwargs) if args else None
        return args if keep is None else (args[0].masked_fill(keep.unsqueeze(-1) == 0, -math.inf), *args[1:])

    def reduce(self, reduction: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """The kept-only reduction, or ``None`` where the call does not reduce tokens."""
        keep = self.keep_of_reduction(*args, **kwargs)
        if keep is None:
            return None
        tokens = args[0] if args else kwargs["input"]
        keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        result = reduction(tokens, keep.unsqueeze(-1))  # (B, 1, C)
        return result if keepdim else result.squeeze(1)

    def keep_of_reduction(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The decisions on the tokens that a call reduces over, or ``None`` where it does not."""
        tokens = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        if isinstance(dim, (tuple, list)) and len(dim) == 1:
            dim = dim[0]
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or dim not in (1, -2):
            return None
        keep = self.lookup(tokens.shape[1])
        return None if keep is None or tokens.shape[0] != keep.shape[0] else keep

    def lookup(self, length: int) -> Tensor | None:
        """The decisions for a sequence of all tokens or of the patch tokens; ``None`` for another."""
        assert self.keep is not None
        if length == self.keep.shape[1]:
            return self.keep
        if length == self.keep.shape[1] - self.num_prefix_tokens:
            return self.keep[:, self.num_prefix_tokens :]
        return None

    def keep_of_keys(self, num_keys: int) -> tuple[Tensor, bool]:
        keep = self.lookup(num_keys)
        if keep is None:
            assert self.keep is not None
            raise InterceptionError(
                f"attention after the last block runs over {num_keys} keys, neither the {self.keep.shape[1]} tokens "
                "nor the patch tokens among them; which of them are pruned cannot be told."
            )
        # A pool's query is not one of the tokens. Where it is, rows of pruned tokens are not used.
        return keep, False


def _mean(tokens: Tensor, keep: Tensor) -> Tensor:
    keep = keep.to(torch.promote_types(tokens.dtype, torch.float32))
    mean = (tokens * keep).sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.to(tokens.dtype)


def _maximum(tokens: Tensor, keep: Tensor) -> Tensor:
    return tokens.masked_fill(keep == 0, -math.inf).amax(dim=1, keepdim=True)


_REDUCTIONS: dict[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]] = {
    torch.mean: _mean,
    Tensor.mean: _mean,
    torch.amax: _maximum,
    Tensor.amax: _maximum,
}
_MAXIMA_WITH_INDICES = (torch.max, Tensor.max)

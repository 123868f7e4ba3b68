"""Interception: attention of somebody else's code, made to see kept tokens only.

A `TorchFunctionMode` that is active while a module runs sees every torch function the module
calls, and answers the few that mix tokens in its own way. Nothing outside that call is touched.

Shapes: B images, N patch tokens, P prefix tokens, L = P + N, K keys, C channels.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenprune.errors import InterceptionError
from tokenprune.functional import attend, masked_softmax, visible
from tokenprune.pruning.side_inputs import gather_mask
from tokenprune.tokens import Layout, sizes


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


class AttentionCall(NamedTuple):
    """What `F.scaled_dot_product_attention` was called with, in its own order and with its defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        """Make the call."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


class Interception(TorchFunctionMode):
    """What all interceptions have in common: the way to the attention call."""

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
            return self.attention(AttentionCall(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention_forward(*args, **kwargs)
        return self.other(func, args, kwargs)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def attention(self, call: AttentionCall) -> Tensor:
        """Stands in for `F.scaled_dot_product_attention`."""
        raise NotImplementedError


class Masking(Interception):
    """Attention that does not see pruned tokens, by SDPA or with a softmax written out.

    Attributes:
        keep: (B, N) decisions on the patch tokens; ``None`` while it is switched off.
        num_suffix: Tokens behind them.
    """

    own_key: bool
    """Whether a query always sees its own key."""
    where: str
    """What attends, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.keep: Tensor | None = None
        self.num_suffix = 0

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in SOFTMAXES:
            weights = self.softmax(*args, **kwargs)
            if weights is not None:
                return weights
        return func(*args, **kwargs)

    def attention(self, call: AttentionCall) -> Tensor:
        if call.is_causal:
            raise InterceptionError("causal attention cannot be masked; no ViT is known to use it.")
        key, value = call.key, call.value
        if call.enable_gqa:  # each key and value serves several heads of queries
            key, value = (for_each_query_head(tensor, call.query) for tensor in (key, value))
        return attend(
            call.query,
            key,
            value,
            self.keep_of_keys(key.shape[-2]),
            own_key=self.own_key,
            scale=call.scale,
            dropout_p=call.dropout_p,
            attn_mask=call.attn_mask,
        )

    def softmax(
        self,
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """Stands in for a softmax over keys; ``None`` for any other one."""
        if input.dim() not in (3, 4) or dim not in (-1, input.dim() - 1):
            return None
        keep = self.lookup(input.shape[-1])
        if keep is None or (self.own_key and input.shape[-2] != input.shape[-1]):
            return None
        if input.shape[0] % keep.shape[0] or (input.dim() == 4 and input.shape[0] != keep.shape[0]):
            return None
        self.seen()
        return masked_softmax(input, keep, own_key=self.own_key, dtype=dtype)

    def keep_of_keys(self, num_keys: int) -> Tensor:
        """The (B, K) decisions for ``num_keys`` keys.

        Raises:
            InterceptionError: Which of so many are pruned cannot be told.
        """
        keep = self.lookup(num_keys)
        if keep is None:
            assert self.keep is not None
            raise InterceptionError(
                f"{self.where} runs over {num_keys} keys, and not over {self.keep.shape[1]} patch tokens with "
                f"{self.expected()} others; which of them are pruned cannot be told."
            )
        self.seen()
        return keep

    def expected(self) -> str:
        """How many tokens besides patches are known of, for messages."""
        raise NotImplementedError

    def lookup(self, length: int) -> Tensor | None:
        """The decisions for a sequence of that many tokens, ``None`` if it is not one of the model's sequences."""
        raise NotImplementedError

    def seen(self) -> None:
        """Note that an attention was masked."""

    def surrounded(self, num_prefix: int, num_suffix: int) -> Tensor:
        """The decisions with ones for other tokens in front and behind."""
        assert self.keep is not None
        return Layout(num_prefix, self.keep.shape[1], num_suffix).with_others(self.keep)


class BlockInterception(Masking):
    """While a block's attention runs: pruned tokens are invisible to all but themselves.

    Attributes:
        num_prefix: Numbers of tokens that may stand in front of the patch tokens.
        hits: Attention calls seen since it was last set to 0.
    """

    own_key = True
    where = "the attention of a masked block"

    def __init__(self) -> None:
        super().__init__()
        self.num_prefix: tuple[int, ...] = (0,)
        self.hits = 0

    def lookup(self, length: int) -> Tensor | None:
        assert self.keep is not None
        num_prefix = length - self.keep.shape[1] - self.num_suffix
        return self.surrounded(num_prefix, self.num_suffix) if num_prefix in self.num_prefix else None

    def expected(self) -> str:
        return " or ".join(str(number + self.num_suffix) for number in self.num_prefix)

    def seen(self) -> None:
        self.hits += 1

    def mix(self, weights: Tensor) -> Tensor:
        """Attention weights (B, L, L, H) that were mixed, with those of pruned tokens at 0 again."""
        keep = self.lookup(weights.shape[2])
        assert keep is not None
        return weights * visible(keep.to(weights.dtype), own_key=True).unsqueeze(-1)


class GatherInterception(Interception):
    """While a block's attention runs over the tokens that are left: what it has for all tokens is cut down to them.

    A bias over all pairs of tokens is cut; and a table with the tokens left of each image, to which
    attention adds a first dimension of 1, for all images, gets none: it has one of B already.

    Attributes:
        positions: (B, K) int64, those left among all tokens; ``None`` while it is switched off.
        length: L.
        tables: Such tables, (B, K, …).
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.length = 0
        self.tables: tuple[Tensor, ...] = ()

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _ADDING_DIMENSIONS and any(table is args[0] for table in self.tables):
            table, *rest = args
            if func is Tensor.unsqueeze:
                return table if rest == [0] else func(*args)
            shape = [*rest[0]] if isinstance(rest[0], (tuple, list)) else rest
            return func(table, [table.shape[0], *shape[1:]] if shape[0] == 1 else shape)
        return func(*args, **kwargs)

    def attention(self, call: AttentionCall) -> Tensor:
        return self.cut(call).run()

    def cut(self, call: AttentionCall) -> AttentionCall:
        """The call with a bias for the keys that are there, if it has one for all tokens."""
        bias = call.attn_mask
        if self.positions is None or bias is None or not sizes(bias)[-1] == self.length != sizes(call.key)[-2]:
            return call
        return call._replace(attn_mask=gather_mask(bias, self.positions))


def for_each_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values that serve several heads of queries each, once for each of these."""
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)


SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
_ADDING_DIMENSIONS = (Tensor.unsqueeze, Tensor.view, Tensor.reshape)

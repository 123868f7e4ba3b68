"""Interception: seeing the calls that somebody else's code makes while it runs, and answering them differently.

A `TorchFunctionMode` that is active while a module runs sees every torch function the module
calls, and answers the few that mix tokens in its own way. Nothing outside that call is touched.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _without_override_check(function: Callable[..., Any]) -> types.FunctionType:
    """The function itself, in a namespace where it does not ask whether it is overridden.

    `F.multi_head_attention_forward` hands itself to the active mode before it does anything. To run
    it *with* the mode, so that the attention inside is seen, the answer to that question must be no.
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

    def check(self, module: nn.Module) -> None:
        """Raise an error if a module that has run did not call what this is there for; it has been left already."""

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


def for_each_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values that serve several heads of queries each, once for each of these."""
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)


SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)

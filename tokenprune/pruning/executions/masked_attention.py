"""Attention of somebody else's code that does not see pruned tokens, although they are there.

Shapes: B images, N patch tokens, L tokens of a sequence, K keys, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.interception import SOFTMAXES, AttentionCall, Interception, for_each_query_head
from tokenprune.errors import InterceptionError
from tokenprune.functional import attend, masked_softmax, visible
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, of_length


class MaskedAttention(Interception):
    """Attention that does not see pruned tokens, by SDPA or with a softmax written out.

    Attributes:
        selection: What is in force; ``None`` while it is switched off.
        layouts: The sequences over which attention may run.
        hits: Attention calls seen since it was last prepared.
    """

    own_key: bool
    """Whether a query always sees its own key."""
    where: str
    """What attends, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.selection: Selection | None = None
        self.layouts: tuple[Layout, ...] = ()
        self.hits = 0

    def prepare(self, selection: Selection, layouts: Sequence[Layout]) -> MaskedAttention:
        """Itself, for what is in force now."""
        self.selection, self.layouts, self.hits = selection, tuple(layouts), 0
        return self

    def leave(self) -> None:
        super().leave()
        self.selection = None

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
            self._visible_keys(key.shape[-2]),
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
        seen = self.lookup(input.shape[-1])
        if seen is None or (self.own_key and input.shape[-2] != input.shape[-1]):
            return None
        if input.shape[0] % seen.shape[0] or (input.dim() == 4 and input.shape[0] != seen.shape[0]):
            return None
        self.hits += 1
        return masked_softmax(input, seen, own_key=self.own_key, dtype=dtype)

    def _visible_keys(self, num_keys: int) -> Tensor:
        """Which of ``num_keys`` keys are seen, (B, K).

        Raises:
            InterceptionError: Which of so many are pruned is unknown.
        """
        seen = self.lookup(num_keys)
        if seen is None:
            lengths = " or ".join(map(str, sorted({layout.length for layout in self.layouts})))
            raise InterceptionError(
                f"{self.where} runs over {num_keys} keys, and not over {lengths}, the tokens of the sequences known "
                "there; which of them are pruned is unknown."
            )
        self.hits += 1
        return seen

    def lookup(self, length: int) -> Tensor | None:
        """Which tokens of a sequence of that many are seen, (B, L); ``None`` if it is not one of those known."""
        layout = of_length(self.layouts, length)
        if layout is None or self.selection is None:
            return None
        return self.selection.visible(layout)


class BlockAttention(MaskedAttention):
    """While a block's attention runs: pruned tokens are invisible to all but themselves."""

    own_key = True
    where = "the attention of a masked block"

    def check(self, module: nn.Module) -> None:
        if self.hits == 0:
            raise InterceptionError(
                f"the attention of {type(module).__name__} passed neither through scaled_dot_product_attention nor "
                "through a softmax over all tokens, so pruned tokens could not be masked; use its fused (SDPA) "
                "attention."
            )

    def mask_weights(self, weights: Tensor) -> Tensor | None:
        """Attention weights (B, L, L, H) that were mixed, with those of pruned tokens at 0 again."""
        seen = self.lookup(weights.shape[2])
        return None if seen is None else weights * visible(seen.to(weights.dtype), own_key=True).unsqueeze(-1)

"""Attention to tokens that stand for several: each counts as often as the patches that it was merged of.

Shapes: B images, L tokens of a sequence, K keys, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tokenprune.backbones.interception import SOFTMAXES, AttentionCall, Interception
from tokenprune.errors import InterceptionError
from tokenprune.functional import additive
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, of_length, replaced, sizes


class ProportionalAttention(Interception):
    """While a block's attention runs: softmax(q·kᵀ/√d + log s), with s the number of patches a key stands for.

    Token Merging: Your ViT But Faster (ToMe, arXiv 2210.09461), Eq. 1. By SDPA it is a bias, where a softmax is
    written out a sum. It is to be entered inside what masks or records attention, and outside what gathers its bias.

    Args:
        segments: Whether the model attends segment by segment of one sequence for all images, one call after the other.

    Attributes:
        alone: While a call runs whose bias is log s and nothing else: log s in the precision of sizes, (B or 1, K).
    """

    def __init__(self, *, segments: bool = False) -> None:
        super().__init__()
        self._segments, self._done = segments, 0
        self.alone: Tensor | None = None
        self._selection: Selection | None = None
        self._layouts: tuple[Layout, ...] = ()
        self._hits = 0

    def prepare(self, selection: Selection, layouts: Sequence[Layout]) -> ProportionalAttention:
        """Itself, for what is in force, in sequences of these layouts."""
        self._selection, self._layouts, self._hits, self._done = selection, tuple(layouts), 0, 0
        return self

    def leave(self) -> None:
        super().leave()
        self._selection = self.alone = None

    def check(self, module: nn.Module) -> None:
        if self._hits == 0:
            raise InterceptionError(
                f"the attention of {type(module).__name__} passed neither through scaled_dot_product_attention nor "
                "through a softmax over all tokens, so that tokens cannot count by their sizes; take a reduction "
                "without sizes, such as pruned='merge'."
            )

    def attention(self, call: AttentionCall) -> Tensor:
        exact = self._log_sizes(sizes(call.key)[-2])
        if exact is None:
            return call.run()
        log_sizes = _bias(exact, call.query)
        if call.attn_mask is not None:
            mask = additive(call.attn_mask, call.query)
            if sizes(mask)[-1] != sizes(log_sizes)[-1]:  # one for each image, of images that stand in one sequence
                raise InterceptionError(
                    "tokens cannot count by their sizes beside an attention mask or bias where all images stand in one "
                    "sequence; run this model in another execution."
                )
            return replaced(call, {"attn_mask": log_sizes + mask}).run()
        self.alone = exact
        output = replaced(call, {"attn_mask": log_sizes}).run()
        self.alone = None
        return output

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in SOFTMAXES and args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            _, _, num_queries, num_keys = sizes(args[0])
            log_sizes = self._log_sizes(num_keys) if num_queries == num_keys else None
            if log_sizes is not None:
                args = (args[0] + _bias(log_sizes, args[0]), *args[1:])
        return func(*args, **kwargs)

    def _log_sizes(self, num_keys: int) -> Tensor | None:
        """Log s of so many keys, (B, K); ``None`` where there are not so many tokens.

        Of images that stand in one sequence (1, T), or of the next segment of it.
        """
        selection = self._selection
        if selection is None or selection.sizes is None:
            return None
        packing, start = selection.packing, self._done
        packed = packing is not None and (num_keys == packing.length or self._segments)
        layout = self._layouts[0] if packed else of_length(self._layouts, num_keys)
        if layout is None:
            return None
        self._hits += 1
        everything = layout.with_others(selection.sizes)  # (B, K)
        if packing is not None and packed:
            everything = packing.pack(everything)[:, start : start + num_keys]  # (1, T), or (1, t) of a segment
            self._done += num_keys
        return everything.log()


def _bias(log_sizes: Tensor, like: Tensor) -> Tensor:
    """Log s (B, K) as a bias (B, 1, 1, K) in the dtype of what it is added to."""
    return log_sizes.to(like.dtype)[:, None, None, :]

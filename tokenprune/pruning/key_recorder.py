"""The keys of patch tokens, recorded for scorers that need them.

Shapes: B images, H heads, L tokens of a sequence, D channels of a key, n patch tokens in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenprune.backbones.interception import AttentionCall, Interception
from tokenprune.errors import InterceptionError
from tokenprune.functional import compute_dtype
from tokenprune.pruning.packing import Packing
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout, of_length, sizes


class KeyRecorder(Interception):
    """While a block's attention runs: the keys of patch tokens are recorded, and nothing changed.

    That is their mean over heads, as attention multiplies them with queries: behind a norm of keys and rotary
    positions, where there are any; in single precision at least, without a gradient.

    Attributes:
        recorded: (B, n, D), one for each time that attention was seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packing: Packing | None = None
        self._layouts: tuple[Layout, ...] = ()
        self._segments: list[Tensor] = []
        self.recorded: list[Tensor] = []

    def prepare(self, selection: Selection, layouts: Sequence[Layout]) -> KeyRecorder:
        """Itself, for what is in force, in sequences of these layouts."""
        self._packing, self._layouts, self._segments, self.recorded = selection.packing, tuple(layouts), [], []
        return self

    def check(self, module: nn.Module) -> None:
        if len(self.recorded) != 1:
            raise InterceptionError(
                f"the attention of {type(module).__name__} passed {len(self.recorded)} times, and not once, over all "
                "tokens through scaled_dot_product_attention, so the keys of tokens are unknown; move the stage, or "
                "take a scorer that does not need keys."
            )

    def attention(self, call: AttentionCall) -> Tensor:
        packing = self._packing
        layout = of_length(self._layouts, sizes(call.key)[-2]) if packing is None else self._layouts[0]
        if layout is not None and call.key.dim() == 4:
            with torch.no_grad():
                keys: Tensor | None = call.key.to(compute_dtype(call.key)).mean(dim=1)  # (B, L, D)
                if packing is not None:  # all in one call, or segment by segment
                    assert keys is not None
                    self._segments.append(keys)
                    keys = packing.unpack_segments(self._segments)
                if keys is not None:
                    self.recorded.append(layout.patches(keys))
        return call.run()

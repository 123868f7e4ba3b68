"""What stages are told of a block's attention.

Shapes: B images, m patch tokens in the sequence, D channels of a key.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Recorded(NamedTuple):
    """What was recorded of a block's attention for a scorer that asks for it.

    Attributes:
        attention: (B, m), what each patch token received; ``None`` where it was not recorded.
        keys: (B, m, D), each patch token's keys, mean over heads; ``None`` where they were not recorded.
    """

    attention: Tensor | None = None
    keys: Tensor | None = None

"""What happens around the attention of a block: it is masked, or what it has for all tokens cut down, or watched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenprune.backbones.backbone import Backbone
from tokenprune.backbones.interception import BlockInterception, GatherInterception
from tokenprune.errors import InterceptionError
from tokenprune.pruning.attention_recorder import Watching
from tokenprune.pruning.side_inputs import gather_tokens
from tokenprune.tokens import Layout, sizes


class AttentionPatch:
    """Entered in front of an attention module and left behind it, by hooks.

    Attributes:
        cuts: Whether attention has something for all tokens, so that `cut` is needed.
        entered: Whether anything has been entered that is to be left.
    """

    def __init__(self, backbone: Backbone) -> None:
        num_prefix, num_late = backbone.num_prefix_tokens, backbone.num_late_prefix_tokens
        self._backbone = backbone
        self._masking = BlockInterception()
        self._masking.num_prefix = (num_prefix, num_prefix + num_late) if num_late else (num_prefix,)
        self._masking.num_suffix = backbone.num_suffix_tokens + backbone.num_inner_tokens
        self._cutting = GatherInterception()
        self._watching = Watching(backbone, self._cutting)
        self._received: list[Tensor] = []
        self._full_tables: list[Tensor] = []
        self.cuts = bool(backbone.biased_attention or backbone.token_tables or backbone.shared_token_inputs)
        self.entered = False

    def mask(self, keep: Tensor) -> None:
        """From now on tokens with a 0 in ``keep`` (B, N) are visible to none but themselves."""
        self.entered = True
        self._masking.keep, self._masking.hits = keep, 0
        self._masking.enter()

    def cut(self, attention: nn.Module, indices: Tensor, layout: Layout, tables: Sequence[Tensor]) -> None:
        """From now on biases and tables over all tokens are cut down to those left.

        Args:
            attention: The module that is about to run.
            indices: (B, n) int64, the patch tokens left.
            layout: The sequence before any pruning.
            tables: Side inputs that were cut already, to which attention adds a dimension for all images.
        """
        self.entered = True
        backbone, positions = self._backbone, layout.positions(indices)
        if backbone.biased_attention or backbone.shared_token_inputs:
            self._cutting.positions, self._cutting.length = positions, layout.length
            self._cutting.tables = tuple(tables) if backbone.shared_token_inputs else ()
            self._cutting.enter()
        for table in backbone.token_tables:
            if table.owner is attention:
                full = getattr(attention, table.name)
                if full is None or sizes(full)[table.pattern.split().index("n")] != layout.length:
                    full = table.build(layout.length)
                self._full_tables.append(full)
                setattr(attention, table.name, gather_tokens(full, table.pattern, positions))

    def watch(self, num_patches: int) -> None:
        """From now on what each patch token receives of the attention is noted; after `mask` or `cut`.

        Args:
            num_patches: How many there are in the sequence.
        """
        self.entered = True
        self._watching.start(num_patches, self._masking.keep)

    def take_received(self) -> Tensor | None:
        """What each patch token (B, n) received where attention was watched last; ``None`` where it was not."""
        received, self._received = self._received, []
        return torch.stack(received).mean(dim=0) if received else None

    def leave(self, attention: nn.Module, *, failed: bool) -> None:
        """Take back what was entered in front of ``attention``.

        Args:
            attention: The module that has run.
            failed: Whether it raised an error.

        Raises:
            InterceptionError: It was to be masked or watched and did not attend in a way that can be.
        """
        for table in self._backbone.token_tables if self._full_tables else ():
            if table.owner is attention:
                setattr(attention, table.name, self._full_tables.pop(0))
        masked, watched = self._masking.keep is not None, self._watching.num_patches is not None
        self._leave_interceptions()
        if masked and self._masking.hits == 0 and not failed:
            raise InterceptionError(
                f"the attention of {type(attention).__name__} passed neither through scaled_dot_product_attention nor "
                "through a softmax over all tokens, so pruned tokens could not be masked; use its fused (SDPA) "
                "attention."
            )
        if watched and not failed:
            if len(self._watching.noted) != 1:
                raise InterceptionError(
                    f"the attention of {type(attention).__name__} passed {len(self._watching.noted)} times, and not "
                    "once, through scaled_dot_product_attention or a softmax over all tokens, so what each token "
                    "receives of it cannot be told; move the stage, or take a scorer that does not go by attention."
                )
            self._received += self._watching.noted

    def close(self) -> None:
        """Leave what is still entered, and forget what was noted, as after an interrupted pass."""
        self._leave_interceptions()
        self._received = []

    def _leave_interceptions(self) -> None:
        self.entered = False
        if self._watching.num_patches is not None:
            self._watching.stop()
        if self._masking.keep is not None:
            self._masking.leave()
            self._masking.keep = None
        if self._cutting.positions is not None:
            self._cutting.leave()
            self._cutting.positions = None

    def mix(self, weights: Tensor) -> Tensor | None:
        """Mixed attention weights (B, L, L, H), with those of pruned tokens at 0; ``None`` without masking."""
        return None if self._masking.keep is None else self._masking.mix(weights)

"""What is switched on while a block's attention runs: masking, recording, and what adaptations need.

Shapes: B images, m patch tokens in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenprune.backbones.adaptations import Adaptation, Removed, Scope
from tokenprune.backbones.backbone import Backbone
from tokenprune.errors import InterceptionError
from tokenprune.pruning.attention_recorder import AttentionRecorder
from tokenprune.pruning.selection import Selection
from tokenprune.tokens import Layout


class AttentionScopes:
    """Scopes that hooks enter in front of an attention module, and leave behind it in the opposite order.

    Args:
        backbone: What the model looks like.

    Attributes:
        adapting: The adaptations that want to know when attention runs on a sequence of which tokens were removed.
        entered: Those that have been entered and not left.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.adapting = tuple(
            one for one in backbone.adaptations if type(one).around_attention is not Adaptation.around_attention
        )
        self.entered: list[Scope] = []
        self._recorder = AttentionRecorder(class_token=backbone.class_token)
        self._recorded: list[Tensor] = []

    def recorder(self, selection: Selection, layouts: Sequence[Layout]) -> Scope:
        """What records the attention scores of tokens; inside masking, outside of what adaptations need."""
        return self._recorder.prepare(selection, layouts)

    def of_adaptations(self, attention: nn.Module, removed: Removed) -> list[Scope]:
        """What adaptations need while ``attention`` runs."""
        scopes = (one.around_attention(attention, removed) for one in self.adapting)
        return [scope for scope in scopes if scope is not None]

    def enter(self, scopes: list[Scope]) -> None:
        """Enter all, the first one outermost.

        Raises:
            InterceptionError: Others have been entered and not left.
        """
        if self.entered:
            raise InterceptionError(
                "an attention module of the Backbone runs inside of another one; name the outermost alone, each once."
            )
        for scope in scopes:
            scope.enter()
        self.entered = scopes

    def leave(self, attention: nn.Module, *, failed: bool) -> None:
        """Leave all, and have each check what it has seen, unless ``attention`` has ``failed``.

        Raises:
            InterceptionError: The attention did not run in a way that could be masked or recorded.
        """
        scopes = self._leave()
        for scope in () if failed else scopes:
            scope.check(attention)
            if scope is self._recorder:
                self._recorded += self._recorder.recorded

    def close(self) -> None:
        """Leave what is still entered, and forget what was recorded, as after an interrupted pass."""
        self._leave()
        self._recorded = []

    def take_recorded(self) -> Tensor | None:
        """(B, m), what each patch token received where attention was recorded last; ``None`` where it was not."""
        recorded, self._recorded = self._recorded, []
        return torch.stack(recorded).mean(dim=0) if recorded else None

    def _leave(self) -> list[Scope]:
        scopes, self.entered = self.entered, []
        for scope in reversed(scopes):
            scope.leave()
        return scopes

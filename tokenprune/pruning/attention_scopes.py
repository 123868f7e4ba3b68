"""What is switched on while a block's attention runs: masking, recording, sizes, and what adaptations need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenprune.backbones.adaptations import Adaptation, Removed, Scope
from tokenprune.backbones.backbone import Backbone
from tokenprune.errors import InterceptionError
from tokenprune.pruning.attention_recorder import AttentionRecorder
from tokenprune.pruning.key_recorder import KeyRecorder
from tokenprune.pruning.proportional_attention import ProportionalAttention
from tokenprune.pruning.recording import Recorded
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.size_channels import SizeChannels, on_gpu
from tokenprune.scorers import Scorer
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
        self._recorder = AttentionRecorder(class_token=backbone.class_token, segments=backbone.packed is not None)
        self._key_recorder = KeyRecorder()
        self._proportional = ProportionalAttention(segments=backbone.packed is not None)
        self._channels = SizeChannels(self._proportional)
        self._attention: list[Tensor] = []
        self._keys: list[Tensor] = []

    def of_selection(self, selection: Selection, layouts: Sequence[Layout], asker: Scorer | None) -> list[Scope]:
        """What records what a scorer asks for, and lets tokens count by their sizes.

        Recording is to be entered inside masking, sizes inside recording, outside of what adaptations need. Masked
        attention has kernels of its own, which take sizes as a bias.
        """
        scopes: list[Scope] = []
        if selection.sizes is not None and selection.keep is None and on_gpu(selection.sizes):
            scopes.append(self._channels)
        if asker is not None and asker.needs_attention:
            scopes.append(self._recorder.prepare(selection, layouts))
        if asker is not None and asker.needs_keys:
            scopes.append(self._key_recorder.prepare(selection, layouts))
        if selection.sizes is not None:
            scopes.append(self._proportional.prepare(selection, layouts))
        return scopes

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
                self._attention += self._recorder.recorded
            if scope is self._key_recorder:
                self._keys += self._key_recorder.recorded

    def close(self) -> None:
        """Leave what is still entered, and forget what was recorded, as after an interrupted pass."""
        if self.entered:
            self._leave()
        if self._attention or self._keys:
            self._attention, self._keys = [], []

    def take_recorded(self) -> Recorded:
        """What was recorded where attention ran last, for the next stage."""
        attention, keys, self._attention, self._keys = self._attention, self._keys, [], []
        return Recorded(_mean(attention), _mean(keys))

    def _leave(self) -> list[Scope]:
        scopes, self.entered = self.entered, []
        for scope in reversed(scopes):
            scope.leave()
        return scopes


def _mean(recorded: list[Tensor]) -> Tensor | None:
    return torch.stack(recorded).mean(dim=0) if recorded else None

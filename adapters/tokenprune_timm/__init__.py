"""The adapter of timm's Vision Transformers.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`. LV-ViT, which timm lacks, is in `lvvit`, to be imported by
whoever wants its models registered with timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenprune import Adapter, Backbone, Preprocessing
from tokenprune_timm import checkpoints, hierarchy_checkpoints, loading, models, preprocessing, rebuilding

__all__ = ["TimmAdapter", "adapter"]


class TimmAdapter(Adapter):
    """Knows timm's Vision Transformers, and LV-ViT among them."""

    def describe(self, model: nn.Module) -> Backbone:
        return models.describe(model)

    def example_inputs(self, model: nn.Module) -> Mapping[str, Any]:
        return models.example_inputs(model)

    def identity(self, model: nn.Module) -> dict[str, Any]:
        return rebuilding.identity(model)

    def build(self, identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
        return rebuilding.build(identity, pretrained=pretrained)

    def load(self, name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
        return loading.load(name, pretrained=pretrained, image_size=image_size)

    def names(self) -> list[str]:
        return loading.names()

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        return preprocessing.preprocessing(model)

    def from_state_dict(self, state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
        if hierarchy_checkpoints.is_hierarchy(state):
            return hierarchy_checkpoints.from_state_dict(state)
        return checkpoints.from_state_dict(state, num_heads=num_heads)

    def official_weights(self, model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return hierarchy_checkpoints.renamed(state, model) if hierarchy_checkpoints.is_hierarchy(state) else state


adapter = TimmAdapter()

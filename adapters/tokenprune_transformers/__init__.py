"""The adapter of the Vision Transformers of transformers.

Whatever is a flat list of blocks with global attention is found by its structure; the few families
that differ otherwise are described in `models`, and what to feed them in `example_inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokenprune import Adapter, Backbone, Preprocessing
from tokenprune.backbones.vision_language import VisionLanguage
from tokenprune_transformers import (
    example_inputs,
    example_prompts,
    loading,
    models,
    preprocessing,
    rebuilding,
    vision_language,
)

__all__ = ["TransformersAdapter", "adapter"]


class TransformersAdapter(Adapter):
    """Knows the vision models of transformers, and towers inside of other models."""

    def describe(self, model: nn.Module) -> Backbone:
        return models.describe(model)

    def vision_language(self, model: nn.Module) -> VisionLanguage | None:
        return vision_language.vision_language(model)

    def example_prompts(
        self, model: Any, described: VisionLanguage, *, num_prompts: int, num_words: int
    ) -> Mapping[str, Any]:
        return example_prompts.example_prompts(model, described, num_prompts=num_prompts, num_words=num_words)

    def example_inputs(self, model: Any) -> Mapping[str, Any]:
        return example_inputs.example_inputs(model)

    def identity(self, model: nn.Module) -> dict[str, Any]:
        return rebuilding.identity(model)

    def build(self, identity: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
        return rebuilding.build(identity, pretrained=pretrained)

    def load(self, name: str, *, pretrained: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
        return loading.load(name, pretrained=pretrained, image_size=image_size)

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        return preprocessing.preprocessing(model)


adapter = TransformersAdapter()

"""An adapter for toy_vits, by somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from tokenprune import Adapter, Backbone, Example


class ToyAdapter(Adapter):
    """Describes the models, and names examples of them."""

    token_inputs: ClassVar[dict[str, tuple[str, ...]]] = {"rope": ("n i d -> b n i d",)}

    def describe(self, model: nn.Module) -> Backbone:
        return Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=32, token_inputs=self.token_inputs)

    def examples(self) -> Iterator[Example]:
        import toy_vits

        for name, build in {
            "rotary_tiny": toy_vits.RotaryViT,
            "rotary_deep": lambda: toy_vits.RotaryViT(depth=6),
            "forgotten": toy_vits.ForgottenViT,
        }.items():
            yield Example(name=name, family="toys", build=build, inputs=images)


def images(number: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"images": torch.randn(number, 3, 24, 24, generator=generator)}

"""Saving without a warning, models that nobody can build, and damage done to what was saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.zoo import BY_NAME, Case

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 7}
VIT = BY_NAME["timm class token"]


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Without a warning, and without the card, which takes long."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tokenprune.save_pretrained(model, folder, **{"model_card": False, **options})


def same_outputs(one: nn.Module, other: nn.Module, case: Case, images: Tensor | None = None) -> bool:
    images = case.images() if images is None else images
    with torch.no_grad():
        before, after = case.run(one.eval(), images), case.run(other.eval(), images)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(dim, 2, batch_first=True), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attn(x, x, x, need_weights=False)[0])


class Mine(nn.Module):
    """A user's model."""

    def __init__(self, dim: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, dim, 8, 8), nn.Linear(dim, 5)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def describe(model: Mine) -> tokenprune.Backbone:
    return tokenprune.Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=model.embed.out_channels)


def own(model: Any) -> nn.Module:
    return tokenprune.sparsify(model, (1,), 0.5, backbone=describe(model))


def manifest(**changes: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        file = folder / "tokenprune.json"
        fields = json.loads(file.read_text())
        for path, value in changes.items():
            inner = fields
            *outer, last = path.split("__")
            for name in outer:
                inner = inner[name]
            inner[last] = value
        file.write_text(json.dumps(fields))

    return damage

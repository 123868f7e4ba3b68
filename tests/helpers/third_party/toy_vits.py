"""A library of somebody else's: small Vision Transformers with rotary positions, one of which cannot be run.

Shapes: B images, N patch tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID, PATCH_SIZE, EMBED_DIM, NUM_HEADS = 6, 4, 32, 2


class RotaryAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(EMBED_DIM, 3 * EMBED_DIM), nn.Linear(EMBED_DIM, EMBED_DIM)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, NUM_HEADS, -1)).unbind(2)  # (B, N, H, D) each
        query, key = rotate(query, rope), rotate(key, rope)
        x = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (query, key, value)))
        return self.proj(x.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys (B, N, H, D), rotated by tables (N, 1, D) or (B, N, 1, D)."""
    # Whoever does not gather the tables for the tokens that are left gets those of the first ones, without an error.
    cos, sin = rope[..., : x.shape[1], :, :].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RotaryBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(EMBED_DIM), RotaryAttention(), nn.Linear(EMBED_DIM, EMBED_DIM)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x), rope)
        return x + self.mlp(x)


class RotaryViT(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, EMBED_DIM, PATCH_SIZE, PATCH_SIZE)
        self.blocks = nn.ModuleList(RotaryBlock() for _ in range(depth))
        self.head = nn.Linear(EMBED_DIM, 5)
        frequencies = 0.5 ** torch.arange(EMBED_DIM // NUM_HEADS // 2)
        angles = torch.arange(GRID * GRID).unsqueeze(1) * frequencies  # (N, D / 2)
        self.register_buffer("rope", torch.cat([angles.cos(), angles.sin()], dim=1).unsqueeze(1))  # (N, 1, D)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.rope)
        return self.head(x.mean(dim=1))


class BlindViT(RotaryViT):
    """Puts out the same, whatever its tokens are."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head.bias + 0 * super().forward(images)


class ForgottenViT(RotaryViT):
    """Was left behind when the others moved on."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc_norm(super().forward(images))

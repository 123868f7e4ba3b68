"""DynamicViT and ToMe written out from their papers around timm's own blocks: the peers of `benchmarks.peers`.

Shapes: B images, P prefix tokens, n patch tokens, L = P + n, C channels, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DynamicViT(nn.Module):
    """Tokens are scored, sorted and gathered in front of blocks.

    DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), inference.

    Args:
        model: A Vision Transformer of timm, whose modules become this one's.
        num_keep: By block index how many patch tokens are kept in front of it.
        scorers: By block index the state dict of its predictor.
    """

    def __init__(self, model: Any, num_keep: dict[int, int], scorers: dict[int, dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.num_keep = model, num_keep
        self.predictors = nn.ModuleDict({str(index): LocalGlobal(model.embed_dim) for index in num_keep})
        for index, state in scorers.items():
            self.predictors[str(index)].load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (B, 3, H, W)."""
        x, prefix = embedded(self.model, images), self.model.num_prefix_tokens
        for index, block in enumerate(self.model.blocks):
            if index in self.num_keep:
                patches = x[:, prefix:]
                best = self.predictors[str(index)](patches).argsort(dim=1, descending=True)[:, : self.num_keep[index]]
                x = torch.cat([x[:, :prefix], taken(patches, best)], dim=1)  # (B, P + k, C)
            x = block(x)
        logits: Tensor = self.model.forward_head(self.model.norm(x))
        return logits


class LocalGlobal(nn.Module):
    """The predictor, Eq. 1 to 5: an MLP on what each token says, and on the mean of what all say.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, patches: Tensor) -> Tensor:
        """The log-probability of keeping each token, (B, n)."""
        local, everywhere = self.in_conv(patches).chunk(2, dim=-1)  # (B, n, C/2) each
        mean = everywhere.mean(dim=1, keepdim=True).expand_as(local)
        keep: Tensor = self.out_conv(torch.cat([local, mean], dim=-1))[..., 0]
        return keep


class ToMe(nn.Module):
    """In every block, between attention and MLP, the r most similar pairs of tokens are merged.

    Token Merging: Your ViT But Faster (arXiv 2210.09461), Section 3, with proportional attention. The class token is
    neither merged nor merged into.

    Args:
        model: A Vision Transformer of timm with a class token alone, whose modules become this one's.
        r: Tokens that each block merges.

    Raises:
        ValueError: It has no class token, or others beside it.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        if model.num_prefix_tokens != 1:
            raise ValueError(f"{model.num_prefix_tokens} prefix tokens: expected a model with a class token alone.")
        self.model, self.r = model, r

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (B, 3, H, W)."""
        logits: Tensor = self.model.forward_head(self.tokens(images)[0])
        return logits

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, L, C) behind the final norm, and how many patches each stands for (B, L, 1)."""
        x = embedded(self.model, images)
        size = torch.ones_like(x[..., :1])
        for block in self.model.blocks:
            attended, keys = proportional_attention(block.attn, block.norm1(x), size)
            x = x + block.ls1(attended)
            x, size = self.merge(x, size, keys.mean(dim=1))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.model.norm(x), size

    def merge(self, x: Tensor, size: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (B, L, C) with sizes (B, L, 1) and keys (B, L, D) those that are left, and their sizes."""
        r = min(self.r, (x.shape[1] - 1) // 2)
        metric = F.normalize(
            metric, dim=-1
        )  # tokens take turns in the sets A, which begins with the class token, and B
        best, partner = (metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, a - 1)
        order = best.argsort(dim=1, descending=True)
        goes, into = order[:, :r] + 1, partner.gather(1, order[:, :r])
        stays = F.pad(order[:, r:].sort(dim=1).values + 1, (1, 0))  # and the class token
        weighted = torch.cat([x * size, size], dim=-1)  # (B, L, C + 1)
        a, b = weighted[:, ::2], weighted[:, 1::2]
        b = b.scatter_add(1, into[..., None].expand(-1, -1, a.shape[-1]), taken(a, goes))
        weighted = torch.cat([taken(a, stays), b], dim=1)
        size = weighted[..., -1:]
        return weighted[..., :-1] / size, size


def embedded(model: Any, images: Tensor) -> Tensor:
    """The sequence (B, L, C) in front of the first block."""
    x: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    return x


def proportional_attention(attention: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √d + log s) v of tokens (B, L, C) with sizes (B, L, 1), and the keys (B, H, L, d)."""
    batch, length, width = x.shape
    qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = size.log().reshape(batch, 1, 1, length)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.proj(mixed.transpose(1, 2).reshape(batch, length, width)), key


def taken(tokens: Tensor, indices: Tensor) -> Tensor:
    """Of tokens (B, n, C) those at indices (B, k): (B, k, C)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))

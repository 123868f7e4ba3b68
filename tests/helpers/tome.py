"""ToMe written out for timm's Vision Transformers, from the paper: what the library's combination has to equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tome_tokens(model: nn.Module, images: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The tokens (B, L, C) behind the final norm, and how many patches each stands for (B, L).

    Token Merging: Your ViT But Faster (arXiv 2210.09461): attention with log s; the r most similar pairs of a bipartite
    matching of keys merged between attention and MLP of every block; what is left of A in front of B. Prefix tokens
    (class token, distillation token) are not merged, and nothing is merged into them.
    """
    x = model._pos_embed(model.patch_embed(images))
    x = model.norm_pre(x)
    prefix = model.num_prefix_tokens
    size = torch.ones_like(x[..., 0])
    for block in model.blocks:
        attention = block.attn
        batch, length, width = x.shape
        qkv = attention.qkv(block.norm1(x)).reshape(batch, length, 3, attention.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + size.log()[:, None, None, :]
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width)
        x = x + block.ls1(attention.proj(mixed))
        merged = [merge(x[b], size[b], key[b].mean(dim=0), r, prefix) for b in range(batch)]
        x = torch.stack([tokens for tokens, _ in merged])
        size = torch.stack([counts for _, counts in merged])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x), size


def merge(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Of one image's tokens (L, C), sizes (L,) and keys (L, D) those that are left."""
    r = min(r, (len(x) - prefix) // 2)
    of_a, of_b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best: dict[int, tuple[float, int]] = {}
    for i in of_a:
        if i < prefix:
            continue
        similar = [(float(metric[i] @ metric[j]), j) for j in of_b if j >= prefix]
        best[i] = max(similar)
    goes = sorted(best, key=lambda i: best[i][0], reverse=True)[:r]
    total, count = x * size[:, None], size.clone()
    for i in goes:
        total[best[i][1]] += size[i] * x[i]
        count[best[i][1]] += size[i]
    stays = list(range(prefix))
    stays += [i for i in of_a if i >= prefix and i not in goes] + [j for j in of_b if j >= prefix]
    return total[stays] / count[stays, None], count[stays]

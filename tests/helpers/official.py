"""The official inference of DynamicViT, written out in plain operations, and checkpoints in its layout.

Nothing here knows the library: shapes and keys are those of the papers and of the authors' files.

Shapes: B images, N patch tokens, n of them left, L = 1 + n, C channels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a DeiT, or with ``stem_channels`` of an LV-ViT."""

    width: int
    depth: int
    heads: int
    image_size: int
    classes: int
    patch_size: int = 16
    mlp_ratio: int = 4
    channels: int = 3
    stem_channels: int = 0
    divisor: float = 1.0
    num_stages: int = 3

    @property
    def stages(self) -> list[int]:
        step = self.depth // 4
        return [step, 2 * step, 3 * step][: self.num_stages]

    def state(self) -> State:
        """Random weights under the official keys; nothing is zero, and no norm is the identity."""
        width, generator = self.width, torch.Generator().manual_seed(3)
        state: State = {}

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
            state[f"{name}.weight"] = normal(outputs, inputs, scale=inputs**-0.5)
            if bias:
                state[f"{name}.bias"] = normal(outputs, scale=0.2)

        def norm(name: str, size: int) -> None:
            state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(size, scale=0.2), normal(size, scale=0.2)

        def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
            state[f"{name}.weight"] = normal(outputs, inputs, kernel, kernel, scale=(inputs * kernel**2) ** -0.5)

        state["cls_token"] = normal(1, 1, width)
        state["pos_embed"] = normal(1, 1 + (self.image_size // self.patch_size) ** 2, width)
        channels, kernel = self.channels, self.patch_size
        for index in (1, 2, 3) if self.stem_channels else ():
            conv(f"patch_embed.conv{index}", channels, self.stem_channels, 7 if index == 1 else 3)
            norm(f"patch_embed.bn{index}", self.stem_channels)
            state[f"patch_embed.bn{index}.running_mean"] = normal(self.stem_channels, scale=0.2)
            state[f"patch_embed.bn{index}.running_var"] = 0.5 + normal(self.stem_channels).abs()
            state[f"patch_embed.bn{index}.num_batches_tracked"] = torch.tensor(1000)
            channels, kernel = self.stem_channels, self.patch_size // 2
        conv("patch_embed.proj", channels, width, kernel)
        state["patch_embed.proj.bias"] = normal(width, scale=0.2)
        for block in (f"blocks.{index}" for index in range(self.depth)):
            norm(f"{block}.norm1", width)
            linear(f"{block}.attn.qkv", width, 3 * width, bias=not self.stem_channels)
            linear(f"{block}.attn.proj", width, width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.mlp.fc1", width, self.mlp_ratio * width)
            linear(f"{block}.mlp.fc2", self.mlp_ratio * width, width)
        norm("norm", width)
        linear("head", width, self.classes)
        if self.stem_channels:
            linear("aux_head", width, self.classes)
        for stage in (f"score_predictor.{index}" for index in range(self.num_stages)):
            norm(f"{stage}.in_conv.0", width)
            linear(f"{stage}.in_conv.1", width, width)
            linear(f"{stage}.out_conv.0", width, width // 2)
            linear(f"{stage}.out_conv.2", width // 2, width // 4)
            linear(f"{stage}.out_conv.4", width // 4, 2)
        return state

    def images(self, batch: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return torch.randn(batch, self.channels, self.image_size, self.image_size, generator=generator)


def infer(layout: Layout, state: State, images: Tensor, keep_ratio: float) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, K), and for each stage which positions of the patch grid are left, (B, n) in ascending order."""
    eps = 1e-5 if layout.stem_channels else 1e-6

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def layer_norm(name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = images
    for index, stride, padding in ((1, 2, 3), (2, 1, 1), (3, 1, 1)) if layout.stem_channels else ():
        x = F.conv2d(x, state[f"patch_embed.conv{index}.weight"], stride=stride, padding=padding)
        norm = {name: state[f"patch_embed.bn{index}.{name}"][:, None, None]
                for name in ("running_mean", "running_var", "weight", "bias")}  # fmt: skip
        x = (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
        x = F.relu(x)
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    batch, num_patches, width = x.shape
    x = torch.cat([state["cls_token"].expand(batch, -1, -1), x], dim=1) + state["pos_embed"]  # (B, 1 + N, C)

    left = [torch.arange(num_patches).expand(batch, -1)]
    rows = torch.arange(batch)[:, None]
    for index in range(layout.depth):
        if index in layout.stages:
            stage = layout.stages.index(index)
            name, patches = f"score_predictor.{stage}", x[:, 1:]
            z = F.gelu(linear(f"{name}.in_conv.1", layer_norm(f"{name}.in_conv.0", patches, 1e-5)))  # (B, n, C)
            everywhere = z[..., width // 2 :].mean(dim=1, keepdim=True).expand(-1, z.shape[1], -1)
            z = F.gelu(linear(f"{name}.out_conv.0", torch.cat([z[..., : width // 2], everywhere], dim=-1)))
            z = linear(f"{name}.out_conv.4", F.gelu(linear(f"{name}.out_conv.2", z)))
            keep = z.log_softmax(dim=-1)[..., 0]  # (B, n)
            num_keep = int(num_patches * keep_ratio ** (stage + 1))
            best = keep.argsort(dim=1, descending=True)[:, :num_keep]  # (B, num_keep)
            x = torch.cat([x[:, :1], patches[rows, best]], dim=1)  # (B, 1 + num_keep, C)
            left.append(left[-1][rows, best])
        block = f"blocks.{index}"
        qkv = linear(f"{block}.attn.qkv", layer_norm(f"{block}.norm1", x, eps))  # (B, L, 3 C)
        query, key, value = qkv.reshape(batch, x.shape[1], 3, layout.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) / (width // layout.heads) ** 0.5).softmax(dim=-1)
        attended = linear(f"{block}.attn.proj", (attention @ value).transpose(1, 2).reshape(x.shape))
        x = x + attended / layout.divisor
        hidden = F.gelu(linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x, eps)))
        x = x + linear(f"{block}.mlp.fc2", hidden) / layout.divisor
    x = layer_norm("norm", x, eps)
    logits = linear("head", x[:, 0])
    if layout.stem_channels:
        logits = logits + 0.5 * linear("aux_head", x[:, 1:]).max(dim=1).values
    return logits, [positions.sort(dim=1).values for positions in left[1:]]

"""The official inference of DynamicSwin and DynamicConvNeXt, written out, and checkpoints in their layouts.

Nothing here knows the library: shapes and keys are those of the papers and of the authors' files.

Shapes: B images, H rows and W columns, N = H·W positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
DEPTHS, CLASSES = (1, 2, 6, 1), 5
STAGES = (1, 2, 3)
"""In front of these blocks of the third level's 6."""


class _Weights:
    """Draws weights; nothing is zero, and no norm is the identity."""

    def __init__(self) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(3)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def layer(self, name: str, outputs: int, *inputs: int, bias: bool = True) -> None:
        fan_in = torch.Size(inputs).numel()
        self.state[f"{name}.weight"] = self.normal(outputs, *inputs, scale=fan_in**-0.5)
        if bias:
            self.state[f"{name}.bias"] = self.normal(outputs, scale=0.2)

    def norm(self, name: str, size: int) -> None:
        self.state[f"{name}.weight"] = 1 + self.normal(size, scale=0.2)
        self.state[f"{name}.bias"] = self.normal(size, scale=0.2)

    def predictors(self, prefix: str, width: int, *kernel: int) -> None:
        for number in range(len(STAGES)):
            name = f"{prefix}score_predictor.{number}"
            self.norm(f"{name}.in_conv.0", width)
            self.layer(f"{name}.in_conv.1", width, width, *kernel)
            self.layer(f"{name}.out_conv.0", width // 2, width, *kernel)
            self.layer(f"{name}.out_conv.2", width // 4, width // 2, *kernel)
            self.layer(f"{name}.out_conv.4", 2, width // 4, *kernel)


def convnext_state(widths: tuple[int, ...] = (8, 16, 32, 64)) -> State:
    """A checkpoint of a DynamicConvNeXt."""
    weights = _Weights()
    before = (3, *widths)
    for level, width in enumerate(widths):
        norm, layer = ("1", "0") if level == 0 else ("0", "1")
        kernel = 4 if level == 0 else 2
        weights.layer(f"downsample_layers.{level}.{layer}", width, before[level], kernel, kernel)
        weights.norm(f"downsample_layers.{level}.{norm}", width if level == 0 else before[level])
        for block in range(DEPTHS[level]):
            name = f"stages.{level}.{block}"
            weights.state[f"{name}.gamma"] = 0.5 + weights.normal(width).abs()
            weights.layer(f"{name}.dwconv", width, 1, 7, 7)
            weights.norm(f"{name}.norm", width)
            weights.layer(f"{name}.pwconv1", 4 * width, width)
            weights.layer(f"{name}.pwconv2", width, 4 * width)
            if level == 2 and block >= STAGES[0]:
                weights.norm(f"{name}.fast_path.0", width)
                weights.layer(f"{name}.fast_path.1", width, width)
                weights.state[f"{name}.fast_path_gamma"] = weights.normal(width)
    weights.norm("norm", widths[-1])
    weights.layer("head", CLASSES, widths[-1])
    weights.predictors("", widths[2], 1, 1)
    return weights.state


def swin_state(width: int = 8, window: int = 3, side: int = 24, heads: tuple[int, ...] = (1, 2, 2, 4)) -> State:
    """A checkpoint of a DynamicSwin.

    Args:
        width: Of the first level.
        window: Its side.
        side: Of the first level's grid.
        heads: Of each level.
    """
    weights = _Weights()
    weights.layer("patch_embed.proj", width, 3, 4, 4)
    weights.norm("patch_embed.norm", width)
    for level, depth in enumerate(DEPTHS):
        size, rows = width * 2**level, side // 2**level
        for block in range(depth):
            name = f"layers.{level}.blocks.{block}"
            weights.norm(f"{name}.norm1", size)
            table = weights.normal((2 * window - 1) ** 2, heads[level])
            weights.state[f"{name}.attn.relative_position_bias_table"] = table
            weights.state[f"{name}.attn.relative_position_index"] = relative_positions(window)
            weights.layer(f"{name}.attn.qkv", 3 * size, size)
            weights.layer(f"{name}.attn.proj", size, size)
            weights.norm(f"{name}.norm2", size)
            weights.layer(f"{name}.mlp.fc1", 4 * size, size)
            weights.layer(f"{name}.mlp.fc2", size, 4 * size)
            if block % 2 and rows > window:
                weights.state[f"{name}.attn_mask"] = shift_mask(rows, window)
            if level == 2 and block >= STAGES[0]:
                weights.norm(f"{name}.fastmlp.fc1.0", size)
                weights.layer(f"{name}.fastmlp.fc1.1", size, size)
        if level < len(DEPTHS) - 1:
            weights.norm(f"layers.{level}.downsample.norm", 4 * size)
            weights.layer(f"layers.{level}.downsample.reduction", 2 * size, 4 * size, bias=False)
    weights.norm("norm", width * 8)
    weights.layer("head", CLASSES, width * 8)
    weights.predictors("layers.2.", width * 4)
    return weights.state


def relative_positions(window: int) -> Tensor:
    """For each pair of places of a window the row of its bias, (window², window²)."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    return (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1


def shift_mask(side: int, window: int) -> Tensor:
    """What is added to attention in shifted windows, (number of windows, window², window²)."""
    place = torch.arange(side)
    zone = (place >= side - window).long() + (place >= side - window // 2).long()
    zones = windows((zone[:, None] * 3 + zone)[None, :, :, None].float(), window)[..., 0]
    return (zones[:, None] != zones[:, :, None]).float() * -100.0


def windows(x: Tensor, window: int) -> Tensor:
    """Grids (B, H, W, C) as windows (B · number, window², C)."""
    batch, rows, columns, width = x.shape
    x = x.reshape(batch, rows // window, window, columns // window, window, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, width)


class _Inference:
    """What both families have in common; tokens are (B, N, C) here."""

    def __init__(self, state: State, keep_ratios: tuple[float, ...], prefix: str, eps: float) -> None:
        self.state, self.keep_ratios, self.prefix, self.eps = state, keep_ratios, prefix, eps
        self.kept: list[Tensor] = []

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"].flatten(1), self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def decide(self, x: Tensor) -> None:
        """Which positions (B, n) are kept from here on, by the next predictor, of tokens (B, N, C)."""
        name, half = f"{self.prefix}score_predictor.{len(self.kept)}", x.shape[-1] // 2
        z = F.gelu(self.linear(f"{name}.in_conv.1", self.norm(f"{name}.in_conv.0", x)))
        everywhere = z[..., half:].mean(dim=1, keepdim=True).expand(-1, z.shape[1], -1)
        z = F.gelu(self.linear(f"{name}.out_conv.0", torch.cat([z[..., :half], everywhere], dim=-1)))
        z = self.linear(f"{name}.out_conv.4", F.gelu(self.linear(f"{name}.out_conv.2", z)))
        number = int(x.shape[1] * self.keep_ratios[len(self.kept)])
        self.kept.append(z.log_softmax(-1)[..., 0].argsort(dim=1, descending=True)[:, :number])

    def split(self, x: Tensor, slow: Callable[[Tensor], Tensor], fast: Callable[[Tensor], Tensor]) -> Tensor:
        """What kept tokens get by one path and the others by the other one."""
        m = torch.zeros(x.shape[:2]).scatter(1, self.kept[-1], 1.0).unsqueeze(-1)
        return m * slow(x) + (1 - m) * fast(x)


def infer_convnext(state: State, images: Tensor, keep_ratios: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, K), and which positions each stage keeps, (B, n) in ascending order."""
    run, x = _Inference(state, keep_ratios, "", 1e-6), images

    def norm(name: str, grid: Tensor) -> Tensor:
        return run.norm(name, grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    for level, depth in enumerate(DEPTHS):
        name = f"downsample_layers.{level}"
        if level:
            x = F.conv2d(norm(f"{name}.0", x), state[f"{name}.1.weight"], state[f"{name}.1.bias"], stride=2)
        else:
            x = norm(f"{name}.1", F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], stride=4))
        for block in range(depth):
            name = f"stages.{level}.{block}"
            if level == 2 and block in STAGES:
                run.decide(x.flatten(2).transpose(1, 2))
            width = x.shape[1]
            mixed = F.conv2d(x, state[f"{name}.dwconv.weight"], state[f"{name}.dwconv.bias"], padding=3, groups=width)
            tokens = mixed.flatten(2).transpose(1, 2)

            def slow(t: Tensor, name: str = name) -> Tensor:
                hidden = F.gelu(run.linear(f"{name}.pwconv1", run.norm(f"{name}.norm", t)))
                return state[f"{name}.gamma"] * run.linear(f"{name}.pwconv2", hidden)

            def fast(t: Tensor, name: str = name) -> Tensor:
                return state[f"{name}.fast_path_gamma"] * run.linear(
                    f"{name}.fast_path.1", run.norm(f"{name}.fast_path.0", t)
                )

            pruned = level == 2 and block >= STAGES[0]
            tokens = run.split(tokens, slow, fast) if pruned else slow(tokens)
            x = x + tokens.transpose(1, 2).reshape(x.shape)
    logits = run.linear("head", run.norm("norm", x.mean(dim=(2, 3))))
    return logits, [kept.sort(dim=1).values for kept in run.kept]


def infer_swin(
    state: State, images: Tensor, keep_ratios: tuple[float, ...], window: int = 3
) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, K), and which positions each stage keeps, (B, n) in ascending order."""
    run = _Inference(state, keep_ratios, "layers.2.", 1e-5)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    batch, side = len(x), x.shape[-1]
    x = run.norm("patch_embed.norm", x.flatten(2).transpose(1, 2))  # (B, N, C)

    def attend(name: str, x: Tensor, side: int, shift: int) -> Tensor:
        width, heads = x.shape[-1], state[f"{name}.relative_position_bias_table"].shape[1]
        grid = torch.roll(x.view(batch, side, side, width), (-shift, -shift), (1, 2))
        parts = windows(grid, window)  # (B · number, w², C)
        qkv = run.linear(f"{name}.qkv", parts).view(len(parts), window**2, 3, heads, width // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = state[f"{name}.relative_position_bias_table"][relative_positions(window).flatten()]
        scores = query @ key.transpose(-2, -1) * (width // heads) ** -0.5
        scores = scores + bias.view(window**2, window**2, heads).permute(2, 0, 1)
        if shift:
            scores = scores + shift_mask(side, window).repeat(batch, 1, 1)[:, None]
        out = run.linear(f"{name}.proj", (scores.softmax(-1) @ value).transpose(1, 2).reshape(parts.shape))
        number = side // window
        out = out.view(batch, number, number, window, window, width).permute(0, 1, 3, 2, 4, 5)
        return torch.roll(out.reshape(batch, side, side, width), (shift, shift), (1, 2)).reshape(x.shape)

    for level, depth in enumerate(DEPTHS):
        for block in range(depth):
            name = f"layers.{level}.blocks.{block}"
            if level == 2 and block in STAGES:
                run.decide(x)
            shift = window // 2 if block % 2 and side > window else 0
            x = x + attend(f"{name}.attn", run.norm(f"{name}.norm1", x), side, shift)

            def slow(t: Tensor, name: str = name) -> Tensor:
                hidden = F.gelu(run.linear(f"{name}.mlp.fc1", run.norm(f"{name}.norm2", t)))
                return run.linear(f"{name}.mlp.fc2", hidden)

            def fast(t: Tensor, name: str = name) -> Tensor:
                return run.linear(f"{name}.fastmlp.fc1.1", run.norm(f"{name}.fastmlp.fc1.0", t))

            pruned = level == 2 and block >= STAGES[0]
            x = x + (run.split(x, slow, fast) if pruned else slow(x))
        if level < len(DEPTHS) - 1:
            name, grid = f"layers.{level}.downsample", x.view(batch, side, side, -1)
            corners = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            merged = torch.cat(corners, dim=-1).flatten(1, 2)
            x, side = run.linear(f"{name}.reduction", run.norm(f"{name}.norm", merged)), side // 2
    return run.linear("head", run.norm("norm", x).mean(dim=1)), [kept.sort(dim=1).values for kept in run.kept]

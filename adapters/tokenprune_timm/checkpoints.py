"""Building the timm model that a state dict in the layout of DeiT or LV-ViT belongs to, from its shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenprune import CheckpointError

# DeiT's entry points by width; another width is one of DeiT-S's sizes that is given, as its depth is.
_DEIT = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
_LVVIT = {(240, 12): "lvvit_t", (384, 16): "lvvit_s", (512, 20): "lvvit_m", (768, 24): "lvvit_l"}
_HEAD_WIDTH = 64


def from_state_dict(state: Mapping[str, Tensor], *, num_heads: int | None) -> nn.Module:
    """A timm model, with random weights, whose state dict has these keys and shapes.

    Args:
        state: Weights of a DeiT (keys as timm's) or of an LV-ViT (keys as its authors').
        num_heads: Heads of the attention; ``None`` means the published models' for LV-ViT, and width // 64.
    """
    import timm

    from tokenprune_timm.lvvit import LVViT  # this import makes it known to timm, too

    is_lvvit = any(name.startswith(("aux_head.", "patch_embed.conv")) for name in state)
    depth = len({match[1] for match in (re.match(r"blocks\.(\d+)\.", name) for name in state) if match})
    _check_keys(state, LVViT if is_lvvit else timm.models.VisionTransformer, depth)
    width, classes = _shape(state, "cls_token", 3)[2], _shape(state, "head.weight", 2)[0]
    _, in_channels, *patch = _shape(state, "patch_embed.proj.weight", 4)
    options: dict[str, Any] = {}
    if is_lvvit:
        options["stem_channels"], in_channels, _, _ = _shape(state, "patch_embed.conv1.weight", 4)
        patch = [2 * side for side in patch]
    side = _grid_side(_shape(state, "pos_embed", 3)[1])
    image_size = (side * patch[0], side * patch[1])
    if is_lvvit:
        name = _lvvit_name(width, depth)
        # The published model's, unless the user says so: the heads of LV-ViT-T are not 64 wide.
        heads = {} if num_heads is None else {"num_heads": _checked_heads(num_heads, width)}
    else:
        name = _DEIT.get(width, _DEIT[384])
        heads = {"num_heads": _checked_heads(width // _HEAD_WIDTH if num_heads is None else num_heads, width)}
    hidden = _shape(state, "blocks.0.mlp.fc1.weight", 2)[0]
    model: nn.Module = timm.create_model(
        name,
        img_size=image_size,
        patch_size=tuple(patch),
        in_chans=in_channels,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        mlp_ratio=hidden / width if hidden % width == 0 else (hidden + 0.5) / width,  # timm rounds the product down
        # What else the data loader takes from the model; images larger than 224 are not cropped.
        pretrained_cfg_overlay={
            "input_size": (in_channels, *image_size),
            "num_classes": classes,
            **({"crop_pct": 1.0} if image_size[0] > 224 else {}),
        },
        **heads,
        **options,
    )
    return model


def _check_keys(state: Mapping[str, Tensor], cls: type[nn.Module], depth: int) -> None:
    """That there is every key that a model of a class and a depth has, and no other one."""
    expected = cls(img_size=16, patch_size=16, embed_dim=8, num_heads=1, depth=max(depth, 1), num_classes=1)
    names = list(expected.state_dict())
    missing, unexpected = [name for name in names if name not in state], [name for name in state if name not in names]
    if missing or unexpected:
        raise CheckpointError(
            "the weights are neither DeiT's nor LV-ViT's, of which official checkpoints are; compared with those of a "
            f"{cls.__name__} of {max(depth, 1)} block(s) there are",
            missing=missing,
            unexpected=unexpected,
        )


def _shape(state: Mapping[str, Tensor], name: str, num_dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != num_dimensions or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}; expected {num_dimensions} dimensions, none of them 0.")
    return shape


def _grid_side(num_positions: int) -> int:
    """Patches along one side of the image, which is a square, in front of which there is a class token."""
    side = math.isqrt(num_positions - 1)
    if side == 0 or side * side != num_positions - 1:
        raise CheckpointError(
            f"pos_embed has {num_positions} positions; expected one for a class token and those of a square of patches."
        )
    return side


def _lvvit_name(width: int, depth: int) -> str:
    if (width, depth) not in _LVVIT:
        known = ", ".join(f"{name} ({width} wide, {depth} blocks)" for (width, depth), name in _LVVIT.items())
        raise CheckpointError(
            f"an LV-ViT {width} wide with {depth} blocks is none of {known}, and by what its residual branches are "
            "divided is not in the weights. Build a tokenprune_timm.lvvit.LVViT(residual_divisor=…), sparsify it, and "
            "load the weights into it."
        )
    return _LVVIT[width, depth]


def _checked_heads(num_heads: int, width: int) -> int:
    if num_heads < 1 or width % num_heads:
        raise CheckpointError(
            f"{num_heads} attention heads do not divide the width {width}; pass num_heads=… as the model was trained."
        )
    return num_heads

"""Building the timm model that weights in the layout of Swin's or ConvNeXt's authors are of, from their shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from tokenprune import CheckpointError

_BUFFERS = ("relative_position_index", "attn_mask")  # which timm makes anew


def is_hierarchy(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are named as in the original repositories of Swin and ConvNeXt."""
    return any(name.startswith(("downsample_layers.", "layers.0.blocks.0.")) for name in state)


def from_state_dict(state: Mapping[str, Tensor]) -> nn.Module:
    """A timm model, with random weights, that these weights are of.

    Raises:
        CheckpointError: A weight that says a size is missing, or has another number of dimensions.
    """
    return _convnext(state) if "downsample_layers.0.0.weight" in state else _swin(state)


def renamed(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names that they have in timm's model."""
    if "downsample_layers.0.0.weight" in state:
        from timm.models.convnext import checkpoint_filter_fn
    else:
        from timm.models.swin_transformer import checkpoint_filter_fn

        state = {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}
    converted: dict[str, Tensor] = checkpoint_filter_fn(dict(state), model)
    return converted


def _convnext(state: Mapping[str, Tensor]) -> nn.Module:
    """A ConvNet for the 2020s (arXiv 2201.03545)."""
    import timm

    dims = [_shape(state, f"stages.{level}.0.gamma", 1)[0] for level in _numbers(state, r"stages\.(\d+)\.")]
    depths = [len(_numbers(state, rf"stages\.{level}\.(\d+)\.")) for level in range(len(dims))]
    _, channels, *_ = _shape(state, "downsample_layers.0.0.weight", 4)
    classes = _shape(state, "head.weight", 2)[0]
    model: nn.Module = timm.create_model(
        "convnext_tiny", dims=dims, depths=depths, in_chans=channels, num_classes=classes
    )
    return model


def _swin(state: Mapping[str, Tensor]) -> nn.Module:
    """Swin Transformer (arXiv 2103.14030)."""
    import timm

    width, channels, patch, _ = _shape(state, "patch_embed.proj.weight", 4)
    levels = range(len(_numbers(state, r"layers\.(\d+)\.")))
    depths = [len(_numbers(state, rf"layers\.{level}\.blocks\.(\d+)\.")) for level in levels]
    tables = [_shape(state, f"layers.{level}.blocks.0.attn.relative_position_bias_table", 2) for level in levels]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    hidden = _shape(state, "layers.0.blocks.0.mlp.fc1.weight", 2)[0]
    # As many windows as the first level has along one side, which the mask of any shifted block says.
    masks = [(level, state.get(f"layers.{level}.blocks.1.attn_mask")) for level in levels]
    sides = [math.isqrt(mask.shape[0]) * 2**level for level, mask in masks if mask is not None and mask.dim() == 3]
    windows = sides[0] if sides else 224 // (patch * window)
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=windows * window * patch,
        patch_size=patch,
        in_chans=channels,
        num_classes=_shape(state, "head.weight", 2)[0],
        embed_dim=width,
        depths=tuple(depths),
        num_heads=tuple(heads for _, heads in tables),
        window_size=window,
        mlp_ratio=hidden / width,
    )
    return model


def _numbers(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(match[1]) for match in (re.match(pattern, name) for name in state) if match})


def _shape(state: Mapping[str, Tensor], name: str, num_dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError("the weights are those of no Swin or ConvNeXt.", missing=[name])
    shape = tuple(state[name].shape)
    if len(shape) != num_dimensions or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}; expected {num_dimensions} dimensions, none of them 0.")
    return shape

"""The towers of transformers that are given all images of a batch as one sequence of patches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import Packed

# The parameters that say how many patches each image has.
GRIDS = ("grid_thw", "image_grid_thw", "image_sizes", "target_sizes")
# What towers do differently, by the same key: attributes of a Packed.
_FAMILIES: dict[str, dict[str, Any]] = {
    # Rows of patches, which are merged behind the blocks, over all frames of a video or frame by frame.
    "kimi_k25_vision": {"blockwise": False, "across_frames": True},
    **{key: {"blockwise": False} for key in ("paddleocr_vl_vision", "hunyuan_vl_vision")},
    # The same, in the order of windows.
    **{key: {"blockwise": False} for key in ("muse_spark_vision", "muse_glimmer_vision")},
    "video_llama_3_vision": {"merge_size": "merge_sizes"},
    # Grids count what is merged behind the blocks.
    "inkling2_vision": {"cell_size": "spatial_merge_size"},
}
# How many tokens stand in front of each image's patches, by the same key.
_NUM_PREFIX = {"inkling2_vision": 1}
# Towers that merge windows of tokens behind one of their blocks, whose number the config says.
_MERGING = ("minicpmv4_6_vision", "minicpmv4_7_vision", "minicpm_ocr_vision")


def grids_of(tower: nn.Module) -> str | None:
    """The name of the parameter by which a tower tells packed images apart; ``None`` if it packs none."""
    names = inspect.signature(tower.forward).parameters
    return next((name for name in GRIDS if name in names), None)


def num_prefix_of(config: Any) -> int:
    """How many tokens, such as a class token, stand in front of each image's patches in a packed sequence."""
    return _NUM_PREFIX.get(config.model_type, 0)


def packed(tower: nn.Module, config: Any) -> Packed | None:
    """How a tower packs images; ``None`` if it does not."""
    grids = grids_of(tower)
    if grids is None:
        return None
    if grids == "image_sizes":  # in pixels, and images stand row by row
        return Packed(grids=grids, lengths=(), patch_size=int(config.patch_size))
    if config.model_type in _MERGING:
        return _with_merger(grids, config)
    settings = {"merge_size": _merge_size(config), **_FAMILIES.get(config.model_type, {})}
    settings |= {name: getattr(config, value) for name, value in settings.items() if name == "cell_size"}
    return Packed(grids=grids, order=_order(tower), **settings)


def _with_merger(grids: str, config: Any) -> Packed:
    """Of a tower with a merger between its blocks the sequence in front of it, and behind it the one of windows."""
    side, merger, depth = int(config.window_kernel_size[0]), int(config.insert_layer_id) + 1, config.num_hidden_layers
    front = Packed(grids=grids, merge_size=side, blockwise=False)
    if not 0 < merger < depth:
        return front
    behind = Packed(grids=grids, patch_size=side, blocks=range(merger, depth))
    return replace(front, blocks=range(merger), coarser=behind)


def _merge_size(config: Any) -> int | tuple[int, int]:
    """How many neighbours, in height and width, become one token behind the blocks."""
    names = ("spatial_merge_size", "merge_kernel_size", "merge_size")
    size = next((getattr(config, name) for name in names if hasattr(config, name)), 1)
    return size if isinstance(size, int) else (int(size[0]), int(size[1]))


def _order(tower: nn.Module) -> Callable[[Mapping[str, Any]], Tensor] | None:
    """How a tower with windows orders its tokens, so that those of a window stand together."""
    if hasattr(tower, "get_window_index"):  # before transformers 5
        return partial(_by_windows, tower)
    windows = hasattr(tower, "window_size") and hasattr(tower, "spatial_merge_size")
    return partial(_by_windows, tower) if windows else None


def _by_windows(tower: Any, arguments: Mapping[str, Any]) -> Tensor:
    """For each place in the blocks' sequence, which token stands there, as the tower is given them: (T,) int64."""
    grids, index = arguments["grid_thw"], arguments.get("window_index")
    if index is None and hasattr(tower, "get_window_index"):
        index = tower.get_window_index(grids)[0]
    elif index is None:
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(
            grids,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
    unit: int = tower.spatial_merge_size**2
    order: Tensor = (index.unsqueeze(1) * unit + torch.arange(unit, device=index.device)).flatten()
    return order

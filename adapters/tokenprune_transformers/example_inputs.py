"""Inputs of two random images, or videos or sounds, for a model of transformers, from its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.backbones.probing import random_inputs
from tokenprune_transformers.packed import grids_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_IMAGES = 2
_IMAGE_SIZES = ("image_size", "crop_size", "img_size", "input_size", "pretrain_image_size")


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of the forward pass of a model, or of a vision tower, on two different images."""
    config = vision_config(model.config)
    special = _FAMILIES.get(config.model_type)
    if special is not None:
        return special(model, config)
    return _images(model, config) if grids_of(model) is None else _packed(model, config)


def vision_config(config: Any) -> Any:
    """The part of a config that is about images."""
    for name in ("vision_config", "backbone_config", "encoder"):
        inner = getattr(config, name, None)
        if hasattr(inner, "model_type"):
            return vision_config(inner)
    return config


def image_size(model: torch.nn.Module, config: Any) -> tuple[int, int]:
    """Height and width that the model was built for."""
    sizes = [getattr(config, name, None) for name in _IMAGE_SIZES]
    sizes += [getattr(module, "img_size", None) for module in model.modules()]
    return pair(next((size for size in sizes if size is not None), 224))


def pair(size: Any) -> tuple[int, int]:
    """Height and width of what is one number, two, or three with a time in front."""
    return (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[-2]), int(size[-1]))


def _device(model: torch.nn.Module) -> torch.device:
    """Where a model is, or a part that is no model by itself."""
    return next(model.parameters()).device


def _num_channels(config: Any) -> int:
    return int(getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3)


def _images(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    shape = (NUM_IMAGES, _num_channels(config), *image_size(model, config))
    return random_inputs(model, pixel_values=shape)


def _videos(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    num_frames = int(getattr(config, "num_frames", 0) or config.frames_per_clip)
    shape: tuple[int, ...] = (NUM_IMAGES, num_frames, _num_channels(config), *image_size(model, config))
    name: str = "pixel_values" if model.main_input_name == "input_ids" else model.main_input_name
    return random_inputs(model, **{name: shape})


def _frames(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """A video as a batch of its frames."""
    shape = (NUM_IMAGES * config.num_frames, _num_channels(config), *image_size(model, config))
    return random_inputs(model, pixel_values=shape)


def _masked_videos(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    inputs = _videos(model, config)
    if not type(model).__name__.endswith("ForPreTraining"):
        return inputs
    height, width = image_size(model, config)
    patch_height, patch_width = pair(config.patch_size)
    num_patches = config.num_frames // config.tubelet_size * (height // patch_height) * (width // patch_width)
    hidden = torch.arange(num_patches, device=_device(model)) < num_patches // 2
    return {**inputs, "bool_masked_pos": hidden.expand(NUM_IMAGES, -1)}


def _sounds(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    return random_inputs(model, input_values=(NUM_IMAGES, config.max_length, config.num_mel_bins))


def _rows_of_patches(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """Patches in rows, as many as the position table has, with the grid they come from."""
    side = int(config.num_patches**0.5)
    patch_height, patch_width = pair(config.patch_size)
    shape = (NUM_IMAGES, side * side, _num_channels(config) * patch_height * patch_width)
    grid = torch.tensor([[side, side]] * NUM_IMAGES, device=_device(model))
    mask = torch.ones(shape[:2], dtype=torch.long, device=_device(model))
    # Inside of a model, a tower before transformers 5 has the shorter name.
    short = "attention_mask" in inspect.signature(model.forward).parameters
    name = "attention_mask" if short else "pixel_attention_mask"
    return {**random_inputs(model, pixel_values=shape), name: mask, "spatial_shapes": grid}


def _flat_patches(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    height, width = image_size(model, config)
    patch_height, patch_width = pair(config.patch_size)
    values = _num_channels(config) * patch_height * patch_width
    num_patches = getattr(config, "image_num_patch", None) or (height // patch_height) * (width // patch_width)
    if not isinstance(num_patches, int):
        num_patches = num_patches[0] * num_patches[1]
    return random_inputs(model, pixel_values=(NUM_IMAGES, num_patches, values))


def _placed_patches(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """Patches in rows, each with its column and row, of a grid that is pooled by threes."""
    side = 6
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1).to(_device(model))
    patches = random_inputs(model, pixel_values=(NUM_IMAGES, side * side, 3 * config.patch_size**2))
    return {**patches, "pixel_position_ids": places.expand(NUM_IMAGES, -1, -1)}


def _with_patch_mask(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    inputs = _images(model, config)
    images: Tensor = inputs["pixel_values"]
    grid = tuple(size // patch for size, patch in zip(images.shape[2:], pair(config.patch_size), strict=True))
    mask = torch.ones(NUM_IMAGES, *grid, dtype=torch.bool, device=_device(model))
    return {**inputs, "patch_attention_mask": mask}


def _with_image_sizes(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    inputs = _images(model, config)
    return {**inputs, "image_sizes": torch.tensor([inputs["pixel_values"].shape[2:]] * NUM_IMAGES)}


def _packed(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """Patches of two images of different sizes, one after the other, and their grids."""
    depth = next((getattr(config, name) for name in _DEPTHS if hasattr(config, name)), 1)
    patch_height, patch_width = pair(config.patch_size)
    values = _num_channels(config) * (depth if isinstance(depth, int) else depth[0]) * patch_height * patch_width
    return _packed_as(model, config, (values,))


def _packed_flat(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """The same, of patches without a dimension for time."""
    patch_height, patch_width = pair(config.patch_size)
    inputs = _packed_as(model, config, (_num_channels(config) * patch_height * patch_width,))
    if "merge_sizes" in inspect.signature(model.forward).parameters:
        inputs["merge_sizes"] = torch.full((len(_GRIDS),), 2, device=_device(model))
    return inputs


def _packed_patches(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """The same, of patches as small images."""
    return _packed_as(model, config, (_num_channels(config), *pair(config.patch_size)))


def _packed_row(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """The same, with a dimension for the one row in front."""
    inputs = _packed_patches(model, config)
    return {name: value.unsqueeze(0) if name == "pixel_values" else value for name, value in inputs.items()}


def _packed_strip(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """Patches as one image of one row, and grids without a number of frames."""
    inputs = _packed_patches(model, config)
    return {
        name: value[:, 1:] if name == grids_of(model) else value.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
        for name, value in inputs.items()
    }


def _packed_cells(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """Pixels, channels last, of each cell of patches that become one token behind the blocks."""
    side = config.patch_size * config.spatial_merge_size
    return _packed_as(model, config, (side, side, _num_channels(config)))


def _packed_as(model: PreTrainedModel, config: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    grids = torch.tensor(_GRIDS, device=_device(model))
    name, sizes = next(iter(inspect.signature(model.forward).parameters)), grids_of(model)
    assert sizes is not None
    return {**random_inputs(model, **{name: (int(grids.prod(dim=1).sum()), *shape)}), sizes: grids}


_GRIDS = ((1, 4, 6), (1, 4, 4))  # frames, rows, columns
_DEPTHS = ("temporal_patch_size", "patch_temporal")

_FAMILIES: dict[str, Callable[[PreTrainedModel, Any], dict[str, Any]]] = {
    **dict.fromkeys(("vivit", "vjepa2", "timesformer", "videoprism_vision_model"), _videos),
    "videomae": _masked_videos,
    "xclip_vision_model": _frames,
    "audio-spectrogram-transformer": _sounds,
    "siglip2_vision_model": _rows_of_patches,
    "molmo2_vision": _flat_patches,
    "gemma4_vision": _placed_patches,
    "phi4_multimodal_vision": _with_patch_mask,
    "pixtral": _with_image_sizes,
    **dict.fromkeys(
        (
            "ernie4_5_vl_moe_vision",
            "video_llama_3_vision",
            "dots3_note_vision_encoder",
            "glm_image_vision",
            "cosmos3_edge_vision",
        ),
        _packed_flat,
    ),
    "kimi_k25_vision": _packed_patches,
    "paddleocr_vl_vision": _packed_row,
    **dict.fromkeys(("minicpmv4_6_vision", "minicpmv4_7_vision", "minicpm_ocr_vision"), _packed_strip),
    "inkling2_vision": _packed_cells,
}

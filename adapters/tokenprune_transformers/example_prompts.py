"""Prompts with one random image each for a vision-language model of transformers, from its config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tokenprune import VisionLanguage
from tokenprune.backbones.probing import eval_mode, random_inputs
from tokenprune_transformers.example_inputs import image_size
from tokenprune_transformers.packed import grids_of

_PIXELS = 448
"""Height and width of images for models that take any."""


def example_prompts(model: Any, described: VisionLanguage, *, num_prompts: int, num_words: int) -> dict[str, Any]:
    """Keyword arguments of a forward pass: prompts of so many words, half of them in front of an image."""
    merging: Any = described.model
    images = _images(merging, described.tower, num_prompts)
    with eval_mode(model), torch.no_grad():
        encoded = getattr(merging, described.encode)(**images)
    number = _count(getattr(encoded, "pooler_output", encoded)) // num_prompts
    word = 3 + (described.placeholder == 3)
    row = torch.full((num_words + number,), word)
    row[num_words // 2 : num_words // 2 + number] = described.placeholder
    ids = row.expand(num_prompts, -1).clone().to(images["pixel_values"].device)
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    taken = inspect.signature(merging.forward).parameters
    is_image = (ids == described.placeholder).long()
    if "mm_token_type_ids" in taken:
        made["mm_token_type_ids"] = is_image
    if "token_type_ids" in taken:  # PaliGemma's say what is to be answered, Gemma 3's what is an image
        made["token_type_ids"] = torch.zeros_like(ids) if "PaliGemma" in type(merging).__name__ else is_image
    return made


def _images(model: Any, tower: Any, number: int) -> dict[str, Any]:
    """One random image for each prompt, as the encoding method takes them."""
    config = model.config.vision_config
    if "image_grid_thw" in inspect.signature(model.get_image_features).parameters:
        cell = config.patch_size * config.spatial_merge_size
        side = config.spatial_merge_size * (_PIXELS // cell)
        width = (getattr(config, "in_channels", None) or 3) * config.temporal_patch_size * config.patch_size**2
        grids = torch.tensor([[1, side, side]] * number, device=next(model.parameters()).device)
        return {**random_inputs(model, pixel_values=(number * side**2, width)), "image_grid_thw": grids}
    height, width = image_size(model, config)
    if hasattr(model.config, "image_grid_pinpoints"):
        tiles = 1 + max(rows * columns for rows, columns in model.config.image_grid_pinpoints) // (height * width)
        sizes = torch.tensor([[height, width]] * number)
        return {**random_inputs(model, pixel_values=(number, tiles, 3, height, width)), "image_sizes": sizes}
    by_prompt = (1,) if hasattr(model, "connector") else ()  # Idefics takes several images of a prompt
    made: dict[str, Any] = random_inputs(model, pixel_values=(number, *by_prompt, 3, height, width))
    if grids_of(tower) == "image_sizes":
        made["image_sizes"] = torch.tensor([[height, width]] * number, device=made["pixel_values"].device)
    return made


def _count(tokens: Any) -> int:
    """The number of tokens in any of the shapes in which models give them."""
    return tokens[..., 0].numel() if isinstance(tokens, Tensor) else sum(map(_count, tokens))

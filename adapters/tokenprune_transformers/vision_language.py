"""The vision-language models of transformers whose prompts hold a placeholder for each image token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.backbones.vision_language import VisionLanguage


def _gemma3(model: Any) -> int:
    return int(model.multi_modal_projector.kernel_size)


def _internvl(model: Any) -> int:
    ratio: float = model.config.downsample_ratio
    return round(1 / ratio)


def _idefics3(model: Any) -> int:
    return int(model.config.scale_factor)


def _merged(model: Any) -> int:
    return int(model.config.vision_config.spatial_merge_size)


def _from_one(model: nn.Module, given: Mapping[str, Any], before: int) -> Tensor:
    """PaliGemma counts positions from 1."""
    return _from_zero(model, given, before) + 1


def _from_zero(model: nn.Module, given: Mapping[str, Any], before: int) -> Tensor:
    tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    return torch.arange(before, before + tokens.shape[1], device=tokens.device).unsqueeze(0)


def _multimodal(model: Any, given: Mapping[str, Any], before: int) -> Tensor:
    """Positions in time, rows and columns (3, b, L), and what later tokens are ahead of their number by."""
    mask, grids = given.get("attention_mask"), (given.get("image_grid_thw"), given.get("video_grid_thw"))
    if given.get("input_ids") is not None and any(grid is not None for grid in grids):
        taken = inspect.signature(model.get_rope_index).parameters
        arguments = {name: given[name] for name in taken if given.get(name) is not None}
        if before and mask is not None:
            arguments["attention_mask"] = mask[:, before:]
        positions, deltas = model.get_rope_index(**arguments)
        if before:  # a prompt behind another one
            first = _continued(model, given, before)[..., :1]
            positions, deltas = positions + first, deltas + first[0] - before
        model.rope_deltas = deltas
        return torch.as_tensor(positions)
    return _continued(model, given, before)


def _continued(model: Any, given: Mapping[str, Any], before: int) -> Tensor:
    """The positions (3, b, L) of text behind a prompt that has been read."""
    mask, plain = given.get("attention_mask"), _from_zero(model, given, before)
    if mask is not None:
        plain = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, before:]
    deltas = model.rope_deltas
    text = plain if deltas is None else plain + deltas.to(plain.device)
    return torch.as_tensor(text).expand(3, *text.shape)


# The merging modules, by the names of their classes: attributes of a VisionLanguage, or what makes them of the module.
_MODELS: dict[str, dict[str, Any]] = {
    "LlavaModel": {"block": 1},
    "PaliGemmaModel": {"block": 1, "positions": _from_one},
    "Gemma3Model": {"block": _gemma3},
    "InternVLModel": {"block": _internvl},
    **{name: {"block": _idefics3} for name in ("Idefics3Model", "SmolVLMModel")},
    **{name: {} for name in ("LlavaNextModel", "LlavaOnevisionModel")},
    **{
        name: {"block": _merged, "positions": _multimodal}
        for name in (
            "Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel", "Qwen3VLMoeModel",
            "Glm4vModel", "Glm4vMoeModel", "Glm46VModel", "GlmOcrModel",
        )
    },
}  # fmt: skip
_LANGUAGE, _TOWER = ("language_model", "text_model"), ("vision_tower", "vision_model", "visual")


def vision_language(model: nn.Module) -> VisionLanguage | None:
    """The description of a vision-language model, with a language head or without; ``None`` of any other model.

    And of all models before transformers 5, whose merging modules and caches differ: there the tower is pruned alone.
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return None
    for part in (model, *model.children()):
        given = next((_MODELS[base.__name__] for base in type(part).__mro__ if base.__name__ in _MODELS), None)
        if given is not None:
            block = given.get("block")
            return VisionLanguage(
                model=part,
                language=_part(part, _LANGUAGE),
                tower=_part(part, _TOWER),
                placeholder=_placeholder(part.config),
                block=block(part) if callable(block) else block,
                num_tokens=getattr(part, "image_seq_len", None),
                positions=given.get("positions"),
            )
    return None


def _part(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    return next(part for name in names if isinstance(part := getattr(model, name, None), nn.Module))


def _placeholder(config: Any) -> int:
    """The id of image placeholders, under the name that it has in this family and release."""
    names = ("image_token_id", "image_token_index")
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))

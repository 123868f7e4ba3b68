"""The vision models of transformers that are a flat list of blocks, and their classification heads."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenprune import Backbone, Setting, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = (
    "ViTModel",
    "DeiTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "SiglipVisionModel",
    "and their …ForImageClassification",
)

# The module whose output each family calls its final tokens. CLIP norms the class token alone.
_FINAL_NORMS: dict[str, str | None] = {
    "vit": "layernorm",
    "deit": "layernorm",
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "clip_vision_model": None,
    "siglip_vision_model": "post_layernorm",
}
_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
# Classes that hold a tower and take nothing but pooled outputs from it. (Vision models proper were such in versions
# before 5.10.)
_HEADS = ("ForImageClassification", "ForImageClassificationWithTeacher", "WithProjection", "VisionModel")


def describe(model: nn.Module) -> Backbone:
    """The description of a transformers model.

    Raises:
        UnsupportedModelError: The family, or what stands behind its encoder, is not supported.
    """
    name = type(model).__name__
    tower = _vision_tower(model)
    if tower is None:
        raise UnsupportedModelError(
            f"transformers' {name} is not supported yet; supported are {', '.join(SUPPORTED)}. If its blocks take and "
            "return (B, L, C) tokens, pass tokenprune.sparsify(model, backbone=tokenprune.Backbone(…))."
        )
    if tower is not model and not name.endswith(_HEADS):
        raise UnsupportedModelError(
            f"what {name} does with its vision tokens may take all of them; sparsify its {type(tower).__name__} alone "
            "if it does not."
        )
    if not tower._supports_sdpa:
        raise UnsupportedModelError(f"{type(tower).__name__} has no SDPA attention in this version of transformers.")
    config: Any = tower.config
    norm = _FINAL_NORMS[config.model_type]
    settings: list[Setting] = []
    if config._attn_implementation != "sdpa":
        # A config may be shared with other models, so this one gets a copy.
        changed = copy.copy(config)
        changed._attn_implementation = "sdpa"
        holders = [module for module in model.modules() if getattr(module, "config", None) is config]
        settings = [Setting(owner=module, name="config", value=changed) for module in holders]
    patch_size, image_size = _pair(config.patch_size), _pair(config.image_size)
    return Backbone(
        blocks=_blocks(tower, config.num_hidden_layers),
        num_prefix_tokens=_num_prefix_tokens(tower.get_submodule("embeddings")),
        embed_dim=config.hidden_size,
        patch_size=patch_size,
        grid_size=(image_size[0] // patch_size[0], image_size[1] // patch_size[1]),
        final_norm=None if norm is None else tower.get_submodule(norm),
        settings=tuple(settings),
    )


def _vision_tower(model: nn.Module) -> PreTrainedModel | None:
    """The model, or the part of it, that turns images into tokens and runs the blocks over them."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if (
            isinstance(module, PreTrainedModel)
            and module.config.model_type in _FINAL_NORMS
            and hasattr(module, "embeddings")
        ):
            # By name, since the class has moved from one version to the next.
            feature_extractor = any(base.__name__ == "BackboneMixin" for base in type(module).__mro__)
            return None if feature_extractor else module
    return None


def _blocks(tower: nn.Module, depth: int) -> tuple[nn.Module, ...]:
    """The block list, by structure: the one list of ``depth`` modules of one class."""
    lists = [
        module
        for module in tower.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(item) for item in module}) == 1
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{type(tower).__name__} has {len(lists)} lists of {depth} equal modules; which holds the "
            "blocks cannot be told."
        )
    return tuple(lists[0])


def _num_prefix_tokens(embeddings: nn.Module) -> int:
    parameters = (getattr(embeddings, name, None) for name in _PREFIX_TOKENS)
    return sum(1 if token.dim() == 1 else token.shape[1] for token in parameters if token is not None)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

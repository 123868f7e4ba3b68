"""The vision models of transformers: what they have in common, and what each family does differently."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenprune import Backbone, Setting, UnsupportedModelError
from tokenprune.backbones.adaptations import Adaptation
from tokenprune.backbones.hierarchy import observe_hierarchy
from tokenprune.backbones.structure import observe
from tokenprune_transformers.example_inputs import example_inputs, image_size, pair, vision_config
from tokenprune_transformers.families import FrameMessage, FullLength, PositionInput, SharedTables
from tokenprune_transformers.packed import grids_of, num_prefix_of, packed
from tokenprune_transformers.vision_language import vision_language

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the families do differently, by the model type of their config: attributes of a Backbone.
_FAMILIES: dict[str, dict[str, Any]] = {
    # Rotary tables that attention spreads over the heads by itself, or over heads and images.
    "step3p5_vision": {"token_inputs": {"position_embeddings": ("n d -> b n d",)}, "downstream": "all tokens"},
    "mlcd_vision_model": {"token_inputs": {"position_embeddings": ("n d -> b n d",)}},
    "llama4_vision_model": {
        "token_inputs": {"freqs_ci": ("n d -> b n d", "n h d -> b n h d")},
        "downstream": "all tokens",
    },
    # Positions are added to all tokens between the blocks (YOLOS, arXiv 2106.00666).
    "yolos": {"downstream": "all tokens"},
    # Rotary tables, cosines and sines, without an entry for prefix tokens.
    **{family: {"neutral_inputs": {"position_embeddings": (1.0, 0.0)}} for family in ("dinov3_vit", "sapiens2")},
    # Heads are given a mask of the original patches, pool by positions, merge neighbours or take the first patch.
    **{
        family: {"downstream": "all tokens"}
        for family in (
            "siglip2_vision_model",
            "phi4_multimodal_vision",
            "gemma4_vision",
            "granite_docling_vision",
            "janus_vision_model",
        )
    },
}
# Masks of the patches that are there, where rows of them are padded, by the same key. Before transformers 5, a tower
# inside of a model has the shorter name.
_PATCH_MASKS = {
    "siglip2_vision_model": ("pixel_attention_mask", "attention_mask"),
}
# The adaptations that the families need, by the same key: made of the vision tower.
_ADAPTATIONS: dict[str, Callable[[nn.Module], Adaptation]] = {
    "vjepa2": lambda tower: PositionInput("position_mask"),
    "mlcd_vision_model": lambda tower: SharedTables(),
    "llama4_vision_model": lambda tower: SharedTables(),
    "xclip_vision_model": lambda tower: FrameMessage(),
    **dict.fromkeys(
        ("beit", "data2vec-vision"),
        lambda tower: FullLength(
            [module for module in tower.modules() if type(module).__name__.endswith("RelativePositionBias")],
            "dim_size",
        ),
    ),
}
# Hierarchies whose tokens stand in the order of their mask units, not in that of rows (Hiera, arXiv 2306.00989).
_OUT_OF_ORDER = ("hiera",)
# Names of classes whose heads take all tokens: feature maps, dense predictions, masked images.
_DENSE = ("Backbone", "ForMaskedImageModeling", "ForPreTraining", "Segmentation", "Estimation", "Matting")
# Models of several parts that take a pooled output from their vision tower, or any number of tokens.
_POOLING = (
    "CLIPModel", "AltCLIPModel", "ChineseCLIPModel", "MetaClip2Model", "SiglipModel", "Siglip2Model", "Aimv2Model",
    "BlipModel", "VisionTextDualEncoderModel",
)  # fmt: skip
_TAKING_ANY_NUMBER = (
    "VisionEncoderDecoderModel",
    # Before transformers 5; from then on their prompts are shortened.
    "LlavaModel", "LlavaForConditionalGeneration", "PaliGemmaModel", "PaliGemmaForConditionalGeneration",
    "BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "Blip2Model",
    "Blip2ForConditionalGeneration", "Blip2VisionModelWithProjection", "InstructBlipForConditionalGeneration",
)  # fmt: skip


def describe(model: nn.Module) -> Backbone:
    """The description of a transformers model: of a flat list of blocks, or of a hierarchy.

    Raises:
        UnsupportedModelError: It is neither, or what stands behind the blocks may need every token.
    """
    try:
        return _flat(model)
    except UnsupportedModelError as flat:
        try:
            return _hierarchy(model, obstacle=str(flat))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{flat} As a hierarchy: {error}") from error


def _hierarchy(model: nn.Module, *, obstacle: str) -> Backbone:
    """The description of a hierarchy, or of a model with dense heads on one."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is a part of a model.")
    config = vision_config(model.config)
    tower = model if config is model.config else _vision_tower(model, config)
    found = observe_hierarchy(
        tower,
        example_inputs(tower),
        image_size=image_size(tower, config),
        row_major=config.model_type not in _OUT_OF_ORDER,
        obstacle=obstacle,
    )
    return Backbone(**found._asdict(), num_prefix_tokens=0, tower=None if tower is model else tower)


def _flat(model: nn.Module) -> Backbone:
    from transformers import PreTrainedModel

    name, names = type(model).__name__, {cls.__name__ for cls in type(model).__mro__}
    if not isinstance(model, PreTrainedModel) and not _is_plain_tower(model):
        raise UnsupportedModelError(f"transformers' {name} is a part of a model; sparsify the model it belongs to.")
    config = vision_config(model.config)
    tower: nn.Module = model
    composite, prompted = _has_other_parts(model), vision_language(model) is not None
    if composite:
        tower = _vision_tower(model, config)
        # A tower that packs images gives as many tokens as it would without pruning.
        takes_any = prompted or names & {*_POOLING, *_TAKING_ANY_NUMBER} or grids_of(tower) is not None
        if not takes_any:
            raise UnsupportedModelError(
                f"what {name} does with its vision tokens may need every one of them; sparsify its "
                f"{type(tower).__name__} alone if it does not."
            )
    family = _FAMILIES.get(config.model_type, {})
    settings = _settings(tower, getattr(model, "_supports_sdpa", False))
    packing = packed(tower, config)
    structure = observe(
        tower,
        example_inputs(tower),
        settings=settings,
        first_list=name.endswith("ForPreTraining") or config.model_type == "vjepa2",
        packed=packing is not None,
        num_merged=1 if packing is None or packing.coarser is None else packing.coarser.patch_size**2,
        frames=config.model_type == "xclip_vision_model",
        num_inner_tokens=int(config.model_type == "xclip_vision_model"),
    )
    needed = _ADAPTATIONS.get(config.model_type)
    adaptations = (*settings, *structure.adaptations, *(() if needed is None else (needed(tower),)))
    patch_size = None if getattr(config, "patch_size", None) is None else pair(config.patch_size)
    size = image_size(tower, config)
    own_names = [name.rpartition(".")[2] for name, _ in tower.named_parameters()]
    downstream = family.get("downstream", "pooled")
    # Behind a projector that takes a grid, image tokens are pruned for the language model by themselves.
    dense = prompted or any(part in one for part in (*_DENSE, "VJEPA2Model") for one in names)
    if dense or packing is not None:
        downstream = "all tokens"
    elif names & {*_TAKING_ANY_NUMBER} and downstream == "pooled":
        downstream = "any number"
    found = {
        **structure._asdict(),
        "token_inputs": {**structure.token_inputs, **family.get("token_inputs", {})},
        "adaptations": adaptations,
    }
    if packing is not None:
        found["num_prefix_tokens"] = num_prefix_of(config)
    return Backbone(
        **found,
        neutral_inputs=family.get("neutral_inputs", {}),
        downstream=downstream,
        patch_size=patch_size,
        grid_size=None if patch_size is None else (size[0] // patch_size[0], size[1] // patch_size[1]),
        class_token=any(name.startswith(("cls_", "class_")) for name in own_names),
        tower=tower if composite else None,
        packed=packing,
        patch_mask=_patch_mask(tower, config),
    )


def _patch_mask(tower: nn.Module, config: Any) -> str | None:
    """The name by which a tower is told which patches of padded rows are there."""
    names = inspect.signature(tower.forward).parameters
    return next((name for name in _PATCH_MASKS.get(config.model_type, ()) if name in names), None)


def _has_other_parts(model: PreTrainedModel) -> bool:
    """Whether a model has parts besides one that looks at images, and more than a classifier behind it."""
    if "ForImageClassification" in type(model).__name__:
        return False
    configs = [value for value in vars(model.config).values() if hasattr(value, "model_type")]
    looks_with_a_part = hasattr(getattr(model.config, "vision_config", None), "model_type")
    return looks_with_a_part or len(configs) > 1 or "input_ids" in inspect.signature(model.forward).parameters


def _vision_tower(model: PreTrainedModel, config: Any) -> nn.Module:
    """The part of a model that turns images into tokens and runs the blocks over them."""
    from transformers import PreTrainedModel

    parts: list[nn.Module] = [part for part in model.modules() if getattr(part, "config", None) is config]
    for part in parts:
        is_tower = isinstance(part, PreTrainedModel) or (config is not model.config and _is_plain_tower(part))
        if part is not model and is_tower:
            return part
    raise UnsupportedModelError(
        f"{type(model).__name__} has no one part that looks at images, and at nothing else, to be sparsified."
    )


def _is_plain_tower(module: nn.Module) -> bool:
    """Whether a part that is no model by itself looks at images, as towers before transformers 5 do."""
    looks = "pixel_values" in inspect.signature(module.forward).parameters
    return looks and hasattr(getattr(module, "config", None), "model_type")


def _settings(tower: nn.Module, supports_sdpa: bool) -> tuple[Setting, ...]:
    """SDPA attention for all parts of the tower that have another one, but for those that have no SDPA.

    Raises:
        UnsupportedModelError: Attention is by a kernel that cannot be masked, and there is no SDPA.
    """
    settings: list[Setting] = []
    changed: dict[int, Any] = {}
    for module in tower.modules():
        config = getattr(module, "config", None)
        chosen = getattr(config, "_attn_implementation", None)
        if chosen in (None, "sdpa"):
            continue
        if not getattr(tower, "_supports_sdpa", supports_sdpa):
            if chosen != "eager":
                raise UnsupportedModelError(
                    f"{type(tower).__name__} attends with {chosen!r}, which cannot be masked; load it with "
                    "attn_implementation='eager'."
                )
            continue
        if id(config) not in changed:
            # A config may be shared with other models, so this one gets a copy.
            changed[id(config)] = copy.copy(config)
            changed[id(config)]._attn_implementation = "sdpa"
        settings.append(Setting(owner=module, name="config", value=changed[id(config)]))
    return tuple(settings)

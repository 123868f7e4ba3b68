"""timm's Vision Transformers: what they have in common, and what each family does differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tokenprune import Backbone, Setting, TokenTable, UnsupportedModelError
from tokenprune.backbones.adaptations import GridMethods
from tokenprune.backbones.probing import random_inputs
from tokenprune.backbones.structure import observe
from tokenprune_timm.families import GridTokens, LateClassToken, TailClassToken, TalkingHeads
from tokenprune_timm.hierarchies import describe_hierarchy

# Rotary tables: one for all images and heads, one a head, or one an image.
_ROPE = ("n d -> b 1 n d", "h n d -> b h n d", "b h n d -> b h n d")
_NO_ROTATION = (0.0, 1.0)  # a rotary table holds sines, then cosines
_GRID_METHODS = ("forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers")


def describe(model: nn.Module) -> Backbone:
    """The description of a timm model: of a flat list of blocks, or of a hierarchy.

    Raises:
        UnsupportedModelError: It is neither, or has a part that pruned tokens break.
    """
    if type(model).__module__.startswith("timm.models._features"):
        return _feature_maps(model)
    try:
        return _flat(model)
    except UnsupportedModelError as flat:
        try:
            return describe_hierarchy(model, example_inputs(model), image_size(model), obstacle=str(flat))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{flat} As a hierarchy: {error}") from error


def _flat(model: nn.Module) -> Backbone:
    families = (_FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _FAMILIES)
    options: dict[str, Any] = next(families, _plain)(model)
    adaptations = [
        Setting(owner=module, name="fused_attn", value=True)
        for module in model.modules()
        if getattr(module, "fused_attn", True) is False
    ]
    if "blocks" not in options:
        structure = observe(
            model,
            example_inputs(model),
            settings=adaptations,
            num_late_prefix_tokens=int(any(isinstance(one, LateClassToken) for one in options.get("adaptations", ()))),
        )
        family = options.get("adaptations", ())
        options = {**structure._asdict(), **options, "adaptations": (*structure.adaptations, *family)}
    methods = tuple(method for method in _GRID_METHODS if callable(getattr(type(model), method, None)))
    given = {name: _ROPE if name == "rope" else None for name in options.get("token_inputs", ())}
    neutral = {name: _NO_ROTATION for name in given if name == "rope"}
    norm, patch_size = getattr(model, "norm", None), _patch_size(model)
    return Backbone(
        **{"final_norm": norm, **{name: value for name, value in options.items() if value is not None},
           "token_inputs": given, "neutral_inputs": neutral,
           "adaptations": (*adaptations, *options["adaptations"], GridMethods(model, methods))},
        patch_size=patch_size,
        grid_size=None if patch_size is None else _grid(image_size(model), patch_size),
        class_token=any(name.endswith("cls_token") for name, _ in model.named_parameters()),
    )  # fmt: skip


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Two random images."""
    return dict(random_inputs(model, x=(2, num_channels(model), *image_size(model))))


def _feature_maps(model: nn.Module) -> Backbone:
    """What ``features_only=True`` makes of a model.

    It wraps one, to get feature maps from its ``forward_intermediates``, or runs the parts of a hierarchy in turn.
    """
    wrapped = getattr(model, "model", None)
    if wrapped is None:
        apart = f"timm's {type(model).__name__} runs the parts of a model in turn, and needs all of their tokens."
        return describe_hierarchy(model, example_inputs(model), image_size(model), obstacle=apart)
    found = describe(wrapped)
    others = (one for one in found.adaptations if not isinstance(one, GridMethods))
    return replace(found, adaptations=(*others, GridMethods(model, ("forward",))))


def _plain(model: nn.Module) -> dict[str, Any]:
    # An attention pool with positions of its own adds them to a full grid.
    needs_all = getattr(getattr(model, "attn_pool", None), "pos_embed", None) is not None
    return {"downstream": "all tokens" if needs_all else "pooled"}


def _grid_tail(model: nn.Module) -> dict[str, Any]:
    """Encoders of language models give their tokens back as a grid, or merge neighbours."""
    return {"downstream": "all tokens"}


def _naflex(model: nn.Module) -> dict[str, Any]:
    """NaFlexViT is given a mask of the patches that are there, and pools with it, by all of the original patches."""
    downstream = "pooled" if getattr(model, "global_pool", "") == "token" else "all tokens"
    return {"downstream": downstream, "patch_mask": "patch_valid"}


def _cait(model: nn.Module) -> dict[str, Any]:
    """CaiT (arXiv 2103.17239): talking heads mix finished weights; the class token comes in behind the blocks."""
    mixers = [block.get_submodule("attn.proj_w") for block in _children(model, "blocks")]
    return {"adaptations": (TalkingHeads(mixers), TailClassToken())}


def _convit(model: Any) -> dict[str, Any]:
    """ConViT (arXiv 2103.10697): gated attention keeps a table of relative positions; a class token joins late."""
    gated: list[Any] = [module for module in model.modules() if hasattr(module, "get_rel_indices")]
    tables = [
        TokenTable(owner=module, name="rel_indices", pattern="b n m d -> b n m d", build=module.get_rel_indices)
        for module in gated
    ]
    attentions = [(block.get_submodule("attn"),) for block in _children(model, "blocks")]
    late = () if model.cls_token is None else (LateClassToken(int(model.local_up_to_layer)),)
    return {"adaptations": (*tables, *late), "attentions": attentions}


def _volo(model: Any) -> dict[str, Any]:
    """VOLO (arXiv 2106.13112): blocks over grids behind the outlooker; the class token comes in behind them."""
    stages = list(_children(model, "network"))
    last = max(index for index, stage in enumerate(stages) if not isinstance(stage, nn.Sequential)) + 1
    return {
        "blocks": tuple(block for stage in stages[last:] for block in stage.children()),
        "num_prefix_tokens": 0,
        "embed_dim": model.num_features,
        "adaptations": (GridTokens(), TailClassToken()),
    }


_FAMILIES: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "Cait": _cait,
    "ConVit": _convit,
    "VOLO": _volo,
    "NaFlexVit": _naflex,
    **dict.fromkeys(
        ("DeepseekVitEncoder", "DeepseekVitClassifier", "Qwen3VitEncoder", "Qwen3VitClassifier"), _grid_tail
    ),
    **dict.fromkeys(("Gemma4VitEncoder", "Gemma4VitClassifier"), _grid_tail),
}


def _children(model: nn.Module, name: str) -> Iterator[nn.Module]:
    return model.get_submodule(name).children()


def image_size(model: Any) -> tuple[int, int]:
    """Height and width that the model was built for."""
    sizes = (getattr(module, "img_size", None) for module in model.modules())
    size = next((size for size in sizes if size is not None), None)
    if size is None and hasattr(model, "tokens_spatial_shape"):  # Hiera keeps its grid instead
        size = [tokens * stride for tokens, stride in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)]
    return _pair(_input_size(model)[1:] if size is None else size)


def num_channels(model: nn.Module) -> int:
    """Channels of the images, from the layer that embeds patches: a convolution, or a linear one over their pixels."""
    embeddings = (part for name, part in model.named_children() if name.endswith(("patch_embed", "embeds")))
    embedding = next(embeddings, None) or _first_layer(model)
    patch_size = _patch_size(model)
    for module in embedding.modules():
        if isinstance(module, nn.Conv2d):
            return int(module.in_channels)
        if isinstance(module, nn.Linear) and patch_size is not None:
            return int(module.in_features) // (patch_size[0] * patch_size[1])
    return _input_size(model)[0]


def _first_layer(model: nn.Module) -> nn.Module:
    """The convolution that timm's own configuration calls the first one; an empty module if it names none.

    Or if pixels have been folded into channels before it, 4 x 4 of them as TResNet does.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    found = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    if not isinstance(found, nn.Conv2d) or found.in_channels == 16 * _input_size(model)[0]:
        return nn.Identity()
    return found


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    size: tuple[int, int, int] = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    return size


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Pixels a token stands for, also behind a convolutional stem."""
    patch_embed: Any = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    if hasattr(patch_embed, "feat_ratio"):
        return _pair(patch_embed.feat_ratio(as_scalar=False))
    size = getattr(patch_embed, "patch_size", None)
    return None if size is None else _pair(size)


def _grid(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[0]), int(size[1]))

"""Every ViT-like entry point of timm, and one of each of its other files, all built at a small size.

What makes an entry point itself comes from timm: its function is called, and of the arguments with which that then
builds a model only sizes are changed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import timm
import tokenprune_timm.lvvit  # noqa: F401 - registers its models
import torch
from torch import nn

from tests.census.entry import Entry

PATCH_SIZE, GRID, EMBED_DIM, DEPTH, NUM_HEADS, NUM_CLASSES = 8, 6, 32, 4, 2, 7
NAFLEX_GRIDS, NAFLEX_LENGTH = ((6, 6), (4, 7), (5, 3), (2, 8)), 40

Arguments = dict[str, Any]
Changes = Callable[[Arguments], Arguments]


def create(name: str, changes: Mapping[str, Changes], module: str = "", **options: Any) -> nn.Module:
    """Calls an entry point while functions of its module, or of another, get other keyword arguments."""
    functions = importlib.import_module(module or timm.model_entrypoint(name).__module__)

    def changing(function: Callable[..., Any], change: Changes) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **{**kwargs, **change(kwargs)})

    with ExitStack() as stack:
        for attribute, change in changes.items():
            stack.enter_context(patch.object(functions, attribute, changing(getattr(functions, attribute), change)))
        model = timm.create_model(name, **options)
    # Variances are no parameters: next to those of 1, redrawn parameters let next to nothing of an image through.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_var.fill_(0.04 if len(norms) < 200 else 0.1)
    return model


def num_classes(name: str) -> int:
    """An entry point whose weights have no classifier builds none."""
    return NUM_CLASSES if timm.get_pretrained_cfg(name).num_classes else 0


def _image_size(family: str, name: str) -> tuple[int, int]:
    """A grid of 6 x 6, or of 8 x 6 where timm's images are higher than wide."""
    stride = {"vitamin": 16, "volo": 16}.get(family, PATCH_SIZE)
    if family == "vision_transformer_hybrid":
        stride = 16 if re.search("s16|mci", name) else 32
    _, height, width = timm.get_pretrained_cfg(name).input_size
    return stride * (8 if height > width else GRID), stride * GRID


def images(height: int, width: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, height, width, generator=generator)}


def _patches(batch: int, generator: torch.Generator) -> dict[str, Any]:
    """What timm's NaFlex collator makes of images of several sizes, but for the padding, which is not zero."""
    coordinates = torch.zeros(batch, NAFLEX_LENGTH, 2, dtype=torch.int64)
    valid = torch.zeros(batch, NAFLEX_LENGTH, dtype=torch.bool)
    for image in range(batch):
        rows, columns = NAFLEX_GRIDS[image % len(NAFLEX_GRIDS)]
        coordinates[image, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[image, : rows * columns] = True
    patches = torch.randn(batch, NAFLEX_LENGTH, PATCH_SIZE * PATCH_SIZE * 3, generator=generator)
    return {"x": {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}}


def _transformer(arguments: Arguments) -> Arguments:
    return {"embed_dim": EMBED_DIM, "depth": DEPTH, "num_heads": NUM_HEADS}


def _vit(arguments: Arguments) -> Arguments:
    return {**_transformer(arguments), "patch_size": PATCH_SIZE}


def _eva(arguments: Arguments) -> Arguments:
    sizes = _vit(arguments)
    if isinstance(heads := arguments.get("num_kv_heads"), tuple):
        # The blocks in the middle may share keys and values between heads; the first and the last ones never do.
        shared = NUM_HEADS // 2 if heads[len(heads) // 2] < heads[0] else NUM_HEADS
        sizes["num_kv_heads"] = (NUM_HEADS, *(shared,) * (DEPTH - 2), NUM_HEADS)
    return sizes


def _hybrid(arguments: Arguments) -> Arguments:
    return {**_transformer(arguments), "patch_size": min(arguments["patch_size"], 4)}


def _naflex(arguments: Arguments) -> Arguments:
    grid = arguments["cfg"].pos_embed_grid_size
    grid = grid and tuple(min(side, 16) for side in grid)
    return {"cfg": replace(arguments["cfg"], **_vit(arguments), pos_embed_grid_size=grid)}


def _convit(arguments: Arguments) -> Arguments:
    # Positional attention starts out as one offset a head, of a square number of heads; embed_dim is the width of one.
    return {"patch_size": PATCH_SIZE, "embed_dim": 8, "depth": 6, "local_up_to_layer": 4}


def _encoder(arguments: Arguments) -> Arguments:
    return {**_vit(arguments), **({"out_features": 24} if arguments.get("out_features") else {})}


def _gemma(arguments: Arguments) -> Arguments:
    hidden = round(EMBED_DIM * arguments["intermediate_size"] / arguments["embed_dim"])
    sizes = {"head_dim": EMBED_DIM // NUM_HEADS, "intermediate_size": hidden, "position_embedding_size": 128}
    return {**_vit(arguments), **sizes}


def _lvvit(arguments: Arguments) -> Arguments:
    return {**_vit(arguments), "stem_channels": 8}


def _volo(arguments: Arguments) -> Arguments:
    return {
        "layers": (1, 2, 4, 2),
        "embed_dims": (16, EMBED_DIM, EMBED_DIM, EMBED_DIM),
        "num_heads": (NUM_HEADS,) * 4,
        "stem_hidden_dim": arguments.get("stem_hidden_dim", 64) // 8,
    }


# By timm's file, what changes of the arguments with which it builds a model: flat lists of global attention, and VOLO.
FLAT: dict[str, Changes] = {
    "vision_transformer": _vit,
    "deit": _vit,
    "eva": _eva,
    "beit": _vit,
    "vision_transformer_relpos": _vit,
    "vision_transformer_hybrid": _hybrid,
    "naflexvit": _naflex,
    "cait": _vit,
    "convit": _convit,
    "deepseek_vit": _encoder,
    "gemma4_vit": _gemma,
    "lvvit": _lvvit,
    "qwen3_vit": _encoder,
    "vitamin": _transformer,
}
VOLO: dict[str, Changes] = {"volo": _volo}

# Stems that an entry point builds before its model. ResNetV2 normalises in 32 groups.
_RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16), "stem_width": 16}
_STEMS: dict[str, dict[str, Changes]] = {
    "vision_transformer_hybrid": {
        "ResNetV2": lambda arguments: {
            "layers": (1,) * len(arguments["layers"]),
            "channels": (128,) * len(arguments["layers"]),
            "stem_chs": 32,
        },
        "create_resnetv2_stem": lambda arguments: {"out_chs": 32},
        "resnet26d": lambda arguments: _RESNET,
        "resnet50d": lambda arguments: _RESNET,
        "ConvStem": lambda arguments: {"channels": (8, 8, EMBED_DIM)},
    },
    "vitamin": {
        "MbConvStages": lambda arguments: {
            "cfg": replace(arguments["cfg"], embed_dim=(8, 16, EMBED_DIM), depths=(1, 1, 1), stem_width=8)
        }
    },
}


def _small(family: str, name: str, sizes: Changes, module: str = "", **options: Any) -> Callable[[], nn.Module]:
    def changes(arguments: Arguments) -> Arguments:
        images = {} if "cfg" in arguments else {"img_size": _image_size(family, name)}
        return {**sizes(arguments), **images, "num_classes": num_classes(name)}

    stems = _STEMS.get(family, {})
    return lambda: create(name, {"build_model_with_cfg": changes, **stems}, module, **options)


def _every(families: Mapping[str, Changes]) -> list[Entry]:
    return [
        Entry(
            library="timm",
            family=family,
            name=name,
            build=_small(family, name, sizes),
            inputs=partial(images, *_image_size(family, name)),
        )
        for family, sizes in families.items()
        for name in timm.list_models(module=family)
    ]


def flat() -> list[Entry]:
    """Every listed entry point of the files whose models are one flat list of blocks with global attention."""
    return _every(FLAT)


def volo() -> list[Entry]:
    """Every listed entry point of VOLO: outlookers, transformer blocks in three lists, class attention."""
    return _every(VOLO)


def naflex_dict() -> list[Entry]:
    """NaFlex models given patches of images of several sizes: each pool, each kind of position."""
    module = "timm.models.naflexvit"
    models: dict[str, tuple[str, Arguments]] = {
        "naflexvit_base_patch16_radio_v3": ("naflexvit", {}),  # class token
        "naflexvit_base_patch16_siglip": ("naflexvit", {}),  # attention pool
        "naflexvit_base_patch16_par_gap": ("naflexvit", {}),  # average
        "naflexvit_base_patch16_parfac_gap": ("naflexvit", {}),  # average, positions by row and column
        "vit_small_patch16_dinov3": ("eva", {"use_naflex": True}),  # average, RoPE
        "vit_small_patch16_rope_mixed_224": ("eva", {"use_naflex": True}),  # class token, RoPE by block
    }
    return [
        Entry(
            library="timm",
            family=family,
            name=f"{name} given patches",
            build=_small(family, name, _naflex, module, **options),
            inputs=_patches,
        )
        for name, (family, options) in models.items()
        if timm.is_model(name)
    ]


def examples() -> list[Entry]:
    """All that are supported, to prove: flat models, and hierarchies with a fast path."""
    from tests.census import timm_hierarchies  # which is written with what is here

    return [*flat_examples(), *timm_hierarchies.examples()]


def flat_examples() -> list[Entry]:
    """Flat models; the first of each architecture is compiled and exported as well."""
    entries = [*flat(), *volo(), *naflex_dict()]
    first = {entry.name for entry in distinct(entries)}
    return [replace(entry, compiled=entry.name in first) for entry in entries]


# What tells two models apart besides their modules and parameters.
_SETTINGS = (
    "global_pool",
    "encoder_pool",
    "pool_include_prefix",
    "num_prefix_tokens",
    "no_embed_class",
    "dynamic_img_size",
    "rope_mixed",
    "rotate_half",
    "pos_embed_type",
    "pos_embed_ar_preserving",
    "num_kv_heads",
)


# Modules that do the same to every token on its own; timm's activations, norms and convolutions have many names.
_POINTWISE = re.compile("Norm|GELU|SiLU|Sigmoid|Conv|Pad|Drop|Identity|Mlp|GLU|LayerScale|Linear")


def _signature(entry: Entry) -> tuple[object, ...]:
    """The classes of a model's modules, the names of the parameters outside of its blocks and its settings."""
    model = entry.build()
    modules = list(model.modules())
    classes = {type(module).__name__ for module in modules if type(module).__module__.startswith("timm")}
    names = {re.sub(r"\.(weight|bias)$", "", name) for name, _ in model.named_parameters()}
    settings = {
        (setting, str(vars(module)[setting]))
        for module in modules
        for setting in _SETTINGS
        if isinstance(vars(module).get(setting), bool | int | str)
    }
    return (
        frozenset(name for name in classes if not _POINTWISE.search(name)),
        frozenset(name for name in names if not re.search("blocks|layers|stages|backbone|network", name)),
        frozenset(settings),
        type(entry.inputs(1, torch.Generator())["x"]),
    )


def distinct(entries: Iterable[Entry]) -> list[Entry]:
    """The first of the entries of each architecture, leaving out those that differ from it in sizes only."""
    first: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        try:
            signature = _signature(entry)
        except Exception:  # the test of the entry says why it cannot be built
            signature = (entry.name,)
        first.setdefault(signature, entry)
    return list(first.values())

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

from tests.census import Entry

PATCH_SIZE, GRID, EMBED_DIM, DEPTH, NUM_HEADS, NUM_CLASSES = 8, 6, 32, 4, 2, 7
NAFLEX_GRIDS, NAFLEX_LENGTH = ((6, 6), (4, 7), (5, 3), (2, 8)), 40

Arguments = dict[str, Any]
Changes = Callable[[Arguments], Arguments]


def _create(name: str, changes: Mapping[str, Changes], module: str = "", **options: Any) -> nn.Module:
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


def _num_classes(name: str) -> int:
    """An entry point whose weights have no classifier builds none."""
    return NUM_CLASSES if timm.get_pretrained_cfg(name).num_classes else 0


def _image_size(family: str, name: str) -> tuple[int, int]:
    """A grid of 6 x 6, or of 8 x 6 where timm's images are higher than wide."""
    stride = {"vitamin": 16, "volo": 16}.get(family, PATCH_SIZE)
    if family == "vision_transformer_hybrid":
        stride = 16 if re.search("s16|mci", name) else 32
    _, height, width = timm.get_pretrained_cfg(name).input_size
    return stride * (8 if height > width else GRID), stride * GRID


def _images(height: int, width: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
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
        return {**sizes(arguments), **images, "num_classes": _num_classes(name)}

    stems = _STEMS.get(family, {})
    return lambda: _create(name, {"build_model_with_cfg": changes, **stems}, module, **options)


def _every(families: Mapping[str, Changes]) -> list[Entry]:
    return [
        Entry(
            library="timm",
            family=family,
            name=name,
            build=_small(family, name, sizes),
            inputs=partial(_images, *_image_size(family, name)),
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


_WIDTHS = (16, 32, 48, 64)
_WIDER = (16, 32, 64, 128)
_HEADS = (2, 2, 2, 2)


def _halo(arguments: Arguments) -> Arguments:
    cfg = arguments["model_cfg"]
    blocks = tuple(replace(block, d=min(block.d, 4), c=block.c // 4) for block in cfg.blocks)
    attention = {"block_size": 2, "halo_size": 1}
    return {"model_cfg": replace(cfg, blocks=blocks, stem_chs=16, self_attn_kwargs=attention)}


def _mvit(arguments: Arguments) -> Arguments:
    return {"model_cfg": replace(arguments["model_cfg"], embed_dim=_WIDER)}


# One entry point of every other file: its name, the side of its images, and what changes of its arguments. Narrow, but
# as deep as a list of blocks has to be to look like one that could be pruned.
_OTHERS: dict[str, tuple[str, int, Arguments | Changes]] = {
    "byoanet": ("halonet_h1", 64, _halo),
    "byobnet": ("test_byobnet", 32, {}),
    "coat": ("coat_tiny", 64, {"img_size": 64, "embed_dims": (32, 32, 32, 32), "num_heads": 8}),
    "convmixer": ("convmixer_768_32", 28, {"dim": 32, "depth": 4}),
    "convnext": ("test_convnext", 32, {}),
    "cpubone": ("cpubone_nano", 32, {"width_list": (8, 16, 16, 32, 32)}),
    "crossvit": ("crossvit_tiny_240", 120, {"img_size": 120, "embed_dim": (32, 64), "num_heads": (2, 2)}),
    "csatv2": ("csatv2", 64, {"dims": (16, 24, 32, 48)}),
    "cspnet": ("cs3darknet_focus_s", 32, {}),
    "cspnext": ("cspnext_tiny", 32, {}),
    "davit": ("davit_tiny", 56, {"embed_dims": _WIDTHS, "num_heads": _HEADS, "depths": (1, 1, 4, 1)}),
    "densenet": ("densenet121", 32, {"growth_rate": 8, "block_config": (2, 2, 4, 2)}),
    "dla": ("dla46x_c", 32, {}),
    "dpn": ("dpn48b", 32, {"k_sec": (1, 1, 2, 1)}),
    "edgenext": ("edgenext_xx_small", 32, {}),
    "efficientformer": ("efficientformer_l1", 224, {"embed_dims": _WIDTHS, "depths": (1, 1, 2, 4), "num_vit": 4}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("test_efficientnet", 32, {}),
    "efficientvim": ("efficientvim_m1", 32, {"embed_dim": (32, 48, 64)}),
    "efficientvit_mit": ("efficientvit_b0", 32, {"head_widths": (64, 64)}),
    "efficientvit_msra": ("efficientvit_m0", 64, {"img_size": 64}),
    "fasternet": ("fasternet_t0", 32, {"embed_dim": 16}),
    "fastvit": ("fastvit_t8", 32, {"embed_dims": _WIDER}),
    "focalnet": ("focalnet_tiny_srf", 32, {"embed_dim": 16}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64, "embed_dim": 32}),
    "ghostnet": ("ghostnet_050", 32, {}),
    "hardcorenas": ("hardcorenas_b", 32, {}),
    "hgnet": ("hgnetv2_b0", 32, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16}),
    "hieradet_sam2": ("sam2_hiera_tiny", 64, {"embed_dim": 16}),
    "hrnet": ("hrnet_w18_small", 32, {}),
    "iformer": ("iformer_t", 32, {}),
    "inception_next": ("inception_next_atto", 32, {"dims": _WIDTHS}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 32, {}),
    "levit": ("levit_128s", 64, {"img_size": 64, "embed_dim": (32, 48, 64), "num_heads": (2, 3, 4)}),
    "lowformer": ("lowformer_b0", 32, {"width_list": (8, 16, 16, 32, 32), "head_widths": (64, 64)}),
    "mambaout": ("test_mambaout", 32, {}),
    "maxxvit": ("test_maxvit", 64, {"img_size": 64}),
    "metaformer": ("caformer_s18", 32, {"dims": (32, 32, 64, 64), "depths": (2, 2, 4, 4)}),
    "mlp_mixer": ("gmlp_ti16_224", 48, {"img_size": 48, "patch_size": 8, "num_blocks": 4, "embed_dim": 32}),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {}),
    "mobilevit": ("mobilevit_xxs", 32, {}),
    "mvitv2": ("mvitv2_tiny", 32, _mvit),
    "nasnet": ("nasnetalarge", 32, {"stem_size": 16, "num_features": 384}),
    "nest": (
        "nest_tiny",
        64,
        {"img_size": 64, "embed_dims": (16, 32, 64), "num_heads": (2, 2, 2), "depths": (2, 2, 4)},
    ),
    "nextvit": ("nextvit_small", 32, {"depths": (1, 1, 5, 1)}),
    "nfnet": ("test_nfnet", 32, {}),
    "pit": (
        "pit_ti_224",
        64,
        {
            "img_size": 64,
            "patch_size": 8,
            "stride": 4,
            "base_dims": (16, 16, 16),
            "heads": (2, 2, 2),
            "depth": (2, 4, 4),
        },
    ),
    "pnasnet": ("pnasnet5large", 32, {}),
    "pvt_v2": ("pvt_v2_b0", 32, {"depths": (2, 2, 4, 2), "embed_dims": _WIDTHS, "num_heads": (1, 2, 2, 2)}),
    "rdnet": ("rdnet_tiny", 32, {"growth_rates": (16,) * 7, "num_init_features": 16}),
    "regnet": ("regnetx_002", 32, {}),
    "repghost": ("repghostnet_050", 32, {}),
    "repvit": ("repvit_m1", 32, {"embed_dim": _WIDTHS, "depth": (2, 2, 4, 2)}),
    "res2net": ("res2next50", 32, {"layers": (1, 1, 2, 1), "channels": (32, 32, 64, 64)}),
    "resnest": ("resnest14d", 32, {"channels": (16, 16, 32, 64)}),
    "resnet": ("test_resnet", 32, {}),
    "resnetv2": ("resnetv2_18", 32, {"channels": _WIDTHS}),
    "rexnet": ("rexnet_100", 32, {"width_mult": 0.5}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 32, {}),
    "sequencer": (
        "sequencer2d_s",
        56,
        {"embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8), "layers": (2, 2, 4, 2)},
    ),
    "shvit": ("shvit_s1", 32, {"embed_dim": (32, 48, 64), "partial_dim": (8, 16, 16)}),
    "sknet": ("skresnet18", 32, {"channels": _WIDTHS}),
    "starnet": ("starnet_s050", 32, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 16, "num_heads": _HEADS},
    ),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64, {"img_size": 64, "embed_dim": 16, "num_heads": _HEADS}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"img_size": 64, "embed_dim": 16, "num_heads": _HEADS}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {"embed_dims": (16, 32, 32, 64), "num_heads": _HEADS}),
    "tnt": (
        "tnt_s_patch16_224",
        96,
        {"img_size": 96, "embed_dim": 32, "inner_dim": 8, "depth": 4, "num_heads_outer": 2, "num_heads_inner": 2},
    ),
    "tresnet": ("tresnet_m", 32, {"width_factor": 0.125}),
    "twins": (
        "twins_svt_small",
        64,
        {"img_size": 64, "embed_dims": _WIDTHS, "num_heads": _HEADS, "depths": (2, 2, 4, 4)},
    ),
    "vgg": ("vgg11", 32, {"model_cfg": [8, "M", 8, "M", 16, "M", 16, "M", 32, "M"], "mlp_ratio": 0.0625}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "embed_dim": 48, "depth": (2, 4, 4)}),
    "vision_transformer_sam": (
        "samvit_base_patch16",
        96,
        {"img_size": 96, "window_size": 4, "global_attn_indexes": (1, 3), "embed_dim": 32, "depth": 4, "num_heads": 2},
    ),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception41p", 32, {}),
    "xcit": ("xcit_nano_12_p8_224", 48, {"img_size": 48, "embed_dim": 32, "depth": 4, "num_heads": 2}),
}


def _other(family: str) -> Entry:
    names = timm.list_models(module=family)
    name, side, sizes = _OTHERS.get(family, (names[0], 0, {}))
    if name not in names:  # of another release of timm
        name, side, sizes = names[0], 0, {}

    def changes(arguments: Arguments) -> Arguments:
        return {**(sizes(arguments) if callable(sizes) else sizes), "num_classes": _num_classes(name)}

    # This file counts its channels before anything is built.
    options = {"channel_multiplier": 0.125} if family == "mobilenetv5" else {}
    height, width = (side, side) if side else timm.get_pretrained_cfg(name).input_size[1:]
    return Entry(
        library="timm",
        family=family,
        name=name,
        build=lambda: _create(name, {"build_model_with_cfg": changes}, **options),
        inputs=partial(_images, height, width),
    )


def other_files() -> list[Entry]:
    """One entry point of every file that is not in `flat` or `volo`: there is nothing in them to prune."""
    families = [
        family for family in timm.list_modules() if family not in {*FLAT, *VOLO} and timm.list_models(module=family)
    ]
    return [_other(family) for family in families]


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

"""One entry point of each of timm's files in which there is nothing to prune."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import timm
import tokenprune_timm.lvvit  # noqa: F401 - registers its models

from tests.census.entry import Entry
from tests.census.timm import FLAT, VOLO, Arguments, Changes, create, images, num_classes

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
        return {**(sizes(arguments) if callable(sizes) else sizes), "num_classes": num_classes(name)}

    # This file counts its channels before anything is built.
    options = {"channel_multiplier": 0.125} if family == "mobilenetv5" else {}
    height, width = (side, side) if side else timm.get_pretrained_cfg(name).input_size[1:]
    return Entry(
        library="timm",
        family=family,
        name=name,
        build=lambda: create(name, {"build_model_with_cfg": changes}, **options),
        inputs=partial(images, height, width),
    )


def other_files() -> list[Entry]:
    """One entry point of every file that is not in `flat` or `volo`: there is nothing in them to prune."""
    names = {family: timm.list_models(module=family) for family in timm.list_modules() if family not in {*FLAT, *VOLO}}
    # Recipes register models of their own where they have been imported.
    return [_other(family) for family, of_family in names.items() if of_family and _is_timms(of_family[0])]


def _is_timms(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith("timm.")

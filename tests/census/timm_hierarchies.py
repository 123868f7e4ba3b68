"""timm's hierarchies at a small size, for the fast path.

Of the files that the paper's method is meant for, every entry point; of each other file, one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import timm

from tests.census import timm_other_files
from tests.census.entry import Entry
from tests.census.timm import Arguments, Changes, create, images, num_classes

FAST: dict[str, Any] = {"stages": None, "keep_ratio": 0.6, "pruned": "fast"}
WIDTHS, DEPTHS, HEADS = (16, 32, 48, 64), (1, 1, 4, 1), (2, 2, 2, 2)


def _sizes(**sizes: Any) -> Changes:
    return lambda arguments: sizes


def _config(**sizes: Any) -> Changes:
    """Of a model that takes its sizes in a config."""
    return lambda arguments: {"model_cfg": replace(arguments["model_cfg"], **sizes)}


def _maxxvit(arguments: Arguments) -> Arguments:
    config = arguments["model_cfg"]
    stem = 16 if isinstance(config.stem_width, int) else (16, 16)
    sizes = {"embed_dim": (32, 32, 64, 128), "depths": DEPTHS, "stem_width": stem}
    sizes["head_hidden_size"] = 32 if isinstance(config.head_hidden_size, int) else config.head_hidden_size
    return {"model_cfg": replace(config, **sizes), "img_size": 64}


class _Family(NamedTuple):
    """How the entry points of a file are made small.

    Attributes:
        side: Of the images.
        changes: What changes of the arguments with which a model is built.
    """

    side: int
    changes: Changes


_WINDOWS = {"embed_dim": 16, "depths": DEPTHS, "num_heads": HEADS}
HIERARCHIES: dict[str, _Family] = {
    "convnext": _Family(64, _sizes(dims=WIDTHS, depths=DEPTHS)),
    "davit": _Family(56, _sizes(embed_dims=WIDTHS, num_heads=HEADS, depths=DEPTHS)),
    "focalnet": _Family(64, _sizes(embed_dim=16, depths=DEPTHS)),
    "hiera": _Family(64, _sizes(img_size=(64, 64), embed_dim=16, stages=(1, 1, 4, 1))),
    "hieradet_sam2": _Family(64, _sizes(embed_dim=16)),
    "inception_next": _Family(64, _sizes(dims=WIDTHS, depths=DEPTHS)),
    "maxxvit": _Family(64, _maxxvit),
    "metaformer": _Family(64, _sizes(dims=(32, 32, 64, 96), depths=DEPTHS)),
    "mvitv2": _Family(64, _config(embed_dim=(16, 32, 64, 128), depths=(1, 1, 4, 1))),
    "nest": _Family(64, _sizes(img_size=64, embed_dims=(16, 32, 64), num_heads=(2, 2, 2), depths=(1, 1, 4))),
    "pvt_v2": _Family(64, _sizes(depths=DEPTHS, embed_dims=WIDTHS, num_heads=(1, 2, 2, 2))),
    "swin_transformer": _Family(56, _sizes(img_size=56, **_WINDOWS)),
    "swin_transformer_v2": _Family(64, _sizes(img_size=64, **_WINDOWS)),
    "swin_transformer_v2_cr": _Family(64, _sizes(img_size=64, **_WINDOWS)),
    "tiny_vit": _Family(64, _sizes(embed_dims=WIDTHS, num_heads=HEADS, depths=DEPTHS)),
    "twins": _Family(64, _sizes(img_size=64, embed_dims=WIDTHS, num_heads=HEADS, depths=DEPTHS)),
    "vision_transformer_sam": _Family(
        96, _sizes(img_size=96, window_size=4, global_attn_indexes=(1, 3), embed_dim=32, depth=4, num_heads=2)
    ),
}


def _small(name: str, family: _Family) -> Callable[[], Any]:
    def changes(arguments: Arguments) -> Arguments:
        return {**family.changes(arguments), "num_classes": num_classes(name)}

    return lambda: create(name, {"build_model_with_cfg": changes})


def every() -> list[Entry]:
    """Every listed entry point of the files above."""
    return [
        Entry(
            library="timm",
            family=file,
            name=name,
            build=_small(name, family),
            inputs=partial(images, family.side, family.side),
            **FAST,
        )
        for file, family in HIERARCHIES.items()
        for name in timm.list_models(module=file)
    ]


# Files besides, with blocks in which a part treats tokens one by one: mobile networks among them, whose blocks widen
# and narrow channels by 1 x 1 convolutions. With sizes, where those of the flat census leave too few tokens to prune,
# or are not those that the model says it was built for.
OTHERS: dict[str, _Family | None] = {
    **dict.fromkeys(
        ("coat", "cpubone", "crossvit", "csatv2", "edgenext", "efficientformer", "efficientvim", "efficientvit_msra",
         "fasternet", "fastvit", "hardcorenas", "iformer", "lowformer", "mambaout", "mobilenetv3", "mobilenetv5",
         "mobilevit", "pit", "repvit", "sequencer", "swiftformer", "visformer", "xcit"),
    ),
    "efficientformer_v2": _Family(224, _sizes()),
    "efficientvit_mit": _Family(128, _sizes(head_widths=(64, 64))),
    "gcvit": _Family(224, _sizes(embed_dim=32)),
    "levit": _Family(224, _sizes(img_size=224, embed_dim=(32, 48, 64), num_heads=(2, 3, 4))),
    "nextvit": _Family(64, _sizes(depths=(1, 1, 5, 1))),
    "repghost": _Family(96, _sizes()),
    "shvit": _Family(128, _sizes(embed_dim=(32, 48, 64), partial_dim=(8, 16, 16))),
    "starnet": _Family(64, _sizes()),
}  # fmt: skip

# What the error says of the others.
_NO_PART = "no list of blocks that take and give tokens of one shape|no part that treats tokens one by one"
_ELSEWHERE = "what treats tokens one by one does not see them as the block gets them"
REFUSED = {"tnt": _ELSEWHERE, "tresnet": _ELSEWHERE}
"""Of these files; of all others `_NO_PART`."""


def others() -> list[Entry]:
    """One entry point of each file in `OTHERS`."""
    entries = {entry.family: entry for entry in timm_other_files.other_files() if entry.family in OTHERS}
    sized = {file: family for file, family in OTHERS.items() if family is not None and file in entries}
    for file, family in sized.items():
        entries[file] = replace(
            entries[file],
            build=_small(entries[file].name, family),
            inputs=partial(images, family.side, family.side),
        )
    return [replace(entry, **FAST) for entry in entries.values()]


def examples() -> list[Entry]:
    """All that are proved."""
    return [*every(), *others()]


def refused() -> list[tuple[Entry, str]]:
    """One entry point of each file that is in none of the tables, with a pattern of the reason why."""
    left = [entry for entry in timm_other_files.other_files() if entry.family not in {*HIERARCHIES, *OTHERS}]
    return [(replace(entry, **FAST), REFUSED.get(entry.family, _NO_PART)) for entry in left]

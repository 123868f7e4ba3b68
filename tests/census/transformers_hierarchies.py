"""Model classes of transformers that are hierarchies, and dense heads on them, for the fast path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.census.entry import Entry
from tests.census.transformers import flat_examples, rows
from tests.census.transformers_inputs import DEPTH, draw
from tests.census.transformers_refused import refused

# Families with windows, stages and grids that are refused where tokens are taken out, and have a fast path.
_FAMILIES = (
    "swin", "swinv2", "donut", "maskformer", "swin2sr", "focalnet", "poolformer", "convnext", "pvt", "pvt_v2",
    "segformer", "glpn", "hiera", "sam", "sam_hq", "got_ocr2", "deepseek_ocr2", "sam3", "vitdet", "cvt",
)  # fmt: skip
_DEPTHS = [1, 1, 4, 1]  # a list, as in a file of JSON: backbones add to it


def every() -> list[Entry]:
    """All that are proved."""
    return [
        replace(entry, stages=None, keep_ratio=0.6, pruned="fast")
        for entry in (*(entry for entry in refused() if entry.family in _FAMILIES), *_more(), *_dense())
    ]


def examples() -> list[Entry]:
    """One of each class, for the list of supported models, but for those that are listed with a flat backbone."""
    flat = {entry.name for entry in flat_examples()}
    first = {entry.name: entry for entry in reversed(every()) if entry.name not in flat}
    return [*first.values()][::-1]


def _more() -> list[Entry]:
    """Further classes of these families."""
    images = draw(pixel_values=(3, 96, 96))
    stages = {"depths": _DEPTHS, "hidden_sizes": [8, 16, 32, 48]}
    pyramid = {**stages, "num_attention_heads": (1, 2, 2, 4)}
    swin: dict[str, Any] = {"embed_dim": 8, "depths": _DEPTHS, "num_heads": (1, 1, 2, 2), "window_size": 3}
    swin |= {"patch_size": 4, "image_size": 96}
    maps = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    return [
        *rows("swin SwinBackbone", images, **swin, **maps),
        *rows("swinv2 Swinv2ForImageClassification Swinv2Backbone", images, **swin, **maps),
        *rows("convnext ConvNextForImageClassification ConvNextBackbone", images, **stages, patch_size=4, **maps),
        *rows("convnextv2 ConvNextV2Model ConvNextV2ForImageClassification ConvNextV2Backbone", images, **stages,
              patch_size=4, **maps),
        *rows("pvt_v2 PvtV2ForImageClassification PvtV2Backbone", images, **pyramid, image_size=(96, 96), **maps),
        *rows("pvt PvtForImageClassification", images, **pyramid, image_size=96),
        *rows("segformer SegformerForSemanticSegmentation", images, **pyramid, decoder_hidden_size=16),
        *rows("glpn GLPNForDepthEstimation", images, **pyramid, decoder_hidden_size=8),
        *rows("focalnet FocalNetForImageClassification", images, embed_dim=16, depths=(1, 4), hidden_sizes=(16, 32),
              focal_levels=(2, 2), focal_windows=(3, 3), patch_size=4, image_size=96),
        *rows("poolformer PoolFormerForImageClassification", images, **stages),
    ]  # fmt: skip


def _dense() -> list[Entry]:
    """Dense heads on a Swin or a ConvNeXt."""
    images = draw(pixel_values=(3, 96, 96))
    maps = ["stage1", "stage2", "stage3", "stage4"]
    swin: dict[str, Any] = {"model_type": "swin", "embed_dim": 8, "depths": _DEPTHS, "num_heads": (1, 1, 2, 2)}
    swin |= {"window_size": 3, "patch_size": 4, "image_size": 96, "out_features": maps}
    convnext: dict[str, Any] = {"model_type": "convnext", "depths": _DEPTHS, "hidden_sizes": [8, 16, 32, 48]}
    convnext |= {"out_features": maps, "patch_size": 4}
    upernet = {"hidden_size": 16, "pool_scales": (1, 2), "auxiliary_channels": 8, "auxiliary_in_channels": 32}
    masks: dict[str, Any] = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 5}
    masks |= {"encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 32}
    masks |= {"dim_feedforward": 32}
    detr: dict[str, Any] = {"d_model": 32, "num_queries": 5, "encoder_layers": DEPTH, "decoder_layers": 2}
    detr |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    detr |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    detr |= {**dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone"), False), "backbone": None}
    last = {"out_features": ["stage4"]}
    return [
        *rows("upernet UperNetForSemanticSegmentation", images, backbone_config=swin, **upernet),
        *rows("upernet UperNetForSemanticSegmentation", images, backbone_config=convnext, **upernet),
        *rows(
            "mask2former Mask2FormerModel Mask2FormerForUniversalSegmentation", images, backbone_config=swin, **masks
        ),
        *rows("detr DetrModel DetrForObjectDetection", images, backbone_config={**swin, **last}, **detr),
        *rows("conditional_detr ConditionalDetrModel", images, backbone_config={**convnext, **last}, **detr),
    ]

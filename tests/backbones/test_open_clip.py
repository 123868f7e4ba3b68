"""open_clip's vision tower through a Backbone; runs where open_clip is installed."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from tokenprune.backbones.structure import observe

open_clip = pytest.importorskip("open_clip")

STAGES, KEEP_RATIO = (1, 2), (0.6, 0.36)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
        {"final_ln_after_pool": True, "pool_type": "avg"},
    ],
    ids=["class token", "attention pool", "average"],
)
def test_the_vision_tower_of_open_clip(form: dict[str, object]) -> None:
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 48, "patch_size": 8, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 2, "output_dim": 16}
    tower = VisionTransformer(**sizes, **form).eval()
    images = torch.randn(3, 3, 48, 48)
    seen = observe(tower, {"x": images[:2]})
    assert seen.blocks == tuple(tower.transformer.resblocks) and seen.num_prefix_tokens == 1
    backbone = tokenprune.Backbone(blocks=tower.transformer.resblocks, num_prefix_tokens=1, embed_dim=32)
    tokenprune.sparsify(tower, STAGES, KEEP_RATIO, backbone=backbone)
    report = tokenprune.verify(tower, images)
    assert report.passed, str(report)


def test_a_clip_model_of_open_clip() -> None:
    vision = {"image_size": 48, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    backbone = tokenprune.Backbone(
        blocks=model.visual.transformer.resblocks, num_prefix_tokens=1, embed_dim=64, tower=model.visual
    )
    tokenprune.sparsify(model, STAGES, KEEP_RATIO, backbone=backbone)
    inputs = {"image": torch.randn(3, 3, 48, 48), "text": torch.randint(1, 50, (3, 8))}
    report = tokenprune.verify(model, inputs)
    assert report.passed, str(report)

"""Feature maps and dense heads of hierarchies with fast paths: every shape is the dense one, and heads train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.hierarchies import DEPTHS, SWIN, WIDTHS

IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))
_WINDOWS = {"embed_dim": 8, "depths": DEPTHS, "num_heads": (1, 1, 2, 2), "window_size": 3}
_MAPS = ["stage1", "stage2", "stage3", "stage4"]


def swin_maps() -> nn.Module:
    options = {**_WINDOWS, "features_only": True, "feature_cls": "getter"}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=96, **options)


def convnext_maps() -> nn.Module:
    options = {"features_only": True, "feature_cls": "getter", "ls_init_value": None}
    return timm.create_model("convnext_tiny", depths=DEPTHS, dims=WIDTHS, **options)


def auto_backbone() -> nn.Module:
    from transformers import AutoBackbone, SwinConfig

    return AutoBackbone.from_config(SwinConfig(image_size=96, patch_size=4, out_features=_MAPS, **_WINDOWS))


def maps_of(model: nn.Module) -> list[Tensor]:
    output = model(IMAGES)
    return list(output) if isinstance(output, list) else list(output.feature_maps)


@pytest.mark.parametrize("build", [swin_maps, convnext_maps, auto_backbone])
def test_feature_maps_have_dense_shapes_and_train(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        dense = maps_of(model)
        tokenprune.sparsify(model, keep_ratio=(0.7, 0.5, 0.3), pruned="fast")
        sparse = maps_of(model)
    assert [one.shape for one in sparse] == [one.shape for one in dense]
    differ = [not torch.equal(one, other) for one, other in zip(sparse, dense, strict=True)]
    assert differ == [False, False, True, True]  # from the level of the stages on
    assert tokenprune.verify(model, IMAGES).passed
    maps = maps_of(model.train())
    third = maps[2] if maps[2].shape[1] == 32 else maps[2].permute(0, 3, 1, 2)
    head = nn.Conv2d(32, 4, 1)
    nn.functional.cross_entropy(head(third), torch.randint(4, (2, 6, 6))).backward()
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_model_that_was_taken_apart_is_refused() -> None:
    model = timm.create_model("convnext_tiny", features_only=True, depths=DEPTHS, dims=WIDTHS)
    with pytest.raises(tokenprune.UnsupportedModelError, match="feature_cls='getter' leaves whole"):
        tokenprune.sparsify(model, pruned="fast")


@torch.no_grad()
def test_intermediate_maps_of_a_classifier() -> None:
    model = SWIN.model()
    dense = model.forward_intermediates(IMAGES, intermediates_only=True)
    tokenprune.sparsify(model, keep_ratio=(0.7, 0.5, 0.3), pruned="fast")
    sparse = model.forward_intermediates(IMAGES, intermediates_only=True)
    assert [one.shape for one in sparse] == [one.shape for one in dense]
    assert torch.equal(sparse[1], dense[1]) and not torch.equal(sparse[2], dense[2])


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_a_segmentation_head_trains_one_step(kind: str) -> None:
    from transformers import ConvNextConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    config = (
        SwinConfig(image_size=96, patch_size=4, out_features=_MAPS, **_WINDOWS)
        if kind == "swin"
        else ConvNextConfig(hidden_sizes=[*WIDTHS], depths=[*DEPTHS], out_features=_MAPS, layer_scale_init_value=1.0)
    )
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=32, num_labels=5
        )
    )
    tokenprune.sparsify(model, keep_ratio=(0.7, 0.5, 0.3), pruned="fast")
    assert tokenprune.verify(model, {"pixel_values": IMAGES}).passed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = torch.randint(5, (2, 96, 96))
    losses = []
    for _ in range(2):
        output = model.train()(pixel_values=IMAGES, labels=targets)
        assert output.logits.shape == (2, 5, 96, 96)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.tokenprune.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss))
    assert losses[1] != losses[0]

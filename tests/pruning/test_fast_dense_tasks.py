"""Feature maps and dense heads of hierarchies with fast paths: every shape is the dense one, and heads train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from tokenprune_timm.models import num_channels
from torch import Tensor, nn

import tokenprune
from tests.helpers.hierarchies import DEPTHS, KEEP_RATIO, SWIN, WIDTHS

IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))
_WINDOWS = {"embed_dim": 8, "depths": DEPTHS, "num_heads": (1, 1, 2, 2), "window_size": 3}
_MAPS = ["stage1", "stage2", "stage3", "stage4"]


def swin_maps() -> nn.Module:
    options = {**_WINDOWS, "features_only": True, "feature_cls": "getter"}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=96, **options)


def convnext_maps() -> nn.Module:
    options = {"features_only": True, "feature_cls": "getter", "ls_init_value": None}
    return timm.create_model("convnext_tiny", depths=DEPTHS, dims=WIDTHS, **options)


def taken_apart(feature_cls: str) -> nn.Module:
    """Parts of a model in a container that runs them in turn."""
    options = {"features_only": True, "feature_cls": feature_cls, "ls_init_value": None}
    return timm.create_model("convnext_tiny", depths=DEPTHS, dims=WIDTHS, **options)


def auto_backbone() -> nn.Module:
    from transformers import AutoBackbone, SwinConfig

    return AutoBackbone.from_config(SwinConfig(image_size=96, patch_size=4, out_features=_MAPS, **_WINDOWS))


def maps_of(model: nn.Module) -> list[Tensor]:
    output = model(IMAGES)
    return list(output) if isinstance(output, list) else list(output.feature_maps)


@pytest.mark.parametrize(
    "build", [swin_maps, convnext_maps, partial(taken_apart, "list"), partial(taken_apart, "hook"), auto_backbone]
)
def test_feature_maps_have_dense_shapes_and_train(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        dense = maps_of(model)
        tokenprune.sparsify(model, keep_ratio=KEEP_RATIO, pruned="fast")
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


def test_images_of_one_channel() -> None:
    """The convolution that timm calls the first one says how many there are."""
    for name in ("test_convnext", "test_byobnet"):
        assert num_channels(timm.create_model(name, in_chans=1)) == 1
    model = tokenprune.sparsify(timm.create_model("test_convnext", in_chans=1).eval(), pruned="fast")
    assert model(torch.zeros(2, 1, 96, 96)).shape[0] == 2


@torch.no_grad()
def test_intermediate_maps_of_a_classifier() -> None:
    model = SWIN.model()
    dense = model.forward_intermediates(IMAGES, intermediates_only=True)
    tokenprune.sparsify(model, keep_ratio=KEEP_RATIO, pruned="fast")
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
    tokenprune.sparsify(model, keep_ratio=KEEP_RATIO, pruned="fast")
    assert tokenprune.verify(model, {"pixel_values": IMAGES}).passed
    assert model.train()(pixel_values=IMAGES).logits.shape == (2, 5, 96, 96)
    targets = torch.randint(5, (2, 96, 96))
    train_one_step(model, model, lambda: model(pixel_values=IMAGES, labels=targets).loss)


def test_a_detector_of_torchvision_trains_on_a_pyramid() -> None:
    """Its maps come from a container that runs the parts of a ConvNeXt in turn."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    torch.manual_seed(0)
    sizes = zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)
    features = ConvNeXt([CNBlockConfig(*one) for one in sizes], layer_scale=1.0, stochastic_depth_prob=0.0).features
    levels = {str(1 + 2 * level): str(level) for level in range(4)}
    pyramid = BackboneWithFPN(features, levels, [*WIDTHS], out_channels=16)
    anchors = AnchorGenerator(sizes=((16,),) * 5, aspect_ratios=((1.0,),) * 5)
    model = RetinaNet(pyramid, num_classes=3, anchor_generator=anchors, min_size=96, max_size=96).eval()
    body = model.backbone.body
    with torch.no_grad():
        dense = model.backbone(IMAGES)
        tokenprune.sparsify(body, keep_ratio=KEEP_RATIO, pruned="fast")
        sparse = model.backbone(IMAGES)
    assert {name: one.shape for name, one in sparse.items()} == {name: one.shape for name, one in dense.items()}
    assert not torch.equal(sparse["2"], dense["2"]) and tokenprune.verify(body, IMAGES).passed
    with torch.no_grad():
        assert [found["boxes"].shape[1] for found in model(list(IMAGES))] == [4, 4]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}] * 2
    train_one_step(model.train(), body, lambda: sum(model(list(IMAGES), targets).values()))
    tokenprune.unsparsify(body)
    with torch.no_grad():
        assert model.eval().backbone(IMAGES).keys() == dense.keys()


def test_a_detector_of_transformers_trains() -> None:
    from transformers import DetrConfig, DetrForObjectDetection, SwinConfig

    torch.manual_seed(0)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
    config = DetrConfig(
        backbone_config=SwinConfig(image_size=96, patch_size=4, out_features=_MAPS[-1:], **_WINDOWS),
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, num_queries=5,
        encoder_layers=1, decoder_layers=2, num_labels=3, **heads, **widths,
    )  # fmt: skip
    model = tokenprune.sparsify(DetrForObjectDetection(config), keep_ratio=KEEP_RATIO, pruned="fast")
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    train_one_step(model, model, lambda: model(pixel_values=IMAGES, labels=labels).loss)


def test_a_model_of_masks_trains() -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=96, patch_size=4, out_features=_MAPS, **_WINDOWS),
        hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=5, encoder_layers=2, decoder_layers=2,
        num_attention_heads=2, encoder_feedforward_dim=32, dim_feedforward=32, num_labels=3,
    )  # fmt: skip
    model = tokenprune.sparsify(Mask2FormerForUniversalSegmentation(config), keep_ratio=KEEP_RATIO, pruned="fast")
    given = {"class_labels": [torch.tensor([1])] * 2, "mask_labels": [torch.randint(2, (1, 96, 96)).float()] * 2}
    train_one_step(model, model, lambda: model(pixel_values=IMAGES, **given).loss)


def train_one_step(model: nn.Module, sparsified: nn.Module, loss: Callable[[], Any]) -> None:
    """Every scorer and every fast path gets a gradient, and a step changes the loss."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same decisions are sampled
        value = loss()
        value.backward()
        for name, parameter in sparsified.tokenprune.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    assert losses[1] != losses[0]

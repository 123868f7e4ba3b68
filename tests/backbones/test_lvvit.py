"""LV-ViT: its published sizes, its output, its checkpoints, and what a model of timm's is expected to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from tokenprune_timm.lvvit import LVViT
from torch import nn

import tokenprune
from tests.helpers.zoo import BY_NAME
from tokenprune.pruning.plan import default_stages

LVVIT = BY_NAME["timm LV-ViT"]
SMALL: dict[str, Any] = {"img_size": 32, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 7}


def small(**options: Any) -> LVViT:
    return timm.create_model("lvvit_s", **{**SMALL, **options})


@pytest.mark.parametrize(
    ("name", "millions", "width", "stages", "millions_of_predictors"),
    [
        ("lvvit_t", 8.53, 240, (3, 6, 9), None),
        ("lvvit_s", 26.15, 384, (4, 8, 12), 0.724),
        ("lvvit_m", 55.83, 512, (5, 10, 15), 1.284),
        ("lvvit_l", 150.47, 768, (6, 12, 18), 2.885),
    ],
)
def test_published_numbers_of_parameters(
    name: str, millions: float, width: int, stages: tuple[int, ...], millions_of_predictors: float | None
) -> None:
    """To the digits given. Predictors have the authors' two outputs, keep and drop."""
    with torch.device("meta"):
        model = timm.create_model(name)
        predictors = [tokenprune.scorers.Predictor(width) for _ in stages]
    assert isinstance(model, LVViT)
    assert default_stages(len(model.blocks)) == stages
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
    if millions_of_predictors is not None:
        count = sum(parameter.numel() for predictor in predictors for parameter in predictor.parameters())
        assert round(count / 1e6, 3) == millions_of_predictors


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("lvvit_t", {1.0: 2.87, 0.7: 2.26}),
        ("lvvit_s", {1.0: 6.55, 0.9: 5.88, 0.8: 5.21, 0.7: 4.65, 0.5: 3.79}),
        pytest.param("lvvit_m", {1.0: 12.68, 0.9: 11.21, 0.8: 9.78, 0.7: 8.59}, marks=pytest.mark.slow),
    ],
)
def test_published_multiply_adds(name: str, figures: dict[float, float]) -> None:
    model = tokenprune.sparsify(timm.create_model(name)).eval()
    for ratio, gmacs in figures.items():
        model.tokenprune.keep_ratio = ratio
        assert tokenprune.flops(model).sparse_gmacs == pytest.approx(gmacs, rel=0.01)


def test_keys_are_those_of_the_official_checkpoints() -> None:
    norms = [f"bn{n}.{name}" for n in (1, 2, 3)
             for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]  # fmt: skip
    stem = ["conv1.weight", "conv2.weight", "conv3.weight", *norms, "proj.weight", "proj.bias"]
    modules = ["norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    parts = ["attn.qkv.weight", *(f"{module}.{name}" for module in modules for name in ("weight", "bias"))]
    heads = [f"{module}.{name}" for module in ("norm", "head", "aux_head") for name in ("weight", "bias")]
    expected = {"cls_token", "pos_embed", *heads, *(f"patch_embed.{name}" for name in stem)}
    expected |= {f"blocks.{index}.{name}" for index in range(4) for name in parts}
    assert set(small().state_dict()) == expected


@pytest.mark.parametrize("mode", ["eval", "training"])
@pytest.mark.parametrize(("options", "weight"), [({}, 0.5), ({"aux_weight": 0.2}, 0.2)], ids=str)
@torch.no_grad()
def test_output_is_class_logits_and_half_the_largest_token_logits(
    options: dict[str, float], weight: float, mode: str
) -> None:
    model = small(**options).train(mode == "training")
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    expected = torch.stack([
        model.head(image[0]) + weight * torch.stack([model.aux_head(token) for token in image[1:]]).max(dim=0).values
        for image in tokens
    ])  # fmt: skip
    torch.testing.assert_close(model(images), expected)


@torch.no_grad()
def test_the_maximum_is_over_kept_tokens_in_either_execution() -> None:
    model, images = LVVIT.sparsified(), LVVIT.images()
    final: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda module, args, output: final.append(output))
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        output = model(images)
        keep, tokens = model.tokenprune.trace.keep[-1], final.pop()
        for image in range(len(images)):
            patches = tokens[image, 1:]
            left = patches if execution == "gather" else patches[keep[image] == 1]
            assert len(left) == 12
            expected = model.head(tokens[image, 0]) + 0.5 * model.aux_head(left).max(dim=0).values
            torch.testing.assert_close(output[image], expected, rtol=1e-4, atol=1e-5)
            over_all = model.head(tokens[image, 0]) + 0.5 * model.aux_head(patches).max(dim=0).values
            assert execution == "gather" or (over_all - expected).abs().max() > 1e-3, "pruned tokens do not matter"


@torch.no_grad()
def test_residual_branches_are_divided() -> None:
    block = small(residual_divisor=3.0).blocks[0]
    x = torch.randn(2, 5, 32)
    between = x + block.attn(block.norm1(x)) / 3
    torch.testing.assert_close(block(x), between + block.mlp(block.norm2(between)) / 3)
    assert {norm.eps for norm in (block.norm1, block.norm2, small().norm)} == {1e-5}


def test_token_training_returns_both_logits_in_training_mode_alone() -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    model.set_token_training()
    class_logits, token_logits = model.train()(images)
    assert class_logits.shape == (2, 7) and token_logits.shape == (2, 4, 7)
    torch.testing.assert_close(model.head(model.forward_features(images)[:, 0]), class_logits)
    assert model.eval()(images).shape == (2, 7)
    model.set_token_training(False)
    assert model.train()(images).shape == (2, 7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_ordinary_loop_trains_every_parameter(checkpointing: bool) -> None:
    model = small(drop_path_rate=0.0)
    model.set_grad_checkpointing(checkpointing)
    F.cross_entropy(model.train()(torch.randn(3, 3, 32, 32)), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_what_timm_models_do() -> None:
    model, images = small(in_chans=1, stem_channels=8), torch.randn(2, 1, 32, 32)
    assert model.num_classes == 7 and model.no_weight_decay() >= {"cls_token", "pos_embed"}
    assert model.get_classifier() == (model.head, model.aux_head)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.aux_head.out_features == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, 32) and isinstance(model.aux_head, nn.Identity)
    assert small(num_classes=0, global_pool="")(torch.randn(2, 3, 32, 32)).shape == (2, 5, 32)
    model.set_input_size((64, 32))
    assert model(torch.randn(2, 1, 64, 32)).shape == (2, 32) and model.pos_embed.shape == (1, 9, 32)
    assert small(dynamic_img_size=True)(torch.randn(2, 3, 48, 64)).shape == (2, 7)
    assert small(dynamic_img_size=True, dynamic_img_pad=True)(torch.randn(2, 3, 41, 64)).shape == (2, 7)
    normed = small(embed_norm_layer="layernorm")
    assert normed.patch_embed(torch.randn(2, 3, 32, 32)).std(dim=-1).allclose(torch.ones(()), atol=0.05)
    features = small(features_only=True)(torch.randn(2, 3, 32, 32))
    assert [tuple(feature.shape) for feature in features] == [(2, 32, 2, 2)] * 3


@pytest.mark.parametrize(("name", "size", "crop"), [("t", 224, 0.9), ("s", 224, 0.9), ("m", 224, 1.0), ("l", 448, 1.0)])
def test_preprocessing_is_the_published_one(name: str, size: int, crop: float) -> None:
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(f"lvvit_{name}"))
    assert config["input_size"] == (3, size, size) and config["crop_pct"] == crop
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406) and config["std"] == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("nest", ["state_dict", "state_dict_ema", "model"])
def test_an_official_file_loads_at_another_resolution_and_with_other_classes(nest: str, tmp_path: Path) -> None:
    official = small()
    nn.init.normal_(official.pos_embed)
    file = tmp_path / "lvvit.pth.tar"
    torch.save({nest: {f"module.{name}": tensor for name, tensor in official.state_dict().items()}, "epoch": 3}, file)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 7}}
    model = small(img_size=64, num_classes=5, **options)
    grid = official.pos_embed[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed, torch.cat([official.pos_embed[:, :1], resized], dim=1))
    assert torch.equal(model.blocks[3].mlp.fc2.weight, official.blocks[3].mlp.fc2.weight)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(small(**options).eval()(images), official.eval()(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg"}, r"global_pool='avg' with num_classes=7: .* choose 'token', or ''"),
        ({"global_pool": ""}, r"global_pool='' with num_classes=7"),
        ({"patch_size": 7}, "patch_size=7: .* takes an even size"),
        ({"init_values": 0.1}, "init_values: .* no layer scale"),
    ],
)
def test_what_it_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_and_patches_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="stay 16 x 16 pixels"):
        small().set_input_size(patch_size=8)
    with pytest.raises(AssertionError, match=r"images of \(48, 32\) pixels; the model takes \(32, 32\)"):
        small()(torch.randn(1, 3, 48, 32))
    with pytest.raises(AssertionError, match=r"multiples of \(16, 16\)"):
        small(dynamic_img_size=True)(torch.randn(1, 3, 40, 32))
    with pytest.raises(RuntimeError, match="No pretrained weights exist for lvvit_s"):
        small(pretrained=True)

"""What once passed by accident, or would fail in silence: each must be right, or be found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tests.census.entry import STAGES, Entry
from tests.census.hosts import is_older
from tests.census.lookup import entry_of
from tests.helpers.tolerances import CENSUS_MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME
from tokenprune.analysis.verification import named_outputs
from tokenprune.backbones.adapters import describe


def sparsified(entry: Entry, keep_ratio: Any, *without: str, **changes: Any) -> Any:
    """A model whose description lacks adaptations of these names, and has these changes."""
    model = entry.model()
    described = describe(model)
    adaptations = tuple(one for one in described.adaptations if type(one).__name__ not in without)
    assert len(adaptations) < len(described.adaptations) or not without
    backbone = replace(described, **{"adaptations": adaptations, **changes})
    return tokenprune.sparsify(model, STAGES, keep_ratio, backbone=backbone)


def verified(entry: Entry, keep_ratio: Any, *without: str, **changes: Any) -> tokenprune.VerificationReport:
    """The report of such a model."""
    model = sparsified(entry, keep_ratio, *without, **changes)
    return tokenprune.verify(model, entry.example(), tolerance=CENSUS_MASK_EQUALS_GATHER)


def test_convit_when_a_perfect_square_of_tokens_is_left() -> None:
    """Its attention takes the square root of their number for the side of a grid."""
    entry = entry_of("convit_tiny")
    assert tokenprune.Plan.build(depth=6, stages=STAGES, keep_ratio=(0.7, 0.45)).num_keep(36) == (25, 16)
    report = verified(entry, (0.7, 0.45))
    assert report.passed, str(report)
    model, outputs = sparsified(entry, (0.7, 0.45), "TokenTable"), []
    for model.tokenprune.execution in ("mask", "gather"):
        with torch.no_grad():
            outputs.append(model(**entry.example()))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_vjepa_counts_positions_inside_of_attention() -> None:
    entry = entry_of("VJEPA2ForVideoClassification")
    assert verified(entry, 0.6).passed
    assert not verified(entry, 0.6, "PositionInput").passed


@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("family", ["Beit", "Data2VecVision"])
def test_a_bias_is_interpolated_to_all_tokens_and_not_to_those_left(family: str, size: int) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(
        **sizes, image_size=48, patch_size=8, use_relative_position_bias=True
    )
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    tokenprune.sparsify(model, STAGES, 0.6)
    inputs = {"pixel_values": torch.randn(3, 3, size, size), "interpolate_pos_encoding": True}
    report = tokenprune.verify(model, inputs, tolerance=CENSUS_MASK_EQUALS_GATHER)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "without", "changes"),
    [
        ("vit_small_patch16_rope_224", (), {"token_inputs": {"rope": ("b n d -> b n d",)}}),
        ("vit_small_patch16_rope_mixed_224", (), {"token_inputs": {"rope": ("b h n d -> b h n d",)}}),
        ("cait_xxs24_224", ("TalkingHeads",), {}),
        ("convit_tiny", ("LateClassToken",), {}),
        ("Gemma4VisionModel", (), {"downstream": "pooled"}),
        ("Siglip2VisionModel", (), {"downstream": "pooled"}),
        ("Data2VecVisionModel", ("AttentionBias",), {"token_inputs": {"attention_mask": ()}}),
        ("beit_base_patch16_224", ("AttentionBias",), {}),
        ("volo_d1_224", ("TailClassToken",), {}),
        ("volo_d1_224", ("GridTokens",), {}),
        ("MLCDVisionModel", ("SharedTables",), {}),
        ("XCLIPVisionModel", ("FrameMessage",), {}),
    ],
)
def test_what_a_family_needs_is_needed(name: str, without: tuple[str, ...], changes: dict[str, Any]) -> None:
    """A description without it fails, by a report or by an error, and never passes."""
    entry = entry_of(name)
    assert verified(entry, 0.6).passed
    try:
        report = verified(entry, 0.6, *without, **changes)
    except (RuntimeError, ValueError):
        return
    assert not report.passed


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "eva02_base_patch14_224", "beit_base_patch16_224", "convit_tiny"]
)
def test_methods_that_would_scramble_channels_are_refused(name: str) -> None:
    entry = entry_of(name)
    model, images = entry.model(), entry.example()["x"]
    if not hasattr(model, "forward_intermediates") and is_older("timm"):
        pytest.skip("an older release does not have the method")
    tokenprune.sparsify(model, STAGES, 0.5)
    with pytest.raises(tokenprune.StateError, match="forward_intermediates needs the full grid"):
        model.forward_intermediates(images)


def test_feature_wrappers_of_timm_are_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, features_only=True)
    with pytest.raises(tokenprune.UnsupportedModelError, match="feature maps, which need every token"):
        tokenprune.sparsify(model)


@pytest.mark.slow
def test_flex_attention_is_never_silently_unmasked() -> None:
    case = BY_NAME["transformers ViT classifier"]
    model = case.sparsified()
    model.tokenprune.execution = "mask"
    model.config._attn_implementation = "flex_attention"  # as a user might, after it was sparsified
    with torch.no_grad(), pytest.raises(tokenprune.InterceptionError, match="could not be masked"):
        model(case.images())


def test_a_kernel_that_cannot_be_masked_and_no_other_is_refused() -> None:
    entry = entry_of("BlipVisionModel")  # has no SDPA attention
    model = entry.model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        tokenprune.UnsupportedModelError, match="attends with 'flash_attention_2', which cannot be masked"
    ):
        tokenprune.sparsify(model)


def test_attention_that_is_never_called_does_not_pass() -> None:
    """As in CoaT, whose blocks hand the pruned tensor through."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Vacuous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.blocks = nn.Sequential(*(Through() for _ in range(4)))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.embed(images).flatten(2).transpose(1, 2)).mean(dim=1)

    model = Vacuous()
    backbone = tokenprune.Backbone(blocks=model.blocks, num_prefix_tokens=0, embed_dim=16)
    tokenprune.sparsify(model, (1, 2), 0.5, backbone=backbone)
    with pytest.raises(tokenprune.InterceptionError, match="never called the attention modules"):
        tokenprune.verify(model, torch.randn(2, 3, 48, 48))


def test_one_stage_of_a_hierarchy_is_not_taken_for_a_model() -> None:
    entry = entry_of("GroupViTVisionModel")
    with pytest.raises(tokenprune.UnsupportedModelError, match="is one of several stages"):
        tokenprune.sparsify(entry.model())


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "DINOv3ViTModel"])
def test_looking_at_a_model_leaves_no_trace(name: str) -> None:
    model = entry_of(name).model()
    model.train()
    modes = {module: module.training for module in model.modules()}
    state = torch.get_rng_state()
    describe(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == modes[module] for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def encoder_layers(layer: Callable[[], nn.Module]) -> nn.Module:
    class Research(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.encoder = nn.TransformerEncoder(layer(), 4, enable_nested_tensor=False)

        def forward(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            tokens = self.embed(images).flatten(2).transpose(1, 2)
            return self.encoder(tokens, src_key_padding_mask=mask).mean(dim=1)

    return Research().eval()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_transformer_encoder_of_torch_works_with_three_lines(norm_first: bool, padded: bool) -> None:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)

    model = encoder_layers(layer)
    backbone = tokenprune.Backbone(blocks=model.encoder.layers, num_prefix_tokens=0, embed_dim=16)
    tokenprune.sparsify(model, STAGES, 0.6, backbone=backbone)
    inputs = [torch.randn(3, 3, 48, 48)]
    if padded:
        inputs.append(torch.arange(36)[None] >= torch.tensor([[36], [30], [20]]))
    report = tokenprune.verify(model, tuple(inputs))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "cait_xxs24_224"])
def test_a_subclass_of_a_family_is_described_like_it(name: str) -> None:
    entry = entry_of(name)
    model = entry.model()
    model.__class__ = type("Mine", (type(model),), {"__module__": type(model).__module__})
    tokenprune.sparsify(model, STAGES, 0.6)
    assert tokenprune.verify(model, entry.example(), tolerance=CENSUS_MASK_EQUALS_GATHER).passed


def test_a_model_that_does_not_look_at_the_image_is_refused() -> None:
    model = entry_of("vit_base_patch16_224").model()
    nn.init.zeros_(model.patch_embed.proj.weight)
    with pytest.raises(tokenprune.UnsupportedModelError, match="the same for every image"):
        tokenprune.sparsify(model)


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "vit_tiny_patch16_224"])
def test_images_of_one_channel(name: str) -> None:
    model = timm.create_model(name, in_chans=1, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2)
    tokenprune.sparsify(model, STAGES, 0.6)
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 1, 224, 224)).isfinite().all()


def test_checkpointing_in_gather_execution_is_refused() -> None:
    model = entry_of("vit_base_patch16_224").model().train()
    tokenprune.sparsify(model, STAGES, 0.6).tokenprune.execution = "gather"
    model.set_grad_checkpointing(True)
    output = model(torch.randn(2, 3, 48, 48))
    with pytest.raises(tokenprune.StateError, match="train in mask execution and make no other pass"):
        output.sum().backward()


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = entry_of("vit_base_patch16_224").build()
    with pytest.raises(tokenprune.UnsupportedModelError, match="on the meta device"):
        tokenprune.sparsify(model)


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "ViTForMaskedImageModeling"])
def test_checkpointed_blocks_whose_tokens_are_put_back(name: str) -> None:
    """What puts them back is the first to ask for the block again, before any gradient of the block is known."""
    entry = entry_of(name)
    model, inputs = tokenprune.sparsify(entry.model(), STAGES, 0.6).train(), entry.example()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        outputs = named_outputs(model(**inputs)).values()
        sum(output.square().mean() for output in outputs if output.requires_grad).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((actual[name] - gradient).abs().max() / scale).item() <= 1e-5, name

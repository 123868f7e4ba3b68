"""Every misuse is refused with an error that helps, and the model stays exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import tokenprune
from tests.helpers.refusals import refused
from tests.helpers.zoo import BY_NAME, DEPTH
from tokenprune import PlanError, StateError, UnsupportedModelError
from tokenprune.backbones.adaptations import GridMethods
from tokenprune.backbones.adapters import describe
from tokenprune.pruning.reductions import Drop
from tokenprune.scorers import Random

PLAIN = BY_NAME["timm class token"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stages": (2, 6)}, r"stage 6 is out of range; the model has 6 blocks, so stages lie in 0 … 5"),
        ({"stages": (-1, 3)}, "stage -1 is out of range"),
        ({"stages": (4, 2)}, "not sorted"),
        ({"stages": (2, 2)}, "repeat a block"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": (1.5,)}, "1.5 is not a block index"),
        ({"stages": 3}, "stages=3: expected a sequence"),
        ({"keep_ratio": 0}, r"keep ratio 0 is outside \(0, 1\]"),
        ({"keep_ratio": 1.2}, r"keep ratio 1.2 is outside \(0, 1\]"),
        ({"keep_ratio": float("nan")}, "keep ratio nan is outside"),
        ({"keep_ratio": (0.5, 0.7, 0.3)}, "rise from stage to stage"),
        ({"keep_ratio": (0.5, 0.3)}, r"and 3 stage\(s\) do not match"),
        ({"keep_ratio": "half"}, "keep ratio 'h' is outside|do not match"),
    ],
    ids=str,
)
def test_plans_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    refused(PLAIN.model(), PlanError, match, **options)


def test_other_options_that_make_no_sense() -> None:
    model = PLAIN.model()
    refused(model, ValueError, "scorer='best' is unknown; choose from", scorer="best")
    refused(model, TypeError, "a callable that takes a ScorerContext", scorer=Random())
    refused(model, ValueError, r"pruned='melt' is unknown; choose from \['drop', 'fast', .*'preserve'\]", pruned="melt")
    refused(model, TypeError, "a callable that takes a ReductionContext", pruned=Drop())
    refused(model, TypeError, "built a Random; expected a tokenprune.Reduction", pruned=lambda context: Random())
    refused(model, TypeError, "built a Drop; expected a tokenprune.Scorer", scorer=lambda context: Drop())
    refused(model, TypeError, "backbone=", backbone=model.blocks)

    def fails_at_the_last_stage() -> Callable[[tokenprune.ScorerContext], tokenprune.Scorer]:
        built: list[tokenprune.Scorer] = []

        def build(context: tokenprune.ScorerContext) -> tokenprune.Scorer:
            if len(built) == 2:
                raise RuntimeError("no more scorers")
            built.append(Random())
            return built[-1]

        return build

    refused(model, RuntimeError, "no more scorers", scorer=fails_at_the_last_stage())


def test_no_module_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, got str"):
        tokenprune.sparsify("vit_base_patch16_224")  # type: ignore[type-var]


def test_a_model_that_no_adapter_knows() -> None:
    class Unheard(nn.Module):
        pass

    message = refused(Unheard(), UnsupportedModelError, "no adapter knows")
    assert "Unheard" in message  # names the class,
    for supported in (
        "vision_transformer_relpos",
        "dinov2_with_registers",
        "torchvision: convnext, swin, vision_transformer",
    ):
        assert supported in message  # lists what is supported,
    assert "backbone=tokenprune.Backbone(" in message  # and says what to do.


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet has no list of blocks with attention"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", features_only=True),
            "FeatureGetterNet puts out feature maps",
        ),
        (lambda: torchvision.models.resnet18(), "torchvision's ResNet has no flat list of blocks"),
        (lambda: torchvision.models.swin_t(), "torchvision's SwinTransformer has no flat list"),
    ],
    ids=["timm ResNet", "timm feature maps", "torchvision ResNet", "torchvision Swin"],
)
def test_models_of_known_libraries_that_are_not_supported(build: Callable[[], nn.Module], match: str) -> None:
    refused(build(), UnsupportedModelError, match)


def small(config: Any, **extra: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    return config(**sizes, image_size=48, patch_size=8, **extra)


def clip_config(name: str) -> Any:
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return getattr(transformers, name)(vision_config={**vision, "image_size": 48, "patch_size": 8}, text_config=vision)


def vit_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__ == "ViTLayer")


def transformers_models() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    import transformers as hub

    return {
        "text model": (
            lambda: hub.BertModel(
                hub.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
            ),
            "BertModel has no one part that looks at images",
        ),
        "part of a model": (lambda: vit_layer(hub.ViTModel(small(hub.ViTConfig))), "is a part of a model"),
        "detection by text": (
            lambda: hub.OwlViTModel(clip_config("OwlViTConfig")),
            "sparsify its OwlViTVisionTransformer alone",
        ),
    }


@pytest.mark.parametrize("name", ["text model", "part of a model", "detection by text"])
def test_transformers_models_that_are_not_supported(name: str) -> None:
    build, match = transformers_models()[name]
    refused(build(), UnsupportedModelError, match)


def test_twice_sparsified() -> None:
    model = tokenprune.sparsify(PLAIN.model())
    message = refused(model, StateError, "sparsified already")
    assert "unsparsify" in message and "keep_ratio" in message
    refused(nn.Sequential(model), StateError, r"its 0 carries tokenprune")
    tokenprune.unsparsify(model)
    for verb in (tokenprune.unsparsify, lambda model: tokenprune.dense(model).__enter__()):
        with pytest.raises(StateError, match="is not sparsified; call"):
            verb(model)


def test_an_attribute_that_is_in_the_way() -> None:
    model = PLAIN.model()
    model.tokenprune = "mine"
    refused(model, StateError, "an attribute 'tokenprune' of its own")


def test_torchscript() -> None:
    refused(torch.jit.script(nn.Linear(2, 2)), UnsupportedModelError, "TorchScript")


def test_backbones_that_do_not_fit() -> None:
    model = PLAIN.model()
    right = describe(model)
    for wrong, match in (
        (replace(right, blocks=PLAIN.model().blocks), "not part of this VisionTransformer"),
        (replace(right, final_norm=nn.LayerNorm(32)), "names a LayerNorm that is not part"),
        (replace(right, blocks=(*right.blocks, right.blocks[0])), "the same block more than once"),
        (replace(right, num_prefix_tokens=-1), "num_prefix_tokens=-1"),
        (replace(right, embed_dim=0), "embed_dim=0"),
        (replace(right, attentions=[(right.blocks[0].attn,)]), "attentions"),
        (replace(right, blocks=()), "no blocks"),
        (
            replace(right, adaptations=[tokenprune.Setting(owner=model, name="fast", value=True)]),
            "names 'fast', which Vis",
        ),
        (replace(right, adaptations=[GridMethods(model, ["fly"])]), "names 'fly', no method of VisionTransformer"),
        (replace(right, adaptations=[GridMethods(PLAIN.model(), [])]), "not part of this VisionTransformer"),
        (replace(right, downstream="some tokens"), "choose from 'pooled', 'all tokens', 'any number'"),
    ):
        refused(model, UnsupportedModelError, match, backbone=wrong)
    refused(model, ValueError, "embed_dim=30", backbone=replace(right, embed_dim=30))


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PLAIN.model()
    for block in model.blocks:
        block.attn.fused_attn = False

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(model.blocks[5].attn, "register_forward_hook", fails)
    refused(model, RuntimeError, "no more hooks")
    assert "tokenprune" not in model._modules and not any(block.attn.fused_attn for block in model.blocks)


def test_written_out_attention_is_switched_and_switched_back() -> None:
    model = PLAIN.model()
    for block in model.blocks:
        block.attn.fused_attn = False
    before, images = PLAIN.model(), PLAIN.images()
    tokenprune.sparsify(model, (2, 4), 0.6)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert tokenprune.verify(model, images).passed
    tokenprune.unsparsify(model)
    assert not any(block.attn.fused_attn for block in model.blocks)
    torch.testing.assert_close(model(images), before(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_attention_of_transformers_is_switched_and_switched_back(implementation: str) -> None:
    case = BY_NAME["transformers ViT classifier"]
    model, images = case.model(), case.images()
    model.config._attn_implementation = implementation
    with torch.no_grad():
        expected = case.run(case.model(), images)["logits"]
        tokenprune.sparsify(model, (2, 4), 1.0)
        torch.testing.assert_close(case.run(model, images)["logits"], expected, rtol=0, atol=1e-5)
    model.tokenprune.keep_ratio = 0.6
    assert tokenprune.verify(model, {"pixel_values": images}).passed
    tokenprune.unsparsify(model)
    assert model.config._attn_implementation == implementation


def test_a_config_shared_with_another_model_is_not_changed() -> None:
    import transformers

    config = small(transformers.ViTConfig, attn_implementation="eager")
    first, second = transformers.ViTModel(config).eval(), transformers.ViTModel(config).eval()
    tokenprune.sparsify(first, (2, 4), 0.6)
    assert second.config is config and config._attn_implementation == "eager"
    assert tokenprune.verify(first, {"pixel_values": PLAIN.images()}).passed
    tokenprune.unsparsify(first)
    assert all(module.config is config for module in first.modules() if hasattr(module, "config"))


def test_attention_weights_in_training_are_those_of_masked_attention() -> None:
    case = BY_NAME["transformers ViT classifier"]
    model, images = case.sparsified().eval(), case.images()
    model.tokenprune.execution = "mask"
    with torch.no_grad():
        expected = case.run(model, images)["logits"]
        model.config._attn_implementation = "eager"  # as a user might, to see the weights
        output = model(images, output_attentions=True)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    dropped = model.tokenprune.trace.keep[-1][:, None, None, :] == 0
    weights = output.attentions[-1][..., 1:] * (1 - torch.eye(case.num_patches + 1)[:, 1:])
    assert (weights * dropped).abs().max() == 0 and (weights * ~dropped).abs().max() > 0


def test_methods_that_need_the_full_grid_are_refused_while_tokens_are_missing() -> None:
    model, images = PLAIN.sparsified(), PLAIN.images()
    expected = PLAIN.model().forward_intermediates(images, intermediates_only=True)
    with pytest.raises(StateError, match=r"VisionTransformer\.forward_intermediates needs the full grid"):
        model.forward_intermediates(images)
    with pytest.raises(StateError, match=r"get_intermediate_layers needs the full grid"):
        copy.deepcopy(model).get_intermediate_layers(images)
    with tokenprune.dense(model):
        actual = model.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_a_method_called_past_the_model_in_training_warns() -> None:
    model, images = PLAIN.sparsified().train(), PLAIN.images()
    with pytest.warns(UserWarning, match=r"its tokens include pruned ones, which model\.tokenprune\.trace\.keep\[-1\]"):
        model.forward_features(images)


def test_tokens_that_are_not_as_described() -> None:
    model = PLAIN.model()
    tokenprune.sparsify(model, (2,), 0.5, backbone=replace(describe(model), embed_dim=64))
    with pytest.raises(StateError, match="got tokens of width 32, and the Backbone says embed_dim=64"):
        model(PLAIN.images())
    tokenprune.unsparsify(model)
    tokenprune.sparsify(model, (0,), 0.5, backbone=replace(describe(model), num_prefix_tokens=40))
    with pytest.raises(StateError, match="there is no patch token to prune"):
        model(PLAIN.images())

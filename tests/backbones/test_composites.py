"""Models of several parts: the vision tower is found and pruned, and what follows takes what is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tokenprune
from tests.census.entry import STAGES
from tests.census.lookup import entry_of
from tests.census.transformers_inputs import GRID, NUM_PATCHES
from tests.helpers.zoo import wide_scorers
from tokenprune.analysis.verification import named_outputs

KEEP_RATIO = (0.6, 0.4)
KEPT = (int(NUM_PATCHES * 0.6), int(NUM_PATCHES * 0.4))


def block_lengths(model: nn.Module) -> list[int]:
    lengths: list[int] = []
    for block in model.tokenprune.backbone.blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: lengths.append(next(iter((*args, *kwargs.values()))).shape[1]), with_kwargs=True
        )
    return lengths


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_image_embeddings(name: str) -> None:
    entry = entry_of(name)
    model, inputs = entry.model(), entry.example()
    images = {"pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        dense = named_outputs(model.get_image_features(**images))
        wide_scorers(tokenprune.sparsify(model, STAGES, KEEP_RATIO))
        lengths = block_lengths(model)
        gathered = named_outputs(model.get_image_features(**images))
        prefix = model.tokenprune.backbone.num_prefix_tokens
        assert lengths == [prefix + NUM_PATCHES, *(prefix + kept for kept in (KEPT[0], KEPT[1], KEPT[1]))]
        words = model(**inputs).text_embeds
        model.tokenprune.execution = "mask"
        masked = named_outputs(model.get_image_features(**images))
        torch.testing.assert_close(model(**inputs).text_embeds, words, rtol=0, atol=1e-6)
    pooled = [key for key in gathered if gathered[key].shape == masked[key].shape]
    assert any("pooler" in key or key == "output" for key in pooled)
    for key in pooled:
        torch.testing.assert_close(masked[key], gathered[key], rtol=0, atol=1e-4)
        assert (gathered[key] - dense[key]).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [-2, -3])
def test_an_earlier_layer_gives_what_was_left_at_it(layer: int) -> None:
    entry = entry_of("LlavaForConditionalGeneration")
    model, inputs = entry.model(), entry.example()
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "vision_feature_layer"):
            part.config.vision_feature_layer = layer
    wide_scorers(tokenprune.sparsify(model, (1, 3), KEEP_RATIO))
    with torch.no_grad():
        gathered = named_outputs(model.get_image_features(pixel_values=inputs["pixel_values"]))
        model.tokenprune.execution = "mask"
        masked = named_outputs(model.get_image_features(pixel_values=inputs["pixel_values"]))
    assert gathered.keys() == masked.keys() and gathered
    for name in gathered:
        torch.testing.assert_close(masked[name], gathered[name], rtol=0, atol=1e-4 * float(gathered[name].abs().max()))


def test_a_tower_is_trained_by_itself_and_serves_in_the_language_model() -> None:
    entry = entry_of("LlavaForConditionalGeneration")
    model, inputs = entry.model(), entry.example()
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    tokenprune.sparsify(tower, STAGES, KEEP_RATIO).train()
    pooled = tower(pixel_values=inputs["pixel_values"]).pooler_output
    pooled.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tower.tokenprune.parameters())
    with pytest.raises(tokenprune.StateError, match=r"its .*vision_tower carries tokenprune"):
        tokenprune.sparsify(model)


def test_a_feature_extractor_gives_full_maps_at_every_block() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
    config = transformers.Dinov2Config(**sizes, mlp_ratio=2, out_indices=[1, 2, 3, 4])
    model = transformers.Dinov2Backbone(config).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        dense = model(images).feature_maps
        wide_scorers(tokenprune.sparsify(model, STAGES, KEEP_RATIO))
        gathered = model(images).feature_maps
        first, second = model.tokenprune.trace.indices
        model.tokenprune.execution = "mask"
        masked = model(images).feature_maps
    assert [one.shape for one in gathered] == [(2, 32, GRID, GRID)] * 4
    assert torch.equal(gathered[0], dense[0])  # in front of the first stage nothing differs
    for one, other in zip(gathered, masked, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    # A token waits as it was when it was pruned (maps are behind the final norm, which norms each by itself).
    for kept, before, after in ((first, 0, 1), (second, 1, 2), (second, 2, 3)):
        pruned = torch.ones(2, NUM_PATCHES, dtype=torch.bool).scatter(1, kept, False)
        earlier, later = (gathered[index].flatten(2).transpose(1, 2) for index in (before, after))
        torch.testing.assert_close(later[pruned], earlier[pruned])
        assert (later[~pruned] - earlier[~pruned]).abs().max() > 1e-3

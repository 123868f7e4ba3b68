"""`pruned="preserve"`: pruned tokens wait, and whatever comes after a block gets the full grid."""

from __future__ import annotations

import copy
import pickle
from importlib.metadata import version
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import tokenprune
from tests.census.entry import Entry
from tests.census.lookup import entry_of
from tests.census.timm import flat, volo
from tests.census.transformers import composites, supported, uncovered
from tests.helpers.gradients import assert_same_gradients, enable_checkpointing, gradients
from tests.helpers.outputs import assert_close
from tests.helpers.refusals import refused
from tests.helpers.tolerances import CENSUS_MASK_EQUALS_GATHER, IDENTITY, MASK_EQUALS_GATHER
from tests.helpers.zoo import (
    BY_NAME,
    EMBED_DIM,
    KEEP_RATIO,
    NUM_PATCHES,
    STAGES,
    Case,
    every_model,
    hook_counts,
    wide_scorers,
)
from tokenprune.analysis.verification import named_outputs
from tokenprune.tokens import output_tokens

TOLERANCE = MASK_EQUALS_GATHER[torch.float32]
KINDS = ("timm class token", "timm no class token, average", "transformers ViT classifier", "torchvision")
some_models = pytest.mark.parametrize("case", [BY_NAME[name] for name in KINDS], ids=str)


def preserving(case: Case, **options: Any) -> nn.Module:
    return case.sparsified(pruned="preserve", **options)


def boundaries(model: nn.Module, run: Any) -> list[Tensor]:
    """The tokens behind every block, as whoever hooks blocks sees them."""
    seen: list[Tensor] = []
    blocks = model.tokenprune.backbone.blocks
    handles = [block.register_forward_hook(lambda b, args, out: seen.append(output_tokens(out))) for block in blocks]
    run()
    for handle in handles:
        handle.remove()
    return seen


# The invariants


@every_model
@torch.no_grad()
def test_the_three_invariants(case: Case) -> None:
    model, images = case.model(), case.images()
    before, hooks = case.run(model, images), hook_counts(model)
    tokenprune.sparsify(model, STAGES, 1.0, pruned="preserve")
    assert model.tokenprune.pruned == "preserve"
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        assert_close(case.run(model, images), before, IDENTITY)
    assert tokenprune.unsparsify(model) is model and hook_counts(model) == hooks
    after = case.run(model, images)
    assert all(torch.equal(after[name], before[name]) for name in before)

    model = preserving(case)
    gathered, kept = case.run(model, images), model.tokenprune.trace.keep
    model.tokenprune.execution = "mask"
    masked = case.run(model, images)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.keep, kept, strict=True))
    assert_close(masked, gathered, TOLERANCE)
    assert max((gathered[name] - before[name]).abs().max() for name in before) > 1e-3


@pytest.mark.parametrize("execution", ["gather", "mask"])
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_small_patch16_dinov3",  # RoPE and registers
        "beit_base_patch16_224",  # a bias over pairs of tokens
        "convit_tiny",  # a table over tokens, and a class token that joins late
        "cait_s24_224",  # the class token comes in behind the blocks
        "volo_d1_224",  # blocks over grids
        "BeitModel",
        "Dinov2WithRegistersModel",
        "DINOv3ViTModel",
        "SiglipVisionModel",
        "VJEPA2Model",  # positions are told
        "LlavaForConditionalGeneration",  # a tower in front of something else
    ],
)
@torch.no_grad()
def test_tokens_stay_as_they_were_when_they_were_pruned(name: str, execution: str) -> None:
    entry = entry_of(name)
    model, inputs = entry.model(), entry.example()
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned="preserve")
    wide_scorers(model)
    with tokenprune.dense(model):
        dense = boundaries(model, lambda: model(**inputs))
    model.tokenprune.execution = execution
    sparse = boundaries(model, lambda: model(**inputs))
    trace = model.tokenprune.trace
    assert [tokens.shape for tokens in sparse] == [tokens.shape for tokens in dense]
    assert torch.equal(sparse[0], dense[0])  # in front of the first stage nothing differs
    num_suffix = model.tokenprune.backbone.num_suffix_tokens
    for stage, keep in enumerate(trace.keep):
        assert keep.shape[1] == trace.num_patches and 0 < keep.mean() < 1
        patches = [tokens.flatten(1, -2) for tokens in sparse[stage:]]
        patches = [one[:, one.shape[1] - num_suffix - trace.num_patches : one.shape[1] - num_suffix] for one in patches]
        for later in patches[1:]:
            assert torch.equal(later[keep == 0], patches[0][keep == 0])
        assert (patches[1][keep == 1] - patches[0][keep == 1]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("entry", [*flat(), *volo(), *supported(), *uncovered(), *composites()], ids=str)
def test_every_model_of_the_census_preserves(entry: Entry) -> None:
    model, inputs = entry.model(), entry.example()
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned="preserve")
    report = tokenprune.verify(model, inputs, tolerance=CENSUS_MASK_EQUALS_GATHER)
    assert report.passed and len(report.gradients) == 2, str(report)
    with torch.no_grad():
        sparse = named_outputs(model(**inputs))
        with tokenprune.dense(model):
            dense = named_outputs(model(**inputs))
    assert {name: output.shape for name, output in sparse.items()} == {
        name: output.shape for name, output in dense.items()
    }


# What users of full grids call


@pytest.mark.parametrize("output_format", ["NCHW", "NLC"])
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_medium_patch16_reg4_gap_256",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "deit3_base_patch16_224",
    ],
)
@torch.no_grad()
def test_forward_intermediates(name: str, output_format: str) -> None:
    entry = entry_of(name)
    model, images = entry.model(), entry.example()["x"]
    options = {"output_fmt": output_format, "norm": True, "return_prefix_tokens": True}
    final, dense = model.forward_intermediates(images, **options)
    wide_scorers(tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned="preserve"))
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        last, sparse = model.forward_intermediates(images, **options)
        maps, prefixes = zip(*sparse, strict=True)
        assert last.shape == final.shape and [one.shape for one in maps] == [one.shape for one, _ in dense]
        assert [one.shape for one in prefixes] == [one.shape for _, one in dense]
        assert torch.equal(maps[0], dense[0][0]) and (maps[-1] - dense[-1][0]).abs().max() > 1e-3
        torch.testing.assert_close(last, model.forward_features(images))
        if execution == "gather":
            gathered = maps
    for one, other in zip(maps, gathered, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max()))


@torch.no_grad()
def test_features_only() -> None:
    options = {"img_size": 48, "patch_size": 8, "out_indices": (1, 4, 7, 11)}
    images = torch.randn(3, 3, 48, 48)
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, **options).eval()
    dense = model(images)
    tokenprune.sparsify(model, keep_ratio=KEEP_RATIO, pruned="preserve")
    sparse = model(images)
    assert [one.shape for one in sparse] == [(3, 192, 6, 6)] * 4 == [one.shape for one in dense]
    assert model.tokenprune.trace.grid == (6, 6)
    assert torch.equal(sparse[0], dense[0]) and not torch.equal(sparse[1], dense[1])
    report = tokenprune.verify(model, images)
    assert report.passed and report.compared == 4 and len(report.gradients) == 3, str(report)
    assert tokenprune.flops(model, (3, 48, 48)).ratio > 1.2
    tokenprune.unsparsify(model)
    assert all(torch.equal(one, other) for one, other in zip(model(images), dense, strict=True))


@pytest.mark.parametrize("wrapped_first", [True, False], ids=["wrapped, then sparsified", "sparsified, then wrapped"])
@torch.no_grad()
def test_the_model_inside_of_a_feature_wrapper(wrapped_first: bool) -> None:
    model, images = BY_NAME["timm class token"].model(), BY_NAME["timm class token"].images()
    dense = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 3, 5))(images)
    if wrapped_first:
        wrapper = FeatureGetterNet(model, out_indices=(0, 3, 5))
    tokenprune.sparsify(model, STAGES, KEEP_RATIO, pruned="preserve")
    if not wrapped_first:
        wrapper = FeatureGetterNet(model, out_indices=(0, 3, 5))
    sparse = wrapper(images)
    assert [one.shape for one in sparse] == [(3, EMBED_DIM, 6, 6)] * 3
    assert torch.equal(sparse[0], dense[0]) and not torch.equal(sparse[2], dense[2])


@pytest.mark.parametrize(
    "name", ["ViTModel", "Dinov2Model", "Dinov2WithRegistersModel", "BeitModel", "CLIPVisionModel"]
)
@torch.no_grad()
def test_hidden_states_of_transformers(name: str) -> None:
    if name == "ViTModel" and int(version("transformers").partition(".")[0]) < 5:
        pytest.skip("its blocks' outputs are recorded before hooks run, by which pruned tokens are put back")
    entry = entry_of(name)
    model, inputs = entry.model(), {**entry.example(), "output_hidden_states": True}
    inputs.pop("bool_masked_pos", None)
    dense = model(**inputs)
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned="preserve")
    wide_scorers(model)
    gathered, keep = model(**inputs), model.tokenprune.trace.keep
    model.tokenprune.execution = "mask"
    masked = model(**inputs)
    assert gathered.last_hidden_state.shape == masked.last_hidden_state.shape == dense.last_hidden_state.shape
    assert len(gathered.hidden_states) == len(dense.hidden_states) == 5
    for one, other, before in zip(gathered.hidden_states, masked.hidden_states, dense.hidden_states, strict=True):
        assert one.shape == before.shape
        torch.testing.assert_close(other, one, rtol=0, atol=TOLERANCE * float(one.abs().max()))
    for stage, kept in enumerate(keep):  # stage s stands in front of block s + 1, whose input is state s + 1
        states = [state[:, -NUM_PATCHES:] for state in gathered.hidden_states[stage + 1 :]]
        assert all(torch.equal(state[kept == 0], states[0][kept == 0]) for state in states[1:-1])
        assert not torch.equal(states[1][kept == 1], states[0][kept == 1])


@pytest.mark.parametrize(
    "name",
    [
        "DPTForDepthEstimation",
        "DPTForSemanticSegmentation",
        "BeitForSemanticSegmentation",
        "DepthAnythingForDepthEstimation",
        "UperNetForSemanticSegmentation",
        "Dinov2Backbone",
    ],
)
def test_dense_heads_of_transformers(name: str) -> None:
    entry = entry_of(name)
    model, inputs = entry.model(), entry.example()
    with torch.no_grad():
        dense = named_outputs(model(**inputs))
        sparse = named_outputs(tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned="preserve")(**inputs))
    assert {key: value.shape for key, value in sparse.items()} == {key: value.shape for key, value in dense.items()}
    report = tokenprune.verify(model, inputs, tolerance=CENSUS_MASK_EQUALS_GATHER)
    assert report.passed and len(report.gradients) == 2, str(report)


@torch.no_grad()
def test_a_head_of_ones_own_gets_every_token() -> None:
    """A segmenter as users write it: tokens of the last block to a grid, a convolution, one class a pixel."""

    class Segmenter(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Conv2d(EMBED_DIM, 5, 1)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.encoder.forward_features(images)[:, 1:]
            return self.head(tokens.transpose(1, 2).unflatten(2, (6, 6)))

    case = BY_NAME["timm class token"]
    model, images = Segmenter(preserving(case)), case.images()
    gathered = model(images)
    model.encoder.tokenprune.execution = "mask"
    torch.testing.assert_close(model(images), gathered, rtol=0, atol=TOLERANCE)
    with pytest.raises(RuntimeError):
        Segmenter(case.sparsified())(images)


def test_a_language_model_gets_every_image_token_and_trains_its_tower() -> None:
    entry = entry_of("LlavaForConditionalGeneration")
    model, inputs = entry.model(), entry.example()
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned="preserve")
    report = tokenprune.verify(model, inputs, tolerance=CENSUS_MASK_EQUALS_GATHER)
    assert report.passed and len(report.gradients) == 2, str(report)


# Heads, gradients, losses


@torch.no_grad()
def test_a_head_on_the_class_token_does_not_notice() -> None:
    case = BY_NAME["timm class token"]
    images = case.images()
    torch.testing.assert_close(preserving(case)(images), case.sparsified()(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("execution", ["gather", "mask"])
@torch.no_grad()
def test_an_average_is_over_all_tokens_the_pruned_ones_as_they_wait(execution: str) -> None:
    case = BY_NAME["timm no class token, average"]
    model, images = preserving(case), case.images()
    model.tokenprune.execution = execution
    tokens = boundaries(model, lambda: model(images))[-1]
    expected = model.head(model.fc_norm(model.norm(tokens).mean(dim=1)))
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)
    assert (case.sparsified()(images) - expected).abs().max() > 1e-3


@every_model
def test_gradients_reach_every_scorer(case: Case) -> None:
    model, images = preserving(case).train(), case.images()
    sum(output.square().mean() for output in case.run(model, images).values()).backward()
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("execution", ["gather", "mask"])
def test_gradients_reach_the_pixels_of_pruned_tokens(execution: str) -> None:
    case = BY_NAME["timm class token"]
    model, images = preserving(case, scorer="random").train(), case.images().requires_grad_()
    model.tokenprune.execution = execution
    maps = model.forward_intermediates(images, intermediates_only=True)[-1]  # (B, C, 6, 6)
    pruned = model.tokenprune.trace.keep[0] == 0  # (B, N)
    maps.flatten(2).transpose(1, 2)[pruned].square().sum().backward()
    patches = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    assert (patches[pruned].abs().sum(dim=1) > 0).all()


def test_tokens_are_distilled_where_they_are_kept() -> None:
    case = BY_NAME["timm class token"]
    model, teacher, images = preserving(case).train(), case.model(), case.images()
    loss = tokenprune.DynamicViTLoss(teacher)
    parts = loss(model, images, model(images), torch.tensor([1, 2, 3]))
    trace = model.tokenprune.trace
    with torch.no_grad():
        difference = (trace.tokens - teacher.forward_features(images))[:, 1:]
        expected = difference[trace.keep[-1] == 1].square().mean()
    assert trace.tokens.shape == (3, 1 + NUM_PATCHES, EMBED_DIM)
    torch.testing.assert_close(parts["distill"].detach(), expected)
    parts["loss"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.tokenprune.parameters())


# What else is done to models


@some_models
def test_checkpointed_blocks(case: Case) -> None:
    if case.name == "torchvision":
        pytest.skip("torchvision has no checkpointing")
    model, images = preserving(case).train(), case.images()
    expected = gradients(case, model, images)
    enable_checkpointing(model)
    assert_same_gradients(gradients(case, model, images), expected, 1e-5)


# Compiling takes its time, so of all but one kind only where all tests are run.
@pytest.mark.parametrize(
    "case", [BY_NAME[KINDS[0]], *(pytest.param(BY_NAME[name], marks=pytest.mark.slow) for name in KINDS[1:])], ids=str
)
@torch.no_grad()
def test_compile_and_export(case: Case) -> None:
    model, images = preserving(case), case.images()
    expected = case.run(model, images)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (case.images(4),), dynamic_shapes=shapes, strict=False)
    for actual in (case.run(compiled, images), case.run(program.module(), images)):
        assert_close(actual, expected, TOLERANCE)


@pytest.mark.slow
def test_compile_in_training() -> None:
    case = BY_NAME["timm no class token, average"]
    model, images = preserving(case).train(), case.images()
    torch.compiler.reset()
    actual = gradients(case, torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    expected = gradients(case, model, images)
    assert_same_gradients({name.removeprefix("_orig_mod."): grad for name, grad in actual.items()}, expected, 1e-4)


@some_models
@torch.no_grad()
def test_copies_remember(case: Case) -> None:
    model, images = preserving(case), case.images()
    expected = case.run(model, images)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.tokenprune.pruned == "preserve" and copied.tokenprune.restores
        actual = case.run(copied, images)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert case.sparsified().tokenprune.pruned == "drop"


@pytest.mark.parametrize(("name", "normed_behind"), [*zip(KINDS, (True, False, True, True), strict=True)])
def test_putting_back_costs_no_multiply_adds(name: str, normed_behind: bool) -> None:
    case, size = BY_NAME[name], (3, 48, 48)
    dropped, kept = tokenprune.flops(case.sparsified(), size), tokenprune.flops(preserving(case), size)
    assert (kept.sparse_blocks, kept.stages, kept.dense) == (dropped.sparse_blocks, dropped.stages, dropped.dense)
    # A norm behind the last block runs over all tokens again: 5 an element in fvcore's count.
    more = NUM_PATCHES - int(NUM_PATCHES * KEEP_RATIO**2)
    assert kept.sparse - dropped.sparse == (5 * more * EMBED_DIM if normed_behind else 0)


# With tokens dropped


@pytest.mark.parametrize("method", ["forward_intermediates", "get_intermediate_layers"])
def test_with_tokens_dropped_what_needs_the_grid_says_what_to_do(method: str) -> None:
    case = BY_NAME["timm class token"]
    with pytest.raises(
        tokenprune.StateError, match=rf'{method} needs the full grid.*pruned="preserve".*dense\(model\)'
    ):
        getattr(case.sparsified(), method)(case.images())
    getattr(preserving(case), method)(case.images())


def test_with_tokens_dropped_feature_wrappers_are_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, features_only=True)
    refused(model, tokenprune.UnsupportedModelError, 'feature maps, which need every token; pass pruned="preserve"')
    tokenprune.sparsify(model.model)
    with pytest.raises(tokenprune.StateError, match='pruned="preserve"'):
        model(torch.randn(2, 3, 48, 48))
    apart = timm.create_model("resnet18", features_only=True)
    refused(apart, tokenprune.UnsupportedModelError, "FeatureListNet has no list of blocks", pruned="preserve")


@torch.no_grad()
def test_with_tokens_dropped_hidden_states_are_shorter() -> None:
    entry = entry_of("ViTModel")
    model, inputs = entry.model(), {**entry.example(), "output_hidden_states": True}
    states = tokenprune.sparsify(model, (1, 2), KEEP_RATIO)(**inputs).hidden_states
    assert [state.shape[1] for state in states] == [37, 37, 22, 13, 13]

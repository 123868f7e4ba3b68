"""Towers that are given all images of a batch as one sequence: each image by itself, whole merge groups, lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.census.entry import Entry
from tests.census.lookup import entry_of
from tests.census.transformers_packed import behind_merger, towers
from tests.helpers.packed_towers import (
    DEEP,
    KEEP_RATIO,
    RASTER,
    WINDOWED,
    Numbered,
    assert_joined,
    merged,
    one_by_one,
    pruned,
)
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tokenprune.backbones.adapters import describe
from tokenprune.backbones.probing import named_outputs

# One of each kind; make test-all runs all.
FEW = (
    "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel", "VideoLlama3VisionModel", "PaddleOCRVisionModel",
    "Kimi_K25VisionModel", "MuseSparkVisionModel", "HunYuanVLVisionTransformer", "PixtralVisionModel",
    "Inkling2VisionModel", "Lfm3VlVisionModel", "MiniCPMV4_6VisionModel",
)  # fmt: skip
TOWERS = [
    pytest.param(entry, id=f"{entry}-{entry.stages}", marks=() if entry.name in FEW else pytest.mark.slow)
    for entry in (*towers(), *behind_merger())
]


@pytest.mark.parametrize("entry", TOWERS)
@torch.no_grad()
def test_each_image_alone_equals_the_packed_batch(entry: Entry) -> None:
    model, arguments = pruned(entry)
    together, kept = named_outputs(model(**arguments)), model.tokenprune.trace.indices
    assert len({len(indices) for indices in kept[-1]}) > 1
    alone = []
    for image, inputs in enumerate(one_by_one(arguments)):
        alone.append(named_outputs(model(**inputs)))
        for stage, indices in enumerate(model.tokenprune.trace.indices):
            assert torch.equal(indices[0], kept[stage][image])
    assert_joined(together, alone)
    with tokenprune.dense(model):
        dense = named_outputs(model(**arguments))
    model.tokenprune.keep_ratio = 1.0
    for name, output in named_outputs(model(**arguments)).items():
        torch.testing.assert_close(output, dense[name], rtol=0, atol=IDENTITY * float(dense[name].abs().max()))
        assert together[name].shape == output.shape
        assert len(output) == 1 or (together[name] - output).abs().max() > 1e-4 * output.abs().max()


@pytest.mark.parametrize("name", [WINDOWED, DEEP, RASTER])
@torch.no_grad()
def test_whole_merge_groups_of_each_image_s_own_number_are_kept(name: str) -> None:
    model, arguments = pruned(entry_of(name))
    model(**arguments)
    trace, plan = model.tokenprune.trace, model.tokenprune.plan
    images = trace.images
    assert images is not None and images.num_groups == (9, 6, 3)
    for image, number in enumerate(images.num_groups):
        for stage, indices in enumerate(trace.indices):
            groups, counts = images.groups[image][indices[image]].unique(return_counts=True)
            assert len(groups) == plan.num_keep(number)[stage]
            assert counts.tolist() == [4] * len(groups)
        assert torch.equal(trace.groups[image], groups)
    model.tokenprune.execution = "mask"
    model(**arguments)
    for one, other in zip(model.tokenprune.trace.groups, trace.groups, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [WINDOWED, DEEP, RASTER, "MuseSparkVisionModel"])
@torch.no_grad()
def test_groups_are_numbered_as_the_tower_s_outputs(name: str) -> None:
    """Nobody sees a group that is pruned in front of the first block, and its output changes with its patches alone."""
    entry = entry_of(name)
    model, arguments = entry.model(), entry.example()
    tokenprune.sparsify(model, (0,), 0.5, scorer=lambda _: Numbered())
    (patches,) = (value for name, value in arguments.items() if "grid" not in name)

    def outputs() -> Tensor:
        made = merged(model(**arguments))
        return made if made.dim() == 2 else made.mean(dim=1)

    before = outputs()
    groups, images = model.tokenprune.trace.groups, model.tokenprune.trace.images
    kept = torch.cat([torch.isin(torch.arange(n), one) for n, one in zip(images.num_groups, groups, strict=True)])
    assert len(before) == len(kept)
    for image in range(len(groups)):  # any patch of a pruned group
        start = sum(images.lengths[:image])
        patch = start + int((~torch.isin(images.groups[image], groups[image])).nonzero()[0])
        patches[patch] += 1.0
    changed = (outputs() - before).abs().amax(dim=1) > 1e-6
    assert not changed[kept].any()
    assert changed[~kept].sum() == len(groups)


@torch.no_grad()
def test_lengths_and_rotary_tables_go_with_the_tokens() -> None:
    model, arguments = pruned(entry_of(WINDOWED), scorer="random")
    dense, sparse = [], []

    def look(seen: list[Any]) -> Callable[..., None]:
        return lambda block, args, kwargs: seen.append((args[0], kwargs["cu_seqlens"], kwargs["position_embeddings"]))

    with tokenprune.dense(model):
        handles = [block.register_forward_pre_hook(look(dense), with_kwargs=True) for block in model.blocks]
        model(**arguments)
    for handle in handles:
        handle.remove()
    for block in model.blocks:
        block.register_forward_pre_hook(look(sparse), with_kwargs=True)
    model(**arguments)
    rows = [selection.rows for selection in model.tokenprune.trace.selections]
    windows, full = dense[2][1], dense[3][1]
    assert windows.tolist() != full.tolist()
    for block, stage in ((1, 0), (2, 1), (3, 1)):
        tokens, ends, tables = sparse[block]
        assert len(tokens) == len(rows[stage]) == ends[-1]
        counts = torch.bincount(torch.bucketize(rows[stage], dense[block][1][1:], right=True))
        assert ends.diff().tolist() == counts[counts > 0].tolist() and ends.dtype == dense[block][1].dtype
        for table, whole in zip(tables, dense[block][2], strict=True):
            assert torch.equal(table, whole[rows[stage]])


@torch.no_grad()
def test_a_video_is_one_image_whose_frames_may_lose_all_tokens() -> None:
    entry = entry_of("Qwen2VisionTransformerPretrainedModel")
    model = entry.model()
    tokenprune.sparsify(model, (1,), 0.5, scorer=lambda _: Numbered())
    values = entry.example()["hidden_states"].shape[1]
    arguments = {"hidden_states": torch.randn(48, values), "grid_thw": torch.tensor([[2, 4, 4], [1, 4, 4]])}
    outputs = merged(model(**arguments))
    assert model.tokenprune.trace.indices[0][0].tolist() == [*range(16)]  # all of the first frame, none of the second
    model.tokenprune.execution = "mask"
    masked = merged(model(**arguments))
    torch.testing.assert_close(outputs, masked, rtol=0, atol=MASK_EQUALS_GATHER[torch.float32])


@pytest.mark.parametrize("name", [WINDOWED, DEEP])
def test_gradients_reach_every_predictor_also_with_checkpointing(name: str) -> None:
    model, arguments = pruned(entry_of(name))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        merged(model.train()(**arguments)).square().mean().backward()
        assert model.tokenprune.trace.execution == "mask"
        found.append([parameter.grad.clone() for parameter in model.tokenprune.parameters()])
    for stage in model.tokenprune.stages:
        assert all(parameter.grad.abs().max() > 0 for parameter in stage.parameters())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_copies_have_their_own_order_of_windows() -> None:
    model, arguments = pruned(entry_of(WINDOWED))
    copied = copy.deepcopy(model)
    assert torch.equal(merged(copied(**arguments)), merged(model(**arguments)))
    assert copied.tokenprune.backbone.packed.order.args[0] is copied


@contextmanager
def own_attention(function: Callable[..., Any]) -> Iterator[str]:
    """While it lasts, transformers knows an implementation of attention."""
    from transformers import AttentionInterface

    AttentionInterface.register("of_the_tests", function)
    try:
        yield "of_the_tests"
    finally:
        AttentionInterface._global_mapping.pop("of_the_tests", None)


def by_products(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    weights = (query @ key.transpose(-1, -2) * module.scaling).exp()
    return (weights / weights.sum(dim=-1, keepdim=True) @ value).transpose(1, 2), None


def test_attention_that_cannot_be_masked_is_one_clear_error() -> None:
    entry = entry_of(WINDOWED)
    with own_attention(by_products) as name:
        model, arguments = pruned(entry)
        expected = merged(model(**arguments))
        model.set_attn_implementation(name)
        # Tokens are removed, and attention is split by the model itself, however it attends.
        torch.testing.assert_close(merged(model(**arguments)), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(tokenprune.InterceptionError, match="attn_implementation='sdpa'"):
            model.train()(**arguments)
        # An implementation chosen before is set aside while the model is sparsified.
        other = entry.model()
        other.set_attn_implementation(name)
        tokenprune.sparsify(other, (1, 2), KEEP_RATIO)
        assert other.config._attn_implementation == "sdpa"
        assert tokenprune.unsparsify(other).config._attn_implementation == name


@torch.no_grad()
def test_written_out_attention_is_masked_segment_by_segment() -> None:
    model, arguments = pruned(entry_of(WINDOWED))
    expected = merged(model(**arguments))
    model.set_attn_implementation("eager")
    model.tokenprune.execution = "mask"
    found = merged(model(**arguments))
    torch.testing.assert_close(found, expected, rtol=0, atol=MASK_EQUALS_GATHER[torch.float32])


@pytest.mark.parametrize("scorer", ["cls_attention", "redundancy", "informative"])
@pytest.mark.parametrize("name", [WINDOWED, "PixtralVisionModel"])
@torch.no_grad()
def test_attention_is_recorded_segment_by_segment(name: str, scorer: str) -> None:
    model, arguments = pruned(entry_of(name), scorer=scorer)
    together = named_outputs(model(**arguments))
    trace = model.tokenprune.trace
    if scorer == "cls_attention":  # what all receive on average is 1
        first, present = trace.scores[0], trace.images.present
        torch.testing.assert_close(first.nansum(dim=1), present.sum(dim=1), rtol=1e-4, atol=0)
    model.tokenprune.execution = "mask"
    for key, output in named_outputs(model(**arguments)).items():
        scale = float(output.abs().max())
        torch.testing.assert_close(output, together[key], rtol=0, atol=MASK_EQUALS_GATHER[torch.float32] * scale)
    for one, other in zip(trace.groups, model.tokenprune.trace.groups, strict=True):
        assert torch.equal(one, other)


def test_a_scorer_that_merges_one_number_of_all_images_is_refused() -> None:
    with pytest.raises(tokenprune.UnsupportedModelError, match="different sizes"):
        tokenprune.sparsify(entry_of(DEEP).model(), scorer="tome")


def test_adaptive_budgets_are_refused() -> None:
    model, arguments = pruned(entry_of(DEEP))
    with pytest.raises(tokenprune.UnsupportedModelError, match="fraction of its own"):
        tokenprune.calibrate_budget(model, [arguments])
    with pytest.raises(tokenprune.UnsupportedModelError, match="fraction of its own"):
        model.tokenprune.budget = "adaptive"


def test_grids_that_do_not_fit_are_one_clear_error() -> None:
    entry = entry_of(DEEP)
    model, arguments = entry.model(), entry.example()
    described = describe(model)
    assert described.packed is not None
    halves = replace(described, packed=replace(described.packed, patch_size=2))
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, backbone=halves)
    with pytest.raises(tokenprune.StateError, match=r"the images' grids say that there are 18, 9 \+ 6 \+ 3"):
        model(**arguments)
    with pytest.raises(tokenprune.StateError, match="without 'grid_thw'"):
        model(arguments["hidden_states"])


def test_calibration_trains_predictors_of_each_image_s_own_share() -> None:
    model, arguments = pruned(entry_of(WINDOWED))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "tokenprune" not in name}
    tokenprune.calibrate(model, [arguments] * 2, steps=2)
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())
    model.train()(**arguments)
    trace = model.tokenprune.trace
    for share, keep in zip(trace.shares, trace.keep, strict=True):
        kept = [row[:number].mean() for row, number in zip(keep, trace.images.lengths, strict=True)]
        torch.testing.assert_close(share, torch.stack(kept))


def test_multiply_adds_of_given_images_are_those_of_the_closed_form() -> None:
    width, inner = 32, 64
    model, arguments = pruned(entry_of("Ernie4_5_VLMoeVisionTransformerPretrainedModel"))
    report = tokenprune.flops(model, inputs=arguments)

    def block(lengths: Iterable[int]) -> int:
        """Four projections, two layers of an MLP and two norms of each token, and attention image by image."""
        by_token = 4 * width**2 + 2 * width * inner + 2 * 5 * width
        return sum(length * by_token + 2 * width * length**2 for length in lengths)

    model.eval()(**arguments)
    trace = model.tokenprune.trace
    kept = [[len(indices) for indices in stage] for stage in trace.indices]
    assert report.dense_blocks == (block(trace.images.lengths),) * 4
    assert report.sparse_blocks == tuple(map(block, (trace.images.lengths, kept[0], kept[1], kept[1])))
    assert report.input_size == () and report.ratio == report.dense / report.sparse > 1.2
    rest = report.sparse - sum(report.sparse_blocks) - sum(report.stages)
    assert min(report.stages) > 0 and rest == report.dense - sum(report.dense_blocks)
    assert "the given inputs" in str(report.table().title)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [*towers(), *behind_merger()], ids=lambda entry: f"{entry}-{entry.stages}")
def test_every_packed_tower_is_counted(entry: Entry) -> None:
    model, arguments = pruned(entry)
    report = tokenprune.flops(model, inputs=arguments)
    last = model.tokenprune.backbone.reach[-1]
    assert report.sparse_blocks[last] <= 0.4 * report.dense_blocks[last] and report.sparse < report.dense


def test_multiply_adds_of_one_image_size_are_refused() -> None:
    model, arguments = pruned(entry_of(DEEP))
    with pytest.raises(tokenprune.CountingError, match=r"grids.*inputs="):
        tokenprune.flops(model)
    with pytest.raises(ValueError, match="not both"):
        tokenprune.flops(model, images=torch.zeros(1, 3, 48, 48), inputs=arguments)
    with pytest.raises(ValueError, match="no tensor is among"):
        tokenprune.flops(model, inputs={"use_vit_merger": True})

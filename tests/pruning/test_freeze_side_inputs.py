"""Frozen models whose blocks need more than tokens: rotary tables, biases, masks, positions, grids."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.census.hosts import skip_host_fault
from tests.census.lookup import entry_of
from tests.census.timm import naflex_dict
from tests.helpers.tolerances import FROZEN, MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME, hook_counts, models, wide_scorers
from tokenprune.backbones.probing import named_outputs

# One of each way in which blocks get something for each token.
KINDS = (
    "eva02_base_patch14_224",  # one rotary table, for patch tokens alone
    "vit_small_patch16_dinov3",  # the same, made anew for each size of images
    "vit_small_patch16_rope_mixed_224",  # one of its own for each block and head
    "vit_pe_core_base_patch16_224",  # rotary tables, and a pool by attention
    "beit_base_patch16_224",  # a bias inside attention
    "vit_relpos_base_patch16_rpn_224",  # the same, without a class token
    "convit_base",  # tables of attention modules, and a class token that joins late
    "cait_xxs24_224",  # attention weights mixed over heads
    "volo_d1_224",  # blocks over grids
    "DINOv3ViTModel",  # cosines and sines in a tuple
    "MLCDVisionModel",  # tables that attention spreads over the images
    "BeitModel",  # modules that make a bias for a number of tokens
    "VJEPA2ForVideoClassification",  # blocks that number their tokens
    "VisionEncoderDecoderModel",  # a decoder takes the kept tokens, in the order of the grid
)
FAST = ("vit_small_patch16_dinov3", "beit_base_patch16_224", "convit_base", "volo_d1_224", "DINOv3ViTModel",
        "MLCDVisionModel", "VJEPA2ForVideoClassification", "VisionEncoderDecoderModel")  # fmt: skip
each_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in KINDS]
)
rotary = pytest.mark.parametrize("name", ["vit_small_patch16_dinov3"])
compiled = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "vit_small_patch16_dinov3" else pytest.mark.slow) for name in FAST]
)


def sparsified(name: str, **options: str) -> nn.Module:
    entry = entry_of(name)
    return wide_scorers(tokenprune.sparsify(entry.model(), entry.stages, entry.keep_ratio, **options))


def arguments(name: str, batch: int = 2) -> dict[str, Any]:
    entry = entry_of(name)
    return dict(entry.inputs(batch, torch.Generator().manual_seed(8)))


def run(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(model(**copy.deepcopy(inputs)))


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = FROZEN, *, ordered: bool = False
) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        one = actual[name]
        if not ordered and tensor.dim() == 3 and (one - tensor).abs().max() > tolerance * tensor.abs().max():
            one, tensor = (tokens.sort(dim=1).values for tokens in (one, tensor))  # tokens go on in any order
        assert (one - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@each_kind
def test_outputs_are_the_same(name: str) -> None:
    model = sparsified(name)
    hooks, inputs = hook_counts(model), arguments(name)
    before, dense = copy.deepcopy(model), tokenprune.unsparsify(copy.deepcopy(model))
    tokenprune.freeze(model, inputs)
    ordered = name == "VisionEncoderDecoderModel"
    for batch in (3, 1):
        assert_same(run(model, arguments(name, batch)), run(before, arguments(name, batch)), ordered=ordered)
    with tokenprune.dense(model):
        unpruned = run(model, inputs)
    expected = run(dense, inputs)
    assert all(torch.equal(unpruned[output], tensor) for output, tensor in expected.items())
    assert any(  # pruning has an effect, or nothing has been shown
        tensor.shape != unpruned[output].shape or (tensor - unpruned[output]).abs().max() > 1e-4
        for output, tensor in run(model, inputs).items()
    )
    tokenprune.unfreeze(model)
    assert hook_counts(model) == hooks
    expected = run(before, inputs)
    assert all(torch.equal(run(model, inputs)[output], tensor) for output, tensor in expected.items())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "DINOv3ViTModel"])
def test_attention_that_is_recorded_and_merged_tokens(name: str) -> None:
    model = sparsified(name, scorer="cls_attention", pruned="merge")
    frozen = tokenprune.freeze(copy.deepcopy(model), arguments(name))
    for batch in (3, 1):
        assert_same(run(frozen, arguments(name, batch)), run(model, arguments(name, batch)))


@each_kind
def test_double_precision(name: str) -> None:
    entry = entry_of(name)
    skip_host_fault(entry, double=True)
    dense = entry.model().double()  # first: timm 1.0.26 keeps tables of ConViT in the dtype of their first use
    model = wide_scorers(tokenprune.sparsify(dense, entry.stages, entry.keep_ratio)).double()
    frozen, inputs = tokenprune.freeze(copy.deepcopy(model), entry.example(double=True)), entry.example(double=True)
    assert_same(run(frozen, inputs), run(model, inputs), MASK_EQUALS_GATHER[torch.float64])


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "DINOv3ViTModel"])
def test_images_of_another_size(name: str) -> None:
    model, inputs = sparsified(name), arguments(name)
    frozen, images = tokenprune.freeze(copy.deepcopy(model), inputs), next(iter(inputs))
    for size in ((32, 64), (64, 48), (48, 48)):
        other = {images: torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))}
        assert_same(run(frozen, other), run(model, other))


@rotary
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    model, inputs = sparsified(name), arguments(name)
    frozen = tokenprune.freeze(copy.deepcopy(model))
    expected = run(model, inputs)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):  # type: ignore[no-untyped-call]
        assert again.tokenprune.frozen
        assert_same(run(again, inputs), expected)
        assert_same(run(tokenprune.unfreeze(again), inputs), expected)
    tokenprune.save_pretrained(frozen, tmp_path / "saved")
    assert_same(run(tokenprune.from_pretrained(tmp_path / "saved", model=entry_of(name).model()), inputs), expected)


@compiled
def test_compiled_whole(name: str) -> None:
    model, inputs = sparsified(name), arguments(name)
    frozen = tokenprune.freeze(copy.deepcopy(model), inputs)
    torch.compiler.reset()
    with torch.no_grad():
        try:
            torch.compile(entry_of(name).model(), fullgraph=True, backend="eager")(**arguments(name))
        except torch._dynamo.exc.TorchDynamoException:
            pytest.skip("the unpruned model cannot be compiled whole")
    runner = torch.compile(frozen, fullgraph=True, backend="eager")
    assert_same(run(runner, inputs), run(model, inputs))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(run(runner, inputs), run(model, inputs))


@pytest.mark.slow
@rotary
def test_a_frozen_model_is_a_program(name: str) -> None:
    model = sparsified(name)
    frozen, images = tokenprune.freeze(copy.deepcopy(model)), arguments(name, 3)["x"]
    program = torch.export.export(
        frozen, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},), strict=False
    )
    for batch in (3, 5):
        inputs = arguments(name, batch)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(inputs["x"]), model(inputs["x"]), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_base_patch14_224", "beit_base_patch16_224"])
def test_exported_files(name: str, suffix: str, tmp_path: Path) -> None:
    model = tokenprune.freeze(sparsified(name))
    size = tuple(arguments(name)["x"].shape[1:])
    report = tokenprune.export(model, tmp_path / f"model{suffix}", input_size=size)
    assert max(report.differences) < 1e-4 and model.tokenprune.frozen


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
@torch.no_grad()
def test_blocks_that_are_called_by_themselves(name: str) -> None:
    model, images = sparsified(name), arguments(name)["x"]
    dense, frozen = tokenprune.unsparsify(copy.deepcopy(model)), tokenprune.freeze(copy.deepcopy(model))
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for block in dense.blocks:
        block.register_forward_pre_hook(lambda block, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    dense(images)
    frozen(images)
    for index in (0, 3):  # no stage stands in front of them
        assert torch.equal(*(each.blocks[index](*given[index][0], **given[index][1]) for each in (dense, frozen)))
    # At a stage a sequence is pruned, and so are the tables of blocks that are called with it afterwards.
    ((tokens,), besides), expected = given[0], []
    handles = [block.register_forward_hook(lambda block, args, out: expected.append(out)) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    for block, output in zip(frozen.blocks, expected, strict=True):
        tokens = block(tokens, **besides)
        assert_same({"tokens": tokens}, {"tokens": output})
    args, besides = given[2]
    assert frozen.blocks[2](*args, **besides).shape[1] < args[0].shape[1]  # a later stage, of a whole sequence
    if name == "vit_small_patch16_dinov3":  # and then a block of another whole one
        args, besides = given[3]
        assert torch.equal(*(each.blocks[3](*args, **besides) for each in (dense, frozen)))


@pytest.mark.parametrize("hidden", [0, 5])
@models("timm class token")
def test_masks_of_whole_sequences(case: Any, hidden: int) -> None:
    mask = torch.ones(1, 1, case.num_patches + 1, case.num_patches + 1, dtype=torch.bool)
    mask[..., case.num_patches + 1 - hidden :] = False
    model, inputs = case.sparsified(), {"x": case.images(), "attn_mask": mask}
    frozen = tokenprune.freeze(copy.deepcopy(model), inputs)
    assert_same(run(frozen, inputs), run(model, inputs))
    assert_same(run(frozen, {"x": case.images()}), run(model, {"x": case.images()}))


def test_what_is_refused() -> None:
    model = tokenprune.freeze(BY_NAME["timm class token"].sparsified())
    with pytest.raises(tokenprune.StateError, match="more tensors than tokens"):
        model.forward_features(BY_NAME["timm class token"].images(), attn_mask=torch.zeros(1, 1, 37, 37))


def test_images_of_different_sizes_are_refused() -> None:
    entry = next(one for one in naflex_dict() if "rope_mixed" in one.name)
    skip_host_fault(entry)
    model, inputs = tokenprune.sparsify(entry.model(), entry.stages, entry.keep_ratio), entry.example()
    hooks = hook_counts(model)
    with pytest.raises(tokenprune.UnsupportedModelError, match="images of different sizes"):
        tokenprune.freeze(model, inputs)
    assert hook_counts(model) == hooks
    images = {"x": torch.randn(2, 3, 48, 48)}
    before = copy.deepcopy(model)
    tokenprune.freeze(model, images)
    assert_same(run(model, images), run(before, images))
    with pytest.raises(tokenprune.StateError, match="images of different sizes"):
        run(model, inputs)
    assert_same(run(model, images), run(before, images))


@rotary
def test_nothing_pruned(name: str) -> None:
    entry = entry_of(name)
    dense = entry.model()
    model = tokenprune.freeze(tokenprune.sparsify(copy.deepcopy(dense), entry.stages, 1.0))
    assert torch.equal(run(model, arguments(name))["output"], run(dense, arguments(name))["output"])

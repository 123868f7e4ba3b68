"""Class attention in use: training, checkpointing, compilation, export, copies, cost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from tests.helpers.attention import Learned
from tests.helpers.gradients import assert_same_gradients, enable_checkpointing, gradients
from tests.helpers.zoo import (
    BY_NAME,
    EMBED_DIM,
    KEEP_RATIO,
    NUM_PATCHES,
    ONE_OF_EACH_KIND,
    Case,
    models,
    some_models,
)


@some_models
def test_a_backbone_is_trained_around_it(case: Case) -> None:
    model, images = case.sparsified(scorer="cls_attention").train(), case.images()
    outputs = case.run(model, images)
    sum(output.square().mean() for output in outputs.values()).backward()
    assert [keep.sum(dim=1).tolist() for keep in model.tokenprune.trace.keep] == [[21.0] * 3, [12.0] * 3]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    block = model.tokenprune.backbone.blocks[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters() if parameter.dim() > 1)


def test_the_loss_takes_it() -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(scorer="cls_attention").train(), case.images()
    parts = tokenprune.DynamicViTLoss(case.model())(model, images, model(images), torch.tensor([1, 2, 3]))
    parts["loss"].backward()
    assert parts["distill"] > 0 and parts["kl"] > 0 and parts["ratio"] < 1e-3


@pytest.mark.parametrize("scorer", ["cls_attention", Learned], ids=["ranks", "learned"])
@models("timm class token", "timm no class token, average", "transformers ViT classifier")
def test_checkpointed_blocks_see_the_same_decisions(case: Case, scorer: Any) -> None:
    model, images = case.sparsified(scorer=scorer).train(), case.images()
    expected, kept = gradients(case, model, images), model.tokenprune.trace.keep
    assert all("tokenprune" not in name or grad.abs().max() > 0 for name, grad in expected.items())
    enable_checkpointing(model)
    assert_same_gradients(gradients(case, model, images), expected, 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.keep, kept, strict=True))
    torch.manual_seed(3)
    model.zero_grad()
    first = sum(output.square().mean() for output in case.run(model, images).values())
    case.run(model, images.flip(0) + 1)  # other decisions, now the model's latest
    first.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("timm class token", True),
        pytest.param("torchvision", True, marks=pytest.mark.slow),
        *((name, False) for name in ONE_OF_EACH_KIND),
    ],
)
def test_compile(name: str, training: bool) -> None:
    case = BY_NAME[name]
    model, images = case.sparsified(scorer="cls_attention").train(training), case.images()
    if torch.__version__ < "2.15" and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        pytest.skip("earlier compilers cannot trace nn.MultiheadAttention inside a function mode")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if training:
        expected = gradients(case, model, images)
        actual = gradients(case, compiled, images)
        assert_same_gradients({name.removeprefix("_orig_mod."): g for name, g in actual.items()}, expected, 1e-4)
        return
    with torch.no_grad():
        expected, kept = case.run(model, images), model.tokenprune.trace.indices
        actual = case.run(compiled, images)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.indices, kept, strict=True))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


@some_models
def test_export(case: Case) -> None:
    model = case.sparsified(scorer="cls_attention")
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (case.images(),), dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        for batch in (3, 5):
            expected, actual = case.run(model, case.images(batch)), case.run(program.module(), case.images(batch))
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


@some_models
@torch.no_grad()
def test_copies_and_half_precision(case: Case) -> None:
    model, images = case.sparsified(scorer="cls_attention"), case.images()
    expected = case.run(model, images)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        actual = case.run(copied, images)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    # How it was sparsified, and no weight.
    assert [key for key in model.state_dict() if key.startswith("tokenprune.")] == ["tokenprune._extra_state"]
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        with torch.autocast("cpu", torch.bfloat16):
            assert all(output.isfinite().all() for output in case.run(model, images).values())


@models("timm class token", "timm no class token, average")
def test_its_cost_is_counted(case: Case) -> None:
    size, prefix = (3, 48, 48), case.num_prefix_tokens
    blind = tokenprune.flops(case.sparsified(scorer="random"), size)
    report = tokenprune.flops(case.sparsified(scorer="cls_attention"), size)
    extra = [after - before for before, after in zip(blind.sparse_blocks, report.sparse_blocks, strict=True)]
    lengths = (prefix + NUM_PATCHES, prefix + int(NUM_PATCHES * KEEP_RATIO))
    rows = [1 if prefix else length for length in lengths]
    assert extra == [0, rows[0] * lengths[0] * EMBED_DIM, 0, rows[1] * lengths[1] * EMBED_DIM, 0, 0]
    assert report.dense == blind.dense and report.sparse - blind.sparse == sum(extra)

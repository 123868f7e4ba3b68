"""Frozen models: the same outputs by the shortest path, and back again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from tests.helpers.profiling import operators
from tests.helpers.tolerances import FROZEN
from tests.helpers.zoo import (
    BY_NAME,
    KEEP_RATIO,
    STAGES,
    Case,
    compiled_models,
    hook_counts,
    models,
    some_models,
    wide_scorers,
)
from tokenprune.scorers import PredictorSlim

one_model = models("timm class token")


def assert_same(case: Case, model: nn.Module, other: nn.Module, batch: int = 3) -> None:
    images = case.images(batch)
    with torch.no_grad():
        expected, actual = case.run(other, images), case.run(model, images)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= FROZEN * tensor.abs().max(), name


def differs(case: Case, model: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        expected, actual = case.run(other, case.images()), case.run(model, case.images())
    return any((actual[name] - expected[name]).abs().max() > 1e-3 for name in expected)


@pytest.mark.parametrize("scorer", ["predictor", "predictor_slim", "predictor_linear", "static"])
@models(
    "timm class token", "timm registers, average with prefix", "timm no class token, average", "timm LV-ViT",
    "timm non-square, dynamic size", "transformers ViT classifier", "transformers DINOv2 registers classifier",
    "transformers SigLIP", "torchvision",
)  # fmt: skip
def test_outputs_are_the_same(case: Case, scorer: str) -> None:
    if scorer == "static" and case.image_size[0] != case.image_size[1]:
        pytest.skip("a frozen model does not see the size of images, and static scores need it for another grid")
    model = case.sparsified(scorer=scorer)
    for stage in model.tokenprune.stages:
        if isinstance(stage.scorer, PredictorSlim):  # a fresh one scores many tokens alike, and either may be kept
            torch.nn.init.ones_(stage.scorer.mean.bias)
    hooks, before = hook_counts(model), copy.deepcopy(model)
    assert tokenprune.freeze(model) is model and model.tokenprune.frozen
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == len(STAGES)
    assert not any(module._forward_hooks for module in model.modules())
    for batch in (3, 1, 2):
        assert_same(case, model, before, batch)
    assert model.tokenprune.trace is None
    assert tokenprune.unfreeze(model) is model and not model.tokenprune.frozen
    assert hook_counts(model) == hooks
    with torch.no_grad():
        for name, tensor in case.run(before, case.images()).items():
            assert torch.equal(case.run(model, case.images())[name], tensor)
    assert [len(kept[0]) for kept in model.tokenprune.trace.indices] == [
        case.num_patches * 6 // 10, int(case.num_patches * 0.36)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"scorer": "cls_attention"}, {"scorer": "informative"}, {"scorer": "redundancy"},
     {"scorer": "cls_attention", "pruned": "fuse"}, {"pruned": "fuse"}, {"pruned": "merge"}],
    ids=str,
)  # fmt: skip
@models("timm class token", "timm no class token, average", "timm LV-ViT", "transformers ViT classifier", "torchvision")
def test_attention_and_what_becomes_of_pruned_tokens(case: Case, options: dict[str, str]) -> None:
    model = case.sparsified(**options)
    hooks, before = hook_counts(model), copy.deepcopy(model)
    tokenprune.freeze(model)
    for batch in (3, 1):
        assert_same(case, model, before, batch)
    again = pickle.loads(pickle.dumps(model))  # type: ignore[no-untyped-call]
    assert_same(case, again, before)
    assert hook_counts(tokenprune.unfreeze(model)) == hooks
    with torch.no_grad():
        for name, tensor in case.run(before, case.images()).items():
            assert torch.equal(case.run(model, case.images())[name], tensor)


@one_model
def test_a_block_called_by_itself_leaves_no_attention_behind(case: Case) -> None:
    model = case.sparsified(scorer="cls_attention")
    frozen = tokenprune.freeze(copy.deepcopy(model))
    dense, tokens = case.model(), torch.randn(2, 50, 32)
    with torch.no_grad():  # those whose attention is recorded
        assert all(torch.equal(frozen.blocks[index](tokens), dense.blocks[index](tokens)) for index in (1, 3))
    assert_same(case, frozen, model)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"scorer": "cls_attention", "pruned": "fuse"}, {"pruned": "merge"}], ids=str)
@one_model
def test_attention_and_reductions_compiled_and_exported(case: Case, options: dict[str, str], tmp_path: Path) -> None:
    model = case.sparsified(**options)
    frozen = tokenprune.freeze(copy.deepcopy(model))
    torch.compiler.reset()
    assert_same(case, torch.compile(frozen, fullgraph=True, backend="eager"), model)
    for suffix in (".pt2", ".onnx"):
        report = tokenprune.export(frozen, tmp_path / f"model{suffix}", input_size=(3, *case.image_size))
        assert max(report.differences) < 1e-4


@some_models
def test_the_dense_model_comes_back(case: Case) -> None:
    dense = case.model()
    hooks, expected = hook_counts(dense), case.run(dense, case.images())
    model = tokenprune.freeze(tokenprune.sparsify(copy.deepcopy(dense), STAGES, KEEP_RATIO))
    with tokenprune.dense(model):
        assert all(torch.equal(case.run(model, case.images())[name], tensor) for name, tensor in expected.items())
    tokenprune.unsparsify(model)
    assert hook_counts(model) == hooks
    assert all(torch.equal(case.run(model, case.images())[name], tensor) for name, tensor in expected.items())


@one_model
def test_changed_weights_are_taken(case: Case) -> None:
    model, other = case.sparsified(), wide_scorers(case.sparsified())
    frozen = tokenprune.freeze(copy.deepcopy(model))
    assert_same(case, frozen, model)
    assert differs(case, model, other)
    with torch.no_grad():
        for parameter, new in zip(frozen.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)
    assert_same(case, frozen, other)
    frozen.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_same(case, frozen, model)
    frozen.tokenprune.stages[0].scorer = copy.deepcopy(other.tokenprune.stages[0].scorer)
    model.tokenprune.stages[0].scorer = other.tokenprune.stages[0].scorer
    assert_same(case, frozen, model)
    images = case.images(dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(frozen.double()(images), model.double()(images), rtol=0, atol=1e-9)


@one_model
def test_copies_and_files(case: Case, tmp_path: Path) -> None:
    model = case.sparsified()
    frozen = tokenprune.freeze(copy.deepcopy(model))
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):  # type: ignore[no-untyped-call]
        assert again.tokenprune.frozen
        assert_same(case, again, model)
        tokenprune.unfreeze(again)
        assert_same(case, again, model)
    assert frozen.state_dict().keys() == model.state_dict().keys()
    tokenprune.save_pretrained(frozen, tmp_path / "saved")
    loaded = tokenprune.from_pretrained(tmp_path / "saved", model=case.model())
    assert not loaded.tokenprune.frozen
    assert_same(case, loaded, model)


@one_model
def test_gradients_pass(case: Case) -> None:
    model = case.sparsified()
    frozen = tokenprune.freeze(copy.deepcopy(model))
    found = []
    for each in (model, frozen):
        images = case.images().requires_grad_()
        outputs = [each(images), each(images)]  # two passes, neither of which may spoil what the other remembers
        torch.stack(outputs).square().sum().backward()
        found.append(images.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=float(FROZEN * found[0].abs().max()))


@pytest.mark.parametrize("scorer", ["predictor", "predictor_slim"])
@one_model
def test_inference_mode_and_passes_behind_it(case: Case, scorer: str) -> None:
    model = case.sparsified(scorer=scorer)
    frozen = tokenprune.freeze(copy.deepcopy(model))
    with torch.inference_mode():
        frozen(case.images())
    assert_same(case, frozen, model)
    images = case.images().requires_grad_()
    frozen(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    with torch.inference_mode():
        frozen(case.images())


@one_model
def test_what_a_frozen_model_does_not_do(case: Case) -> None:
    model = tokenprune.freeze(case.sparsified())
    before = copy.deepcopy(model)
    with pytest.raises(tokenprune.StateError, match="frozen already"):
        tokenprune.freeze(model)
    with pytest.raises(tokenprune.StateError, match=r"unfreeze\(model\) for another keep ratio"):
        model.tokenprune.keep_ratio = 0.5
    with pytest.raises(tokenprune.StateError, match=r"unfreeze\(model\) for 'mask' execution"):
        model.tokenprune.execution = "mask"
    with pytest.raises(tokenprune.StateError, match="unfreeze"):
        model.tokenprune.budget = "adaptive"
    with pytest.raises(tokenprune.StateError, match="eval mode alone"):
        model.train()(case.images())
    with pytest.raises(tokenprune.StateError, match="the model is frozen"):
        tokenprune.verify(model.eval(), case.images())
    assert_same(case, model, before)
    with pytest.raises(tokenprune.StateError, match="not frozen"):
        tokenprune.unfreeze(tokenprune.unfreeze(model))


@one_model
def test_what_counts_and_times_takes_frozen_models(case: Case) -> None:
    model = case.sparsified()
    size = (3, *case.image_size)
    expected = tokenprune.flops(model, size)
    tokenprune.freeze(model)
    assert tokenprune.flops(model, size) == expected and model.tokenprune.frozen
    hooks = hook_counts(model)
    assert tokenprune.throughput(model, input_size=size, batch_size=2, pairs=2).speedup > 0
    assert hook_counts(model) == hooks


@pytest.mark.parametrize(
    ("options", "why"),
    [({"pruned": "preserve"}, r"still needed behind their stage \(Preserve\)"),
     ({"pruned": "merge_sizes"}, "by how many they stand for"),
     ({"scorer": "tome", "pruned": "merge_sizes"}, r"inside of blocks \(ToMe\)")],
)  # fmt: skip
@one_model
def test_models_that_are_refused(case: Case, options: dict[str, Any], why: str) -> None:
    model = case.sparsified(**options)
    hooks, before = hook_counts(model), copy.deepcopy(model)
    with pytest.raises(tokenprune.UnsupportedModelError, match=why):
        tokenprune.freeze(model)
    assert hook_counts(model) == hooks and model.tokenprune.trace is None and not model.tokenprune.frozen
    assert_same(case, model, before)
    with tokenprune.dense(model), pytest.raises(tokenprune.UnsupportedModelError):
        tokenprune.freeze(model)


@pytest.mark.parametrize(("scorer", "most"), [("predictor", 11), ("predictor_slim", 9), ("predictor_linear", 5)])
@one_model
@torch.no_grad()
def test_a_stage_takes_few_operators(case: Case, scorer: str, most: int) -> None:
    dense, model = operators(case, case.model()), case.sparsified(scorer=scorer)
    hooked = operators(case, model) - dense
    assert 3 * (operators(case, tokenprune.freeze(model)) - dense) <= 3 * most * len(STAGES) < hooked


def test_nothing_pruned_leaves_one_hook() -> None:
    case = BY_NAME["timm class token"]
    dense = case.model()
    model = tokenprune.freeze(tokenprune.sparsify(copy.deepcopy(dense), STAGES, 1.0))
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1
    with torch.no_grad():
        assert torch.equal(model(case.images()), dense(case.images()))


@compiled_models
def test_compiled_code_follows(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    expected = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        case.run(compiled, images)
        assert model.tokenprune.trace is not None
        tokenprune.freeze(model)
        assert_same(case, compiled, expected)
        assert model.tokenprune.trace is None  # what was compiled before is not in use any longer
        tokenprune.unfreeze(model)
        model.tokenprune.keep_ratio = expected.tokenprune.keep_ratio = 0.3
        assert_same(case, compiled, expected)


@one_model
def test_a_frozen_model_is_a_program(case: Case, tmp_path: Path) -> None:
    model = tokenprune.freeze(case.sparsified())
    program = torch.export.export(
        model, (case.images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},), strict=False
    )
    with torch.no_grad():
        for batch in (3, 5):
            images = case.images(batch)
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-4)


@one_model
@torch.no_grad()
def test_a_ranking_that_ranks_class_tokens_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.sparsified()
    monkeypatch.setattr(model.tokenprune.stages[0].scorer, "ranking", lambda: lambda rows: rows.tokens[:, 0])
    with pytest.raises(ValueError, match=r"with −inf for tokens that are no patch tokens: add rows\.others"):
        tokenprune.freeze(model)(case.images(1))


@one_model
@torch.no_grad()
def test_with_autocast_and_without_in_turn(case: Case) -> None:
    model, images = tokenprune.freeze(case.sparsified()), case.images(1)
    before = case.run(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        lower = case.run(model, images)
    after = case.run(model, images)
    for name, tensor in before.items():
        assert lower[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor)

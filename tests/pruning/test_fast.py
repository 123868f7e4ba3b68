"""The fast path: pruned tokens stay in the sequence, and skip the token-wise parts of blocks."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenprune
from tests.helpers.hierarchies import (
    ALL,
    CONVNEXT,
    KEEP_RATIO,
    LEVEL,
    RESPONSE_NORM,
    SIDE,
    SWIN,
    Hierarchy,
    every_kind,
    swin_and_convnext,
)
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME, hook_counts
from tokenprune.pruning.reductions import Fast, FastPath

NUM_TOKENS = SIDE * SIDE
COUNTS = tuple(int(NUM_TOKENS * ratio) for ratio in KEEP_RATIO)


def paths(model: nn.Module) -> list[FastPath]:
    return [path for stage in model.tokenprune.stages for path in stage.reduction.paths]


@every_kind
@torch.no_grad()
def test_nothing_pruned_is_the_dense_model(case: Hierarchy) -> None:
    model, images = case.model(), case.images()
    before = case.run(model, images)
    tokenprune.sparsify(model, keep_ratio=1.0, pruned="fast")
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        assert_close(case.run(model, images), before, IDENTITY)
    model.tokenprune.keep_ratio = KEEP_RATIO
    with tokenprune.dense(model):
        assert_close(case.run(model, images), before, IDENTITY)


@every_kind
@pytest.mark.parametrize("dtype", MASK_EQUALS_GATHER, ids=str)
@pytest.mark.parametrize("pruned", ["fast", "fast_nested"])
@torch.no_grad()
def test_mask_equals_gather(case: Hierarchy, dtype: torch.dtype, pruned: str) -> None:
    model, images = case.sparsified(dtype, pruned), case.images(dtype=dtype)
    gathered, trace = case.run(model, images), model.tokenprune.trace
    assert [tuple(one.shape) for one in trace.indices] == [(len(images), count) for count in COUNTS]
    assert trace.grid == (SIDE, SIDE)
    model.tokenprune.execution = "mask"
    masked = case.run(model, images)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.keep, trace.keep, strict=True))
    assert_close(masked, gathered, MASK_EQUALS_GATHER[dtype])
    with tokenprune.dense(model):
        dense = case.run(model, images)
    assert all((dense[name] - gathered[name]).abs().max() > 1e-3 for name in dense)


@torch.no_grad()
def test_tokens_are_scored_anew_unless_nested() -> None:
    images = SWIN.images()
    keep = {}
    for pruned in ("fast", "fast_nested"):
        model = SWIN.sparsified(pruned=pruned)
        SWIN.run(model, images)
        keep[pruned] = model.tokenprune.trace.keep
        scores = model.tokenprune.trace.scores
        unscored = [int(one.isnan().sum(dim=1)[0]) for one in scores]
        assert unscored == ([0, 0, 0] if pruned == "fast" else [0, NUM_TOKENS - COUNTS[0], NUM_TOKENS - COUNTS[1]])
    first, second, _ = keep["fast"]
    assert ((first == 0) & (second == 1)).any()
    nested = keep["fast_nested"]
    assert all(((before == 1) | (after == 0)).all() for before, after in pairwise(nested))


@torch.no_grad()
def test_each_path_runs_on_its_own_tokens() -> None:
    model, images = SWIN.sparsified(), SWIN.images()
    seen: dict[str, list[int]] = {"slow": [], "fast": []}
    for path in paths(model):
        path.part.last.fc1.register_forward_pre_hook(lambda module, args: seen["slow"].append(args[0][..., 0].numel()))
        path.linear.register_forward_pre_hook(lambda module, args: seen["fast"].append(args[0][..., 0].numel()))
    SWIN.run(model, images)
    assert seen["slow"] == [len(images) * count for count in COUNTS]
    assert seen["fast"] == [len(images) * (NUM_TOKENS - count) for count in COUNTS]


@torch.no_grad()
def test_a_block_is_the_formula() -> None:
    """Out = x + m·MLP(LN x) + (1 − m)·Fast(x), with the decision of the stage in front."""
    model, images = SWIN.sparsified(torch.float64), SWIN.images(dtype=torch.float64)
    block, path = model.tokenprune.backbone.blocks[3], paths(model)[0]
    given: list[Tensor] = []
    block.norm2.register_forward_pre_hook(lambda module, args: given.append(args[0]), prepend=True)
    block.register_forward_hook(lambda module, args, output: given.append(output))
    SWIN.run(model, images)
    x, out = (one.reshape(len(images), NUM_TOKENS, -1) for one in given)
    m = model.tokenprune.trace.keep[0].unsqueeze(-1)
    with tokenprune.dense(model):
        slow = block.mlp(block.norm2(x))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + path.norm.eps).sqrt()
    fast = (normed * path.norm.weight + path.norm.bias) @ path.linear.weight.T + path.linear.bias
    torch.testing.assert_close(out, x + m * slow + (1 - m) * fast, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_response_norm_sees_kept_tokens_alone() -> None:
    model, images = RESPONSE_NORM.sparsified(), RESPONSE_NORM.images()
    block = model.tokenprune.backbone.blocks[3]
    seen: list[Tensor] = []
    block.mlp.grn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        RESPONSE_NORM.run(model, images)
        empty = seen[-1].flatten(2).abs().sum(dim=1) == 0  # (B, N)
        assert torch.equal(empty, model.tokenprune.trace.keep[0] == 0)


@every_kind
def test_every_scorer_and_every_fast_path_gets_a_gradient(case: Hierarchy) -> None:
    torch.manual_seed(0)
    model = case.sparsified().train()
    sum(output.square().mean() for output in case.run(model, case.images()).values()).backward()
    names = [name for name, _ in model.tokenprune.named_parameters()]
    assert any(".scorer." in name for name in names) and any(".paths." in name for name in names)
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_gradient_of_a_decision_is_the_difference_of_the_paths() -> None:
    """∂L/∂m = g · (MLP(LN x) − Fast(x)), by finite differences of what the mask execution computes."""
    model = CONVNEXT.sparsified(torch.float64)
    model.tokenprune.execution = "mask"
    images = CONVNEXT.images(1, torch.float64)
    keep: list[Tensor] = []

    def record(stage: Any, args: Any, output: Any) -> None:
        keep.append(output)

    original = model.tokenprune.stages[0].prune

    def prune(*args: Any, **kwargs: Any) -> Any:
        tokens, selection = original(*args, **kwargs)
        keep.append((selection.keep + shift).requires_grad_(bool(shift.abs().sum() == 0)))
        return tokens, selection.replace(keep=keep[-1])

    model.tokenprune.stages[0].__dict__["prune"] = prune
    shift = torch.zeros(1, NUM_TOKENS, dtype=torch.float64)
    with torch.enable_grad():
        CONVNEXT.run(model, images)["output"].sum().backward()
    gradient, position, step = keep[0].grad, 7, 1e-6
    totals = []
    for sign in (1, -1):
        shift = torch.zeros(1, NUM_TOKENS, dtype=torch.float64)
        shift[0, position] = sign * step
        with torch.no_grad():
            totals.append(CONVNEXT.run(model, images)["output"].sum())
    torch.testing.assert_close(gradient[0, position], (totals[0] - totals[1]) / (2 * step), rtol=1e-5, atol=1e-9)


@swin_and_convnext
def test_activation_checkpointing_changes_no_gradient(case: Hierarchy) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = case.sparsified(torch.float64).train()
        if checkpointed:
            for block in model.tokenprune.backbone.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(3)
        case.run(model, case.images(dtype=torch.float64))["output"].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


@every_kind
@torch.no_grad()
def test_undo_is_exact(case: Hierarchy) -> None:
    model, images = case.model(), case.images()
    before, keys, hooks = case.run(model, images), list(model.state_dict()), hook_counts(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    tokenprune.sparsify(model, pruned="fast")
    assert [key for key in model.state_dict() if not key.startswith("tokenprune.")] == keys
    case.run(model, images)
    tokenprune.unsparsify(model)
    assert list(model.state_dict()) == keys and hook_counts(model) == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    after = case.run(model, images)
    assert all(torch.equal(after[name], before[name]) for name in before)


@swin_and_convnext
@torch.no_grad()
def test_copies_and_saved_models_are_the_same(case: Hierarchy, tmp_path: Any) -> None:
    model, images = case.sparsified(), case.images()
    expected = case.run(model, images)
    other = tokenprune.sparsify(case.model(), keep_ratio=KEEP_RATIO, pruned="fast")
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="will need model="):  # timm does not say how deep a class was built
        tokenprune.save_pretrained(model, tmp_path)
    loaded = tokenprune.from_pretrained(tmp_path, model=case.model())
    assert loaded.tokenprune.pruned == "fast" and loaded.tokenprune.plan == model.tokenprune.plan
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, loaded):
        actual = case.run(copied, images)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        tokenprune.unsparsify(copied)
        assert hook_counts(model) != [0] * len(hook_counts(model))


@swin_and_convnext
def test_what_is_saved_is_the_formula(case: Hierarchy) -> None:
    """Per block (1 − k)·N multiply-adds of the MLP less C²; a predictor costs N·(1.625 C² + C/2)."""
    model = case.sparsified()
    report = tokenprune.flops(model, (3, 96, 96))
    width = 32
    mlp = sum(one.numel() for one in model.tokenprune.backbone.blocks[3].mlp.parameters() if one.dim() > 1)
    saved = sum((NUM_TOKENS - count) * (mlp - width**2) for count in COUNTS)
    # fvcore counts a norm as 5 an element; that of the fast path stands in for that of the block.
    scorers = sum(NUM_TOKENS * (1.625 * width**2 + width / 2 + 5 * width) for _ in COUNTS)
    assert report.dense - report.sparse == saved - scorers
    assert sum(report.stages) == scorers + sum((NUM_TOKENS - count) * (width**2 + 5 * width) for count in COUNTS)


@pytest.mark.slow
@swin_and_convnext
@torch.no_grad()
def test_compiled_and_exported(case: Hierarchy) -> None:
    model, images = case.sparsified(), case.images()
    expected = case.run(model, images)["output"]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(model, (images,), strict=False).module()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@swin_and_convnext
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_exported_files_agree(case: Hierarchy, suffix: str, tmp_path: Any) -> None:
    report = tokenprune.export(case.sparsified(), tmp_path / f"model.{suffix}", input_size=(3, 96, 96))
    assert (tmp_path / f"model.{suffix}").is_file() and report


@pytest.mark.slow
@swin_and_convnext
def test_compiled_training_step(case: Hierarchy) -> None:
    model = case.sparsified().train()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(case.images()).square().sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(case.images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.tokenprune.parameters())


@torch.no_grad()
def test_a_flat_model_takes_it_too() -> None:
    for name in ("timm class token", "transformers ViT classifier", "torchvision"):
        case = BY_NAME[name]
        model = case.sparsified(pruned="fast")
        report = tokenprune.verify(model, case.images())
        assert report.passed, report
        assert len(paths(model)) == 4  # blocks 2 to 5
        assert model.tokenprune.trace.layout.num_patches == case.num_patches  # nothing has left the sequence


@swin_and_convnext
def test_distillation_is_over_all_positions_of_the_final_map(case: Hierarchy) -> None:
    teacher = case.model()
    model, images = case.sparsified().train(), case.images()
    parts = tokenprune.DynamicViTLoss(teacher)(model, images, model(images), torch.tensor([0, 1, 2]))
    final = model.tokenprune.trace.tokens
    seen: list[Tensor] = []
    name = next(name for name, one in model.named_modules() if one is model.tokenprune.backbone.final_norm)
    teacher.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        teacher(images)
    assert final.shape == seen[0].shape and final.numel() == 3 * 3 * 3 * 64
    torch.testing.assert_close(parts["distill"], (final - seen[0]).square().mean())
    parts["loss"].backward()


@every_kind
def test_what_is_found_in_the_third_level(case: Hierarchy) -> None:
    model = tokenprune.sparsify(case.model(), pruned="fast")
    backbone = model.tokenprune.backbone
    assert backbone.reach == LEVEL and len(backbone.blocks) == 7 and backbone.embed_dim == 32
    assert [(level.start, level.stop) for level in backbone.hierarchy.levels] == [(0, 1), (1, 2), (2, 6), (6, 7)]
    assert [level.embed_dim for level in backbone.hierarchy.levels] == [8, 16, 32, 64]
    assert model.tokenprune.plan.stages == (3, 4, 5)
    assert all(len(parts) == 1 and (parts[0].mixing is not None) is case.mixes for parts in backbone.token_wise)


def test_a_norm_over_all_tokens_is_no_part() -> None:
    """Although tokens are so much alike that a few of them have nearly the mean and variance of all."""
    (case,) = [one for one in ALL if one.name == "timm PoolFormer"]
    model = tokenprune.sparsify(case.model(), pruned="fast")
    assert {type(path.part.first).__name__ for path in paths(model)} == {"Mlp"}


@torch.no_grad()
def test_channels_are_told_from_as_many_rows_by_what_runs_over_them() -> None:
    """At 256 pixels the only level with a part is (B, 64, 64, 64), with 1 x 1 convolutions."""
    torch.manual_seed(0)
    model: Any = tokenprune.sparsify(timm.create_model("mobilevit_s").eval(), keep_ratio=0.6, pruned="fast")
    assert model.tokenprune.backbone.adaptations[0].channels_first
    model(torch.randn(2, 3, 128, 96))
    assert model.tokenprune.trace.grid == (32, 24)


def test_stages_choose_the_level() -> None:
    model = tokenprune.sparsify(SWIN.model(), stages=(1,), keep_ratio=0.5, pruned="fast")
    assert model.tokenprune.backbone.embed_dim == 16
    assert tokenprune.verify(model, SWIN.images()).passed
    assert model.tokenprune.trace.grid == (12, 12)
    fresh = SWIN.model()
    with pytest.raises(tokenprune.PlanError, match=r"stand in 2 levels of a hierarchy.*0 … 0, 1 … 1, 2 … 5, 6 … 6"):
        tokenprune.sparsify(fresh, stages=(1, 3), pruned="fast")
    with pytest.raises(tokenprune.PlanError, match="stage 9 is out of range"):
        tokenprune.sparsify(fresh, stages=(9,), pruned="fast")
    with pytest.raises(tokenprune.PlanError, match="stages=3: expected a sequence"):
        tokenprune.sparsify(fresh, stages=3, pruned="fast")
    assert not hasattr(fresh, "tokenprune")


def test_what_takes_tokens_out_of_a_hierarchy_is_refused() -> None:
    model = SWIN.model()
    hooks = hook_counts(model)
    for pruned in ("drop", "preserve", "fuse", "merge"):
        with pytest.raises(
            tokenprune.UnsupportedModelError,
            match=r"^SwinTransformer has no flat list of blocks.*as windows.*pass pruned='fast'",
        ):
            tokenprune.sparsify(model, pruned=pruned)
    with pytest.raises(tokenprune.UnsupportedModelError, match="attend within windows"):
        tokenprune.sparsify(model, pruned="fast", scorer="cls_attention")
    assert hook_counts(model) == hooks


def test_stages_must_agree() -> None:
    kinds = iter([Fast, tokenprune.pruning.reductions.Drop])

    def build(context: tokenprune.ReductionContext) -> tokenprune.Reduction:
        kind = next(kinds)
        return kind(context) if kind is Fast else kind()

    with pytest.raises(tokenprune.UnsupportedModelError, match="makes the same kind for all stages"):
        tokenprune.sparsify(BY_NAME["timm class token"].model(), stages=(2, 4), pruned=build)

"""Reductions: the protocol of proof for each, what they compute, and where they are refused."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.census.lookup import census_model
from tests.helpers.gradients import assert_same_gradients, enable_checkpointing, gradients
from tests.helpers.outputs import assert_close
from tests.helpers.refusals import refused
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tests.helpers.zoo import BY_NAME, KEEP_RATIO, NUM_PATCHES, STAGES, Case, every_model, hook_counts
from tokenprune import Split
from tokenprune.pruning.executions import Execution, execution_class, executions
from tokenprune.pruning.reductions import Fuse, Merge, reduction_names
from tokenprune.tokens import output_tokens

REDUCTIONS = reduction_names()
NEW = ("fuse", "merge", "fuse_preserve", "merge_preserve")
SIZED = ("merge_sizes", "merge_sizes_preserve")
TOLERANCE = MASK_EQUALS_GATHER[torch.float32]
_sized = [pytest.param(name, marks=pytest.mark.slow) for name in SIZED]  # as merging, but for attention
every_reduction = pytest.mark.parametrize("pruned", [*(name for name in REDUCTIONS if name not in SIZED), *_sized])
every_new_reduction = pytest.mark.parametrize("pruned", [*NEW, *_sized])
KINDS = ("timm class token", "timm no class token, average", "timm registers alone, average", "timm LV-ViT",
         "transformers ViT classifier", "transformers DINOv2 registers classifier", "torchvision")  # fmt: skip
some_models = pytest.mark.parametrize("case", [BY_NAME[name] for name in KINDS], ids=str)


def test_the_built_in_ones_are_there() -> None:
    assert set(REDUCTIONS) >= {"drop", "preserve", *NEW, *SIZED}


# The protocol of proof


@every_model
@every_new_reduction
@pytest.mark.parametrize("dtype", MASK_EQUALS_GATHER, ids=str)
@torch.no_grad()
def test_mask_equals_gather(case: Case, pruned: str, dtype: torch.dtype) -> None:
    model, images = case.sparsified(dtype, pruned=pruned), case.images(dtype=dtype)
    gathered = case.run(model, images)
    kept = model.tokenprune.trace.keep
    model.tokenprune.execution = "mask"
    masked = case.run(model, images)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.keep, kept, strict=True))
    assert_close(masked, gathered, MASK_EQUALS_GATHER[dtype])
    plain = case.sparsified(dtype, pruned="preserve" if "preserve" in pruned else "drop")
    assert max((gathered[name] - output).abs().max() for name, output in case.run(plain, images).items()) > 1e-4


@some_models
@every_reduction
@torch.no_grad()
def test_nothing_pruned_is_the_dense_model(case: Case, pruned: str) -> None:
    model, images = case.model(), case.images()
    before = case.run(model, images)
    tokenprune.sparsify(model, STAGES, 1.0, pruned=pruned)
    for execution in executions():
        model.tokenprune.execution = execution
        assert_close(case.run(model, images), before, IDENTITY)


@some_models
@every_reduction
@torch.no_grad()
def test_nothing_pruned_is_the_dense_model_with_every_stage_at_work(
    case: Case, pruned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ratio 1 stages are skipped as a rule; here they score, decide, gather and mask all the same."""
    for name in executions():
        monkeypatch.setattr(execution_class(name), "keeps_all", lambda *args, **options: False)
    model, images = case.model(), case.images()
    before = case.run(model, images)
    tokenprune.sparsify(model, STAGES, 1.0, pruned=pruned)
    for execution in executions():
        model.tokenprune.execution = execution
        if model.tokenprune.stages[0].reduction.num_summary:
            continue  # a token that sums up nothing is one too many where tokens are removed
        assert_close(case.run(model, images), before, TOLERANCE)
        assert not any(selection.all_kept for selection in model.tokenprune.trace.selections)


@some_models
@every_reduction
def test_gradients_reach_every_scorer(case: Case, pruned: str) -> None:
    model = case.sparsified(pruned=pruned).train()
    torch.manual_seed(0)
    for parameter in model.tokenprune.parameters():
        if not parameter.any():  # the norm in front of a linear layer that starts at 0 has no gradient yet
            torch.nn.init.normal_(parameter, std=0.02)
    loss = sum(output.square().mean() for output in case.run(model, case.images()).values())
    if "fast" in pruned:  # the path in the last block changes patch tokens alone, which a class token does not see
        loss = loss + model.tokenprune.trace.tokens[..., 0].square().mean()
    loss.backward()
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@some_models
@every_reduction
@torch.no_grad()
def test_undo_copies_and_state_dicts(case: Case, pruned: str) -> None:
    model, images = case.model(), case.images()
    before, hooks = case.run(model, images), hook_counts(model)
    tokenprune.unsparsify(tokenprune.sparsify(model, STAGES, KEEP_RATIO, pruned=pruned))
    assert hook_counts(model) == hooks
    assert all(torch.equal(output, before[name]) for name, output in case.run(model, images).items())

    model = case.sparsified(pruned=pruned)
    expected = case.run(model, images)
    loaded = tokenprune.sparsify(case.model(), STAGES, KEEP_RATIO, pruned=pruned)
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert all(torch.equal(output, expected[name]) for name, output in case.run(other, images).items())
        assert other.tokenprune.pruned == pruned


@pytest.mark.parametrize("name", ["timm class token", "transformers ViT classifier", "torchvision"])
@every_new_reduction
@torch.no_grad()
def test_saved_and_loaded(name: str, pruned: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model, images = case.sparsified(pruned=pruned), case.images()
    tokenprune.save_pretrained(model, tmp_path)
    loaded = tokenprune.from_pretrained(tmp_path)
    assert loaded.tokenprune.pruned == pruned
    expected = case.run(model, images)
    assert all(torch.equal(output, expected[key]) for key, output in case.run(loaded, images).items())


@pytest.mark.parametrize(
    "name",
    [
        "timm class token",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("transformers ViT classifier", "torchvision")),
    ],
)
@pytest.mark.parametrize(
    "pruned",
    ["fuse", *(pytest.param(name, marks=pytest.mark.slow) for name in ("merge", "fuse_preserve", "merge_preserve"))],
)
@torch.no_grad()
def test_compiled_and_exported(name: str, pruned: str) -> None:
    case = BY_NAME[name]
    model, images = case.sparsified(pruned=pruned), case.images()
    expected = case.run(model, images)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (case.images(4),), dynamic_shapes=shapes, strict=False)
    for actual in (case.run(compiled, images), case.run(program.module(), images)):
        assert_close(actual, expected, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("name", ["timm class token", "transformers ViT classifier", "torchvision"])
@every_new_reduction
def test_files_agree(name: str, pruned: str, suffix: str, tmp_path: Path) -> None:
    model = BY_NAME[name].sparsified(pruned=pruned)
    report = tokenprune.export(model, tmp_path / f"model.{suffix}", input_size=(3, 48, 48))
    assert max(report.differences) <= 1e-4


@pytest.mark.parametrize("name", ["timm class token", "transformers ViT classifier"])
@every_new_reduction
def test_checkpointed_blocks_see_the_same_decisions(name: str, pruned: str) -> None:
    case = BY_NAME[name]
    model, images = case.sparsified(pruned=pruned).train(), case.images()
    expected = gradients(case, model, images)
    enable_checkpointing(model)
    assert_same_gradients(gradients(case, model, images), expected, 1e-5)


@pytest.mark.parametrize("name", ["timm class token", "transformers ViT classifier"])
@every_reduction
def test_checkpointed_blocks_of_which_nothing_is_pruned(name: str, pruned: str) -> None:
    """Also behind a pass in which something was."""
    case = BY_NAME[name]
    model, images = case.sparsified(pruned=pruned).train(), case.images()
    model.tokenprune.keep_ratio = 1.0
    expected = gradients(case, model, images)
    enable_checkpointing(model)
    assert_same_gradients(gradients(case, model, images), expected, 1e-5)
    model.tokenprune.keep_ratio = (1.0, 0.5)
    gradients(case, model, images)
    model.tokenprune.keep_ratio = 1.0
    assert_same_gradients(gradients(case, model, images), expected, 1e-5)


@some_models
@every_new_reduction
def test_autocast_in_training(case: Case, pruned: str) -> None:
    model = case.sparsified(pruned=pruned).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = case.run(model, case.images())
    sum(output.float().square().mean() for output in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.tokenprune.parameters())


@some_models
@every_new_reduction
def test_verify_and_flops(case: Case, pruned: str) -> None:
    model = case.sparsified(pruned=pruned)
    report = tokenprune.verify(model, case.images(), tolerance=TOLERANCE)
    assert report.passed, str(report)
    size = (3, *case.image_size)
    plain, counted = tokenprune.flops(case.sparsified(), size), tokenprune.flops(model, size)
    tokens, width = case.num_prefix_tokens + NUM_PATCHES, model.tokenprune.backbone.embed_dim
    if pruned.startswith("merge"):
        assert counted.sparse_blocks == plain.sparse_blocks
        # Similarities, each token with each; the same again for sums, but by sizes, which are added up where they go.
        # Nothing else of that size.
        products = 1 if pruned in SIZED else 2
        reached = (NUM_PATCHES, model.tokenprune.plan.num_keep(NUM_PATCHES)[0])
        for stage, number in enumerate(reached):
            extra = (counted.stages[stage] - plain.stages[stage]) / (number**2 * width)
            assert products <= extra <= products + 0.2
    else:
        assert counted.sparse_blocks[: STAGES[0]] == plain.sparse_blocks[: STAGES[0]]
        assert all(after > before for after, before in zip(
            counted.sparse_blocks[STAGES[0] :], plain.sparse_blocks[STAGES[0] :], strict=True
        ))  # fmt: skip
        kept = model.tokenprune.plan.num_keep(NUM_PATCHES)[0]
        share = counted.sparse_blocks[STAGES[0]] / counted.dense_blocks[STAGES[0]]
        left = kept + 1 + case.num_prefix_tokens
        assert (left / tokens) ** 2 <= share <= left / tokens  # one token more than without


# What they compute


def split_of(batch: int = 2, number: int = 9, width: int = 6) -> Split:
    """Tokens of which the last two of each image were pruned earlier, and others now."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(batch, number, width, generator=generator, dtype=torch.float64)
    keep = torch.zeros(batch, number, dtype=torch.float64)
    keep[0, [0, 3, 4]], keep[1, [1, 5, 6]] = 1, 1
    pruned = 1 - keep
    pruned[:, -2:] = 0
    return Split(patches, keep, pruned, torch.rand(batch, number, generator=generator, dtype=torch.float64))


def test_fuse_is_the_weighted_mean_of_what_was_pruned() -> None:
    split = split_of()
    summary = Fuse()(split).summary
    for image in range(2):
        chosen = split.pruned[image].nonzero().flatten()
        weights = split.importance[image, chosen]
        expected = (weights[:, None] * split.patches[image, chosen]).sum(0) / weights.sum()
        torch.testing.assert_close(summary[image, 0], expected, rtol=0, atol=1e-12)
    unweighted = Fuse()(split._replace(importance=torch.zeros_like(split.importance))).summary
    chosen = split.pruned[1].nonzero().flatten()
    torch.testing.assert_close(unweighted[1, 0], split.patches[1, chosen].mean(0), rtol=0, atol=1e-12)
    nothing = Fuse()(split._replace(pruned=torch.zeros_like(split.pruned))).summary
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_merge_folds_into_the_most_similar_kept_token() -> None:
    """TPS' formula, arXiv 2304.10716, token by token."""
    split = split_of()
    merged = Merge()(split)
    for image in range(2):
        x, keep, pruned = split.patches[image], split.keep[image], split.pruned[image]
        kept = keep.nonzero().flatten().tolist()
        total = {host: math.e * x[host] for host in kept}
        weight = dict.fromkeys(kept, math.e)
        for token in range(len(x)):
            similarity = {host: F.cosine_similarity(x[token], x[host], dim=0).item() for host in kept}
            host = max(similarity, key=similarity.__getitem__)
            if pruned[token]:
                assert merged.hosts[image, token] == host
                total[host] = total[host] + math.exp(similarity[host]) * x[token]
                weight[host] += math.exp(similarity[host])
            else:
                assert merged.hosts[image, token] == token
        for host in kept:
            torch.testing.assert_close(merged.patches[image, host], total[host] / weight[host], rtol=0, atol=1e-12)


def test_merge_tells_each_decision_what_it_costs() -> None:
    """The gradient of a decision is that of the formula: what its token would give its host."""
    split = split_of()
    keep = split.keep.clone().requires_grad_()
    alive = split.keep + split.pruned
    Merge()(split._replace(keep=keep, pruned=alive - keep)).patches.square().sum().backward()
    assert keep.grad.isfinite().all()
    assert (keep.grad[alive == 1] != 0).all() and (keep.grad[alive == 0] != 0).any()


@torch.no_grad()
def test_merged_tokens_are_restored_in_the_state_of_their_hosts() -> None:
    case = BY_NAME["timm class token"]
    model = case.sparsified(pruned="merge_preserve")
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: seen.append(output_tokens(output)))
    for execution in executions():
        seen.clear()
        model.tokenprune.execution = execution
        case.run(model, case.images())
        for stage, selection in enumerate(model.tokenprune.trace.selections):
            keep = selection.keep_of_grid(NUM_PATCHES).bool()
            hosts = selection.hosts
            assert keep.gather(1, hosts).all(), "a host was pruned itself"
            assert torch.equal(hosts[keep], torch.arange(NUM_PATCHES).expand_as(hosts)[keep])
            patches = seen[STAGES[stage]][:, 1:]
            rows = torch.arange(len(hosts))[:, None]
            torch.testing.assert_close(patches, patches[rows, hosts], rtol=0, atol=1e-6)
            assert not (patches[~keep] == 0).all()


@torch.no_grad()
def test_fused_tokens_go_beside_the_grid_where_all_are_restored() -> None:
    case = BY_NAME["transformers ViT classifier"]
    beside, plain = case.sparsified(pruned="fuse_preserve"), case.sparsified(pruned="fuse")
    images = case.images()
    lengths: list[int] = []
    for block in beside.tokenprune.backbone.blocks:
        block.register_forward_hook(lambda block, args, output: lengths.append(output_tokens(output).shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(
            case.run(beside, images)["logits"], case.run(plain, images)["logits"], rtol=0, atol=1e-5
        )
    assert set(lengths) == {NUM_PATCHES + 1}


def test_in_training_a_summary_of_nothing_is_not_seen() -> None:
    """Where by chance all tokens of an image are kept, the other tokens get what they get without a summary."""
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(pruned="fuse"), case.images()
    reference = case.sparsified()

    class KeepsFirst(tokenprune.Scorer):
        """Log-odds so large that the first image keeps all."""

        probabilistic = True

        def forward(self, candidates: tokenprune.Candidates) -> Tensor:
            scores = torch.zeros(candidates.patches.shape[:2])
            scores[0] = 60.0
            return scores

    for sparse in (model, reference):
        sparse.train()
        for stage in sparse.tokenprune.stages:
            stage.scorer = KeepsFirst()
    torch.manual_seed(0)
    fused = case.run(model, images)["output"]
    assert model.tokenprune.trace.selections[0].summaries[:, 0].tolist() == [0.0, 1.0, 1.0]
    torch.manual_seed(0)
    dropped = case.run(reference, images)["output"]
    torch.testing.assert_close(fused[0], dropped[0], rtol=0, atol=1e-5)
    assert (fused[1] - dropped[1]).abs().max() > 1e-3


def test_a_summary_of_nothing_has_no_gradient_to_speak_of() -> None:
    """Where a loss looks at all tokens, that of the summary included."""
    case = BY_NAME["transformers ViT"]
    model = case.sparsified(pruned="fuse").train()
    for stage in model.tokenprune.stages:
        stage.scorer.out_conv[-1].bias.data[0] = 60.0  # all are kept
    model(case.images()).last_hidden_state.square().mean().backward()
    assert (model.tokenprune.trace.selections[-1].summaries == 0).all()
    assert max(float(parameter.grad.abs().max()) for parameter in model.tokenprune.parameters()) < 1


@torch.no_grad()
def test_executions_agree_on_a_stage_that_rounds_to_what_reaches_it() -> None:
    case = BY_NAME["transformers ViT"]
    model = case.sparsified(pruned="fuse")
    model.tokenprune.keep_ratio = (0.6, 0.59)  # 21 of 36 both times
    lengths = set()
    for execution in executions():
        model.tokenprune.execution = execution
        model(case.images())
        lengths.add(model.tokenprune.trace.layout.num_summary)
    assert lengths == {1} and tokenprune.verify(model, case.images()).passed


# Where they are refused


@pytest.mark.parametrize("pruned", ["fuse", "fuse_preserve"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_rope_224", "'rope', with an entry for each token"),
        ("beit_base_patch16_224", "a bias for each pair of tokens"),
        ("vit_relpos_small_patch16_224", "a bias for each pair of tokens"),
        ("convit_tiny", "a table with an entry for each token"),
        ("volo_d1_224", "tokens stand in a grid"),
        ("BeitModel", "a bias for each pair of tokens"),
        ("DINOv3ViTModel", "'position_embeddings', with an entry for each token"),
        ("VJEPA2ForVideoClassification", "its blocks number the tokens"),
    ],
)
def test_summary_tokens_are_refused_where_they_have_no_place(name: str, reason: str, pruned: str) -> None:
    model, _ = census_model(name)
    refused(model, tokenprune.UnsupportedModelError, f"pruned='{pruned}' adds a token.*{reason}", pruned=pruned)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "beit_base_patch16_224", "convit_tiny", "volo_d1_224",
                                  "cait_xxs24_224", "BeitModel", "DINOv3ViTModel"])  # fmt: skip
@pytest.mark.parametrize("pruned", ["merge", "merge_preserve"])
def test_merge_needs_no_place(name: str, pruned: str) -> None:
    model, inputs = census_model(name)
    tokenprune.sparsify(model, (1, 2), KEEP_RATIO, pruned=pruned)
    report = tokenprune.verify(model, inputs)
    assert report.passed, str(report)


def test_a_mask_that_hides_tokens_is_refused_when_it_comes() -> None:
    case = BY_NAME["transformers ViT classifier"]
    model = case.sparsified(pruned="fuse")
    layer = model.tokenprune.backbone.blocks[3]
    mask = torch.ones(3, 1, NUM_PATCHES + 1, NUM_PATCHES + 1, dtype=torch.bool)

    def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0], mask), {name: value for name, value in kwargs.items() if name != "attention_mask"}

    layer.register_forward_pre_hook(give, with_kwargs=True, prepend=True)
    with torch.no_grad():
        expected = case.run(case.sparsified(pruned="fuse"), case.images())["logits"]
        for execution in executions():
            model.tokenprune.execution = execution
            torch.testing.assert_close(case.run(model, case.images())["logits"], expected, rtol=0, atol=1e-5)
            mask[:, :, :, 4] = False
            with pytest.raises(tokenprune.StateError, match="_mask', which hides some tokens"):
                case.run(model, case.images())
            mask[:] = True


def test_executions_are_classes_of_one_base() -> None:
    assert all(issubclass(execution_class(name), Execution) for name in executions())

"""ToMe as a combination: a scorer that matches, a reduction with sizes, proportional attention, stages in blocks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.census.lookup import census_model
from tests.helpers.attention import outputs_of
from tests.helpers.command_line import fields
from tests.helpers.refusals import refused
from tests.helpers.saved import save
from tests.helpers.tolerances import TOME
from tests.helpers.tome import tome_tokens
from tests.helpers.zoo import BY_NAME, DEPTH, EMBED_DIM, NUM_PATCHES, Case, hook_counts, models
from tokenprune.pruning.executions import execution_class, executions
from tokenprune.scorers import Candidates, ToMe

MLPS = {
    "timm class token": "blocks.0.mlp.fc1",
    "timm no class token, average": "blocks.0.mlp.fc1",
    "torchvision": "encoder.layers.encoder_layer_0.mlp.0",
}
EVERY_BLOCK, R = range(DEPTH), 4
COMBINED: dict[str, Any] = {"scorer": "tome", "pruned": "merge_sizes"}


def tome(case: Case, r: int = R, **options: Any) -> nn.Module:
    """A case's model with ToMe in every block."""
    ratios = tokenprune.tome_keep_ratios(case.num_patches, r=r, num_stages=DEPTH)
    return tokenprune.sparsify(case.model(), EVERY_BLOCK, ratios, **{**COMBINED, **options})


def executions_of(model: nn.Module) -> list[str]:
    """The executions in which a sparsified model can run."""
    return [name for name in executions() if not execution_class(name).obstacles(model.tokenprune.backbone)]


@pytest.mark.parametrize("execution", ["gather", "mask", "varlen"])
@pytest.mark.parametrize("r", [8, 13])
@torch.no_grad()
def test_it_is_the_papers_algorithm_at_the_size_of_deit_s(r: int, execution: str) -> None:
    torch.manual_seed(r)
    model = timm.create_model("deit_small_patch16_224").eval()
    for parameter in model.parameters():  # beyond the start, where all tokens are much alike
        parameter.mul_(1.5)
    images = torch.randn(2, 3, 224, 224)
    expected, sizes = tome_tokens(model, images, r)
    ratios = tokenprune.tome_keep_ratios(196, r=r, num_stages=12)
    tokenprune.sparsify(model, range(12), ratios, **COMBINED)
    model.tokenprune.execution = execution
    with outputs_of(model.norm) as seen:
        model(images)
    actual = seen[0]
    assert model.tokenprune.plan.num_keep(196) == tuple(196 - r * (i + 1) for i in range(12))
    torch.testing.assert_close(actual[:, 0], expected[:, 0], rtol=0, atol=TOME)
    selection = model.tokenprune.trace.selections[-1]
    kept = model.tokenprune.trace.keep[-1] > 0
    patches, counted = actual[:, 1:], selection.sizes
    if execution == "mask":
        patches, counted = patches[kept].unflatten(0, (2, -1)), counted[kept].unflatten(0, (2, -1))
    # The paper's tokens stand in another order.
    order, reference = patches[..., 0].argsort(dim=1), expected[:, 1:, 0].argsort(dim=1)
    for b in range(2):
        torch.testing.assert_close(patches[b, order[b]], expected[b, 1:][reference[b]], rtol=0, atol=TOME)
        assert torch.equal(counted[b, order[b]], sizes[b, 1:][reference[b]])
        assert counted[b].sum() == 196 and counted[b].max() > 2


@models(
    "timm class token",
    "timm distilled",
    "timm registers, layer scale, q/k norm, no class position",
    "timm no class token, average",
    "timm post-norm blocks",
    "timm LV-ViT",
    "transformers ViT classifier",
    "transformers DINOv2 registers",
    "transformers SigLIP",
    "transformers CLIP",
    "torchvision",
)
@torch.no_grad()
def test_executions_agree(case: Case) -> None:
    model, images = tome(case), case.images()
    before = hook_counts(case.model())
    gathered, kept = case.run(model, images), model.tokenprune.trace.keep
    assert [int(keep[0].sum()) for keep in kept] == [*model.tokenprune.plan.num_keep(NUM_PATCHES)]
    for execution in executions_of(model):
        model.tokenprune.execution = execution
        other = case.run(model, images)
        assert all(torch.equal(one, two) for one, two in zip(kept, model.tokenprune.trace.keep, strict=True))
        for name in gathered:
            torch.testing.assert_close(other[name], gathered[name], rtol=0, atol=1e-4)
    with tokenprune.dense(model):
        dense = case.run(model, images)
    expected = case.run(case.model(), images)
    assert all(torch.equal(dense[name], expected[name]) for name in dense)
    assert any(not torch.allclose(dense[name], gathered[name], atol=1e-3) for name in gathered)
    assert hook_counts(tokenprune.unsparsify(model)) == before


@models("timm class token", "transformers SigLIP", "torchvision")
@torch.no_grad()
def test_nothing_merged_is_the_dense_model(case: Case) -> None:
    model, images = tome(case, r=0), case.images()
    expected = case.run(case.model(), images)
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        actual = case.run(model, images)
        for name in actual:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6)


@models("timm class token", "transformers ViT classifier", "torchvision")
def test_verify_passes(case: Case) -> None:
    assert tokenprune.verify(tome(case), case.images()).passed


@pytest.mark.parametrize(
    ("scorer", "pruned"), [("predictor", "merge_sizes"), ("cls_attention", "merge_sizes_preserve")]
)
@models("timm class token", "transformers SigLIP", "torchvision")
@torch.no_grad()
def test_sizes_go_with_other_scorers(case: Case, scorer: str, pruned: str) -> None:
    model, images = case.sparsified(scorer=scorer, pruned=pruned), case.images()
    gathered = case.run(model, images)
    sizes = model.tokenprune.trace.selections[-1].sizes
    assert sizes.shape == (3, 12) and torch.equal(sizes.sum(dim=1), torch.full((3,), 36.0))
    for execution in executions_of(model):
        model.tokenprune.execution = execution
        other = case.run(model, images)
        for name in gathered:
            torch.testing.assert_close(other[name], gathered[name], rtol=0, atol=1e-4)
    plain = case.run(case.sparsified(scorer=scorer, pruned="merge"), images)
    assert any(not torch.allclose(plain[name], gathered[name], atol=1e-3) for name in gathered)


def test_it_trains() -> None:
    case = BY_NAME["timm class token"]
    model, images = tome(case).train(), case.images()
    model(images).square().mean().backward()
    gradients = [parameter.grad for parameter in model.blocks[0].parameters() if parameter.dim() > 1]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    learned = case.sparsified(pruned="merge_sizes").train()
    learned(images).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in learned.tokenprune.parameters())


@models("timm class token", "timm no class token, average", "torchvision")
def test_its_cost_is_counted(case: Case) -> None:
    report = tokenprune.flops(tome(case), (3, 48, 48))
    prefix, left, heads = case.num_prefix_tokens, NUM_PATCHES, 2
    for keep, counted in zip(tome(case).tokenprune.plan.num_keep(NUM_PATCHES), report.stages, strict=True):
        length = prefix + left
        of_a, of_b = (length + 1) // 2 - (prefix + 1) // 2, length // 2 - prefix // 2
        assert counted == of_a * of_b * EMBED_DIM // heads
        left = keep
    assert report.sparse < report.dense
    mlp = 2 * case.model().get_submodule(MLPS[case.name]).weight.numel()
    # In a block attention runs over all tokens that come; the MLP, and its norm, over those that are left.
    assert report.dense_blocks[0] - report.sparse_blocks[0] == R * (mlp + 5 * EMBED_DIM)


@models("timm class token", "transformers SigLIP", "torchvision")
@torch.no_grad()
def test_it_is_copied_and_saved(case: Case, tmp_path: Path) -> None:
    model, images = tome(case), case.images()
    expected = case.run(model, images)
    others = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        tokenprune.from_pretrained(save(model, tmp_path)),
    )
    for other in others:
        assert (other.tokenprune.scorer, other.tokenprune.pruned) == ("tome", "merge_sizes")
        actual = case.run(other, images)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
@models("timm class token", "timm no class token, average", "transformers SigLIP", "torchvision")
@torch.no_grad()
def test_compile(case: Case) -> None:
    model, images = tome(case), case.images()
    if torch.__version__ < "2.15" and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        pytest.skip("earlier compilers cannot trace nn.MultiheadAttention inside a function mode")
    expected = case.run(model, images)
    torch.compiler.reset()
    actual = case.run(torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


@pytest.mark.slow
@models("timm class token", "timm no class token, average", "transformers SigLIP", "torchvision")
@torch.no_grad()
def test_export(case: Case) -> None:
    model = tome(case)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (case.images(),), dynamic_shapes=shapes, strict=False)
    expected, actual = case.run(model, case.images(5)), case.run(program.module(), case.images(5))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


@torch.no_grad()
def test_half_precision() -> None:
    case = BY_NAME["timm class token"]
    for execution in ("gather", "mask"):
        model = tome(case)
        model.tokenprune.execution = execution
        with torch.autocast("cpu", torch.bfloat16):
            assert model(case.images()).isfinite().all()
        assert model.to(torch.bfloat16)(case.images().bfloat16()).isfinite().all()


def test_the_command_line_knows_it() -> None:
    report = fields("flops", "test_vit", "--stages", "2,4", "--scorer", "tome", "--pruned", "merge_sizes")["reports"][0]
    assert report["sparse_gmacs"] < report["dense_gmacs"]


def test_keep_ratios_of_r() -> None:
    assert tokenprune.tome_keep_ratios(196, r=13, num_stages=3) == (183 / 196, 170 / 196, 157 / 196)
    assert tokenprune.tome_keep_ratios(10, r=4, num_stages=4) == (0.6, 0.3, 0.2, 0.1)  # half at most
    with pytest.raises(ValueError, match="r=-1"):
        tokenprune.tome_keep_ratios(196, r=-1, num_stages=3)


def test_more_than_half_is_refused() -> None:
    case = BY_NAME["timm class token"]
    refused(
        case.model(), tokenprune.PlanError, "one of these stages is to keep 0.4 of them", keep_ratio=0.4, **COMBINED
    )
    model = tokenprune.sparsify(case.model(), (1, 3), 0.7, **COMBINED)
    model.tokenprune.keep_ratio = 0.4
    with pytest.raises(tokenprune.PlanError, match="merge 22 of 36 tokens at a stage, and can merge 18"):
        model(case.images())
    model.tokenprune.keep_ratio = 0.5
    with torch.no_grad():
        assert model(case.images()).isfinite().all()


@models("timm parallel scaling blocks", "timm parallel things blocks")
def test_blocks_without_a_place_between_attention_and_mlp_are_refused(case: Case) -> None:
    refused(case.model(), tokenprune.UnsupportedModelError, "merges tokens between a block's attention", **COMBINED)


def test_checkpointing_is_refused() -> None:
    case = BY_NAME["timm class token"]
    model = tome(case).train()
    model.set_grad_checkpointing()
    with pytest.raises(tokenprune.StateError, match="inside of which tokens are merged"):
        model(case.images()).sum().backward()


def test_an_interrupted_pass_is_forgotten() -> None:
    case = BY_NAME["timm class token"]
    model, images = tome(case), case.images()
    with torch.no_grad():
        expected = model(images)

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    for module in (model.blocks[2].norm2, model.blocks[2].attn.proj):
        handle = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(images + 1)
        handle.remove()
        with torch.no_grad():
            assert torch.equal(model(images), expected)
        assert torch._C._len_torch_function_stack() == 0


def test_tokens_alternate_in_the_order_that_merging_left() -> None:
    keys = torch.eye(8)[:6].unsqueeze(0)
    scorer, patches = ToMe(), torch.zeros(1, 6, 4)
    prefix = torch.zeros(1, 1, 4)

    def score(keys: Tensor, left: int, keep: Tensor | None, notes: Tensor | None) -> tokenprune.Scored:
        given = Candidates(
            patches, prefix, keep, None, 6, None, keys=keys, num_left=left, num_keep=left - 1, notes=notes
        )
        return scorer(given)

    # A class token in front: patches 1, 3, 5 are in A, 0, 2, 4 in B.
    keys[0, 3] += 5 * keys[0, 4]
    first = score(keys, 6, None, None)
    assert first.scores.argmin() == 3 and first.hosts[0].tolist() == [0, first.hosts[0, 1], 2, 4, 4, first.hosts[0, 5]]
    assert first.scores[0, [0, 2, 4]].tolist() == [2, 2, 2]
    # Then 1, 5 of A stand in front of 0, 2, 4: now 5, 2 are in A, and 1, 0, 4 in B.
    keep = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    second = score(keys, 5, keep, first.notes)
    assert (second.scores[0] == 2).tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (
            lambda scores: tokenprune.Scored(scores, hosts=scores),
            TypeError,
            r"hosts of torch.float32; expected torch.int64",
        ),
        (lambda scores: tokenprune.Scored(scores, hosts=scores[:, 1:].long()), ValueError, r"hosts of shape \(3, 35\)"),
        (lambda scores: tokenprune.Scored(scores, notes=[1]), ValueError, r"notes as a list; expected \(3, 36\)"),
        (lambda scores: tokenprune.Scored(None), TypeError, r"returned a NoneType; expected scores"),
    ],
)
def test_what_is_not_scored_is_refused(returned: Any, error: type[Exception], match: str) -> None:
    class Wrong(tokenprune.Scorer):
        def forward(self, candidates: Candidates) -> Any:
            return returned(candidates.patches.norm(dim=-1))

    case = BY_NAME["timm class token"]
    model = case.sparsified(scorer=lambda context: Wrong(), pruned="merge")
    with pytest.raises(error, match=match):
        model(case.images())


def test_sizes_of_a_wrong_shape_are_refused() -> None:
    class Wrong(tokenprune.Reduction):
        def forward(self, split: tokenprune.Split) -> tokenprune.Reduced:
            return tokenprune.Reduced(split.patches, sizes=split.keep[:, 1:])

    case = BY_NAME["timm class token"]
    model = case.sparsified(scorer="random", pruned=lambda context: Wrong())
    with pytest.raises(ValueError, match=r"Wrong returned sizes of shape \(3, 35\); expected \(3, 36\)"):
        model(case.images())


@torch.no_grad()
def test_hosts_of_the_scorer_are_those_that_other_reductions_take() -> None:
    case = BY_NAME["timm class token"]
    chosen, similar = tome(case, pruned="merge"), tome(case, pruned="merge")
    for stage in similar.tokenprune.stages:
        stage.scorer.register_forward_hook(lambda module, args, output: output._replace(hosts=None))
    images = case.images()
    assert not torch.allclose(chosen(images), similar(images), atol=1e-3)
    gathered = chosen(images)
    chosen.tokenprune.execution = "mask"
    torch.testing.assert_close(chosen(images), gathered, rtol=0, atol=1e-4)


def test_reductions_that_leave_all_tokens_are_refused() -> None:
    case = BY_NAME["timm class token"]
    options = {"scorer": "tome", "pruned": "fast", "stages": (1, 2), "keep_ratio": (0.8, 0.7)}
    refused(case.model(), tokenprune.PlanError, "this reduction leaves all tokens", **options)


def test_blocks_that_hold_their_tokens_as_a_grid_are_refused() -> None:
    model, inputs = census_model("volo_d1_224")
    tokenprune.sparsify(model, (1, 2), 0.8, **COMBINED)
    with pytest.raises(tokenprune.InterceptionError, match=r"instead of tokens \(B, L, C\), which cannot be"):
        model(**inputs)
    assert torch._C._len_torch_function_stack() == 0

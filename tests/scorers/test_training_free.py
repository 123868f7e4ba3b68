"""Scores of tokens that differ: redundancy, and importance × novelty; their formulas, and models pruned by them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenprune
from tests.helpers.attention import Recording
from tests.helpers.command_line import fields
from tests.helpers.saved import save
from tests.helpers.zoo import BY_NAME, EMBED_DIM, KEEP_RATIO, NUM_PATCHES, STAGES, Case, models, some_models
from tokenprune.scorers import Candidates, Informative, Redundancy

SCORERS = ("redundancy", "informative")
both = pytest.mark.parametrize("scorer", SCORERS)


def candidates(patches: Tensor, attention: Tensor | None = None, keep: Tensor | None = None) -> Candidates:
    length = patches.shape[1]
    return Candidates(patches, patches[:, :0], keep, None, length, None, attention)


def cosines(patches: Tensor) -> Tensor:
    return F.cosine_similarity(patches.unsqueeze(2), patches.unsqueeze(1), dim=-1)


def by_hand(similarity: Tensor, importance: Tensor) -> Tensor:
    """1 − the highest similarity (B, n) to a token of higher importance, one token after the other."""
    novelty = torch.ones_like(importance)
    for image, row in enumerate(importance):
        for i, mine in enumerate(row):
            above = [float(similarity[image, i, j]) for j, other in enumerate(row) if other > mine]
            novelty[image, i] = 1 - max([0.0, *above])
    return novelty


def test_redundancy_is_the_formula() -> None:
    patches = torch.randn(2, 9, 16)
    similarity = cosines(patches)
    isolated = 1 - similarity.mean(dim=2)
    expected = isolated * by_hand(similarity, isolated)
    torch.testing.assert_close(Redundancy()(candidates(patches)), expected, rtol=1e-5, atol=1e-6)


def test_informative_is_the_formula() -> None:
    patches, attention = torch.randn(2, 9, 16), torch.rand(2, 9)
    similarity = cosines(patches)
    expected = attention * by_hand(similarity, attention) * (1 - similarity.mean(dim=2))
    torch.testing.assert_close(Informative()(candidates(patches, attention)), expected, rtol=1e-5, atol=1e-6)


def test_of_equal_tokens_one_survives() -> None:
    one, other = torch.eye(8)[:2]
    patches = torch.stack([other, one, one, one]).unsqueeze(0)
    alike = Informative()(candidates(patches, torch.full((1, 4), 0.4)))
    torch.testing.assert_close(alike, torch.tensor([[0.3, 0.1, 0.0, 0.0]]))
    blind = Redundancy()(candidates(patches))
    torch.testing.assert_close(blind, torch.tensor([[0.75, 0.25, 0.0, 0.0]]))
    # Only what matters more makes a token redundant: the last is the best of three, and held back by none.
    ranked = Informative()(candidates(patches, torch.tensor([[0.1, 0.2, 0.3, 0.4]])))
    torch.testing.assert_close(ranked, torch.tensor([[0.075, 0.0, 0.0, 0.1]]))


@both
def test_pruned_tokens_leave_no_trace(scorer: str) -> None:
    patches, attention = torch.randn(2, 12, 16), torch.rand(2, 12)
    kept = torch.stack([torch.randperm(12)[:5].sort().values for _ in range(2)])
    keep = torch.zeros(2, 12).scatter(1, kept, 1.0)
    attention = attention * keep
    build = {"redundancy": Redundancy, "informative": Informative}[scorer]()
    masked = build(candidates(patches, attention, keep)).gather(1, kept)
    left = build(candidates(patches.gather(1, kept[..., None].expand(-1, -1, 16)), attention.gather(1, kept)))
    torch.testing.assert_close(masked, left)
    assert left.std() > 0.01


@both
@torch.no_grad()
def test_scores_do_not_depend_on_the_lengths_of_tokens(scorer: str) -> None:
    patches, attention = torch.randn(2, 9, 16), torch.rand(2, 9)
    build = {"redundancy": Redundancy, "informative": Informative}[scorer]()
    scaled = build(candidates(patches * torch.rand(2, 9, 1).add(0.1) * 1e4, attention))
    torch.testing.assert_close(scaled, build(candidates(patches, attention)), rtol=1e-4, atol=1e-6)


@both
@models(
    "timm class token",
    "timm registers alone, average",
    "timm no class token, average",
    "transformers ViT classifier",
    "transformers DINOv2 registers",
    "transformers SigLIP",
    "torchvision",
)
@torch.no_grad()
def test_mask_equals_gather(case: Case, scorer: str) -> None:
    model, images = case.sparsified(scorer=scorer), case.images()
    gathered, kept = case.run(model, images), model.tokenprune.trace.keep
    model.tokenprune.execution = "mask"
    masked = case.run(model, images)
    assert all(torch.equal(one, other) for one, other in zip(kept, model.tokenprune.trace.keep, strict=True))
    for name in gathered:
        torch.testing.assert_close(masked[name], gathered[name], rtol=0, atol=1e-4)
    with tokenprune.dense(model):
        assert any(not torch.allclose(case.run(model, images)[name], gathered[name], atol=1e-3) for name in gathered)


@torch.no_grad()
def test_informative_takes_the_attention_of_the_block_before() -> None:
    case = BY_NAME["timm class token"]
    recording = tokenprune.sparsify(case.model(), STAGES, KEEP_RATIO, scorer=lambda context: Recording())
    recording(case.images())
    seen = recording.tokenprune.stages[0].scorer.seen
    model = case.sparsified(scorer="informative")
    model(case.images())
    torch.testing.assert_close(model.tokenprune.trace.selections[0].scores, Informative()(seen))


@both
def test_it_prunes_in_training_and_in_half_precision(scorer: str) -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(scorer=scorer).train(), case.images()
    model(images).square().mean().backward()
    assert [keep.sum(dim=1).tolist() for keep in model.tokenprune.trace.keep] == [[21.0] * 3, [12.0] * 3]
    assert all(parameter.grad.abs().max() > 0 for parameter in model.blocks[0].parameters() if parameter.dim() > 1)
    half = copy.deepcopy(model).eval().to(torch.bfloat16)
    for execution in ("gather", "mask"):
        half.tokenprune.execution = execution
        with torch.no_grad():
            assert half(images.bfloat16()).isfinite().all()
            assert half.tokenprune.trace.selections[0].scores.dtype == torch.float32


@torch.no_grad()
def test_redundancy_stands_in_front_of_the_first_block_as_well() -> None:
    case = BY_NAME["timm class token"]
    model = tokenprune.sparsify(case.model(), (0, 3), KEEP_RATIO, scorer="redundancy")
    model(case.images())
    assert [kept.shape[1] for kept in model.tokenprune.trace.indices] == [21, 12]
    with pytest.raises(tokenprune.PlanError, match="scorer='informative' needs attention scores"):
        tokenprune.sparsify(case.model(), (0, 3), KEEP_RATIO, scorer="informative")


@both
@models("timm class token", "timm no class token, average")
def test_its_cost_is_counted(case: Case, scorer: str) -> None:
    size = (3, 48, 48)
    other = "random" if scorer == "redundancy" else "cls_attention"
    extra = tokenprune.flops(case.sparsified(scorer=scorer), size).sparse
    extra -= tokenprune.flops(case.sparsified(scorer=other), size).sparse
    lengths = (NUM_PATCHES, int(NUM_PATCHES * KEEP_RATIO))
    assert extra == sum(length**2 for length in lengths) * EMBED_DIM


@pytest.mark.slow
@both
@some_models
def test_export(case: Case, scorer: str) -> None:
    model = case.sparsified(scorer=scorer)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (case.images(),), dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        expected, actual = case.run(model, case.images(5)), case.run(program.module(), case.images(5))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-4)


@pytest.mark.slow
@both
@torch.no_grad()
def test_compile(scorer: str) -> None:
    case = BY_NAME["timm class token"]
    model, images = case.sparsified(scorer=scorer), case.images()
    expected = model(images)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=0, atol=1e-4)


@both
@models("timm class token", "transformers SigLIP", "torchvision")
@torch.no_grad()
def test_it_is_saved_by_name(case: Case, scorer: str, tmp_path: Path) -> None:
    model = case.sparsified(scorer=scorer)
    loaded: Any = tokenprune.from_pretrained(save(model, tmp_path))
    assert loaded.tokenprune.scorer == scorer
    expected, actual = case.run(model, case.images()), case.run(loaded, case.images())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@both
def test_the_command_line_knows_it(scorer: str) -> None:
    report = fields("flops", "test_vit", "--stages", "2,4", "--scorer", scorer)["reports"][0]
    assert report["sparse_gmacs"] < report["dense_gmacs"]

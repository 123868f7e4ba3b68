"""Budgets by image: thresholds that are calibrated, stored, and used; and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import VARLEN
from tests.helpers.zoo import BY_NAME, KEEP_RATIO, STAGES, Case, models
from tokenprune import Candidates, Scorer, StateError, UnsupportedModelError
from tokenprune.analysis.flop_counter import count
from tokenprune.pruning.record import Record

CASE = BY_NAME["timm class token"]
PLANNED = (21, 12)  # of 36 patches, at 0.6 and 0.36


def calibrated(case: Case = CASE, *, batch: int = 24, **options: Any) -> tuple[nn.Module, Tensor]:
    """A model with thresholds, and the images that they were calibrated on."""
    model, images = case.sparsified(**options), case.images(batch)
    tokenprune.calibrate_budget(model, images.split(8))
    return model, images


def counts(model: nn.Module) -> list[list[int]]:
    return [[len(indices) for indices in stage] for stage in model.tokenprune.trace.indices]


@models("timm class token", "timm no class token, average", "transformers ViT classifier", "torchvision")
@pytest.mark.parametrize(
    ("pruned", "scorer"),
    [("drop", "predictor"), ("fuse", "informative"), ("merge", "cls_attention"), ("preserve", "redundancy")],
)
@torch.no_grad()
def test_the_mean_is_the_plans(case: Case, pruned: str, scorer: str) -> None:
    model, images = calibrated(case, pruned=pruned, scorer=scorer)
    before = case.run(model, images)
    assert model.tokenprune.trace.execution == "gather" and model.tokenprune.budget == "fixed"
    model.tokenprune.budget = "adaptive"
    after, kept = case.run(model, images), counts(model)
    assert model.tokenprune.trace.execution == "varlen"
    for numbers, planned in zip(kept, PLANNED, strict=True):
        assert abs(sum(numbers) / len(images) - planned) <= 1 / len(images)
        assert len({*numbers}) > 1 and min(numbers) >= planned // 4
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3
    some = case.run(model, images[:5])  # how many an image keeps is no matter of the others
    assert counts(model) == [numbers[:5] for numbers in kept]
    assert_close(some, {name: output[:5] for name, output in after.items()}, VARLEN[torch.float32])
    model.tokenprune.execution = "mask"
    assert_close(case.run(model, images), after, VARLEN[torch.float32])


@torch.no_grad()
def test_the_floor_holds_and_the_mean_makes_up_for_it() -> None:
    class Uneven(Scorer):
        def forward(self, candidates: Candidates) -> Tensor:
            scores = candidates.patches.mean(dim=2).sigmoid()
            return scores + (torch.arange(len(scores)) % 4 > 0).to(scores.dtype).unsqueeze(1)  # of three images in four

    model, images = CASE.sparsified(scorer=lambda context: Uneven()), CASE.images(24)
    for floor_ratio, least in ((0.5, (10, 6)), (0.01, (1, 1))):
        (report,) = tokenprune.calibrate_budget(model, [images], floor_ratio=floor_ratio)
        model.tokenprune.budget = "adaptive"
        model(images)
        kept = counts(model)
        assert tuple(min(numbers) for numbers in kept) == least
        assert report.mean_kept == tuple(sum(numbers) / (24 * CASE.num_patches) for numbers in kept)
        assert report.num_images == 24 and report.keep_ratios == (0.6, 0.36)
        assert [max(numbers) for numbers in kept] == [round(36 * max(fractions)) for fractions in report.kept]
        assert "stage 1: 36.0% planned, " in str(report)
        model.tokenprune.budget = "fixed"


def test_calibration_leaves_everything_else_as_it_was() -> None:
    model, images = CASE.sparsified(), CASE.images(8)
    model.train()
    model(images)
    trace, state = model.tokenprune.trace, copy.deepcopy(model.state_dict())
    tokenprune.calibrate_budget(model, [{"x": images, "labels": images}, (images, 3)], keep_ratios=[0.7, (0.5, 0.2)])
    assert model.training and model.tokenprune.trace is trace and model.tokenprune.keep_ratio == (0.6, 0.36)
    assert model.tokenprune.execution == "auto" and model.tokenprune.budget == "fixed"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if "extra" not in name)
    assert [one.keep_ratios for one in model.tokenprune.thresholds] == [(0.7, 0.7**2), (0.5, 0.2)]
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_other_ratios_need_thresholds_of_their_own() -> None:
    model, images = calibrated()
    model.tokenprune.budget = "adaptive"
    with pytest.raises(StateError, match=r"thresholds for the keep ratios \(0.5, 0.25\); calibrated are \(0.6, 0.36\)"):
        model.tokenprune.keep_ratio = 0.5
    assert model.tokenprune.keep_ratio == (0.6, 0.36)
    tokenprune.calibrate_budget(model, [images], keep_ratios=[0.5])
    model.tokenprune.keep_ratio = 0.5
    model(images)
    assert [sum(numbers) / 24 for numbers in counts(model)] == pytest.approx([18, 9], abs=1 / 24)
    model.tokenprune.keep_ratio = 0.6
    model(images)
    assert [sum(numbers) / 24 for numbers in counts(model)] == pytest.approx(PLANNED, abs=1 / 24)
    model.tokenprune.keep_ratio = 1.0
    model(images)
    assert model.tokenprune.trace.selections[-1].all_kept


@torch.no_grad()
def test_a_stage_that_keeps_all_has_no_threshold() -> None:
    model, images = CASE.model(), CASE.images(16)
    tokenprune.sparsify(model, (1, *STAGES), (1.0, 0.6, 0.6))
    (report,) = tokenprune.calibrate_budget(model, [images])
    assert [score is None for score in report.thresholds.scores] == [True, False, True]
    assert report.kept[0] == (1.0,) * 16 and report.kept[1] == report.kept[2]
    model.tokenprune.budget = "adaptive"
    model(images)
    assert tokenprune.flops(model, images=images).mean_gmacs == pytest.approx(tokenprune.flops(
        model, images.shape[1:]).sparse_gmacs, rel=0.02)  # fmt: skip


def test_in_training_decisions_are_sampled_as_ever() -> None:
    model, images = calibrated()
    torch.manual_seed(0)
    expected = model.train()(images)
    model.tokenprune.budget = "adaptive"
    torch.manual_seed(0)
    assert torch.equal(model(images), expected) and model.tokenprune.trace.execution == "mask"


# Stored with the model


@torch.no_grad()
def test_they_go_where_the_weights_go(tmp_path: Path) -> None:
    model, images = calibrated()
    model.tokenprune.budget = "adaptive"
    expected = model(images)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images), expected)
    other = tokenprune.sparsify(CASE.model(), STAGES, KEEP_RATIO)
    other.load_state_dict(model.state_dict())
    assert other.tokenprune.budget == "fixed" and other.tokenprune.thresholds == model.tokenprune.thresholds
    other.tokenprune.budget = "adaptive"
    assert torch.equal(other(images), expected)
    tokenprune.save_pretrained(model, tmp_path / "saved")
    loaded = tokenprune.from_pretrained(tmp_path / "saved", model=CASE.model())
    assert loaded.tokenprune.budget == "adaptive"
    assert torch.equal(loaded(images), expected)


@torch.no_grad()
def test_weights_without_thresholds_take_the_old_ones_away() -> None:
    model, images = calibrated()
    model.tokenprune.budget = "adaptive"
    model.load_state_dict(CASE.sparsified().state_dict())
    with pytest.raises(StateError, match=r"calibrated are none. Call tokenprune.calibrate_budget\(model, images\)"):
        model(images)
    model.tokenprune.budget = "fixed"
    model(images)


def test_old_files_have_none(tmp_path: Path) -> None:
    model = CASE.sparsified()
    tokenprune.save_pretrained(model, tmp_path)
    fields = json.loads((tmp_path / "tokenprune.json").read_text())
    assert "budget" not in fields and "thresholds" not in fields, "a file without them is one that older versions wrote"
    assert tokenprune.from_pretrained(tmp_path, model=CASE.model()).tokenprune.thresholds == ()
    assert Record.from_tensor(model.state_dict()["tokenprune._extra_state"]).budget == "fixed"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"budget": "big"}, "budget='big'"),
        ({"thresholds": 3}, "thresholds=3"),
        ({"thresholds": [{"keep_ratios": [0.6, 0.36]}]}, "are no thresholds for 2 stages"),
        ({"thresholds": [{"keep_ratios": [0.6], "scores": [0.0], "floor_ratio": 0.2}]}, "no thresholds for 2 stages"),
        (
            {"thresholds": [{"keep_ratios": [0.6, 0.36], "scores": ["x", 1], "floor_ratio": 0.2}]},
            "no scores of 2 stages",
        ),
    ],
)
def test_damaged_records_are_refused(entry: dict[str, Any], words: str) -> None:
    fields = CASE.sparsified().tokenprune.record.to_dict()
    with pytest.raises(tokenprune.CheckpointError, match=words):
        Record.from_dict({**fields, **entry})


# What is said of such a model


@pytest.mark.parametrize(
    ("name", "pruned"),
    [
        ("timm class token", "drop"),
        pytest.param("timm attention pool", "fuse", marks=pytest.mark.slow),
        pytest.param("transformers ViT classifier", "merge", marks=pytest.mark.slow),
        pytest.param("timm class token", "preserve", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_multiply_adds_of_each_image(name: str, pruned: str) -> None:
    model, images = calibrated(BY_NAME[name], batch=3, pruned=pruned)
    model.tokenprune.budget = "adaptive"
    report = tokenprune.flops(model, images=images)
    assert report.by_image == tuple(count(model, image)[""] for image in images.split(1))
    assert len({*report.by_image}) > 1 and model.tokenprune.keep_ratio == (0.6, 0.36)
    assert report.mean_gmacs == pytest.approx(report.sparse_gmacs, rel=0.05)
    low, high = report.spread
    assert low < report.mean_gmacs < high and "on average over 3 images, quartiles" in str(report)
    assert json.loads(report.to_json())["by_image"] == [*report.by_image]
    model.tokenprune.budget = "fixed"
    assert {*tokenprune.flops(model, images=images).by_image} == {report.sparse}


def test_what_else_looks_at_such_a_model(tmp_path: Path) -> None:
    model, images = calibrated()
    model.tokenprune.budget = "adaptive"
    assert tokenprune.verify(model, images[:3]).passed and model.tokenprune.budget == "adaptive"
    kept = tokenprune.kept_tokens(model, images)
    assert len({*kept.keep[0].flatten(1).sum(dim=1).tolist()}) > 1 and kept.num_kept(0) == PLANNED[0]
    assert tokenprune.throughput(model, images.shape[1:], batch_size=2, pairs=2, warmup=0).keep_ratios == (0.6, 0.36)
    with pytest.raises(tokenprune.ExportError, match=r"budget is adaptive; set .* = 'fixed'"):
        tokenprune.export(model, tmp_path / "model.pt2", input_size=images.shape[1:])


# What is refused


def test_wrong_use_is_one_clear_error() -> None:
    model, images = CASE.sparsified(), CASE.images(8)
    with pytest.raises(ValueError, match="budget='lavish': choose 'fixed' or 'adaptive'"):
        model.tokenprune.budget = "lavish"
    with pytest.raises(StateError, match=r"calibrated are none\. Call tokenprune\.calibrate_budget"):
        model.tokenprune.budget = "adaptive"
    tokenprune.calibrate_budget(model, [images])
    model.tokenprune.execution = "gather"
    with pytest.raises(StateError, match=r"in 'gather' execution all images keep .* = 'auto' or 'varlen'"):
        model.tokenprune.budget = "adaptive"
    assert model.tokenprune.budget == "fixed"
    model.tokenprune.execution = "auto"
    model.tokenprune.budget = "adaptive"
    with pytest.raises(StateError, match="in 'gather' execution"):
        model.tokenprune.execution = "gather"
    assert model.tokenprune.execution == "auto"


def test_calibration_refuses_what_it_cannot_use() -> None:
    model, images = CASE.sparsified(), CASE.images(8)
    with pytest.raises(StateError, match="not sparsified"):
        tokenprune.calibrate_budget(CASE.model(), [images])
    with tokenprune.dense(model), pytest.raises(StateError, match="runs dense here"):
        tokenprune.calibrate_budget(model, [images])
    with pytest.raises(ValueError, match="floor_ratio=0: expected a fraction"):
        tokenprune.calibrate_budget(model, [images], floor_ratio=0)
    with pytest.raises(TypeError, match="an iterator, which can be read only once"):
        tokenprune.calibrate_budget(model, iter([images]))
    with pytest.raises(ValueError, match="yields no batch"):
        tokenprune.calibrate_budget(model, [])
    with pytest.raises(tokenprune.PlanError, match="outside"):
        tokenprune.calibrate_budget(model, [images], keep_ratios=[1.5])
    assert model.tokenprune.thresholds == () and model.tokenprune.keep_ratio == (0.6, 0.36)


@torch.no_grad()
def test_a_model_that_cannot_be_packed_masks_instead() -> None:
    model = timm.create_model("cait_xxs24_224", img_size=32, depth=4, embed_dim=32, num_heads=2).eval()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokenprune.sparsify(model, (1, 2), 0.5, scorer="random")
    tokenprune.calibrate_budget(model, [images])
    with pytest.raises(UnsupportedModelError, match="cannot run in 'varlen' execution"):
        model.tokenprune.budget = "adaptive"
    model.tokenprune.execution = "mask"
    model.tokenprune.budget = "adaptive"
    model(images)
    assert len({*model.tokenprune.trace.keep[0].sum(dim=1).tolist()}) > 1


def test_calibrate_finds_thresholds_anew() -> None:
    model, images = calibrated()
    tokenprune.calibrate_budget(model, [images], keep_ratios=[0.5], floor_ratio=0.5)
    model.tokenprune.budget = "adaptive"
    before = model.tokenprune.thresholds
    tokenprune.calibrate(model, images.split(4), steps=2, progress=False, keep_ratio_range=None)
    after = model.tokenprune.thresholds
    assert [one.keep_ratios for one in after] == [one.keep_ratios for one in before]
    assert [one.floor_ratio for one in after] == [0.25, 0.5]
    assert all(one.scores != other.scores for one, other in zip(after, before, strict=True))
    assert model.tokenprune.budget == "adaptive"
    other = CASE.sparsified()
    tokenprune.calibrate(other, images.split(4), steps=1, progress=False, keep_ratio_range=None)
    assert other.tokenprune.thresholds == ()
    tokenprune.calibrate(other, images.split(4), steps=1, progress=False, keep_ratio_range=None, adaptive=True)
    assert [one.keep_ratios for one in other.tokenprune.thresholds] == [(0.6, 0.36)]


def test_a_reduction_that_keeps_every_token_has_no_adaptive_budget() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 4, 1), dims=(8, 8, 16, 16)).eval()
    tokenprune.sparsify(model, pruned="fast")
    with pytest.raises(UnsupportedModelError, match="with pruned='fast' every token stays in the sequence"):
        model.tokenprune.budget = "adaptive"

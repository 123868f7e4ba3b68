"""Plans for budgets: counted, measured, held to the dense model's answers; what cannot be met is refused."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import tokenprune
from tests.helpers.refusals import fingerprint
from tests.helpers.tolerances import INTERPOLATED_COST
from tokenprune.analysis.planning import stopwatch
from tokenprune.analysis.planning.costs import PlanCosts
from tokenprune.analysis.planning.search import halves

SIZE = (3, 48, 48)


def small(**options: Any) -> nn.Module:
    """36 patches, 4 blocks of width 32, stages in front of 1, 2 and 3."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=48, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, global_pool="avg", fc_norm=False
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tokenprune.sparsify(model.eval(), **{"scorer": "cls_attention", **options})


def batches(number: int = 2, size: int = 16) -> list[Tensor]:
    return list(torch.randn(number, size, *SIZE, generator=torch.Generator().manual_seed(1)))


def agreement(model: nn.Module, plan: tokenprune.Plan, images: list[Tensor]) -> float:
    """The share of images with the same best class, written out."""
    model.tokenprune.keep_ratio = plan.keep_ratios
    inputs = torch.cat(images)
    with torch.no_grad():
        pruned = model(inputs).argmax(dim=1)
        with tokenprune.dense(model):
            return float((model(inputs).argmax(dim=1) == pruned).float().mean())


def test_the_closed_form_is_the_most_expensive_geometric_plan_within_the_budget() -> None:
    model, budget = small(scorer="predictor"), 0.0016
    plan = tokenprune.plan_for(model, gmacs=budget)
    costs = PlanCosts(model, SIZE)
    assert 0.99 * budget * 1e9 <= costs.counted(plan.keep_ratios) <= budget * 1e9
    geometric = {plan.with_keep_ratio(step / 1000).num_keep(36): step / 1000 for step in range(1, 1000)}
    below = [plan.with_keep_ratio(rho).keep_ratios for rho in geometric.values()]
    best = max((one for one in below if costs.estimated(one) <= budget * 1e9), key=costs.estimated)
    extra = [more - number for more, number in zip(plan.num_keep(36), costs.num_keep(best), strict=True)]
    assert set(extra) <= {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("gmacs", [2.3, 2.6, 3.0, 4.0])
def test_the_budget_is_met_within_one_percent(gmacs: float) -> None:
    model = tokenprune.sparsify(timm.create_model("deit_small_patch16_224"))
    plan = tokenprune.plan_for(model, gmacs=gmacs)
    model.tokenprune.keep_ratio = plan.keep_ratios
    assert 0.99 * gmacs <= tokenprune.flops(model).sparse_gmacs <= gmacs


@pytest.mark.parametrize(
    "options", [{"scorer": "predictor"}, {"pruned": "fuse"}, {"pruned": "merge"}, {"pruned": "preserve"}],
    ids=lambda options: "-".join(options.values()),
)  # fmt: skip
def test_interpolated_costs_are_near_counted_ones(options: dict[str, Any]) -> None:
    model = small(**options)
    costs = PlanCosts(model, SIZE)
    for ratios in ((0.9, 0.6, 0.5), (0.61, 0.5, 0.1), (0.95, 0.4, 0.2), (0.2, 0.1, 0.05)):
        assert costs.estimated(ratios) == pytest.approx(costs.counted(ratios), rel=INTERPOLATED_COST)


def test_the_search_is_nearer_to_the_dense_model_at_the_same_cost() -> None:
    model, images = small(), batches()
    geometric = tokenprune.plan_for(model, gmacs=0.0016)
    searched = tokenprune.plan_for(model, images, gmacs=0.0016)
    assert searched != geometric and searched.stages == geometric.stages
    costs = PlanCosts(model, SIZE)
    for plan in (geometric, searched):
        assert 0.97 * 0.0016 <= costs.counted(plan.keep_ratios) / 1e9 <= 0.0016
    _, held_out = halves(images)
    assert isinstance(held_out[0], Tensor) and agreement(model, searched, held_out) >= agreement(
        model, geometric, held_out
    )


def test_what_does_not_carry_over_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the images that were not searched on say that the search went astray, ρ, ρ², ρ³ is the answer."""
    from tokenprune.analysis.planning import search

    model = small()
    geometric = tokenprune.plan_for(model, gmacs=0.0016)
    monkeypatch.setattr(search.PlanSearch, "_holds_out", lambda self, decays, budget: False)
    assert tokenprune.plan_for(model, batches(), gmacs=0.0016) == geometric


@pytest.mark.parametrize("target", [pytest.param(0.8, marks=pytest.mark.slow), 1.0])
def test_agreement_holds(target: float) -> None:
    model, images = small(), batches()
    plan = tokenprune.plan_for(model, images, agreement=target)
    assert agreement(model, plan, images) >= target
    # A much cheaper one does not, or it would have been found.
    fewer = plan.with_keep_ratio(tuple(0.3 * ratio for ratio in plan.keep_ratios))
    assert agreement(model, fewer, images) < target


def test_labels_and_the_form_of_batches_change_nothing() -> None:
    model, images = small(), batches()
    plan = tokenprune.plan_for(model, images, gmacs=0.0016)
    labelled = [({"x": images[0], "labels": None}, torch.zeros(16)), (images[1], torch.ones(16))]
    assert tokenprune.plan_for(model, iter(labelled), gmacs=0.0016) == plan


def test_images_are_halved_one_by_one() -> None:
    even, odd = halves([torch.arange(3), torch.arange(3, 4), {"x": torch.arange(4, 9), "size": 7}])
    assert [one["x"].tolist() if isinstance(one, dict) else one.tolist() for one in even] == [[0, 2], [4, 6, 8]]
    assert [one["x"].tolist() if isinstance(one, dict) else one.tolist() for one in odd] == [[1], [3], [5, 7]]


class Machine:
    """A `throughput` whose speed-up depends on the plan alone."""

    def __init__(self, model: nn.Module, *, noise: float = 0.0, limit: float = math.inf) -> None:
        self.model, self.noise, self.limit, self.calls = model, noise, limit, count()
        self.dense = tokenprune.flops(model, SIZE).dense

    def __call__(self, model: nn.Module, **settings: Any) -> Any:
        assert settings == {"input_size": SIZE, "batch_size": 4, "pairs": 3}
        ratio = self.dense / tokenprune.flops(model, SIZE).sparse
        scatter = 1 + self.noise * (-1) ** next(self.calls)
        return type("Report", (), {"speedup": min(ratio**0.8, self.limit) * scatter})


@pytest.mark.parametrize("noise", [0.0, 0.06])
def test_a_speedup_is_met(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    model = small()
    exact = Machine(model)
    for images in (None,) if noise else (None, batches()):
        monkeypatch.setattr(stopwatch, "throughput", Machine(model, noise=noise))
        plan = tokenprune.plan_for(model, images, speedup=1.4, batch_size=4, pairs=3, input_size=SIZE)
        model.tokenprune.keep_ratio = plan.keep_ratios
        assert exact(model, input_size=SIZE, batch_size=4, pairs=3).speedup == pytest.approx(1.4, rel=0.03)


@pytest.mark.slow
def test_a_speedup_that_is_not_reached_or_not_measurable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = fingerprint(model), model.tokenprune.keep_ratio
    settings: dict[str, Any] = {"batch_size": 4, "pairs": 3}
    monkeypatch.setattr(stopwatch, "throughput", Machine(model, limit=1.2))
    with pytest.raises(tokenprune.PlanError, match=r"speedup=1\.5 .*with one token kept, 1\.20 was measured"):
        tokenprune.plan_for(model, speedup=1.5, **settings)
    monkeypatch.setattr(stopwatch, "throughput", Machine(model, limit=0.9))
    with pytest.raises(tokenprune.PlanError, match=r"speedup=1\.5 .*with one token kept, 0\.90 was measured"):
        tokenprune.plan_for(model, speedup=1.5, **settings)
    monkeypatch.setattr(stopwatch, "throughput", Machine(model, noise=0.2))
    with pytest.raises(tokenprune.PlanError, match=r"scatter too much to tell which plan is within 3% of speedup=1\.5"):
        tokenprune.plan_for(model, speedup=1.5, **settings)
    assert (fingerprint(model), model.tokenprune.keep_ratio) == before


def test_everything_in_the_model_is_as_it_was() -> None:
    model = small(scorer="random", stages=[1, 2]).train()
    model.blocks[3].eval()
    model.tokenprune.execution, model.tokenprune.keep_ratio = "gather", (0.9, 0.7)
    model(batches()[0])
    trace, weights = model.tokenprune.trace, {name: one.clone() for name, one in model.state_dict().items()}
    before = fingerprint(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tokenprune.plan_for(model, batches(), gmacs=0.0016)
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint(model) == before and model.tokenprune.trace is trace
    assert (model.tokenprune.execution, model.tokenprune.keep_ratio) == ("gather", (0.9, 0.7))
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"one budget out of gmacs, speedup and agreement, and none is given"),
        ({"gmacs": 1.0, "speedup": 2.0}, r"gmacs=1\.0 and speedup=2\.0 is given"),
        ({"agreement": 0.9}, r"agreement is measured on images, and none are given"),
        ({"gmacs": 1.0}, r"gmacs=1 cannot be met with stages \(1, 2, 3\): what can is from 0\.00\d+.* to 0\.00\d+"),
        ({"gmacs": 1e-5}, r"gmacs=1e-05 cannot be met"),
        ({"gmacs": math.nan}, r"gmacs=nan: expected a number above 0"),
        ({"gmacs": True}, r"gmacs=True: expected a number above 0"),
        ({"speedup": 0.9}, r"speedup=0\.9: expected a number from 1 on"),
        ({"agreement": 1.5, "images": []}, r"agreement=1\.5: expected a number above 0 and up to 1"),
        ({"gmacs": 0.0016, "images": [torch.zeros(1, *SIZE)]}, r"fewer than two"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model = small()
    before = fingerprint(model), model.tokenprune.keep_ratio
    with pytest.raises(tokenprune.PlanError, match=message):
        tokenprune.plan_for(model, **options)
    assert (fingerprint(model), model.tokenprune.keep_ratio) == before


def test_states_in_which_no_plan_can_be_tried() -> None:
    with pytest.raises(tokenprune.StateError, match="not sparsified"):
        tokenprune.plan_for(nn.Linear(2, 2), gmacs=1.0)
    model = small()
    with tokenprune.dense(model), pytest.raises(tokenprune.StateError, match="runs dense here"):
        tokenprune.plan_for(model, gmacs=1.0)
    with pytest.raises(TypeError, match="expected an iterable of batches"):
        tokenprune.plan_for(model, torch.zeros(2, *SIZE), gmacs=0.0016)


@pytest.mark.slow
def test_one_stage_and_no_logits() -> None:
    model = small(stages=[3])
    assert len(tokenprune.plan_for(model, batches(), gmacs=0.0022).keep_ratios) == 1
    features = tokenprune.unsparsify(model)
    features.reset_classifier(0)
    tokenprune.sparsify(features, scorer="cls_attention")
    plan = tokenprune.plan_for(features, batches(), agreement=0.9)
    assert 0 < plan.keep_ratios[-1] <= 1

"""The plan: defaults, floors, refusals, and its way to JSON and back."""

from __future__ import annotations

import json

import pytest

from tokenprune import Plan, PlanError
from tokenprune.pruning.plan import default_stages


@pytest.mark.parametrize(
    ("depth", "stages"), [(12, (3, 6, 9)), (16, (4, 8, 12)), (20, (5, 10, 15)), (24, (6, 12, 18)), (5, (1, 2, 3))]
)
def test_default_stages(depth: int, stages: tuple[int, ...]) -> None:
    assert default_stages(depth) == stages


def test_one_ratio_means_its_powers() -> None:
    plan = Plan.build(depth=12, stages=None, keep_ratio=0.7)
    assert plan.keep_ratios == pytest.approx((0.7, 0.49, 0.343))
    assert plan.num_keep(196) == (137, 96, 67)
    assert plan.keep_probabilities == pytest.approx((0.7, 0.7, 0.7))


def test_a_sequence_is_cumulative() -> None:
    plan = Plan.build(depth=4, stages=(0, 3), keep_ratio=[0.5, 0.5])
    assert plan.num_keep(10) == (5, 5)
    assert plan.keep_probabilities == (0.5, 1.0)


def test_counts_are_floors_and_at_least_one() -> None:
    plan = Plan(stages=(1, 2), keep_ratios=(0.5, 0.01))
    assert plan.num_keep(9) == (4, 1)
    # 100 · 0.7² is 48.99999999999999 in binary arithmetic, and 49 on paper.
    assert Plan.build(depth=12, stages=None, keep_ratio=0.7).num_keep(100) == (70, 49, 34)


def test_json_round_trip_and_version() -> None:
    plan = Plan(stages=(3, 6), keep_ratios=(0.7, 0.49))
    assert Plan.from_json(plan.to_json()) == plan
    later = json.dumps({**json.loads(plan.to_json()), "version": 2})
    with pytest.raises(PlanError, match=r"plan version 2 cannot be read; this tokenprune reads version 1"):
        Plan.from_json(later)
    for text in ("{", "[]", '{"version": 1}'):
        with pytest.raises(PlanError, match="not a plan"):
            Plan.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ()}, "stages is empty"),
        ({"stages": (3, 12)}, r"stage 12 is out of range; the model has 12 blocks, so stages lie in 0 … 11"),
        ({"stages": (-1, 3)}, "stage -1 is out of range"),
        ({"stages": (6, 3)}, "not sorted"),
        ({"stages": (3, 3)}, "repeat a block"),
        ({"stages": (3, 4.5)}, "4.5 is not a block index"),
        ({"stages": 3}, "stages=3: expected a sequence"),
        ({"stages": "369"}, "'3' is not a block index"),
        ({"keep_ratio": 0.0}, r"keep ratio 0.0 is outside \(0, 1\]"),
        ({"keep_ratio": 1.1}, r"outside \(0, 1\]"),
        ({"keep_ratio": -0.5}, r"outside \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"keep ratio nan is outside \(0, 1\]"),
        ({"keep_ratio": True}, r"keep ratio True is outside \(0, 1\]"),
        ({"keep_ratio": "much"}, "keep ratios"),
        ({"keep_ratio": None}, "keep_ratio=None: expected a sequence"),
        ({"keep_ratio": (0.5, 0.7, 0.2)}, "rise from stage to stage"),
        ({"keep_ratio": (0.7, 0.5)}, r"keep ratios \(0.7, 0.5\) and 3 stage\(s\) do not match"),
        ({"depth": 3}, "a model of 3 blocks has no default stages"),
    ],
)
def test_misuse_is_refused(options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.build(**{"depth": 12, "stages": None, "keep_ratio": 0.7, **options})


def test_plans_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Plan(stages=(1,), keep_ratios=(0.5,)).stages = (2,)  # type: ignore[misc]

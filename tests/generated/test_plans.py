"""Plans and keep ratios by the thousand: stages, cumulative ratios, and JSON of both."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.generated.models import KINDS, depth_of, fresh, images_of, run
from tests.generated.outcomes import assert_holds, assert_unchanged, attempt, snapshot
from tests.generated.strategies.common import ODD, Given, mixed, share
from tests.generated.strategies.json_trees import NO_JSON, damaged_json
from tests.generated.strategies.plans import bad_ratios, bad_stages, good_ratios, good_stages, is_plan
from tokenprune import Plan, PlanError


@share(40)
@given(st.data(), st.integers(4, 40))
def test_a_plan_is_what_was_asked_for_or_is_refused(data: st.DataObject, depth: int) -> None:
    stages: Given = data.draw(mixed(good_stages(depth), bad_stages(depth)))
    asked = [*stages.value] if stages.valid else stages.value
    number = len(asked) if stages.valid else 3
    ratios: Given = data.draw(mixed(good_ratios(number), bad_ratios(number)))
    plan, error = attempt(
        lambda: Plan.build(depth=depth, stages=asked, keep_ratio=ratios.value),
        valid=bool(stages.valid and ratios.valid),
    )
    if error is not None:
        assert isinstance(error, PlanError)
        return
    assert list(plan.stages) == asked and all(type(stage) is int for stage in plan.stages)
    assert all(type(ratio) is float for ratio in plan.keep_ratios)
    assert is_plan(list(plan.stages), list(plan.keep_ratios))
    assert all(0 < probability <= 1 for probability in plan.keep_probabilities)
    num_keep = plan.num_keep(197)
    assert list(num_keep) == sorted(num_keep, reverse=True) and 1 <= num_keep[-1] <= num_keep[0] <= 197
    assert Plan.from_json(plan.to_json()) == plan


@share(30)
@given(st.one_of(ODD, good_stages(9), bad_stages(9)), st.one_of(good_ratios(3), bad_ratios(3)))
def test_a_plan_made_by_itself_takes_sequences_of_numbers_alone(stages: Any, ratios: Any) -> None:
    plan, error = attempt(lambda: Plan(stages=stages, keep_ratios=ratios))
    if error is None:
        assert is_plan(list(plan.stages), list(plan.keep_ratios))
    else:
        assert isinstance(error, PlanError)


@share(30)
@given(st.data())
def test_json_of_a_plan_is_read_or_refused(data: st.DataObject) -> None:
    fields = json.loads(Plan(stages=(1, 3), keep_ratios=(0.5, 0.25)).to_json())
    changed = data.draw(st.one_of(damaged_json(fields), st.none()))
    text = data.draw(NO_JSON) if changed is None else json.dumps(changed)
    read, error = attempt(lambda: Plan.from_json(data.draw(st.sampled_from([text, text.encode(errors="replace")]))))
    if error is None:
        assert is_plan(changed["stages"], changed["keep_ratios"]) and changed["version"] == 1
        assert (list(read.stages), list(read.keep_ratios)) == (changed["stages"], changed["keep_ratios"])
    else:
        assert isinstance(error, PlanError)


@pytest.mark.parametrize("kind", KINDS)
@share(20)
@given(st.data())
def test_a_model_takes_any_plan_and_any_ratio_after_it(kind: str, data: st.DataObject) -> None:
    model, images, depth = fresh(kind), images_of(kind), depth_of(kind)
    before, dense = snapshot(model), run(model, images)
    stages = data.draw(mixed(st.one_of(st.none(), good_stages(depth)), bad_stages(depth)))
    asked = [*stages.value] if stages.valid and stages.value is not None else stages.value
    number = 3 if asked is None or not stages.valid else len(asked)
    ratios = data.draw(mixed(good_ratios(number), bad_ratios(number)))
    _, error = attempt(
        lambda: tokenprune.sparsify(model, asked, ratios.value), valid=bool(stages.valid and ratios.valid)
    )
    if error is not None:
        assert_unchanged(model, before)
        return
    plan, sparse = model.tokenprune.plan, run(model, images)
    later = data.draw(mixed(good_ratios(number), bad_ratios(number)))
    _, error = attempt(lambda: setattr(model.tokenprune, "keep_ratio", later.value), valid=later.valid)
    if error is not None:
        assert model.tokenprune.plan == plan and run(model, images).equal(sparse)
    assert_holds(model, images, dense, before)

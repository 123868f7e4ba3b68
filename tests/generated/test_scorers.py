"""Scorers by the thousand: names, and callables good and bad."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.generated.models import KINDS, depth_of, fresh, images_of, logits, run
from tests.generated.outcomes import assert_clear, assert_holds, assert_unchanged, assert_undone, attempt, snapshot
from tests.generated.strategies.common import share
from tests.generated.strategies.plans import good_ratios, good_stages
from tests.generated.strategies.scorers import BAD_SCORERS, FAILING_SCORERS, GOOD_SCORERS

REDUCTIONS = st.sampled_from(["drop", "fuse", "merge", "preserve", "fuse_preserve", "merge_preserve", "merge_sizes"])


def _plan(data: st.DataObject, kind: str) -> tuple[list[int], Any]:
    stages = [*data.draw(good_stages(depth_of(kind)))]
    return stages, data.draw(good_ratios(len(stages)))


@share(50)
@given(st.data(), st.sampled_from(KINDS), st.sampled_from(sorted(GOOD_SCORERS)), REDUCTIONS)
def test_a_good_scorer_works_in_every_plan(data: st.DataObject, kind: str, name: str, pruned: str) -> None:
    size = data.draw(st.sampled_from([(8, 24), (40, 32), (64, 96)])) if kind == "timm, any size" else None
    model, images = fresh(kind), images_of(kind, data.draw(st.integers(1, 3)), size)
    before, dense = snapshot(model), run(model, images)
    stages, ratios = _plan(data, kind)
    needs_a_block_before = name in ("cls_attention", "informative", "attentive") and 0 in stages
    _, error = attempt(
        lambda: tokenprune.sparsify(model, stages, ratios, scorer=GOOD_SCORERS[name], pruned=pruned),
        valid=not needs_a_block_before,
    )
    if error is not None:
        assert_unchanged(model, before)
        return
    model.train()
    trained = logits(model, images)
    trained.sum().backward()
    assert trained.isfinite().all()
    gradients = [one.grad for one in model.tokenprune.parameters() if one.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    model.zero_grad()
    assert run(model.eval(), images).isfinite().all()
    assert_holds(model, images, dense, before)


@share(20)
@given(st.sampled_from(KINDS), BAD_SCORERS)
def test_what_is_no_scorer_is_refused(kind: str, scorer: Any) -> None:
    model = fresh(kind)
    before = snapshot(model)
    attempt(lambda: tokenprune.sparsify(model, (1, 3), 0.5, scorer=scorer), valid=False)
    assert_unchanged(model, before)


@share(30)
@given(
    st.data(),
    st.sampled_from(KINDS),
    st.sampled_from(sorted(FAILING_SCORERS)),
    st.sampled_from(["gather", "mask", "auto"]),
    st.booleans(),
)
def test_a_scorer_that_fails_leaves_a_model_that_works(
    data: st.DataObject, kind: str, name: str, execution: str, later: bool
) -> None:
    model, images = fresh(kind), images_of(kind)
    before, dense = snapshot(model), run(model, images)
    stages, _ = _plan(data, kind)
    tokenprune.sparsify(model, stages, 0.5, scorer="random" if later else FAILING_SCORERS[name])
    model.tokenprune.execution = execution
    if later:  # in one stage of those that have worked
        expected = run(model, images)
        stage = model.tokenprune.stages[data.draw(st.integers(0, len(stages) - 1))]
        works, stage.scorer = stage.scorer, FAILING_SCORERS[name](None)
    for _ in range(2):
        _, error = attempt(lambda: run(model, images), valid=False)
        assert error is not None
        assert_clear(error)
    if later:
        stage.scorer = works
        assert torch.equal(run(model, images), expected)
    assert_undone(model, images, dense, before)

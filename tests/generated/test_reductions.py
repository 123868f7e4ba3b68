"""Reductions by the thousand: names, and callables good and bad."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.generated.models import KINDS, depth_of, fresh, images_of, logits, run
from tests.generated.outcomes import assert_holds, assert_unchanged, assert_undone, attempt, snapshot
from tests.generated.strategies.common import share
from tests.generated.strategies.plans import good_ratios, good_stages
from tests.generated.strategies.reductions import BAD_REDUCTIONS, FAILING_REDUCTIONS, GOOD_REDUCTIONS
from tests.generated.strategies.scorers import GOOD_SCORERS


@share(50)
@given(
    st.data(),
    st.sampled_from(KINDS),
    st.sampled_from(sorted(GOOD_REDUCTIONS)),
    st.sampled_from(["spread", "learned", "infinite"]),
)
def test_a_good_reduction_works_in_every_plan(data: st.DataObject, kind: str, name: str, scorer: str) -> None:
    model, images = fresh(kind), images_of(kind, data.draw(st.integers(1, 3)))
    before, dense = snapshot(model), run(model, images)
    stages = [*data.draw(good_stages(depth_of(kind)))]
    ratios = data.draw(good_ratios(len(stages)))
    tokenprune.sparsify(model, stages, ratios, scorer=GOOD_SCORERS[scorer], pruned=GOOD_REDUCTIONS[name])
    model.train()
    trained = logits(model, images)
    trained.sum().backward()
    assert trained.isfinite().all()
    assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())
    model.zero_grad()
    assert run(model.eval(), images).isfinite().all()
    assert_holds(model, images, dense, before)


@share(20)
@given(st.sampled_from(KINDS), BAD_REDUCTIONS)
def test_what_is_no_reduction_is_refused(kind: str, pruned: Any) -> None:
    model = fresh(kind)
    before = snapshot(model)
    attempt(lambda: tokenprune.sparsify(model, (1, 3), 0.5, pruned=pruned), valid=False)
    assert_unchanged(model, before)


@share(30)
@given(
    st.data(), st.sampled_from(KINDS), st.sampled_from(sorted(FAILING_REDUCTIONS)), st.sampled_from(["gather", "mask"])
)
def test_a_reduction_that_fails_leaves_a_model_that_works(
    data: st.DataObject, kind: str, name: str, execution: str
) -> None:
    model, images = fresh(kind), images_of(kind)
    before, dense = snapshot(model), run(model, images)
    stages = [*data.draw(good_stages(depth_of(kind)))]
    attempt(lambda: tokenprune.sparsify(model, stages, 0.5, pruned=FAILING_REDUCTIONS[name], scorer="random"))
    if not hasattr(model, "tokenprune"):
        assert_unchanged(model, before)
        return
    model.tokenprune.execution = execution
    for _ in range(2):
        attempt(lambda: run(model, images), valid=False)
    for stage in model.tokenprune.stages:
        stage.reduction = torch.nn.Identity()
    model.tokenprune.keep_ratio = 1
    torch.testing.assert_close(run(model, images), dense, rtol=0, atol=1e-5)
    assert_undone(model, images, dense, before)

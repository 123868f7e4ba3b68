"""Executions by the thousand: a model that is switched, run, copied and broken in any order, and bare decisions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.generated.models import KINDS, depth_of, fresh, images_of, logits, run
from tests.generated.outcomes import assert_holds, attempt, snapshot
from tests.generated.strategies.common import Given, share
from tests.generated.strategies.executions import SCORES, STEPS
from tests.generated.strategies.plans import good_ratios, good_stages
from tests.generated.strategies.scorers import GOOD_SCORERS
from tokenprune.pruning.sampling import sample, top_k


@share(60)
@given(st.data(), st.sampled_from(KINDS), st.sampled_from(["spread", "learned", "attentive"]))
def test_no_order_of_steps_leaves_a_trace(data: st.DataObject, kind: str, scorer: str) -> None:
    model, images = fresh(kind), images_of(kind)
    before, dense = snapshot(model), run(model, images)
    stages = [one for one in data.draw(good_stages(depth_of(kind))) if one] or [2]
    pruned = data.draw(st.sampled_from(["drop", "fuse", "merge", "merge_preserve"]))
    tokenprune.sparsify(model, stages, 0.6, scorer=GOOD_SCORERS[scorer], pruned=pruned)
    steps = data.draw(st.lists(STEPS, max_size=8))
    for name, value in steps:
        if name == "ratio":
            value = data.draw(good_ratios(len(stages)))
        model = _DO[name](model, value, images)
    tokenprune.unsparsify(model)
    tokenprune.sparsify(model, stages, 0.6, scorer=GOOD_SCORERS["spread"], pruned=pruned)
    assert_holds(model.eval(), images, dense, before, copied=any(name == "copy" for name, _ in steps))


def _execute(model: Any, value: Given, images: Any) -> Any:
    was = model.tokenprune.execution
    attempt(lambda: setattr(model.tokenprune, "execution", value.value), valid=value.valid)
    assert model.tokenprune.execution == (value.value if value.valid else was)
    return model


def _ratio(model: Any, value: Any, images: Any) -> Any:
    model.tokenprune.keep_ratio = value
    return model


def _run(model: Any, value: Any, images: Any) -> Any:
    with torch.set_grad_enabled(value):
        assert logits(model, images).isfinite().all()
    return model


def _train(model: Any, value: Any, images: Any) -> Any:
    logits(model.train(), images).sum().backward()
    model.zero_grad()
    return model


def _dense(model: Any, value: Any, images: Any) -> Any:
    with tokenprune.dense(model):
        run(model, images)
        assert model.tokenprune.trace is None
    return model


def _broken(model: Any, value: Any, images: Any) -> Any:
    try:
        run(model, value)
    except Exception as error:  # the model's own, or ours of a scorer that sees nothing
        assert str(error)
    else:
        raise AssertionError("it took what no model takes")
    return model


def _copy(model: Any, value: Any, images: Any) -> Any:
    logits(model, images)  # a record with gradients, which no copy takes along
    return copy.deepcopy(model) if value else pickle.loads(pickle.dumps(model))


_DO: dict[str, Callable[[Any, Any, Any], Any]] = {
    "execution": _execute,
    "ratio": _ratio,
    "run": _run,
    "train": _train,
    "eval": lambda model, value, images: model.eval(),
    "dense": _dense,
    "broken": _broken,
    "copy": _copy,
}


@share(40)
@given(st.data(), SCORES)
def test_decisions_keep_what_is_left_and_never_more(data: st.DataObject, scores: torch.Tensor) -> None:
    batch, number = scores.shape
    left = torch.tensor(
        data.draw(st.lists(st.permutations([1.0] + [0.0] * (number - 1)), min_size=batch, max_size=batch))
    )
    more = data.draw(st.lists(st.booleans(), min_size=number, max_size=number))
    left = torch.maximum(left, torch.tensor(more).float())
    least = int(left.sum(dim=1).min())
    k = data.draw(st.integers(1, least))
    chosen = top_k(scores, left, k)
    assert chosen.shape == (batch, k) and (chosen.diff(dim=1) > 0).all()
    assert (left.gather(1, chosen) == 1).all(), "a pruned token came back"
    if not scores.isnan().any():
        worst_kept = scores.gather(1, chosen).amin(dim=1, keepdim=True)
        given_up = left.scatter(1, chosen, 0.0) > 0
        assert (scores.masked_fill(~given_up, -torch.inf) <= worst_kept).all()
    log_odds = scores.nan_to_num(nan=0.0).requires_grad_()
    keep = sample(log_odds, left)
    assert ((keep == 0) | (keep == 1)).all() and (keep <= left).all() and (keep.sum(dim=1) >= 1).all()
    keep.sum().backward()
    assert log_odds.grad is not None and log_odds.grad.isfinite().all()

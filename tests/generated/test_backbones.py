"""Descriptions of backbones by the thousand, true, false and wrong."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.generated.models import fresh, images_of, logits, run
from tests.generated.outcomes import assert_holds, assert_unchanged, assert_undone, attempt, snapshot
from tests.generated.strategies.backbones import FALSE_FIELDS, TRUE_FIELDS, WRONG_FIELDS
from tests.generated.strategies.common import share
from tests.generated.strategies.plans import good_stages
from tests.generated.strategies.scorers import GOOD_SCORERS
from tokenprune import Backbone

KINDS = st.sampled_from(["timm", "timm, registers, average", "timm, any size"])
NEEDED = ("blocks", "num_prefix_tokens", "embed_dim")


def _fields(data: st.DataObject, model: Any) -> dict[str, Any]:
    """A true description of a model, that says as much of it as it likes."""
    names = data.draw(st.sets(st.sampled_from(sorted(TRUE_FIELDS)))) | {*NEEDED}
    return {name: data.draw(st.sampled_from(TRUE_FIELDS[name]))(model) for name in sorted(names)}


@share(35)
@given(st.data(), KINDS, st.sampled_from(["spread", "learned", "attentive"]), st.sampled_from(["drop", "merge"]))
def test_every_true_description_holds(data: st.DataObject, kind: str, scorer: str, pruned: str) -> None:
    model, images = fresh(kind), images_of(kind)
    before, dense = snapshot(model), run(model, images)
    stages = [one for one in data.draw(good_stages(len(model.blocks))) if one] or [2]
    backbone = Backbone(**_fields(data, model))
    tokenprune.sparsify(model, stages, 0.6, scorer=GOOD_SCORERS[scorer], pruned=pruned, backbone=backbone)
    assert_holds(model, images, dense, before)


@share(35)
@given(st.data(), KINDS, st.sampled_from(sorted(FALSE_FIELDS)))
def test_a_false_description_is_refused(data: st.DataObject, kind: str, name: str) -> None:
    model = fresh(kind)
    before, fields = snapshot(model), _fields(data, model)
    fields[name] = data.draw(st.sampled_from(FALSE_FIELDS[name]))(model)
    _, error = attempt(lambda: tokenprune.sparsify(model, (1, 3), 0.6, backbone=Backbone(**fields)), valid=False)
    assert isinstance(error, tokenprune.UnsupportedModelError)
    assert_unchanged(model, before)


@share(30)
@given(st.data(), KINDS, st.sampled_from(sorted(GOOD_SCORERS)), st.sampled_from(["drop", "fuse", "merge", "preserve"]))
def test_a_wrong_description_breaks_nothing(data: st.DataObject, kind: str, scorer: str, pruned: str) -> None:
    model, images = fresh(kind), images_of(kind)
    before, dense, fields = snapshot(model), run(model, images), _fields(data, model)
    for name in sorted(data.draw(st.sets(st.sampled_from(sorted(WRONG_FIELDS)), min_size=1, max_size=2))):
        fields[name] = data.draw(st.sampled_from(WRONG_FIELDS[name]))(model)
    stages = [*data.draw(good_stages(len(model.blocks)))]
    backbone = Backbone(**fields)
    _, error = attempt(
        lambda: tokenprune.sparsify(model, stages, 0.6, scorer=GOOD_SCORERS[scorer], pruned=pruned, backbone=backbone)
    )
    if error is not None:
        assert_unchanged(model, before)
        return
    for execution in data.draw(st.permutations(["gather", "mask", "auto", "gather"])):
        model.tokenprune.execution = execution
        attempt(lambda: run(model, images))
        attempt(lambda: logits(model.train(), images).sum().backward())
        model.zero_grad()
        model.eval()
    with tokenprune.dense(model):
        torch.testing.assert_close(run(model, images), dense, rtol=0, atol=1e-5)
    assert_undone(model, images, dense, before)

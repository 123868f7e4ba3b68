"""Images and batches by the thousand: sizes that fit or do not, one image and none, odd numbers and types."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.generated.models import KINDS, fresh, images_of, run
from tests.generated.outcomes import assert_clear, assert_undone, snapshot
from tests.generated.strategies.common import share
from tests.generated.strategies.images import IMAGES
from tests.generated.strategies.plans import good_ratios
from tests.generated.strategies.scorers import GOOD_SCORERS
from tests.helpers.tolerances import MASK_EQUALS_GATHER

PRUNED = st.sampled_from(["drop", "fuse", "merge", "preserve", "fuse_preserve", "merge_preserve"])


@share(100)
@given(
    st.data(),
    st.sampled_from([*KINDS, "timm, any size", "timm, any size", "timm, any size"]),
    st.sampled_from(["predictor", "cls_attention", "random", "static", "spread"]),
    PRUNED,
)
def test_images_that_a_model_takes_it_takes_sparse(data: st.DataObject, kind: str, scorer: str, pruned: str) -> None:
    model, fitting = fresh(kind), images_of(kind)
    before, dense = snapshot(model), run(model, fitting)
    images = data.draw(st.lists(IMAGES, min_size=1, max_size=2))
    expected = [_outcome(model, one) for one in images]
    tokenprune.sparsify(model, (1, 2, 3), data.draw(good_ratios(3)), scorer=GOOD_SCORERS[scorer], pruned=pruned)
    fits = run(model, fitting)
    for one, wanted in zip(images, expected, strict=True):
        _assert_alike(model, one, wanted, scorer)
        assert torch.equal(run(model, fitting), fits), "something is left of the images before"
    assert_undone(model, fitting, dense, before)


def _outcome(model: Any, images: Any) -> Any:
    """What a model gives, or the error in which it ends."""
    try:
        return run(model, images)
    except Exception as error:
        return error


def _assert_alike(model: Any, images: Any, dense: Any, scorer: str) -> None:
    found: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for execution in ("gather", "mask"):
        model.tokenprune.execution = execution
        found[execution] = _outcome(model, images)
        if isinstance(found[execution], torch.Tensor):
            kept[execution] = _kept(model, images)
    model.tokenprune.execution = "auto"
    if isinstance(dense, Exception):  # it is the model's own, and comes through as it is
        for error in found.values():
            assert type(error) is type(dense) and str(error) == str(dense)
        return
    for outcome in found.values():
        if isinstance(outcome, Exception):
            assert_clear(outcome)
        else:
            assert outcome.shape == dense.shape and outcome.dtype == dense.dtype
    if len(kept) == 2 and dense.isfinite().all() and all(map(torch.equal, *kept.values())):
        torch.testing.assert_close(found["mask"], found["gather"], rtol=0, atol=10 * MASK_EQUALS_GATHER[torch.float32])


def _kept(model: Any, images: Any) -> list[torch.Tensor]:
    """What was kept in the last pass, after its number has been found right."""
    trace, patches = model.tokenprune.trace, images.shape[-2] // 8 * (images.shape[-1] // 8)
    assert trace.num_patches == patches
    assert trace.grid == (images.shape[-2] // 8, images.shape[-1] // 8)
    for keep, number in zip(trace.keep, model.tokenprune.plan.num_keep(patches), strict=True):
        assert keep.shape == (len(images), patches) and (keep.sum(dim=1) == number).all()
    return list(trace.keep)

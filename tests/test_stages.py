"""`benchmarks.stages`: that what it counts of a stage is what a pass calls more than the dense model."""

from __future__ import annotations

import copy

import pytest
import torch

import tokenprune
from benchmarks.stages import operators_of_stages
from tests.helpers.profiling import operators
from tests.helpers.zoo import STAGES, Case, hook_counts, models


@models("timm class token")
@pytest.mark.parametrize("scorer", ["predictor", "predictor_linear"])
@torch.no_grad()
def test_operators_of_stages_are_those_that_the_dense_model_does_not_call(case: Case, scorer: str) -> None:
    sparse = case.sparsified(scorer=scorer)
    frozen, before = tokenprune.freeze(copy.deepcopy(sparse)), hook_counts(sparse)
    dense = operators(case, case.model())
    counted = [{name: calls for name, (calls, _) in one.items()}
               for one in operators_of_stages([sparse, frozen], case.images(1), passes=1)]  # fmt: skip
    for model, calls in zip((sparse, frozen), counted, strict=True):
        assert round(len(STAGES) * sum(calls.values())) == operators(case, model) - dense
    assert counted[1]["topk"] == counted[1]["index_select"] == 1 and "sort" in counted[0].keys() - counted[1].keys()
    assert hook_counts(sparse) == before

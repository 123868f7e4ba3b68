"""Reductions on the models of the census: each holds the invariants there, or is refused before anything is changed."""

from __future__ import annotations

import pytest

import tokenprune
from tests.census import timm as census_timm
from tests.census import torchvision as census_torchvision
from tests.census import transformers as census_transformers
from tests.census.entry import STAGES, Entry
from tests.census.hosts import skip_host_fault
from tests.helpers.tolerances import CENSUS_MASK_EQUALS_GATHER
from tests.helpers.zoo import hook_counts

ENTRIES = [
    *census_timm.distinct([*census_timm.flat(), *census_timm.volo(), *census_timm.naflex_dict()]),
    *census_transformers.supported(),
    *census_transformers.composites(),
    *census_torchvision.supported()[:1],
]
KEEP_RATIO = (0.6, 0.36)


@pytest.mark.slow
@pytest.mark.parametrize("pruned", ["fuse", "merge", "merge_preserve", "merge_sizes"])
@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry}-{index}" for index, entry in enumerate(ENTRIES)])
def test_proved_or_refused(entry: Entry, pruned: str) -> None:
    skip_host_fault(entry)
    model, inputs = entry.model(), entry.example()
    hooks = hook_counts(model)
    try:
        tokenprune.sparsify(model, STAGES, KEEP_RATIO, pruned=pruned)
    except tokenprune.UnsupportedModelError as error:
        assert pruned == "fuse" and "adds a token" in str(error), str(error)
        assert hook_counts(model) == hooks
        return
    try:
        report = tokenprune.verify(model, inputs, tolerance=CENSUS_MASK_EQUALS_GATHER)
    except tokenprune.StateError as error:  # padding, which only a forward pass brings
        assert pruned == "fuse" and "and a token that is the summary of several has none" in str(error), str(error)
        return
    assert report.passed, str(report)

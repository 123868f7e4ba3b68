"""Hierarchies with a fast path: one model of each kind and, among the slow tests, all of the tables."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from tests.census import timm_hierarchies, torchvision_hierarchies, transformers_hierarchies
from tests.census.entry import Entry
from tests.census.hosts import is_older, skip_host_fault

HIERARCHIES = [
    *timm_hierarchies.every(),
    *timm_hierarchies.others(),
    *transformers_hierarchies.every(),
    *torchvision_hierarchies.every(),
]
REFUSED = timm_hierarchies.refused()
# Of the families whose blocks differ from those of tests/helpers/hierarchies.py, one each.
FAMILIES = (
    "maxxvit",
    "mvitv2",
    "vision_transformer_sam",
    "hiera",
    "nest",
    "pvt_v2",
    "segformer",
    "vitdet",
    "mask2former",
)
DISTINCT = [next(entry for entry in HIERARCHIES if entry.family == family) for family in FAMILIES]


def prove(entry: Entry) -> None:
    if is_older(entry.library):
        pytest.skip(f"the table is written for a later release of {entry.library}")
    skip_host_fault(entry)
    proved = tokenprune.prove(entry, library=entry.library, compiled=False)
    assert proved.name == entry.name


@pytest.mark.parametrize("entry", DISTINCT, ids=str)
def test_one_model_of_each_kind(entry: Entry) -> None:
    prove(entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", HIERARCHIES, ids=[f"{entry}-{index}" for index, entry in enumerate(HIERARCHIES)])
def test_all(entry: Entry) -> None:
    prove(entry)


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "reason"), REFUSED, ids=[str(entry) for entry, _ in REFUSED])
def test_the_other_files_of_timm_are_refused(entry: Entry, reason: str) -> None:
    """By what their blocks are, with an error that says so."""
    skip_host_fault(entry)
    model = entry.model()
    with torch.no_grad():
        model(**entry.example())
    with pytest.raises(tokenprune.UnsupportedModelError, match=reason):
        tokenprune.sparsify(model, keep_ratio=entry.keep_ratio, pruned="fast")
    assert not hasattr(model, "tokenprune")

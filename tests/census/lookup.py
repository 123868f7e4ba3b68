"""Entries of the census by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import nn

from tests.census.entry import Entry
from tests.census.hosts import is_older, skip_host_fault
from tests.census.timm import flat, volo
from tests.census.transformers import composites, language_models, supported, uncovered
from tests.census.transformers_packed import towers
from tests.census.transformers_refused import refused


@cache
def _by_name() -> dict[str, Entry]:
    entries = (*flat(), *volo(), *supported(), *uncovered(), *composites(), *language_models(), *towers(), *refused())
    return {entry.name: entry for entry in reversed(entries)}


def entry_of(name: str) -> Entry:
    """The first entry of a name; skips the test where its library does not have it, or cannot run it."""
    entry = _by_name().get(name)
    if entry is None and any(map(is_older, ("timm", "transformers"))):
        pytest.skip("an older release does not have it")
    assert entry is not None, name
    skip_host_fault(entry)
    return entry


def census_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the census and what it is given."""
    entry = entry_of(name)
    return entry.model(), entry.example()

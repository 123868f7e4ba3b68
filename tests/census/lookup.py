"""Entries of the census by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.census.entry import Entry, is_older
from tests.census.timm import flat, volo
from tests.census.transformers import composites, language_models, supported, uncovered


def entry_of(name: str) -> Entry:
    entries = (*flat(), *volo(), *supported(), *uncovered(), *composites(), *language_models())
    entry = next((entry for entry in entries if entry.name == name), None)
    if entry is None and any(map(is_older, ("timm", "transformers"))):
        pytest.skip("an older release does not have it")
    assert entry is not None, name
    return entry


def census_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the census and what it is given."""
    entry = entry_of(name)
    return entry.model(), entry.example()

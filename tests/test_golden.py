"""Sparsified models put out what they did before the core was rebuilt: the files tests/helpers/golden.*."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.census.hosts import is_older, skip_host_fault
from tests.helpers.golden import FILE, entries, of_case, of_entry
from tests.helpers.zoo import ALL, Case

RECORDED = load_file(FILE)
ENTRIES = {key: entry for key, entry in entries().items() if any(name.startswith(f"{key}: ") for name in RECORDED)}
# Double precision on another processor and in other orders of sums gives 1e-12 and less.
TOLERANCE = 1e-6


def compare(model: str, found: dict[str, torch.Tensor]) -> None:
    expected = {name: value for name, value in RECORDED.items() if name.startswith(f"{model}: ")}
    assert expected.keys() == {f"{model}: {name}" for name in found}
    for name, value in found.items():
        reference = expected[f"{model}: {name}"]
        assert value.shape == reference.shape, name
        error = (value - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
        assert error <= TOLERANCE, f"{name} differs by {error}"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_form_of_model(case: Case) -> None:
    library = str(case).split()[0]
    if library in ("timm", "transformers", "torchvision") and is_older(library):
        pytest.skip(f"the outputs were written down with a later release of {library}")
    compare(str(case), of_case(case))


@pytest.mark.parametrize("key", ENTRIES)
def test_a_model_of_the_census(key: str) -> None:
    entry = ENTRIES[key]
    if is_older(entry.library):
        pytest.skip(f"the outputs were written down with a later release of {entry.library}")
    skip_host_fault(entry, double=True)
    compare(key, of_entry(entry))

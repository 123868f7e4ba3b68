"""Settings of every test: one thread, no network, a fixed seed, no warning unseen; and the census of models."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Their assertions say what was compared, as those of test files do.
pytest.register_assert_rewrite("tests.census", "tests.helpers")
from tests.census.entry import Entry
from tests.census.hosts import skip_host_fault, summary

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator_is_left() -> Iterator[None]:
    """Accelerate keeps precision and device for the rest of the process, and a later test may want others."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # where older Trainers write theirs
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _its_library_runs_it(request: pytest.FixtureRequest, _seed: None) -> None:
    """Of a model of the census nothing is proved where its own library cannot run it."""
    callspec = getattr(request.node, "callspec", None)
    entry = callspec.params.get("entry") if callspec else None
    if isinstance(entry, Entry):
        skip_host_fault(entry)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count what the census proved in this run and what it could not."""
    recorded: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("passed", []):
        for what, name in report.user_properties:
            recorded[what].append(name)
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    faults = [*summary(reason[-1] for reason in skipped if isinstance(reason, tuple))]
    if not recorded and not faults:
        return
    from tests.helpers.supported_models import counts

    terminalreporter.section("census")
    for line in (*counts(recorded), *faults):
        terminalreporter.write_line(line)

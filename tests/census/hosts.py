"""The libraries whose models are pruned: their releases, and faults of their own models.

A model that its library cannot run is no fault of ours. Only the untouched model decides: built afresh, and run before
anything is sparsified. What fails later is ours, and so is what fails in code of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from traceback import walk_tb

import pytest
import torch
from packaging.version import Version
from torch import nn

from tests.census.entry import Entry

FAILS = "the dense model fails"
# What part of a library's models may fail by itself: on the release with which the list beside the adapter was written,
# and on any other. With more of them skipped, next to nothing would be tested.
ALLOWED, ALLOWED_ELSEWHERE = 0.05, 0.5


def recorded_release(library: str) -> Version:
    """The release of a library with which the list beside its adapter was written."""
    listed = json.loads((files(f"tokenprune_{library}") / "supported.json").read_text(encoding="utf-8"))
    return Version(listed["library_version"])


def installed_release(library: str) -> Version:
    """The release that is installed, without what tells builds of it apart, such as ``+cpu``."""
    return Version(Version(version(library)).public)


def is_older(library: str) -> bool:
    """Whether a library is older than the release whose models the census lists."""
    return installed_release(library) < recorded_release(library)


@cache
def host_fault(entry: Entry, *, double: bool = False) -> str | None:
    """What is wrong with a library's own model, in one line; ``None`` where it runs.

    Raises:
        Exception: What the model raises, if code of ours has a part in it.
    """
    model = None
    try:
        # A test draws the same random numbers whether or not this has run before.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = entry.model(double=double)
            model(**entry.example(double=double))
    except Exception as error:
        if _is_ours(error, model, is_older(entry.library)):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        release = f"{entry.library} {version(entry.library)}"
        return f"{release}: {FAILS}: {entry.name}: {type(error).__name__}: {first_line}"
    return None


def _is_ours(error: Exception, model: nn.Module | None, is_older: bool) -> bool:
    """Whether an error comes from a model of our own, passed a hook that was left behind, or lies in the tables."""
    passed = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    classes = [] if model is None else [type(module).__module__ for module in model.modules()]
    if any(name.startswith("tokenprune") for name in (*passed, *classes)):
        return True
    # The tables are not written for older releases.
    return passed[-1].startswith("tests.") and not is_older


def skip_host_fault(entry: Entry, *, double: bool = False) -> None:
    """Skip a test whose model its library cannot run."""
    if fault := host_fault(entry, double=double):
        pytest.skip(fault)


def assert_most_run(library: str, entries: Iterable[Entry]) -> None:
    """Fail where so many models of a library fail that skipping them would hide everything."""
    entries = list(entries)
    faults = [fault for entry in entries if (fault := host_fault(entry))]
    share = ALLOWED if installed_release(library) == recorded_release(library) else ALLOWED_ELSEWHERE
    assert len(faults) <= share * len(entries), "\n".join([f"{len(faults)} of {len(entries)} models:", *faults])


def summary(reasons: Iterable[str]) -> Iterator[str]:
    """Lines that count and list the faults among the reasons for which tests were skipped."""
    faults = sorted({reason.removeprefix("Skipped: ") for reason in reasons if f": {FAILS}: " in reason})
    for release in sorted({fault.partition(":")[0] for fault in faults}):
        of_release = [fault for fault in faults if fault.startswith(f"{release}: ")]
        yield f"{release}: skipped {len(of_release)}, whose dense model fails"
        yield from (f"  {fault}" for fault in of_release)

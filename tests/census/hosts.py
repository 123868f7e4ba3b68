"""The libraries whose models are pruned: their releases, and what is skipped since they cannot run it themselves.

Which faults are those of a library is said in tokenprune/analysis/hosts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from traceback import walk_tb

import pytest
import torch
from packaging.version import Version

from tests.census.entry import Entry
from tokenprune import HostError
from tokenprune.analysis.hosts import DENSE_MODEL_FAILS, dense_fault, run_dense
from tokenprune.backbones.supported import proved_version

# What part of a library's models may fail by itself: on the release with which the list beside the adapter was written,
# and on any other. With more of them skipped, next to nothing would be tested.
ALLOWED, ALLOWED_ELSEWHERE = 0.05, 0.5


def recorded_release(library: str) -> Version:
    """The release of a library with which the list beside its adapter was written."""
    recorded = proved_version(library)
    assert recorded is not None
    return Version(recorded)


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
    try:
        # A test draws the same random numbers whether or not this has run before.
        with torch.random.fork_rng(devices=[]):
            run_dense(entry, library=entry.library, double=double)
    except HostError as error:
        return str(error)
    except Exception as error:
        # The tables are not written for older releases.
        if is_older(entry.library) and _is_raised_in_the_tables(error):
            return dense_fault(entry, entry.library, error)
        raise
    return None


def _is_raised_in_the_tables(error: Exception) -> bool:
    *_, (last, _) = walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__")).startswith("tests.")


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
    faults = sorted({reason.removeprefix("Skipped: ") for reason in reasons if f": {DENSE_MODEL_FAILS}: " in reason})
    for release in sorted({fault.partition(":")[0] for fault in faults}):
        of_release = [fault for fault in faults if fault.startswith(f"{release}: ")]
        yield f"{release}: skipped {len(of_release)}, whose dense model fails"
        yield from (f"  {fault}" for fault in of_release)

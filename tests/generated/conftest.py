"""How many inputs are generated: a hundred an area where slow tests are left out, a thousand where they run."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The same inputs in every run, and no folder of earlier failures: what fails here fails everywhere.
_COMMON = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("a hundred", _COMMON, max_examples=100)
settings.register_profile("a thousand", _COMMON, max_examples=1000)


def pytest_configure(config: pytest.Config) -> None:
    """Before the test files are imported, which take their shares of the profile."""
    settings.load_profile("a hundred" if "not slow" in config.option.markexpr else "a thousand")

"""How many inputs are generated: a hundred an area where slow tests are left out, a thousand where they run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

# The same inputs in every run, and no folder of earlier failures: what fails here fails everywhere.
_COMMON = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("a hundred", _COMMON, max_examples=100)
settings.register_profile("a thousand", _COMMON, max_examples=1000)


class _TorchRandom:
    """PyTorch's random numbers, which are to be the same for every input."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_RANDOM = _TorchRandom()  # Hypothesis holds a weak reference
register_random(_RANDOM)


def pytest_configure(config: pytest.Config) -> None:
    """Before the test files are imported, which take their shares of the profile."""
    settings.load_profile("a hundred" if "not slow" in config.option.markexpr else "a thousand")

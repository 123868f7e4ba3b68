"""How the outputs of models are told apart from rounding."""

from __future__ import annotations

from torch import Tensor


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        error = ((actual[name] - expected[name]).abs().max() / scale).item()
        assert error <= tolerance, f"{name} differs by {error}"

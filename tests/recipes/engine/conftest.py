"""Images for the tests of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.digits.data import DigitsConfig, make_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=70, num_validation=24))

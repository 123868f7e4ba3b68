"""``tokenprune plan``: which budgets it takes, what it prints, how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import fields, run
from tests.helpers.zoo import BY_NAME


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and eight pictures of noise."""
    root = tmp_path_factory.mktemp("data")
    model: Any = BY_NAME["transformers ViT classifier"].model()
    model.save_pretrained(root / "model")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        noise = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 48)).save(root / "pictures" / f"{number}.png")
    return root


def test_a_plan_for_multiply_adds(data: Path) -> None:
    model = str(data / "model")
    counted = fields("flops", model, "-k", "0.6")["reports"][0]
    found = fields("plan", model, "--gmacs", str(counted["sparse_gmacs"] * 1.001))
    assert found["sparse_gmacs"] == pytest.approx(counted["sparse_gmacs"], rel=0.01)
    again = ",".join(map(str, found["keep_ratios"]))
    assert fields("flops", model, "-k", again)["reports"][0]["sparse_gmacs"] == found["sparse_gmacs"]
    told = run("plan", model, "--gmacs", str(counted["sparse_gmacs"] * 1.001))
    assert f"--keep-ratio {again}" in told.output and "dense ÷ pruned" in told.output


def test_a_plan_that_agrees(data: Path) -> None:
    options = ("--agreement", "0.7", "--num-workers", "0", "--device", "cpu")
    found = fields("plan", str(data / "model"), str(data / "pictures"), *options)
    assert found["sparse_gmacs"] <= found["dense_gmacs"] and len(found["keep_ratios"]) == len(found["stages"])


def test_what_is_wrong_with_it_is_one_line(data: Path) -> None:
    model = str(data / "model")
    for arguments, told in (
        (("plan", model), "one budget out of gmacs, speedup and agreement, and none is given"),
        (("plan", model, "--gmacs", "900"), "cannot be met"),
        (("plan", model, "--agreement", "0.9"), "none are given"),
        (("plan", model, str(data / "nothing"), "--agreement", "0.9"), "no such file or folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and told in result.stderr.splitlines()[-1]

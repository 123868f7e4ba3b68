"""The study of fast paths on a handful of digits: rows, resuming, and the flat model at equal multiply-adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

from recipes.digits.data import DigitsConfig, make_digits
from recipes.digits.flat import run_flat
from recipes.digits.presets import DIGITS_DENSE, DIGITS_SPARSE
from recipes.small import hierarchy_study
from recipes.small.hierarchy_study import CALIBRATED, MODELS, PLANS, Study

QUICK: dict[str, Any] = {"num_workers": 0, "tracker": "none", "validation_batches": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=130, num_validation=24))


@pytest.mark.parametrize(("model", "blocks"), [("small_swin", (1, 6, 1)), ("small_convnext", (1, 6, 1, 1))])
def test_stages_stand_in_the_level_of_six_blocks(model: str, blocks: tuple[int, ...]) -> None:
    import tokenprune

    sparse: Any = tokenprune.sparsify(timm.create_model(model).eval(), pruned="fast")
    levels = sparse.tokenprune.backbone.hierarchy.levels
    assert tuple(len(level.blocks) for level in levels) == blocks
    assert sparse.tokenprune.plan.stages == (2, 3, 4)
    with torch.no_grad():
        assert sparse(torch.randn(2, 3, 64, 64)).shape == (2, 10)
        assert sparse.tokenprune.trace.grid == (8, 8)


@pytest.mark.slow
def test_every_row_is_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(
        dense={**DIGITS_DENSE, **QUICK, "steps_per_epoch": 2},
        sparse={**DIGITS_SPARSE, **QUICK, "fitted_images": 64, "batch_size": 32},
        data=folder, output=tmp_path, epochs=1, steps=1, seed=0,
    )  # fmt: skip
    rows = study.run(["small_convnext"], console=Console(quiet=True))
    runs = sum(map(len, PLANS.values()))
    assert len(rows) == 1 + 2 * runs + len(CALIBRATED) * 2 * len(PLANS) and {row.model for row in rows} <= {*MODELS}
    assert len({(row.keep_ratios, row.scorer, row.fast_paths, row.trained) for row in rows}) == len(rows)
    assert rows[0].keep_ratios == () and all(row.gmacs != rows[0].gmacs for row in rows[1:])
    assert all((row.unpruned is None) == (row.trained != "all") for row in rows)
    assert len(json.loads((tmp_path / "hierarchies.json").read_text())) == len(rows)
    for train in ("train_dense", "train_hierarchy"):
        monkeypatch.setattr(hierarchy_study, train, lambda *args, **options: pytest.fail("trained again"))
    again = study.run(["small_convnext"], console=Console(quiet=True))
    assert [row for row in again if row.steps] == [row for row in rows if row.steps]


@pytest.mark.slow
def test_the_flat_model_is_compared_at_equal_multiply_adds(folder: Path, tmp_path: Path) -> None:
    fast, drop = run_flat(
        data=folder, output=tmp_path, keep_ratio=0.5, steps=1, seed=0, console=Console(quiet=True), **QUICK
    )
    assert fast[0] == "fast paths, ρ 0.5" and drop[0].startswith("dropped, ")
    assert drop[2] <= fast[2] and drop[2] == pytest.approx(fast[2], rel=0.03)

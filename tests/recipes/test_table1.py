"""`recipes.table1`: its multiply-adds against those worked out by hand, and the checkpoints it reads."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import tokenprune
from recipes import table1
from recipes.digits.data import DigitsConfig, make_digits
from recipes.engine.settings import SettingsError
from recipes.paper.rows import ARCHITECTURES, ROWS, Architecture, deviation, published_speedup
from recipes.paper.weights import sparse_model, weights_of
from recipes.table1 import TableSettings, multiply_adds

# GMACs of DeiT at 224 px by width, at ρ 1.0, 0.9, … 0.5, worked out from the architecture.
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
WIDTHS = {
    192: (1.25, 1.09, 0.93, 0.80, 0.69, 0.60),
    256: (2.14, 1.87, 1.60, 1.37, 1.18, 1.03),
    288: (2.66, 2.33, 2.00, 1.72, 1.48, 1.29),
    320: (3.25, 2.85, 2.44, 2.10, 1.81, 1.57),
    384: (4.60, 4.04, 3.46, 2.98, 2.56, 2.23),
    768: (17.56, 15.51, 13.32, 11.48, 9.87, 8.56),
}
WIDTH_OF = {
    "deit_tiny": 192, "deit_256": 256, "deit_288": 288, "deit_320": 320, "deit_small": 384, "deit_base": 768
}  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "reproducing.md"
QUICK = {("deit_tiny", 1.0), ("deit_small", 0.7), ("lvvit_t", 0.7)}
TOLERANCE = 0.01  # of fractions: what the columns of figures with two decimals are held to


@lru_cache(maxsize=1)
def built(architecture: Architecture) -> nn.Module:
    return sparse_model(architecture)


def shown(value: float | None) -> str:
    return "–" if value is None else str(value)


# Multiply-adds


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if (row.architecture, row.ratio) in QUICK else pytest.mark.slow)
        for name, row in ROWS.items()
    ],
)
def test_multiply_adds_of_every_row(name: str) -> None:
    row, architecture = ROWS[name], ARCHITECTURES[ROWS[name].architecture]
    gmacs = multiply_adds(built(architecture), architecture, row.ratio)
    assert row.computed is not None and abs(deviation(gmacs, row.computed)) < TOLERANCE
    figures = [architecture.title, f"{row.ratio:g}", *map(shown, (row.top1, row.gmacs)), f"{row.computed:.2f}"]
    assert f"| `{name}` | {' | '.join(figures)} | {gmacs:.2f} |" in PAGE.read_text()


@pytest.mark.parametrize(
    ("width", "ratio"),
    [
        pytest.param(width, ratio, marks=[] if (width, ratio) == (256, 0.7) else pytest.mark.slow)
        for width in WIDTHS
        for ratio in RATIOS
    ],
)
def test_multiply_adds_of_width_scaling(width: int, ratio: float) -> None:
    architecture = Architecture(title="", model="deit_small_patch16_224", width=width)
    computed = WIDTHS[width][RATIOS.index(ratio)]
    assert abs(deviation(multiply_adds(built(architecture), architecture, ratio), computed)) < TOLERANCE


def test_published_figures_are_plausible() -> None:
    assert len(ROWS) == 30 and len([row for row in ROWS.values() if row.images_per_second]) == 12
    for row in ROWS.values():
        dense = ROWS[f"{row.architecture}/1.0"]
        assert row.computed is not None and dense.computed is not None
        if row.gmacs is not None:  # their figures are without the predictors, and rounded down here and there
            assert abs(deviation(row.gmacs, row.computed)) < 0.06, row.name
        if row.top1 is not None and dense.top1 is not None:
            assert row.top1 <= dense.top1
        speedup = published_speedup(row)
        if speedup is not None:
            assert abs(deviation(speedup, dense.computed / row.computed)) < 0.1, row.name
        width = WIDTH_OF.get(row.architecture)
        if width is not None:
            assert row.computed == WIDTHS[width][RATIOS.index(row.ratio)]


# From the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=10, num_validation=60))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """As if `recipes.deit` had trained DeiT-Ti on the digits."""
    torch.manual_seed(0)
    return tokenprune.sparsify(timm.create_model("deit_tiny_patch16_224", num_classes=10), keep_ratio=0.7)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(table1.app, [str(argument) for argument in arguments])


def words(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


def run_folder(model: nn.Module, folder: Path, **settings: Any) -> Path:
    tokenprune.save_pretrained(model, folder, model_card=False)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"stages": None, "scorer": "predictor", **settings}))
    return folder


def official(model: nn.Module) -> dict[str, Any]:
    """A state dict in the layout of the official checkpoints."""
    ours = re.compile(r"tokenprune\.stages\.(\d+)\.scorer\.")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    return {ours.sub(r"score_predictor.\1.", name): tensor for name, tensor in state.items()}


def test_the_table_with_a_checkpoint(trained: nn.Module, folder: Path, tmp_path: Path) -> None:
    path = run_folder(trained, tmp_path / "run", keep_ratio=None)
    result = invoke(
        "--smoke", "--rows", "deit_tiny", "--data-dir", folder, "--checkpoint", f"deit_tiny/0.7={path}",
        "--validation-batches", 8, "--num-workers", 0, "--device", "cpu", "--output", tmp_path / "table",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "DeiT-Ti" in result.output and "LV-ViT" not in result.output
    report = json.loads((tmp_path / "table" / "table1.json").read_text())
    dense, sparse = report["rows"]
    assert (dense["row"], sparse["row"]) == ("deit_tiny/1.0", "deit_tiny/0.7")
    assert dense["scores"] == {} and dense["speedup"] == 1
    # 196 patches: floor(196 · 0.7), floor(196 · 0.49) and floor(196 · 0.343) of them
    assert [sparse["scores"][f"kept_{stage}"] * 196 for stage in (1, 2, 3)] == [137, 96, 67]
    assert 0 <= sparse["scores"]["top1"] <= sparse["scores"]["top5"] <= 1
    assert sparse["gmacs"] == pytest.approx(0.80, rel=TOLERANCE) and sparse["computed_gmacs"] == 0.80
    assert sparse["gmacs_over_computed"] == pytest.approx(sparse["gmacs"] / 0.80 - 1)
    assert sparse["gmacs_over_published"] is None and sparse["published"]["top1"] is None
    assert sparse["images_per_second"] > 0 and dense["images_per_second"] > 0
    page = (tmp_path / "table" / "table1.md").read_text()
    assert f"| {100 * sparse['scores']['top1']:.2f} |" in page and page.count("| DeiT-Ti | 0.7 |") == 2


@pytest.mark.parametrize("form", ["folder", "file", "official", "nested official"])
def test_forms_of_sparse_checkpoints(form: str, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    if form in ("folder", "file"):
        path = run_folder(trained, tmp_path / "run", keep_ratio=[0.7])
        path = path / "tokenprune.safetensors" if form == "file" else path
    else:
        torch.save({"model": official(trained)} if form == "nested official" else official(trained), path)
    model = weights_of(ROWS["deit_tiny/0.7"], path, 10)
    state, expected = model.state_dict(), trained.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    assert model.tokenprune.plan == trained.tokenprune.plan


def test_a_dense_checkpoint(trained: nn.Module, tmp_path: Path) -> None:
    dense = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("tokenprune.")}
    torch.save({"model": dense}, tmp_path / "dense.pth")
    state = weights_of(ROWS["deit_tiny/1.0"], tmp_path / "dense.pth", 10).state_dict()
    assert state.keys() == dense.keys() and all(torch.equal(state[name], dense[name]) for name in dense)
    with pytest.raises(SettingsError, match=r"does not hold the weights of deit_tiny/0\.7"):
        weights_of(ROWS["deit_tiny/0.7"], tmp_path / "dense.pth", 10)


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ("deit_tiny/0.7", {"keep_ratio": [0.5]}, r"was trained with .*0\.5.*takes .*0\.7"),
        ("deit_tiny/0.7", {"stages": [2, 4, 6]}, r"was trained with .*\[2, 4, 6\]"),
        ("deit_tiny/0.7", {"scorer": "random"}, "was trained with .*random"),
        ("deit_tiny/1.0", {}, r"does not hold the weights of deit_tiny/1\.0"),
        ("deit_256/0.7", {}, r"DeiT-256 at 224 px, 10 classes"),
    ],
)
def test_weights_of_another_row_are_refused(
    row: str, changes: dict[str, Any], said: str, trained: nn.Module, tmp_path: Path
) -> None:
    path = run_folder(trained, tmp_path / "run", **{"keep_ratio": [0.7], **changes})
    with pytest.raises(SettingsError, match=f"(?s){said}"):
        weights_of(ROWS[row], path, 10)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(SettingsError, match="does not hold the weights"):
        weights_of(ROWS["deit_tiny/0.7"], tmp_path / "damaged.pth", 10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "deit_huge"], "deit_huge"),
        (["--checkpoint", "deit_small/0.7=FOLDER"], "give both or none"),
        (["--data-dir", "FOLDER"], "give both or none"),
        (["--data-dir", "FOLDER", "--checkpoint", "deit_small=FOLDER"], "none of the rows"),
        (["--data-dir", "FOLDER", "--checkpoint", "deit_small/0.7=nowhere"], "no such file"),
        (["--rows", "lvvit_s", "--data-dir", "FOLDER", "--checkpoint", "deit_small/0.7=FOLDER"], "none of the rows"),
        (["--device", "abacus"], "device='abacus'"),
    ],
)
def test_bad_settings_end_with_code_2(arguments: list[str], said: str, folder: Path, tmp_path: Path) -> None:
    given = [word.replace("FOLDER", str(folder)) for word in arguments]
    result = invoke(*given, "--output", tmp_path / "table")
    assert result.exit_code == 2 and said in words(result), result.output


def test_rows_are_chosen_by_name_or_model() -> None:
    chosen = TableSettings(rows=["lvvit_m", "deit_base/0.7"]).chosen
    assert [row.name for row in chosen] == [*(f"lvvit_m/{ratio}" for ratio in (1.0, 0.9, 0.8, 0.7)), "deit_base/0.7"]
    assert TableSettings().chosen == list(ROWS.values())

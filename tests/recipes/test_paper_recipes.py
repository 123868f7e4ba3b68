"""The recipes that reproduce the paper, on a handful of images: deit, lvvit, ablation, width scaling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from benchmarks import engine as engine_benchmark
from recipes import ablation, deit, dense, hierarchy, lvvit, width_scaling
from recipes.ablation import TABLES, AblationSettings, run_ablation
from recipes.digits.data import DigitsConfig, make_digits
from recipes.dynamicvit import Objective, SparseSettings
from recipes.engine.settings import SettingsError
from recipes.structural import StructuralDownsampling, TaughtCrossEntropy, count
from recipes.width_scaling import WidthSettings, dense_at, run_width_scaling
from tokenprune.analysis.flop_counter import count as count_operations

# test_vit has six blocks of width 64 and, at 64 pixels, 4 x 4 patches.
TINY: dict[str, Any] = {
    "image_size": 64,
    "model": "test_vit",
    "pretrained": False,
    "epochs": 1,
    "steps_per_epoch": 2,
    "warmup_epochs": 0.5,
    "frozen_epochs": 0.0,
    "batch_size": 8,
    "num_workers": 0,
    "log_every": 1,
    "tracker": "none",
    "validation_batches": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=40, num_validation=24))


def smoke(module: Any, folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        module.app,
        ["--smoke", "--data-dir", str(folder), "--output", str(output), "--num-workers", "0", "--tracker", "none",
         *arguments],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made: dict[str, Any] = json.loads((output / "results.json").read_text())
    return made


@pytest.mark.parametrize(
    "module", [deit, dense, hierarchy, lvvit, ablation, width_scaling], ids=lambda module: module.__name__
)
def test_recipes_explain_themselves(module: Any) -> None:
    result = CliRunner().invoke(module.app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "--smoke" in result.output and "--data-dir" in result.output


def test_deit_and_dense_run_end_to_end(folder: Path, tmp_path: Path) -> None:
    trained = smoke(dense, folder, tmp_path / "dense", "--model", "deit_tiny_patch16_224")
    assert "sparse" not in trained["gmacs"]
    made = smoke(deit, folder, tmp_path / "deit", "--checkpoint", str(tmp_path / "dense" / "model.safetensors"))
    assert made["gmacs"]["dense"] == trained["gmacs"]["dense"] > made["gmacs"]["sparse"]


def test_lvvit_learns_with_its_auxiliary_head(folder: Path, tmp_path: Path) -> None:
    made = smoke(lvvit, folder, tmp_path / "lvvit")
    assert made["settings"]["model"] == "lvvit_t" and made["gmacs"]["sparse"] < made["gmacs"]["dense"]
    settings = SparseSettings(**{**TINY, "data_dir": folder, "output": tmp_path})
    model = timm.create_model("lvvit_t", img_size=64, num_classes=10)
    assert Objective(model, settings, lvvit.HEADS).loss.heads == ("head", "aux_head")


# Structural downsampling


def test_two_by_two_patches_become_their_mean() -> None:
    rows, columns = 4, 6
    patches = torch.arange(rows * columns).float().view(1, rows * columns, 1).expand(2, -1, 3)
    prefix = torch.full((2, 2, 3), -1.0)
    hook = StructuralDownsampling((rows, columns), num_prefix_tokens=2)
    tokens, *rest = hook(nn.Identity(), (torch.cat((prefix, patches), dim=1), "mask"))
    assert torch.equal(tokens[:, :2], prefix) and rest == ["mask"]
    expected = rearrange(
        torch.arange(24.0).view(rows, columns), "(r y) (c x) -> (r c) (y x)", y=2, x=2
    ).mean(dim=-1)  # fmt: skip
    assert torch.equal(tokens[0, 2:, 0], expected)
    with pytest.raises(SettingsError, match="grid of 3 x 4 patches cannot be pooled"):
        StructuralDownsampling((3, 4), num_prefix_tokens=1)


def test_the_count_of_structural_downsampling_is_that_of_the_model_that_runs() -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=10).eval()
    counted = count(model)
    assert not hasattr(model, "tokenprune")
    dense = count_operations(model, torch.rand(1, 3, 64, 64))[""]
    model.blocks[3].register_forward_pre_hook(StructuralDownsampling((4, 4), model.num_prefix_tokens))
    pooled = count_operations(model, torch.rand(1, 3, 64, 64))[""]
    assert counted == {"dense": pytest.approx(dense / 1e9), "sparse": pytest.approx(pooled / 1e9)}


def test_its_loss_is_that_of_the_paper_without_decisions(folder: Path) -> None:
    settings = SparseSettings(**{**TINY, "data_dir": folder, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0})
    logits, targets = torch.randn(4, 10), torch.tensor([0, 3, 3, 9])

    class Teacher(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * inputs

    parts = TaughtCrossEntropy(Teacher(), settings)(nn.Identity(), logits, logits, targets)
    student, teacher = logits.softmax(dim=-1), (2 * logits).softmax(dim=-1)
    kl = (student * (student.log() - teacher.log())).sum(dim=-1).mean()
    assert parts["kl"] == pytest.approx(float(kl), rel=1e-5)
    classification = -student[range(4), targets].log().mean()
    assert parts["loss"] == pytest.approx(float(classification + 0.5 * kl), rel=1e-5)


# Ablation


def ablation_settings(folder: Path, output: Path, **changes: Any) -> AblationSettings:
    return AblationSettings(**{**TINY, "data_dir": folder, "output": output, "depth": 6, "seeds": 2, **changes})


def test_rows_change_what_they_say(folder: Path, tmp_path: Path) -> None:
    settings = ablation_settings(folder, tmp_path, depth=12, static_learning_rate=0.4, learning_rate=0.02)
    rows = {row.run: settings.of_row(row, 1) for table in TABLES.values() for row in table}
    assert (rows["one-stage"].stages, rows["one-stage"].ratio) == ([6], 0.25)
    assert (rows["two-stages"].stages, rows["two-stages"].ratio) == ([4, 8], 0.6)
    assert (rows["dynamic"].stages, rows["dynamic"].ratio, rows["dynamic"].scorer) == (None, 0.7, "predictor")
    assert (rows["random"].scorer, rows["cls-attention"].scorer) == ("random", "cls_attention")
    assert (rows["no-teacher"].kl_weight, rows["no-teacher"].distill_weight) == (0, 0)
    assert (rows["ratio-4"].ratio_weight, rows["ratio-1"].ratio_weight) == (4, 1)
    static, dynamic = rows["static"], rows["dynamic"]
    assert static.learning_rate == 0.4
    assert static.learning_rate * static.backbone_factor == dynamic.learning_rate * dynamic.backbone_factor
    assert all(row.seed == 1 and row.output == tmp_path / f"{name}-seed1" for name, row in rows.items())


@pytest.mark.parametrize("changes", [{"keep_ratio": [0.5]}, {"stages": [2]}, {"scorer": "random"}])
def test_what_the_rows_differ_in_is_not_to_be_set(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="rows of the ablation differ in"):
        ablation_settings(folder, tmp_path, **changes)


@pytest.mark.slow
def test_the_ablation_ends_in_tables_and_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"structural", "dynamic", "one-stage"}
    small = {name: tuple(row for row in rows if row.run in kept) for name, rows in TABLES.items()}
    monkeypatch.setattr(ablation, "TABLES", small)
    settings = ablation_settings(folder, tmp_path)
    tables = run_ablation(settings)
    assert list(tables) == ["Strategy", "Score", "Stages", "Losses"]
    structural, dynamic = tables["Strategy"]
    assert len(dynamic["top1"]) == 2 and structural["gmacs"] != dynamic["gmacs"]
    text = (tmp_path / "ablation.md").read_text()
    assert text.count("| --- |") == 4 and "structural: 2 × 2" in text
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert len(stamps) == 6
    assert run_ablation(settings) == tables
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    with pytest.raises(SettingsError, match=r"ratio_weight was 2\.0 and is 3\.0"):
        run_ablation(replace(settings, ratio_weight=3.0))


# Width scaling


def test_width_scaling_trains_loads_and_draws(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    weights = timm.create_model("test_vit", img_size=64, num_classes=10, embed_dim=48, num_heads=1).state_dict()
    torch.save(weights, given / "width-48.pth")
    settings = WidthSettings(
        **{**TINY, "data_dir": folder, "output": tmp_path / "run", "widths": [32, 48], "dense_dir": given,
           "dense_epochs": 1, "dense_warmup_epochs": 0.5, "dense_steps_per_epoch": 3}
    )  # fmt: skip
    points = run_width_scaling(settings)
    assert [point["width"] for point in points] == [32, 48]
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {
        "dense-32",
        "sparse-32",
        "sparse-48",
    }
    assert all(point["sparse"]["gmacs"] < point["dense"]["gmacs"] for point in points)
    with Image.open(tmp_path / "run" / "width_scaling.png") as picture:
        assert picture.width > 300
    assert "| 48 |" in (tmp_path / "run" / "width_scaling.md").read_text()


def test_a_dense_model_of_the_same_cost_lies_between_its_neighbours() -> None:
    points = [{"dense": {"gmacs": gmacs, "top1": top1}} for gmacs, top1 in ((3.0, 0.8), (1.0, 0.6))]
    assert dense_at(2.0, points) == pytest.approx(0.7)
    assert dense_at(0.9, points) is None and dense_at(3.1, points) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 32}, "--widths"),
        ({"widths": [32, 32]}, "each width once"),
        ({"dense_dir": Path("no")}, "no such folder"),
    ],
)
def test_width_settings_that_contradict_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        WidthSettings(**{**TINY, "data_dir": folder, **changes})


# The benchmark of the engine


def test_the_engine_and_the_plain_loop_do_the_same_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    forward = Objective.forward

    def record(self: Objective, *arguments: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the decisions of both
        parts = forward(self, *arguments)
        losses.append(float(parts["classification"].detach()))
        return parts

    monkeypatch.setattr(Objective, "forward", record)
    ratio = engine_benchmark.compare("test_vit", 4, "cpu", 4, tmp_path, warmup=1)
    assert len(ratio.first_seconds) == len(ratio.second_seconds) == 4 and ratio.median > 0
    # Engine and plain loop in turn, six steps each, from the same weights on images in another order: at first alike.
    assert len(losses) == 12 and losses[0] == pytest.approx(losses[1], abs=0.5)

"""`recipes.hierarchy`: the authors' settings, their published multiply-adds, and a run on a handful of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import tokenprune
from recipes import dense, hierarchy
from recipes.digits.data import DigitsConfig, make_digits
from recipes.dynamicvit import fine_tune
from recipes.engine.settings import SettingsError
from recipes.hierarchy import PRESETS, PUBLISHED, HierarchySettings, keep_ratios, start_fast_paths

NUM_POSITIONS = 14 * 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data") / "digits", DigitsConfig(num_train=40, num_validation=24))


def smoke(module: Any, folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    given = ["--smoke", "--data-dir", str(folder), "--output", str(output), "--num-workers", "0", "--tracker", "none"]
    result = CliRunner().invoke(module.app, [*given, "--steps-per-epoch", "2", *arguments])
    assert result.exit_code == 0, result.output
    made: dict[str, Any] = json.loads((output / "results.json").read_text())
    return made


def test_settings_are_the_authors(tmp_path: Path) -> None:
    settings = HierarchySettings(data_dir=tmp_path)
    assert settings.ratio == [0.7, 0.5, 0.3] == keep_ratios(0.7)
    # Of the mean over three stages, where the authors have 10 / 3 of the sum.
    assert (settings.kl_weight, settings.distill_weight, settings.ratio_weight) == (0.5, 0.5, 10.0)
    with pytest.raises(SettingsError, match="fast_paths='authors': choose one of 'fitted', 'zero', 'random'"):
        HierarchySettings(data_dir=tmp_path, fast_paths="authors")  # type: ignore[arg-type]


def test_dense_and_sparse_runs_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    trained = smoke(dense, folder, tmp_path / "dense", "--model", "test_convnext")
    made = smoke(hierarchy, folder, tmp_path / "run", "--checkpoint", str(tmp_path / "dense" / "model.safetensors"))
    assert made["gmacs"]["dense"] == trained["gmacs"]["dense"] != made["gmacs"]["sparse"]
    assert made["settings"]["fast_paths"] == "fitted" and "kept_3" in made["scores"]
    loaded = tokenprune.from_pretrained(tmp_path / "run")
    assert loaded.tokenprune.pruned == "fast" and loaded.tokenprune.keep_ratio == (0.7, 0.5, 0.3)


@pytest.mark.parametrize(("start", "moved"), [("fitted", True), ("zero", False), ("random", True)])
def test_fast_paths_start_as_the_settings_say(folder: Path, start: Any, moved: bool) -> None:
    settings = HierarchySettings(
        data_dir=folder, fast_paths=start, fitted_images=16, batch_size=8, num_workers=0, image_size=64
    )
    model = tokenprune.sparsify(timm.create_model("test_convnext"), keep_ratio=0.7, pruned="fast")
    start_fast_paths(model, settings)
    weights = [path.linear.weight for stage in model.tokenprune.stages for path in stage.reduction.paths]
    assert len(weights) > 1 and all(bool(weight.any()) is moved for weight in weights)
    if start == "random":
        assert torch.cat([weight.flatten() for weight in weights]).std().item() == pytest.approx(0.02, rel=0.2)


def test_the_recipe_of_flat_models_refuses_a_hierarchy(folder: Path, tmp_path: Path) -> None:
    settings = HierarchySettings(
        data_dir=folder, model="test_convnext", pretrained=False, image_size=64, num_workers=0, output=tmp_path
    )
    with pytest.raises(tokenprune.UnsupportedModelError, match="pass pruned='fast'"):
        fine_tune(settings)


def _products(model: nn.Module) -> tuple[float, float]:
    """10⁹ multiply-adds of the dense and of the sparse model, in linear layers, convolutions and attention alone.

    `tokenprune.flops` counts norms too, as fvcore does, 5 an element.
    """
    norms = {"dense": 0, "sparse": 0}

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        norms[path] += 5 * output.numel()

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.LayerNorm)]
    image = torch.zeros(1, 3, 224, 224)
    with torch.no_grad(), tokenprune.dense(model):
        path = "dense"
        model(image)
    with torch.no_grad():
        path = "sparse"
        model(image)
    for hook in hooks:
        hook.remove()
    report = tokenprune.flops(model)
    return (report.dense - norms["dense"]) / 1e9, (report.sparse - norms["sparse"]) / 1e9


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "swin-tiny" else pytest.mark.slow)
        for name in dict.fromkeys(name for name, _ in PUBLISHED)
    ],
)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    """And (1 − k)·N·7C² a block are saved, less N·(1.625 C² + C/2) a predictor."""
    model = timm.create_model(str(PRESETS[name].settings["model"])).eval()
    tokenprune.sparsify(model, keep_ratio=keep_ratios(0.7), pruned=hierarchy.REDUCTION)
    sparsifier = model.tokenprune
    width, blocks, stages = sparsifier.backbone.embed_dim, sparsifier.backbone.reach, sparsifier.plan.stages
    for ratio in (ratio for other, ratio in PUBLISHED if other == name):
        sparsifier.keep_ratio = keep_ratios(ratio)
        published = PUBLISHED[name, ratio][1]
        dense, sparse = _products(model)
        assert abs(sparse - published) < 0.06
        ends = [*stages[1:], blocks[-1] + 1]
        lengths = [end - start for start, end in zip(stages, ends, strict=True)]
        pruned = [NUM_POSITIONS - count for count in sparsifier.plan.num_keep(NUM_POSITIONS)]
        saved = sum(length * number * 7 * width**2 for length, number in zip(lengths, pruned, strict=True))
        scorers = len(stages) * NUM_POSITIONS * (1.625 * width**2 + width / 2)
        assert (dense - sparse) * 1e9 == pytest.approx(saved - scorers, rel=0.01)

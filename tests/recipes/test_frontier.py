"""The comparison of methods on a handful of images: points made once, a table, a picture."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tokenprune
from recipes.digits.data import DigitsConfig, make_digits
from recipes.frontier import runs as frontier_runs
from recipes.frontier.grid import COSTS, Method, Point, points
from recipes.frontier.report import front, gathered_by_method, write_report
from recipes.frontier.runs import Runs, name_of
from recipes.frontier.tasks import DIGITS, Task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("data") / "digits"
    config = DigitsConfig(num_train=24, num_validation=16)
    make_digits(folder, config)
    return dataclasses.replace(
        DIGITS,
        preset={**DIGITS.preset, "data_dir": folder, "batch_size": 8, "num_workers": 0},
        make_images=lambda settings: None,
        num_validation=12,
    )


def test_points_are_made_once_at_their_cost(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(task, tmp_path)
    dense = runs.dense()
    point = Point(method=Method(scorer="cls_attention", pruned="fuse", training="none"), cost=0.48)
    made = runs.make(point)
    assert 0 <= made["accuracy"] <= 1 and 0.99 * 0.48 <= made["gmacs"] / dense["gmacs"] <= 0.48
    monkeypatch.setattr(Runs, "_model", lambda *arguments: pytest.fail("made a second time"))
    again = Runs(task, tmp_path)
    assert again.make(point) == made and again.dense() == dense
    tables = write_report([again, again], tmp_path)
    assert "**" in tables[0].markdown() and "cls_attention" in (tmp_path / "frontier.md").read_text()
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_calibration_serves_every_cost_and_reduction(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier_runs, "CALIBRATION_STEPS", 1)
    monkeypatch.setattr(frontier_runs, "GATHERED_STEPS", 1)
    calls: list[dict[str, Any]] = []
    calibrate = tokenprune.calibrate
    monkeypatch.setattr(
        tokenprune, "calibrate", lambda *images, **options: calls.append(options) or calibrate(*images, **options)
    )
    runs = Runs(task, tmp_path)
    for training, pruned in (("calibrated", "drop"), ("calibrated", "fuse"), ("gathered", "drop")):
        method = Method(scorer="predictor", pruned=pruned, training=training)  # type: ignore[arg-type]
        found = runs.make(Point(method=method, cost=0.4))
        assert found["gmacs"] <= 0.4 * runs.dense()["gmacs"]
    assert [options.get("train", "scorers") for options in calls] == ["scorers", "all"]


@pytest.mark.slow
def test_tome_meets_a_cost_with_a_stage_in_every_block(task: Task, tmp_path: Path) -> None:
    runs = Runs(task, tmp_path)
    method = Method(scorer="tome", pruned="merge_sizes", training="none")
    for cost in (0.6, 0.35):
        made = runs.make(Point(method=method, cost=cost))
        assert 0.97 * cost <= made["gmacs"] / runs.dense()["gmacs"] <= cost  # a token more in one block is up to 1 %
    merged = [round(64 * (before - after)) for before, after in pairwise((1.0, *made["keep_ratios"]))]
    assert len(merged) == 12 and max(merged) - min(merged[:6]) <= 1  # the last blocks merge half of what is left


@pytest.mark.slow
def test_a_backbone_is_trained_around_scorers_without_parameters(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier_runs, "GATHERED_STEPS", 1)
    runs = Runs(task, tmp_path)
    for scorer, pruned in (("random", "drop"), ("tome", "merge_sizes")):
        method = Method(scorer=scorer, pruned=pruned, training="gathered")
        assert 0 <= runs.make(Point(method=method, cost=0.4))["accuracy"] <= 1


def test_the_grid_names_every_point_once() -> None:
    names = [name_of(point) for point in points()]
    assert len(names) == len(set(names)) > 100
    assert {point.cost for point in points(1)} == set(COSTS) and {point.seed for point in points(1)} == {0}


def test_the_front_rises_with_the_cost(tmp_path: Path) -> None:
    good, poor = (Method(scorer=name, pruned="drop", training="none") for name in ("good", "poor"))
    assert front({good: {0.4: [0.8, 0.9], 0.6: [0.95]}, poor: {0.4: [0.7], 0.5: [0.84], 0.6: [0.9]}}) == [
        (0.4, pytest.approx(0.85), good), (0.6, 0.95, good),
    ]  # fmt: skip


def test_what_was_found_is_grouped_by_method(task: Task, tmp_path: Path) -> None:
    runs = Runs(task, tmp_path)
    method = Method(scorer="random", pruned="drop", training="none")
    for seed, accuracy in enumerate((0.5, 0.6)):
        point = Point(method=method, cost=0.4, seed=seed)
        runs._keep(name_of(point), {**dataclasses.asdict(point), "accuracy": accuracy})
    assert gathered_by_method(Runs(task, tmp_path)) == {method: {0.4: [0.5, 0.6]}}

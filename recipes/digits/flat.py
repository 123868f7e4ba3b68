"""Fast paths in the demo's flat model, beside dropped tokens at the same multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import tokenprune
from recipes.digits.model import WEIGHTS, load_dense_model
from recipes.digits.presets import DIGITS_SPARSE
from recipes.dynamicvit import SparseSettings, fine_tune
from recipes.engine.fitting import run_once
from recipes.engine.tables import Table
from recipes.hierarchy import REDUCTION, HierarchySettings, train_hierarchy
from recipes.small.model import IMAGE_SIZE


def run_flat(
    *, data: Path, output: Path, keep_ratio: float, steps: int, seed: int, console: Console, **options: Any
) -> list[tuple[str, float, float]]:
    """Fine-tune both, unless that has been done, and compare them.

    Args:
        data: The digits image folder.
        output: Every run gets a folder in it.
        keep_ratio: ρ of the one with fast paths, which keeps ρ, ρ², ρ³ on them; the other one's follows.
        steps: Of fine-tuning.
        seed: Of everything random.
        console: Where the table is printed.
        options: Further settings of both.

    Returns:
        What it is, accuracy as a fraction, and 10⁹ multiply-adds an image.
    """
    given = {**DIGITS_SPARSE, "data_dir": data, "checkpoint": WEIGHTS, "steps_per_epoch": steps, "seed": seed}
    given |= {"resume": True, **options}
    rows = []
    for name, settings, train in _runs(given, output, keep_ratio):
        made = run_once(settings, train)
        rows.append((name, made["scores"]["top1"], made["gmacs"]["sparse"]))
    table = Table(title=f"The flat model, {steps} steps", columns=("", "accuracy", "MMACs"))
    for name, accuracy, gmacs in rows:
        table.add(name, f"{accuracy:.2%}", f"{1e3 * gmacs:.2f}")
    console.print(table.rich())
    return rows


def _runs(given: dict[str, Any], output: Path, keep_ratio: float) -> Iterator[tuple[str, SparseSettings, Any]]:
    fast = HierarchySettings(
        **{**given, "keep_ratio": [keep_ratio], "output": output / f"flat-fast-{keep_ratio:g}-seed{given['seed']}"}
    )
    yield f"fast paths, ρ {keep_ratio:g}", fast, partial(train_hierarchy, fast)
    sparse: Any = tokenprune.sparsify(load_dense_model(), keep_ratio=keep_ratio, pruned=REDUCTION)
    gmacs = tokenprune.flops(sparse, (3, IMAGE_SIZE, IMAGE_SIZE)).sparse_gmacs
    dropping: Any = tokenprune.sparsify(load_dense_model(), keep_ratio=keep_ratio)
    ratios = [round(ratio, 4) for ratio in tokenprune.plan_for(dropping, gmacs=gmacs).keep_ratios]
    drop = SparseSettings(
        **{**given, "keep_ratio": ratios, "output": output / f"flat-drop-for-{keep_ratio:g}-seed{given['seed']}"}
    )
    yield f"dropped, {', '.join(f'{ratio:.0%}' for ratio in ratios)}", drop, partial(fine_tune, drop)

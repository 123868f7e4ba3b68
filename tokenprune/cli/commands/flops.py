"""``tokenprune flops``: the multiply-adds of one image, dense and sparse."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import (
    ImageSize,
    Json,
    KeepRatios,
    Model,
    Pruned,
    ScorerName,
    Stages,
    check_picture,
    ratios,
    sparsified,
)
from tokenprune.cli.output import show, show_json, step, working

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.analysis.flop_counter import FlopReport


class By(str, Enum):
    """How detailed the figures are."""

    total = "total"
    block = "block"


def flops(
    model: Model,
    keep_ratio: KeepRatios = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: ScorerName = None,
    pruned: Pruned = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curve over several ratios into this file, such as curve.png or .svg.")
    ] = None,
    by: Annotated[By, typer.Option(help="block: every block and stage in a line of its own.")] = By.total,
    as_json: Json = False,
) -> None:
    """Count the multiply-adds of one image, dense and sparse.

    In Python: tokenprune.flops(model).
    """
    from tokenprune.analysis.flop_counter import flops as count
    from tokenprune.api import sparsifier_of

    chosen = ratios(keep_ratio)
    if plot is not None:
        check_picture("--plot", plot)
        if len(chosen) < 2:
            raise typer.BadParameter("--plot draws a curve over keep ratios; give --keep-ratio several times.")
    with working(f"loading {model}") as progress:
        loaded, size = sparsified(
            model,
            stages=stages,
            keep_ratio=chosen[0] if chosen else None,
            image_size=image_size,
            scorer=scorer,
            pruned=pruned,
        )
        sparsifier = sparsifier_of(loaded)
        reports = []
        for number, one in enumerate(chosen or [sparsifier.keep_ratio]):
            step(progress, "counting", number, len(chosen) or 1)
            sparsifier.keep_ratio = one
            reports.append(count(loaded, size))
        if plot is not None:
            _plot(plot, reports, model)
    if as_json:
        show_json({"model": model, "reports": [json.loads(report.to_json()) for report in reports]})
        return
    if by is By.block:
        show(*(report.table() for report in reports))
    else:
        show(_table(model, reports))
    if plot is not None:
        show(f"The curve is in {plot}.")


def _table(model: str, reports: list[FlopReport]) -> Table:
    from rich.table import Table

    size = " × ".join(map(str, reports[0].input_size))
    stages = ", ".join(map(str, reports[0].stage_blocks))
    table = Table(title=f"{model}: GMACs of one image of {size}, pruned at blocks {stages}")
    for column in ("kept after each stage", "dense", "sparse", "dense ÷ sparse"):
        table.add_column(column, justify="right")
    for report in reports:
        kept = " → ".join(f"{one:.1%}" for one in report.keep_ratios)
        table.add_row(kept, f"{report.dense_gmacs:.3f}", f"{report.sparse_gmacs:.3f}", f"{report.ratio:.2f}")
    return table


def _plot(file: Path, reports: list[FlopReport], title: str) -> None:
    try:
        from tokenprune.analysis.plotting import flops_curve

        figure = flops_curve(reports, title=title)
    except ImportError as error:
        raise typer.BadParameter(f"--plot needs matplotlib (pip install matplotlib): {error}") from error
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--plot {file}: {error}") from error

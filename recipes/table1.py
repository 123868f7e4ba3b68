"""Every row of DynamicViT's main table: GMACs and throughput on this machine, accuracy of your checkpoints.

DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Table 1. Published
figures, and GMACs computed from the architectures, are shown for comparison.

python -m recipes.table1 --data-dir imagenet --checkpoint deit_small/0.7=runs/deit
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import nn
from typer import Option

import tokenprune
from recipes.dense import DenseSettings
from recipes.engine.checkpoints import write_json, write_text
from recipes.engine.command_line import Preset, command
from recipes.engine.data import number_of_classes, open_images
from recipes.engine.fitting import evaluate_model
from recipes.engine.settings import Settings, SettingsError
from recipes.engine.tables import Table
from recipes.paper.rows import ARCHITECTURES, ROWS, Architecture, Row, deviation, published_speedup
from recipes.paper.weights import sparse_model, weights_of


@dataclass(frozen=True, kw_only=True)
class TableSettings(Settings):
    """Settings of the table."""

    rows: Annotated[
        list[str] | None,
        Option(
            "--rows", help=f"Such as deit_small/0.7, or all of a model: {', '.join(ARCHITECTURES)}.", show_default="all"
        ),
    ] = None

    # Accuracy
    checkpoint: Annotated[
        list[str] | None,
        Option(help="row=path, repeatable: the output of a recipe, weights in it, or an official checkpoint."),
    ] = None
    data_dir: Annotated[Path | None, Option(help="Image folder (or tars, or cache), as for recipes.deit.")] = None
    dataset: Annotated[str, Option(help="timm's data set type: '' for folders and tars, hfds/…, wds/…")] = ""
    validation_split: Annotated[str, Option(help="The split to evaluate on.")] = "validation"
    num_classes: Annotated[
        int | None, Option(min=1, help="Needed only if the data does not say, as with WebDatasets.")
    ] = None
    num_workers: Annotated[int, Option(min=0, help="Data loading workers.")] = 4
    validation_batches: Annotated[int | None, Option(min=1, help="Evaluate on only this many.")] = None

    # Throughput
    batch_size: Annotated[int, Option(min=1, help="Images per batch, for throughput and accuracy.")] = 32
    pairs: Annotated[int, Option(min=2, help="Pairs of a dense and a sparse batch, timed in turn.")] = 15
    warmup: Annotated[int, Option(min=0, help="Warm-up pairs before those.")] = 3
    device: Annotated[
        str | None, Option(help="Of the throughput, such as cuda or cpu; the accelerator, if any, by default.")
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option(help="Of the throughput.")] = "float32"

    output: Annotated[Path, Option(help="Where the table goes.")] = Path("runs/table1")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {*ROWS, *ARCHITECTURES}
        if unknown := [name for name in self.rows or () if name not in known]:
            raise SettingsError(f"rows={unknown}: there are {', '.join(ROWS)}.")
        if bool(self.checkpoint) != (self.data_dir is not None):
            raise SettingsError("accuracy takes both --checkpoint and --data-dir; give both or none.")
        chosen = {row.name for row in self.chosen}
        for name, path in self.checkpoints.items():
            if name not in chosen:
                raise SettingsError(f"checkpoint={name}={path}: {name!r} is none of the rows {', '.join(chosen)}.")
            if not path.exists():
                raise SettingsError(f"checkpoint={name}={path}: there is no such file or folder.")

    @property
    def chosen(self) -> list[Row]:
        """The rows that are asked for, in the table's order."""
        names = set(self.rows or ROWS)
        return [row for row in ROWS.values() if row.name in names or row.architecture in names]

    @property
    def checkpoints(self) -> dict[str, Path]:
        """Where the weights of a row are, by its name."""
        return {name: Path(path) for name, _, path in (given.partition("=") for given in self.checkpoint or ())}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a row.

    Attributes:
        row: The row.
        gmacs: GMACs per image.
        images_per_second: Throughput.
        speedup: Dense ÷ sparse time, median over the pairs; 1 for a dense row.
        spread: Its quartiles.
        scores: As `recipes.engine.evaluation.evaluate` returns them; empty without a checkpoint.
    """

    row: Row
    gmacs: float
    images_per_second: float
    speedup: float = 1.0
    spread: tuple[float, float] = (1.0, 1.0)
    scores: dict[str, float] = field(default_factory=dict)


def run_table(settings: TableSettings, *, console: Console | None = None) -> list[Measured]:
    """Measure every row, and write ``table1.json`` and ``table1.md`` to ``settings.output``.

    Raises:
        SettingsError: A checkpoint does not belong to its row.
        DataError: The images cannot be read.
    """
    # First, since this is what may fail.
    scores = {name: _accuracy(ROWS[name], path, settings) for name, path in settings.checkpoints.items()}
    device = _device(settings)
    found = []
    rows = track(settings.chosen, "Counting and timing", console=console, disable=console is None)
    for _, group in groupby(rows, key=lambda row: row.architecture):
        model: nn.Module | None = None
        for row in group:
            model = sparse_model(ARCHITECTURES[row.architecture]) if model is None else model
            found.append(_measure(row, model, scores.get(row.name, {}), device, settings))
    if Accelerator().is_main_process:
        _report(found, device, settings, console)
    return found


def multiply_adds(model: nn.Module, architecture: Architecture, ratio: float) -> float:
    """GMACs per image at ρ = ``ratio``, to which ``model``, the sparse model of ``architecture``, is set."""
    sparsifier = model.tokenprune
    assert isinstance(sparsifier, tokenprune.Sparsifier)
    if ratio < 1:
        sparsifier.keep_ratio = ratio
    report = tokenprune.flops(model, architecture.input_size)
    return report.dense_gmacs if ratio == 1 else report.sparse_gmacs


def _accuracy(row: Row, path: Path, settings: TableSettings) -> dict[str, float]:
    architecture = ARCHITECTURES[row.architecture]
    assert settings.data_dir is not None
    evaluation = DenseSettings(
        data_dir=settings.data_dir,
        dataset=settings.dataset,
        validation_split=settings.validation_split,
        num_classes=settings.num_classes,
        num_workers=settings.num_workers,
        validation_batches=settings.validation_batches,
        batch_size=settings.batch_size,
        model=architecture.model,
        image_size=architecture.image_size,
        mixup=0.0,
        cutmix=0.0,
        tracker="none",
        output=settings.output,
    )
    num_classes = number_of_classes(open_images(evaluation, training=False), evaluation)
    return evaluate_model(weights_of(row, path, num_classes), evaluation)


def _measure(
    row: Row, model: nn.Module, scores: dict[str, float], device: torch.device, settings: TableSettings
) -> Measured:
    architecture = ARCHITECTURES[row.architecture]
    gmacs = multiply_adds(model.to("cpu", torch.float32), architecture, row.ratio)
    report = tokenprune.throughput(
        model.to(device, getattr(torch, settings.dtype)),
        architecture.input_size,
        batch_size=settings.batch_size,
        pairs=settings.pairs,
        warmup=settings.warmup,
    )
    if row.ratio == 1:
        return Measured(row=row, gmacs=gmacs, images_per_second=report.dense_images_per_second, scores=scores)
    return Measured(
        row=row,
        gmacs=gmacs,
        images_per_second=report.sparse_images_per_second,
        speedup=report.speedup,
        spread=report.spread,
        scores=scores,
    )


def _device(settings: TableSettings) -> torch.device:
    if settings.device is not None:
        try:
            return torch.zeros(0, device=settings.device).device
        except (RuntimeError, AssertionError) as error:
            raise SettingsError(f"device={settings.device!r}: {error}") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _report(found: list[Measured], device: torch.device, settings: TableSettings, console: Console | None) -> None:
    tables = _tables(found, settings)
    if console is not None:
        console.print(*(table.rich() for table in tables))
    report = {
        "rows": [_plain(measured) for measured in found],
        "settings": settings.to_dict(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {platform.machine()}",
        "versions": {name: version(name) for name in ("tokenprune", "torch", "timm", "fvcore")},
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    write_json(settings.output / "table1.json", report)
    write_text(settings.output / "table1.md", "\n".join(f"{table.title}\n\n{table.markdown()}" for table in tables))


def _plain(measured: Measured) -> dict[str, Any]:
    row = measured.row
    return {
        "row": row.name,
        "keep_ratio": row.ratio,
        "scores": measured.scores,
        "gmacs": measured.gmacs,
        "gmacs_over_published": None if row.gmacs is None else deviation(measured.gmacs, row.gmacs),
        "gmacs_over_computed": None if row.computed is None else deviation(measured.gmacs, row.computed),
        "images_per_second": measured.images_per_second,
        "speedup": measured.speedup,
        "spread": measured.spread,
        "published": {
            "top1": row.top1,
            "gmacs": row.gmacs,
            "images_per_second": row.images_per_second,
            "speedup": published_speedup(row),
        },
        "computed_gmacs": row.computed,
    }


def _tables(found: list[Measured], settings: TableSettings) -> list[Table]:
    figures = Table(
        title="Top-1 accuracy in % · GMACs, and their deviation",
        columns=("model", "ρ", "top-1", "published", "GMACs", "published", "computed"),
    )
    speed = Table(
        title=f"Images/s at batch {settings.batch_size}, {settings.dtype} (published: RTX 3090, batch 32)",
        columns=("model", "ρ", "images/s", "published", "speed-up", "quartiles", "published"),
    )
    for measured in found:
        row = measured.row
        names = (ARCHITECTURES[row.architecture].title, f"{row.ratio:g}")
        figures.add(
            *names,
            f"{100 * measured.scores['top1']:.2f}" if measured.scores else "–",
            _shown(row.top1, ".2f"),
            f"{measured.gmacs:.2f}",
            *(
                "–" if other is None else f"{other} {deviation(measured.gmacs, other):+.1%}"
                for other in (row.gmacs, row.computed)
            ),
        )
        lower, upper = measured.spread
        speed.add(
            *names,
            f"{measured.images_per_second:.1f}",
            _shown(row.images_per_second, ".1f"),
            f"{measured.speedup:.2f}",
            f"{lower:.2f} … {upper:.2f}",
            _shown(published_speedup(row), ".2f"),
        )
    return [figures, speed]


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


PRESETS = {
    "smoke": Preset(
        help="The smallest model's rows, two pairs of one image, to check that everything works here.",
        settings={"rows": ["deit_tiny", "deit_small/0.7"], "batch_size": 1, "pairs": 2, "warmup": 1, "num_workers": 1},
    ),
}
app = command(
    TableSettings, lambda settings: run_table(settings, console=Console()), help_text=__doc__, presets=PRESETS
)

if __name__ == "__main__":
    app()

"""Is a sparse wide model better than a dense narrow one? DeiT at several widths, dense and sparsified.

DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Figure 4.
Trains each dense model, or loads it from --dense-dir, sparsifies it, and plots and tabulates accuracy
against GMACs.

python -m recipes.width_scaling --digits      # on the digits
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
from accelerate import PartialState
from rich.console import Console

from recipes.dense import SMOKE_HELP, DenseSettings, train_dense
from recipes.digits.presets import DIGITS_DENSE, DIGITS_SPARSE, make_images
from recipes.dynamicvit import SMOKE, SparseSettings, fine_tune
from recipes.engine.checkpoints import write_json, write_text, write_whole
from recipes.engine.command_line import Preset, command
from recipes.engine.fitting import evaluate_dense, run_once
from recipes.engine.options import Model, Optimisation, Run
from recipes.engine.settings import SettingsError
from recipes.engine.tables import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True, kw_only=True)
class WidthSettings(SparseSettings):
    """Settings of all runs; epochs, warm-up and learning rate are those of the sparse ones."""

    model: Annotated[str, Model(help="The model whose width is varied, by its name in timm.")] = (
        "deit_small_patch16_224"
    )
    pretrained: Annotated[bool, Model(help="There are no pretrained weights of other widths.")] = False
    widths: Annotated[list[int], Model("--widths", min=16, help="Embedding widths; give it several times.")] = field(
        default_factory=lambda: [192, 256, 288, 320, 384]
    )
    dense_dir: Annotated[
        Path | None, Model(help="Folder of dense weights width-192.safetensors (or .pth) …; others are trained.")
    ] = None
    dense_epochs: Annotated[int, Optimisation(min=1, help="Epochs of a dense model.")] = 300
    dense_warmup_epochs: Annotated[float, Optimisation(min=0, help="Of a dense model.")] = 5.0
    dense_steps_per_epoch: Annotated[int | None, Optimisation(min=1, help="To shorten epochs of a dense model.")] = None
    dense_learning_rate: Annotated[float, Optimisation(min=0, help="Of a dense model, for a batch of 1024.")] = 1e-3
    output: Annotated[Path, Run(help="Where runs, table and picture go.")] = Path("runs/width-scaling")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None or self.checkpoint is not None:
            raise SettingsError("give --widths and --dense-dir in place of one width and one checkpoint.")
        if self.dense_dir is not None and not self.dense_dir.is_dir():
            raise SettingsError(f"dense_dir={self.dense_dir}: there is no such folder.")
        if self.scorer == "static" or len(set(self.widths)) < len(self.widths):
            raise SettingsError(
                f"scorer={self.scorer!r}, widths={self.widths}: take another scorer, and each width once."
            )

    def dense(self, width: int) -> DenseSettings:
        """The settings of the dense model of a width."""
        return self.derive(
            DenseSettings,
            width=width,
            epochs=self.dense_epochs,
            warmup_epochs=self.dense_warmup_epochs,
            learning_rate=self.dense_learning_rate,
            steps_per_epoch=self.dense_steps_per_epoch,
            output=self.output / f"dense-{width}",
            resume=True,
        )

    def sparse(self, width: int, checkpoint: Path) -> SparseSettings:
        """The settings of the sparse model of a width, made from a dense one."""
        output = self.output / f"sparse-{width}"
        return self.derive(SparseSettings, width=width, checkpoint=checkpoint, output=output, resume=True)

    def given(self, width: int) -> Path | None:
        """The dense weights of a width in ``dense_dir``."""
        if self.dense_dir is None:
            return None
        files = (self.dense_dir / f"width-{width}{suffix}" for suffix in (".safetensors", ".pth"))
        return next((file for file in files if file.is_file()), None)


def run_width_scaling(settings: WidthSettings, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Make the runs that are missing; write ``width_scaling.json``, ``.md`` and ``.png``.

    Returns:
        A mapping for each width: ``width``, and of ``dense`` and ``sparse`` ``top1`` and ``gmacs``.
    """
    points = []
    for width in settings.widths:
        weights = settings.given(width)
        if weights is None:
            dense = settings.dense(width)
            run_once(dense, partial(train_dense, dense, description=f"dense, width {width}"))
            weights = dense.output / "model.safetensors"
        sparse = settings.sparse(width, weights)
        made = run_once(sparse, partial(fine_tune, sparse, description=f"ρ {sparse.ratio}, width {width}"))
        gmacs = made["gmacs"]
        points.append(
            {
                "width": width,
                "dense": {"top1": evaluate_dense(sparse)["top1"], "gmacs": gmacs["dense"]},
                "sparse": {"top1": made["scores"]["top1"], "gmacs": gmacs["sparse"]},
            }
        )
    if PartialState().is_main_process:
        _report(points, settings, console)
    return points


def _report(points: list[dict[str, Any]], settings: WidthSettings, console: Console | None) -> None:
    table = Table(
        title=f"Dense and sparse (ρ = {settings.ratio}) by width",
        columns=(
            "width",
            "dense GMACs",
            "dense top-1",
            "sparse GMACs",
            "sparse top-1",
            "dense top-1 at its GMACs",
            "gain",
        ),
    )
    for point in points:
        beside = dense_at(point["sparse"]["gmacs"], points)
        table.add(
            str(point["width"]),
            *(
                cell
                for path in ("dense", "sparse")
                for cell in (f"{point[path]['gmacs']:.4g}", f"{point[path]['top1']:.2%}")
            ),
            "–" if beside is None else f"{beside:.2%}",
            "–" if beside is None else f"{100 * (point['sparse']['top1'] - beside):+.2f}",
        )
    if console is not None:
        console.print(table.rich())
    report = {"points": points, "settings": settings.to_dict()}
    folder = settings.output
    write_json(folder / "width_scaling.json", report)
    write_text(folder / "width_scaling.md", table.markdown())
    write_whole(folder / "width_scaling.png", lambda file: draw(points, file))


def dense_at(gmacs: float, points: list[dict[str, Any]]) -> float | None:
    """The accuracy of a dense model at a cost, interpolated between widths; ``None`` outside their range."""
    curve = sorted((point["dense"]["gmacs"], point["dense"]["top1"]) for point in points)
    costs, accuracies = zip(*curve, strict=True)
    return float(np.interp(gmacs, costs, accuracies)) if costs[0] <= gmacs <= costs[-1] else None


def draw(points: list[dict[str, Any]], file: Path) -> None:
    """Plot accuracy against GMACs, one curve for dense and one for sparse models, as PNG."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for path, style in (("dense", "o-"), ("sparse", "s-")):
        curve = sorted((point[path]["gmacs"], 100 * point[path]["top1"], point["width"]) for point in points)
        costs, accuracies, _ = zip(*curve, strict=True)
        axis.plot(costs, accuracies, style, label=path)
        for cost, accuracy, width in curve:
            above = path == "sparse"
            axis.annotate(
                str(width),
                (cost, accuracy),
                (0, 6 if above else -13),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.set_xlabel("GMACs per image")
    axis.set_ylabel("top-1 accuracy, %")
    axis.margins(y=0.15)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


PRESETS = {
    "smoke": Preset(
        help=SMOKE_HELP,
        settings={
            **SMOKE, "model": "deit_tiny_patch16_224", "widths": [96, 128], "dense_epochs": 1,
            "dense_warmup_epochs": 0.5, "dense_steps_per_epoch": 4,
        },
    ),
    "digits": Preset(
        help="The digits, made if missing.",
        settings={
            **{name: value for name, value in DIGITS_SPARSE.items() if name != "checkpoint"},
            "widths": [32, 48, 64],
            "min_crop": DIGITS_DENSE["min_crop"],
            "dense_epochs": 8,
            "dense_warmup_epochs": 1.0,
            "dense_learning_rate": DIGITS_DENSE["learning_rate"],
        },
        prepare=make_images,
    ),
}  # fmt: skip
app = command(
    WidthSettings, lambda settings: run_width_scaling(settings, console=Console()), help_text=__doc__, presets=PRESETS
)

if __name__ == "__main__":
    app()

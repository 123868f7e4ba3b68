"""DynamicViT's ablations in four tables: which strategy, which score, how many stages, which losses.

DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (arXiv 2106.02034), Tables 2
to 4. Every row starts from the same dense model and takes about as many GMACs as ρ = 0.7.

python -m recipes.ablation --digits      # on the digits, some minutes per row
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from accelerate import PartialState
from rich.console import Console
from typer import Option

from recipes.dense import SMOKE_HELP
from recipes.digits.presets import DIGITS_SPARSE, make_images
from recipes.dynamicvit import SMOKE, SparseSettings, fine_tune
from recipes.engine.checkpoints import write_json, write_text
from recipes.engine.command_line import Preset, command
from recipes.engine.fitting import evaluate_dense, run_once
from recipes.engine.options import Optimisation, Run
from recipes.engine.settings import SettingsError
from recipes.engine.tables import Table
from recipes.structural import fine_tune_downsampled


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
        label: Its name in the table.
        run: Name of the run, which rows of several tables may share.
        changes: The settings that it changes.
        structural: Whether tokens are pooled instead of pruned.
    """

    label: str
    run: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    structural: bool = False


DYNAMIC = Row(label="predictor", run="dynamic")
TABLES: dict[str, tuple[Row, ...]] = {
    "Strategy": (
        Row(label="structural: 2 × 2 average pooling", run="structural", structural=True),
        Row(label="static: learned, the same positions for every image", run="static", changes={"scorer": "static"}),
        replace(DYNAMIC, label="dynamic: learned, by the image"),
    ),
    "Score": (
        Row(label="random", run="random", changes={"scorer": "random"}),
        Row(label="class attention", run="cls-attention", changes={"scorer": "cls_attention"}),
        DYNAMIC,
    ),
    "Stages": (
        Row(label="one", run="one-stage", changes={"num_stages": 1, "keep_ratio": [0.25]}),
        Row(label="two", run="two-stages", changes={"num_stages": 2, "keep_ratio": [0.6]}),
        replace(DYNAMIC, label="three"),
    ),
    "Losses": (
        replace(DYNAMIC, label="all"),
        Row(label="without token distillation", run="no-distill", changes={"distill_weight": 0.0}),
        Row(label="without KL", run="no-kl", changes={"kl_weight": 0.0}),
        Row(label="without both", run="no-teacher", changes={"kl_weight": 0.0, "distill_weight": 0.0}),
        Row(label="λ_ratio = 1", run="ratio-1", changes={"ratio_weight": 1.0}),
        Row(label="λ_ratio = 4", run="ratio-4", changes={"ratio_weight": 4.0}),
    ),
}


@dataclass(frozen=True, kw_only=True)
class AblationSettings(SparseSettings):
    """Settings that all rows share; those that rows differ in must not be given."""

    model: str = "deit_small_patch16_224"
    depth: Annotated[int, Option(min=4, help="Blocks of the model, to spread one or two stages over.")] = 12
    seeds: Annotated[int, Option(min=1, help="Runs per row, with consecutive seeds from --seed.")] = 3
    static_learning_rate: Annotated[
        float | None, Optimisation(min=0, help="Of the static scorer, if not that of the predictors.")
    ] = None
    output: Annotated[Path, Run(help="Where runs and tables go.")] = Path("runs/ablation")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep_ratio", "stages"):
            if getattr(self, name) is not None:
                raise SettingsError(f"{name} is what the rows of the ablation differ in; leave it out.")
        if self.static_learning_rate == 0:
            raise SettingsError("static_learning_rate=0 trains nothing; give one above 0.")
        if self.scorer != "predictor":
            raise SettingsError(f"scorer={self.scorer!r}: scorers are what the rows of the ablation differ in.")

    def of_row(self, row: Row, seed: int) -> SparseSettings:
        """The settings of one run."""
        changes = dict(row.changes)
        num_stages = changes.pop("num_stages", None)
        if num_stages is not None:
            changes["stages"] = [self.depth * (stage + 1) // (num_stages + 1) for stage in range(num_stages)]
        if changes.get("scorer") == "static" and self.static_learning_rate is not None:
            backbone = self.learning_rate * self.backbone_factor
            changes |= {
                "learning_rate": self.static_learning_rate,
                "backbone_factor": backbone / self.static_learning_rate,
            }
        # Finished runs are read, so that an ablation that was stopped continues where it was.
        return self.derive(
            SparseSettings, **changes, seed=seed, output=self.output / f"{row.run}-seed{seed}", resume=True
        )


def run_ablation(settings: AblationSettings, *, console: Console | None = None) -> dict[str, list[dict[str, Any]]]:
    """Make the runs that are missing, print the tables, and write ``ablation.json`` and ``ablation.md``."""
    dense = evaluate_dense(settings)["top1"]
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, rows in TABLES.items():
        tables[name] = []
        for row in rows:
            runs = [_run(settings.of_row(row, settings.seed + number), row) for number in range(settings.seeds)]
            tables[name].append(
                {
                    "label": row.label,
                    "top1": [run["scores"]["top1"] for run in runs],
                    "gmacs": runs[0]["gmacs"]["sparse"],
                }
            )
    if PartialState().is_main_process:
        _report(tables, dense, settings, console)
    return tables


def _run(settings: SparseSettings, row: Row) -> dict[str, Any]:
    train = fine_tune_downsampled if row.structural else fine_tune
    return run_once(settings, lambda: train(settings, description=f"{row.run}, seed {settings.seed}"))


def _report(
    tables: dict[str, list[dict[str, Any]]], dense: float, settings: AblationSettings, console: Console | None
) -> None:
    drawn = []
    for name, rows in tables.items():
        table = Table(title=name, columns=(name.lower(), "top-1, mean", "lowest … highest", "below dense", "GMACs"))
        for row in rows:
            mean = statistics.mean(row["top1"])
            table.add(
                row["label"],
                f"{mean:.2%}",
                f"{min(row['top1']):.2%} … {max(row['top1']):.2%}",
                f"{100 * (dense - mean):.2f}",
                f"{row['gmacs']:.4g}",
            )
        drawn.append(table)
        if console is not None:
            console.print(table.rich())
    report = {"dense_top1": dense, "tables": tables, "settings": settings.to_dict()}
    head = f"Dense: {dense:.2%}. {settings.seeds} seed(s); points below dense are of the mean.\n\n"
    text = head + "\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in drawn)
    write_json(settings.output / "ablation.json", report)
    write_text(settings.output / "ablation.md", text)


PRESETS = {
    "smoke": Preset(help=SMOKE_HELP, settings={**SMOKE, "model": "deit_tiny_patch16_224", "seeds": 1, "epochs": 1}),
    "digits": Preset(
        help="The digits, made if missing, and their trained dense model.",
        settings={**DIGITS_SPARSE, "static_learning_rate": 0.4},
        prepare=make_images,
    ),
}
app = command(
    AblationSettings, lambda settings: run_ablation(settings, console=Console()), help_text=__doc__, presets=PRESETS
)

if __name__ == "__main__":
    app()

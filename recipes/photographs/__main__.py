"""The photographs and their dense model: ``python -m recipes.photographs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from recipes.dynamicvit import SparseSettings
from recipes.photographs.data import make_photographs
from recipes.photographs.dense import train_photographs
from recipes.photographs.model import load_dense_model
from recipes.photographs.presets import DATA, PHOTOGRAPHS_DENSE, PHOTOGRAPHS_SPARSE
from recipes.small.budgets import run_budgets
from recipes.small.calibration import run_calibration
from recipes.small.command_line import resumable
from recipes.small.hierarchy_study import Study

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()

Data = Annotated[Path, typer.Option(help="The image folder, made if missing.")]


@app.command()
def images(data: Data = DATA) -> None:
    """Make the image folder, of photographs that scikit-image and scikit-learn have brought along."""
    with resumable(console):
        console.print(f"The images are in [bold]{make_photographs(data)}[/].")


@app.command()
def dense(
    data: Data = DATA,
    output: Annotated[Path, typer.Option(help="Where results and checkpoints go.")] = Path("runs/photographs"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 10,
    seed: int = 0,
) -> None:
    """Train the dense model from scratch and write the weights that the project ships."""
    with resumable(console):
        accuracy = train_photographs(data, output, epochs=epochs, seed=seed)
        console.print(f"dense accuracy {accuracy:.2%}")


@app.command()
def calibrate(
    data: Data = DATA,
    output: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/photographs"),
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the predictors' calibration.")] = 100,
    backbone_steps: Annotated[int, typer.Option(min=0, help="Gathered steps that follow, at each ratio.")] = 0,
    scorer: Annotated[str, typer.Option(help="A learned scorer, such as predictor_linear.")] = "predictor",
) -> None:
    """Train the predictors alone, without labels, once for all keep ratios."""
    ratios = keep_ratio or [0.7, 0.5, 0.35]
    with resumable(console):
        make_photographs(data)
        run_calibration(
            load_model=load_dense_model,
            settings=SparseSettings(**{**PHOTOGRAPHS_SPARSE, "data_dir": data, "output": output}),
            output=output,
            keep_ratios=ratios,
            seeds=range(seeds),
            steps=steps,
            backbone_steps=backbone_steps,
            scorer=scorer,
            console=console,
        )


@app.command()
def budgets(
    data: Data = DATA,
    output: Annotated[Path, typer.Option(help="Where results go.")] = Path("runs/photographs"),
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the predictors' calibration.")] = 100,
) -> None:
    """Compare fixed and adaptive budgets."""
    ratios = keep_ratio or [0.7, 0.5, 0.35]
    with resumable(console):
        make_photographs(data)
        run_budgets(
            load_model=load_dense_model, data=data, output=output, keep_ratios=ratios, seeds=range(seeds), steps=steps,
            console=console,
        )  # fmt: skip


@app.command()
def hierarchies(
    data: Data = DATA,
    output: Annotated[Path, typer.Option(help="Where results and checkpoints go.")] = Path(
        "runs/photographs-hierarchies"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Of dense training.")] = 20,
    steps: Annotated[int, typer.Option(min=10, help="Steps of each fine-tuning.")] = 100,
    seed: int = 0,
) -> None:
    """Train a small Swin and a small ConvNeXt, and compare starts of their fast paths, scorers and keep ratios."""
    with resumable(console):
        make_photographs(data)
        Study(
            dense=PHOTOGRAPHS_DENSE, sparse=PHOTOGRAPHS_SPARSE, data=data, output=output, epochs=epochs, steps=steps,
            seed=seed,
        ).run(console=console)  # fmt: skip


if __name__ == "__main__":
    app()

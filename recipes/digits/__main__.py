"""The command line of the digits demo: ``python -m recipes.digits``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from recipes.digits.data import VARYING, make_digits
from recipes.digits.demo import run_demo
from recipes.digits.dense import train_digits
from recipes.digits.flat import run_flat
from recipes.digits.model import WEIGHTS, load_dense_model
from recipes.digits.presets import DATA, DIGITS_DENSE, DIGITS_SPARSE
from recipes.digits.sparse import SparseConfig
from recipes.digits.study import SCORERS, run_study
from recipes.small.budgets import run_budgets
from recipes.small.calibration import KEEP_RATIO, run_calibration
from recipes.small.command_line import resumable
from recipes.small.hierarchy_study import Study

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()

Data = Annotated[Path, typer.Option(help="The image folder, made if missing.")]
Output = Annotated[Path, typer.Option(help="Where results and checkpoints go.")]
Steps = Annotated[int, typer.Option(min=10, help="Steps of each training.")]


@app.command()
def demo(
    data: Data = DATA,
    output: Output = Path("runs/digits"),
    keep_ratio: Annotated[float, typer.Option(min=0.05, max=1.0, help="ρ: the stages keep ρ, ρ², ρ³.")] = 0.7,
    steps: Steps = 100,
    seed: int = 0,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the dense model first (about 45 min), once.")
    ] = False,
) -> None:
    """Sparsify the trained dense model, calibrate it without labels, fine-tune it, and compare."""
    with resumable(console):
        weights = WEIGHTS
        if from_scratch:
            output = output / "from-scratch"
            weights = output / "dense.safetensors"
            if not weights.exists():
                train_digits(data, output, weights=weights)
        run_demo(
            data=data,
            output=output,
            keep_ratio=keep_ratio,
            steps=steps,
            seed=seed,
            console=console,
            dense_weights=weights,
        )


@app.command()
def dense(
    data: Data = DATA,
    output: Output = Path("runs/digits"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 20 000 images.")] = 26,
    seed: int = 0,
) -> None:
    """Train the dense model from scratch and write the weights that the project ships."""
    with resumable(console):
        accuracy = train_digits(data, output, epochs=epochs, seed=seed)
        console.print(f"dense accuracy {accuracy:.2%}")


@app.command()
def study(
    data: Data = DATA,
    output: Output = Path("runs/digits"),
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    steps: Steps = 100,
    scorer: Annotated[list[str] | None, typer.Option(help="Give it several times. Default: all of the demo's.")] = None,
    schedule: Annotated[Literal["masked", "gathered"], typer.Option(help="How they are trained.")] = "masked",
) -> None:
    """Compare the scorers over several seeds and keep ratios."""
    ratios = keep_ratio or [0.7, 0.5]
    with resumable(console):
        run_study(
            data=data,
            output=output,
            keep_ratios=ratios,
            seeds=range(seeds),
            steps=steps,
            console=console,
            scorers=scorer or SCORERS,
            schedule=schedule,
        )


@app.command()
def calibrate(
    data: Data = DATA,
    output: Output = Path("runs/digits"),
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    steps: Steps = 100,
    backbone_steps: Annotated[int, typer.Option(min=0, help="Gathered steps that follow, at each ratio.")] = 0,
    scorer: Annotated[str, typer.Option(help="A learned scorer, such as predictor_slim.")] = "predictor",
) -> None:
    """Train the predictors alone, without labels, once for all keep ratios."""
    ratios = keep_ratio or [0.7, 0.5, 0.35]
    with resumable(console):
        make_digits(data)
        config = SparseConfig(scorer=scorer, keep_ratio=KEEP_RATIO, steps=steps)
        run_calibration(
            load_model=load_dense_model,
            settings=config.settings(data, output, WEIGHTS),
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
    data: Data = Path("runs/digits-varying"),
    output: Output = Path("runs/digits"),
    keep_ratio: Annotated[list[float] | None, typer.Option(help="ρ; give it several times.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    steps: Steps = 100,
) -> None:
    """Compare fixed and adaptive budgets on scenes of varying content."""
    ratios = keep_ratio or [0.7, 0.5, 0.35]
    with resumable(console):
        make_digits(data, VARYING)
        run_budgets(
            load_model=load_dense_model, data=data, output=output, keep_ratios=ratios, seeds=range(seeds), steps=steps,
            console=console,
        )  # fmt: skip


@app.command()
def hierarchies(
    data: Data = DATA,
    output: Output = Path("runs/digits-hierarchies"),
    epochs: Annotated[int, typer.Option(min=1, help="Of dense training, half a minute each on one core.")] = 20,
    steps: Steps = 100,
    seed: int = 0,
    flat_ratio: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="Compare fast paths with dropping in the demo's model too.")
    ] = None,
) -> None:
    """Train a small Swin and a small ConvNeXt, and compare starts of their fast paths, scorers and keep ratios."""
    with resumable(console):
        make_digits(data)
        Study(
            dense=DIGITS_DENSE, sparse=DIGITS_SPARSE, data=data, output=output, epochs=epochs, steps=steps, seed=seed
        ).run(console=console)
        if flat_ratio is not None:
            run_flat(data=data, output=output, keep_ratio=flat_ratio, steps=steps, seed=seed, console=console)


if __name__ == "__main__":
    app()

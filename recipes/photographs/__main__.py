"""The photographs and their dense model: ``python -m recipes.photographs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from recipes.photographs.data import make_photographs
from recipes.photographs.dense import train_photographs
from recipes.photographs.presets import DATA
from recipes.small.command_line import resumable

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


if __name__ == "__main__":
    app()

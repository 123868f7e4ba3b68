"""Accuracy at a cost, of every scorer, reduction and training: ``python -m recipes.frontier``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from recipes.frontier.grid import SEEDS, points
from recipes.frontier.report import write_report
from recipes.frontier.runs import Runs, name_of
from recipes.frontier.tasks import TASKS
from recipes.small.command_line import resumable

console = Console()
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def frontier(
    output: Annotated[Path, typer.Option(help="Where results and trained scorers go.")] = Path("runs/frontier"),
    data: Annotated[list[str] | None, typer.Option(help=f"Only this one of {', '.join(TASKS)}.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=len(SEEDS), help="Number of seeds, from 0.")] = len(SEEDS),
    report: Annotated[bool, typer.Option("--report", help="Only draw what was found so far.")] = False,
) -> None:
    """Make every point that is missing, then write the table and the picture.

    Ctrl-C loses no finished point; the same command goes on.
    """
    output.mkdir(parents=True, exist_ok=True)
    if unknown := set(data or ()) - set(TASKS):
        raise typer.BadParameter(f"--data {', '.join(sorted(unknown))}: expected {' or '.join(TASKS)}.")
    all_runs = [Runs(task, output) for name, task in TASKS.items() if not data or name in data]
    grid = list(points(seeds))
    with resumable(console):
        if not report:
            with Progress(console=console) as progress:
                bar = progress.add_task("", total=len(grid) * len(all_runs))
                for point in grid:
                    for runs in all_runs:
                        progress.update(bar, description=f"{runs.task.name}: {name_of(point)}")
                        runs.make(point)
                        progress.advance(bar)
        for table in write_report(all_runs, output):
            console.print(table.rich())
    console.print(f"The table and the picture are in [bold]{output}[/].")


if __name__ == "__main__":
    app()

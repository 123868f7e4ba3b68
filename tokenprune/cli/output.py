"""What commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def show(*things: Any) -> None:
    """Write tables and text for people."""
    console = Console(highlight=False)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def show_json(fields: Any) -> None:
    """Write JSON for machines."""
    typer.echo(json.dumps(fields, indent=2))


@contextmanager
def working(what: str) -> Iterator[Progress]:
    """While it lasts, a progress bar on stderr, and stray prints of libraries go there too, away from the results."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(what, total=None)
    with redirect_stdout(sys.stderr), progress if console.is_terminal else nullcontext():
        yield progress


def step(progress: Progress, what: str, done: float = 0, total: float | None = None) -> None:
    """Say on the bar what is being done, and how far it is."""
    progress.update(progress.task_ids[0], description=what, completed=done, total=total)

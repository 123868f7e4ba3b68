"""What the command lines of the small data sets share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from recipes.engine.checkpoints import Interrupted


@contextmanager
def resumable(console: Console) -> Iterator[None]:
    """Ctrl-C is no error: it ends the command, and the next call continues."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as interrupted:
        console.print(f"\n[yellow]Interrupted.[/] {interrupted}".rstrip())
        console.print("Nothing is half-written. Run the same command again to go on from there.")
        raise typer.Exit(130) from None
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from None

"""The progress bar of a calibration: loss, kept share, agreement and the time that is left."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class CalibrationProgress:
    """A bar on stderr, where that is a terminal or a notebook; nothing otherwise, or if it is off.

    Args:
        steps: How many steps there will be.
        shown: Whether to show it at all.
        description: What stands in front of it.
    """

    def __init__(self, steps: int, *, shown: bool, description: str) -> None:
        self._bar: Any = _bar() if shown else None
        if self._bar is not None:
            self._task = self._bar.add_task(description, total=steps, figures="")

    def __enter__(self) -> CalibrationProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, **figures: float) -> None:
        """Say which step was made last, and what it gave."""
        if self._bar is not None:
            told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self._bar.update(self._task, completed=step, figures=told)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console)

"""The log of a run: JSON lines, Accelerate's trackers, and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recipes.engine.checkpoints import write_text


class Logbook:
    """What a run reports while it runs; only the main process writes.

    Attributes:
        file: One JSON object per line: ``{"kind": "training" or "evaluation", "step": …, …}``.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, *, steps: int, description: str, console: Console | None = None
    ) -> None:
        self.accelerator = accelerator
        self.file = folder / "log.jsonl"
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            transient=True,
            console=console or Console(stderr=True),
            disable=not accelerator.is_main_process,
        )
        self.task = self.progress.add_task(description, total=steps, status="")

    def __enter__(self) -> Logbook:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def resume_from(self, step: int) -> None:
        """Drop lines of later steps, which are about to be written again."""
        self.progress.update(self.task, completed=step)
        if self.accelerator.is_main_process and self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
            write_text(self.file, "".join(f"{line}\n" for line in lines))

    def advance(self) -> None:
        """One more step is done."""
        self.progress.update(self.task, advance=1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one line, and the same to the trackers."""
        if not self.accelerator.is_main_process:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        shown = {name: values[name] for name in ("loss", "top1", "kept_1") if name in values}
        self.progress.update(self.task, status=", ".join(f"{name} {value:.3f}" for name, value in shown.items()))

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.accelerator.is_main_process:
            self.progress.console.print(text)


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, ``"training"`` or ``"evaluation"``, in the log of a run."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # a run that was killed may leave half a line
        return float("inf")

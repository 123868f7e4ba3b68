"""Checkpoints of a run: written whole or not at all, the last and the best kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after its state had been saved."""


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file or folder atomically: ``write`` makes it beside ``path``, then it is renamed."""
    partial = path.with_name(path.name + ".partial")
    remove(partial)
    try:
        write(partial)
        if path.is_dir():
            remove(path)
        partial.replace(path)
    finally:
        remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; a folder is renamed first, so that half of it is never found."""
    if path.is_dir():
        doomed = path.with_name(path.name + ".removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints in a folder: of each kind, such as ``last`` and ``best``, the newest.

    A checkpoint is a folder ``<kind>-<step>`` that Accelerate wrote. A new one is complete before
    the previous one is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self, kind: str = "last") -> Path | None:
        """The newest checkpoint of a kind, ``None`` if there is none."""
        return max(self._all(kind), key=_step, default=None)

    def save(self, accelerator: Accelerator, step: int, kind: str = "last") -> None:
        """Save what the accelerator has prepared and registered; call it on every process."""
        final = self.folder / f"{kind}-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(partial)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if final.exists():  # the run was stopped right after it, and has now made the same again
                remove(partial)
            else:
                partial.replace(final)
            for other in self._all(kind):
                if other != final:
                    remove(other)
        accelerator.wait_for_everyone()

    def _all(self, kind: str) -> list[Path]:
        return [path for path in self.folder.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d+", path.name)]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])

"""Kills runs of several processes on the way."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil


def kill_workers(process: subprocess.Popen[bytes], log: Path, steps: int, victims: slice) -> None:
    """Wait until a run has logged so many steps in all, and kill some of its workers, or all."""
    while process.poll() is None and len(log.read_text().splitlines() if log.exists() else ()) < steps:
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed; give it more steps"
    workers = [one for one in psutil.Process(process.pid).children() if "tests.helpers.sharded_on_cpu" in one.cmdline()]
    assert len(workers) == 2
    for worker in workers[victims]:
        worker.kill()
    assert process.wait(timeout=120) != 0

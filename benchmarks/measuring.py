"""Timing in pairs, and a results file that says on what and with what it was taken."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

RESULTS = Path(__file__).parent / "results"

Device = Annotated[str, typer.Option(help="The device to measure on, such as cpu or cuda.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16: dtype of weights, or of autocast in training.")]
Pairs = Annotated[int, typer.Option(min=4, help="Measured pairs.")]
Name = Annotated[str, typer.Option(help="The results file's name, beside benchmarks/results/.")]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Two things timed in turn.

    Attributes:
        first_seconds: Of each run of the first.
        second_seconds: Of the run of the second in the same round.
    """

    first_seconds: tuple[float, ...]
    second_seconds: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """First ÷ second of each pair."""
        return [first / second for first, second in zip(self.first_seconds, self.second_seconds, strict=True)]

    @property
    def medians(self) -> tuple[float, float]:
        """Median seconds of the first, and of the second."""
        return statistics.median(self.first_seconds), statistics.median(self.second_seconds)

    @property
    def median(self) -> float:
        """Median of the pairs' ratios."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the pairs' ratios."""
        lower, _, upper = statistics.quantiles(self.ratios, n=4)
        return lower, upper


def measure_rounds(
    functions: Sequence[Callable[[], Any]], *, rounds: int, device: str, warmup: int = 3, repeat: int = 1
) -> list[tuple[float, ...]]:
    """Time functions in turn, each round beginning with another one; seconds of each function, by round.

    Args:
        functions: What is timed.
        rounds: How often.
        device: Where they run, to wait for it.
        warmup: Rounds before, which do not count.
        repeat: Calls that are timed together, for what is short.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(-warmup, rounds):
        for offset in range(len(functions)):
            index = (number + offset) % len(functions)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeat):
                functions[index]()
            synchronize(device)
            if number >= 0:
                seconds[index].append((time.perf_counter() - start) / repeat)
    return [tuple(times) for times in seconds]


def measure_pairs(
    first: Callable[[], Any], second: Callable[[], Any], *, pairs: int, device: str, repeat: int = 1
) -> Ratio:
    """Time ``first``, what is divided, and ``second``, what it is divided by, in turn."""
    times = measure_rounds([first, second], rounds=pairs, device=device, repeat=repeat)
    return Ratio(first_seconds=times[0], second_seconds=times[1])


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Most memory that tensors held during a call, beyond what they held before it; ``None`` on a CPU."""
    if device.startswith("cpu"):
        return None
    synchronize(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return int(torch.accelerator.max_memory_allocated(device) - before)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model of timm takes as it was built."""
    height, width = model.patch_embed.img_size
    return model.pretrained_cfg["input_size"][0], height, width


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Hardware, versions, threads and dtype."""
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    packages = ("tokenprune", "torch", "timm", "transformers")
    return {
        "hardware": hardware,
        "device": device,
        "dtype": dtype,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(
    name: str,
    title: str,
    where: dict[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    data: Any,
    *,
    notes: Sequence[str] = (),
    show: bool = True,
) -> None:
    """Write ``results/<name>.json`` and, for the docs, ``results/<name>.md``; print the latter.

    Args:
        name: Of the files.
        title: Of the table.
        where: What `environment` said.
        columns: Heads of the table.
        rows: Cells of the table.
        data: All that was measured, of dataclasses, lists and numbers; nothing = no JSON file.
        notes: Paragraphs below the table.
        show: Whether the table is printed.
    """
    versions = ", ".join(f"{key} {where[key]}" for key in ("torch", "timm", "transformers", "python"))
    lines = [
        f"{title}: {where['hardware']}, {where['dtype']}; {versions}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(line for note in notes for line in (note, "")),
    ]
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines)
    (RESULTS / f"{name}.md").write_text(text)
    if data:
        text_of_all = json.dumps({"environment": where, "data": data}, indent=2, default=asdict)
        (RESULTS / f"{name}.json").write_text(text_of_all + "\n")
    if show:
        Console().print(Markdown(text))

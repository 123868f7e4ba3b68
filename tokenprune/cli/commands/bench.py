"""``tokenprune bench``: how fast a model is, dense and sparse in turn."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import (
    DeviceName,
    ImageSize,
    Json,
    KeepRatios,
    Model,
    Pruned,
    ScorerName,
    Stages,
    device_named,
    ratios,
    sparsified,
)
from tokenprune.cli.output import show, show_json, step, working

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from tokenprune.analysis.benchmark import ThroughputReport
    from tokenprune.analysis.flop_counter import FlopReport


class Runtime(str, Enum):
    """What runs a model."""

    eager = "eager"
    compiled = "compile"
    onnx = "onnx"
    program = "pt2"


class DType(str, Enum):
    """dtypes that a model may be run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench(
    model: Model,
    keep_ratio: KeepRatios = None,
    stages: Stages = None,
    image_size: ImageSize = None,
    scorer: ScorerName = None,
    pruned: Pruned = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Measured beside batches of one.")] = 16,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of batches, dense and sparse, that count.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Pairs that run before and do not.")] = 3,
    runtime: Annotated[
        Runtime,
        typer.Option(
            help="What runs the models: eager PyTorch; compile: torch.compile; pt2: programs of torch.export; onnx: "
            "ONNX Runtime on the CPU, in a process of its own, with as many threads."
        ),
    ] = Runtime.eager,
    frozen: Annotated[bool, typer.Option("--freeze", help="Freeze the model, as tokenprune.freeze does.")] = False,
    dtype: Annotated[DType, typer.Option(help="dtype of weights and images.")] = DType.float32,
    device: DeviceName = None,
    as_json: Json = False,
) -> None:
    """Measure throughput and latency, dense and sparse in turn, at batch 1 and at a larger one.

    Beside it stands the limit: the speed-up of the model with its sequence merely cut off at the stages, which costs
    nothing else; where that is low, the rest of the model is what takes the time.

    Medians over the pairs, with the quartiles of their speed-ups. A measurement is called too noisy to trust when
    there are fewer than 8 pairs, or when the middle half of their speed-ups spans more than 10 % of the median.

    In Python: tokenprune.throughput(model).
    """
    import torch

    from tokenprune.analysis.benchmark import throughputs
    from tokenprune.analysis.flop_counter import flops
    from tokenprune.api import freeze, sparsifier_of, unfreeze
    from tokenprune.saving.export import check_path

    if runtime is Runtime.onnx:
        try:
            check_path(Path("model.onnx"))
        except ImportError as error:
            raise typer.BadParameter(f"--runtime onnx: {error}") from None
        device = device or "cpu"
    chosen, where = ratios(keep_ratio), device_named(device)
    results: list[tuple[FlopReport, ThroughputReport]] = []
    with working(f"loading {model}") as progress:
        loaded, size = sparsified(
            model,
            stages=stages,
            keep_ratio=chosen[0] if chosen else None,
            image_size=image_size,
            scorer=scorer,
            pruned=pruned,
        )
        sparsifier = sparsifier_of(loaded)
        for one in chosen or [sparsifier.keep_ratio]:
            if sparsifier.frozen:
                unfreeze(loaded)
            sparsifier.keep_ratio = one
            step(progress, "counting multiply-adds")
            counted = flops(loaded.float().cpu(), size)
            runner = loaded.to(where, getattr(torch, dtype.value))
            if frozen:
                freeze(runner)
            step(progress, f"{_FIRST.get(runtime, '')}measuring")
            reports = throughputs(
                runner,
                size,
                batch_sizes=sorted({1, batch_size}),
                pairs=pairs,
                warmup=warmup,
                limit=True,
                runtime=runtime.value,
                progress=lambda batch, done, total: step(progress, f"measuring batch {batch}", done, total),
            )
            results += [(counted, each) for each in reports]
            if runtime is Runtime.compiled:
                torch.compiler.reset()
    if as_json:
        show_json(
            {
                "model": model,
                "device": str(where),
                "hardware": _hardware(where),
                "dtype": dtype.value,
                "runtime": runtime.value,
                "frozen": frozen,
                "torch": torch.__version__,
                "reports": [_fields(counted, timed) for counted, timed in results],
            }
        )
        return
    how = f"{_hardware(where)}, {dtype.value}, {runtime.value}{', frozen' if frozen else ''}"
    show(_table(f"{model} on {how}, {pairs} pairs", results))
    for _, timed in results:
        if timed.doubt is not None:
            left = f"{timed.keep_ratios[-1]:.0%} left"
            show(f"? Not to be trusted at batch {timed.batch_size}, {left}: {timed.doubt}")


_FIRST = {Runtime.compiled: "compiling and ", Runtime.onnx: "exporting and ", Runtime.program: "exporting and "}


def _fields(counted: FlopReport, timed: ThroughputReport) -> dict[str, object]:
    return {
        **json.loads(timed.to_json()),
        "gmac_ratio": counted.ratio,
        "dense_gmacs": counted.dense_gmacs,
        "sparse_gmacs": counted.sparse_gmacs,
        "speedup_over_gmac_ratio": timed.speedup / counted.ratio,
    }


def _table(title: str, results: list[tuple[FlopReport, ThroughputReport]]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    columns = ["batch", "left", "images/s", "ms a batch", "speed-up (quartiles)", "limit", "GMAC ratio", "÷ GMAC ratio"]
    with_memory = any(timed.dense_peak_bytes is not None for _, timed in results)
    for column in [*columns, *(["peak MiB"] if with_memory else [])]:
        table.add_column(column, justify="right")
    for counted, timed in results:
        lower, upper = timed.spread
        cells = [
            str(timed.batch_size),
            f"{timed.keep_ratios[-1]:.0%}",
            f"{timed.dense_images_per_second:.1f} → {timed.sparse_images_per_second:.1f}",
            f"{timed.dense_latency * 1e3:.1f} → {timed.sparse_latency * 1e3:.1f}",
            f"{timed.speedup:.2f} ({lower:.2f} … {upper:.2f}){' ?' if timed.doubt else ''}",
            "–" if timed.limit is None else f"{timed.limit:.2f}",
            f"{counted.ratio:.2f}",
            f"{timed.speedup / counted.ratio:.2f}",
        ]
        if timed.dense_peak_bytes is not None and timed.sparse_peak_bytes is not None:
            cells.append(f"{timed.dense_peak_bytes / 2**20:.0f} → {timed.sparse_peak_bytes / 2**20:.0f}")
        table.add_row(*cells)
    return table


def _hardware(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)

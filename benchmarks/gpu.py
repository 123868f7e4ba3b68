"""Everything that only a GPU can tell, in one run of some minutes. ``python -m benchmarks.gpu``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import timm
import tokenprune_timm.lvvit  # noqa: F401 (timm learns of lvvit_s)
import torch
import typer
from rich.console import Console

from benchmarks import attention, inference, peers, training
from benchmarks.measuring import Name, Ratio, environment, peak_bytes, report

DTYPES = ("bfloat16", "float16", "float32")
RATIOS = (0.7, 0.5, 0.9, 0.8)
MODELS: Mapping[str, Mapping[str, Any]] = {
    "deit_small_patch16_224": {},
    "deit_base_patch16_224": {},
    "lvvit_s": {},
}
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 2}

COLUMNS = ("what", "dtype", "run", "batch", "ρ", "first → second, ms", "ratio (quartiles)", "GMAC ratio",
           "÷ GMAC ratio", "peak MiB")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of the work, the smallest that is done or left out.

    Attributes:
        name: What it measures, in words.
        kind: Jobs of a kind take about as long.
        seconds: How long it is thought to take before one of its kind has been seen.
        run: Gives rows of the table and what goes into the JSON file.
    """

    name: str
    kind: str
    seconds: float
    run: Callable[[], tuple[list[list[str]], list[Any]]]


@dataclass
class Results:
    """What was measured, and what was not."""

    rows: list[list[str]] = field(default_factory=list)
    data: list[Any] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What the table does not have, a sentence each."""
        lists = (("Left out for want of time", self.left_out), ("Failed", self.failed))
        return [f"{title}: {'; '.join(names)}." for title, names in lists if names] or ["Nothing was left out."]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all jobs share.

    Attributes:
        device: Where is measured.
        rounds: Rounds of each measurement.
        small: Tiny models and batches, which try the script.
    """

    device: str
    rounds: int
    small: bool

    @property
    def batch_size(self) -> int:
        """Of the large batches."""
        return 4 if self.small else 256

    def options(self, model: str) -> Mapping[str, Any]:
        """What a model is made with."""
        return SMALL if self.small else MODELS[model]


def main(
    minutes: Annotated[float, typer.Option(min=0, help="No work is begun that would not end within these.")] = 8,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is a GPU, otherwise cpu.")] = None,
    rounds: Annotated[int, typer.Option(min=4, help="Rounds of each measurement.")] = 15,
    compiled: Annotated[bool, typer.Option("--compiled/--no-compiled", help="Also measure compiled models.")] = True,
    small: Annotated[bool, typer.Option("--small", help="Tiny models and batches: tries the script itself.")] = False,
    name: Name = "gpu",
) -> None:
    """Measure inference, masked attention and training steps, the most important first, until the time is up."""
    deadline = time.monotonic() + 60 * minutes
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    setup = Setup(device=device, rounds=rounds, small=small)
    where = environment(device, ", ".join(DTYPES))

    def write(results: Results) -> None:
        report(
            name,
            f"Medians of {rounds} rounds",
            where,
            COLUMNS,
            results.rows,
            {"rows": results.data, "left_out": results.left_out, "failed": results.failed},
            notes=results.notes,
            show=False,
        )

    every = [job for job in jobs(setup) if compiled or "compiled" not in job.kind]
    results = work(every, deadline, write, Console(stderr=True).print)
    write(results)
    Console().print(f"{len(results.rows)} rows in benchmarks/results/{name}.md. {' '.join(results.notes)}")


def work(
    jobs: Sequence[Job],
    deadline: float,
    write: Callable[[Results], None],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Results:
    """Do jobs in their order; one that would not end before the deadline is left out, and shorter ones go on.

    Args:
        jobs: What is to be done, the most important first.
        deadline: A time of ``clock``.
        write: Called after each job, so that nothing is lost if the run is ended from outside.
        say: Told what is being done.
        clock: Seconds.
    """
    results, slowest = Results(), {job.kind: 0.0 for job in jobs}  # how many times as long as thought
    for number, job in enumerate(jobs):
        expected = job.seconds * (slowest[job.kind] or 1.0)
        start = clock()
        if start + expected > deadline:
            results.left_out.append(job.name)
            continue
        say(f"{number + 1}/{len(jobs)} {job.name}")
        try:
            rows, data = job.run()
        except (RuntimeError, MemoryError) as error:  # out of memory, or a kernel that this device lacks
            reason = (str(error).splitlines() or [""])[0][:200]
            results.failed.append(f"{job.name} ({type(error).__name__}: {reason})")
        else:
            results.rows += rows
            results.data += data
        slowest[job.kind] = max(slowest[job.kind], (clock() - start) / job.seconds)
        write(results)
    return results


def jobs(setup: Setup) -> Iterator[Job]:
    """All the work, the most important first.

    Eager throughput of the model that the targets are about, then what training costs, then latency, other
    models, and what has to be compiled first, which takes the longest.
    """
    small, base, lvvit = MODELS
    large, one = setup.batch_size, 1
    yield from (_inference(setup, small, dtype, large, RATIOS) for dtype in DTYPES)
    yield from (_attention(setup, dtype) for dtype in DTYPES)
    if setup.device.startswith("cuda"):  # elsewhere there are no kernels of ours
        yield from (_attention(setup, dtype, kernels=False) for dtype in DTYPES)
        yield from (_sizes(setup, dtype) for dtype in DTYPES if dtype != "float32")
    yield from (_training(setup, small, dtype) for dtype in DTYPES)
    yield from (_inference(setup, small, dtype, one, RATIOS) for dtype in DTYPES)
    yield from (_peers(setup, small, DTYPES[0], batch) for batch in (large, one))
    yield _inference(setup, small, DTYPES[0], large, RATIOS[:1], compiled=True)
    yield _training(setup, small, DTYPES[0], compiled=True)
    yield _inference(setup, small, DTYPES[0], one, RATIOS[:1], compiled=True)
    others = [(dtype, model, batch) for batch in (large, one) for dtype in DTYPES for model in (base, lvvit)]
    yield from (_inference(setup, model, dtype, batch, RATIOS) for dtype, model, batch in others)
    # One ratio of every model before all ratios of one: what compiling changes depends little on the ratio.
    yield from (_inference(setup, model, DTYPES[0], large, RATIOS[:1], compiled=True) for model in (base, lvvit))
    yield from (_peers(setup, small, DTYPES[0], batch, compiled=True) for batch in (large, one))
    yield from (_training(setup, small, dtype, compiled=True) for dtype in DTYPES[1:])
    rest = [(model, dtype, batch) for dtype in DTYPES for batch in (large, one) for model in MODELS]
    done = {(model, DTYPES[0], large) for model in MODELS} | {(small, DTYPES[0], one)}
    yield from (
        _inference(setup, model, dtype, batch, RATIOS[:1], compiled=True)
        for model, dtype, batch in rest
        if (model, dtype, batch) not in done
    )
    yield from (_inference(setup, model, dtype, batch, RATIOS[1:], compiled=True) for model, dtype, batch in rest)


def _inference(
    setup: Setup, model: str, dtype: str, batch: int, ratios: Sequence[float], *, compiled: bool = False
) -> Job:
    run = _run(compiled)

    def measure() -> tuple[list[list[str]], list[Any]]:
        dense = timm.create_model(model, **setup.options(model))
        speeds = inference.compare(
            dense, ratios, batch=batch, device=setup.device, dtype=dtype, rounds=setup.rounds, compiled=compiled
        )
        rows = [
            [f"{model}, dense ÷ sparse", dtype, run, f"{batch}", f"{speed.keep_ratio:g}", *_timed(speed.speedup)]
            + [
                f"{speed.gmac_ratio:.2f}",
                f"**{speed.kept_promise:.2f}**",
                _peaks(speed.dense_peak_bytes, speed.sparse_peak_bytes),
            ]
            for speed in speeds
        ]
        about = {"what": "inference", "model": model, "dtype": dtype, "compiled": compiled}
        return rows, [{**about, **speed.fields()} for speed in speeds]

    told = ", ".join(f"{ratio:g}" for ratio in ratios)
    seconds = 40.0 * (1 + len(ratios)) / 2 if compiled else 6.0 if batch > 1 else 4.0
    kind = f"{run} inference, {'one image' if batch == 1 else 'batches'}, {dtype}, {len(ratios)} ratios"
    return Job(
        name=f"inference of {model}, {dtype}, {run}, batch {batch}, ρ {told}", kind=kind, seconds=seconds, run=measure
    )


def _peers(setup: Setup, model: str, dtype: str, batch: int, *, compiled: bool = False) -> Job:
    run = _run(compiled)

    def measure() -> tuple[list[list[str]], list[Any]]:
        dense = timm.create_model(model, **setup.options(model)).eval()
        found = peers.measure(
            dense, RATIOS[0], runtime="compile" if compiled else "eager", batch_sizes=[batch], device=setup.device,
            dtype=dtype, pairs=setup.rounds,
        )  # fmt: skip
        rows = [
            [f"{model}, dense ÷ {one.what}", dtype, run, f"{batch}", f"{RATIOS[0]:g}", *_timed(one.dense_over_it)]
            + ["", "", ""]
            for one in found
        ]
        about = {"what": "peers", "model": model, "dtype": dtype, "compiled": compiled, "batch_size": batch}
        return rows, [
            {**about, "beside": one.what, "dense_over_it": one.dense_over_it, "of_limit": one.of_limit} for one in found
        ]

    return Job(
        name=f"peers of {model}, {dtype}, {run}, batch {batch}",
        kind=f"{run} peers, {'one image' if batch == 1 else 'batches'}",
        seconds=240.0 if compiled else 15.0,
        run=measure,
    )


def _attention(setup: Setup, dtype: str, *, kernels: bool = True) -> Job:
    shape, how = (2 if setup.small else 128, 6, 197, 64), "" if kernels else ", without our kernels"

    def measure() -> tuple[list[list[str]], list[Any]]:
        device = setup.device
        ratio = attention.compare(*shape, device=device, dtype=dtype, pairs=2 * setup.rounds, kernels=kernels)
        runs = attention.runs(*shape, device=device, dtype=dtype, kernels=kernels)
        masked, plain = (peak_bytes(run, device) for run in runs)
        row = [f"attention, masked ÷ plain{how}", dtype, "eager", f"{shape[0]}", "", *_timed(ratio)]
        measured = {"masked_over_plain": ratio, "masked_peak_bytes": masked, "plain_peak_bytes": plain}
        about = {"what": "attention", "dtype": dtype, "kernels": kernels, "batch_size": shape[0]}
        return [[*row, "", "", _peaks(masked, plain)]], [{**about, **measured}]

    return Job(
        name=f"masked attention against the plain one{how}, {dtype}, batch {shape[0]}",
        kind="attention",
        seconds=3.0,
        run=measure,
    )


def _sizes(setup: Setup, dtype: str) -> Job:
    shape, what = (2 if setup.small else 128, 6, 197, 64), "attention by sizes, channels ÷ bias"

    def measure() -> tuple[list[list[str]], list[Any]]:
        ratio = attention.compare_sizes(*shape, device=setup.device, dtype=dtype, pairs=2 * setup.rounds)
        row = [what, dtype, "eager", f"{shape[0]}", "", *_timed(ratio), "", "", ""]
        return [row], [{"what": what, "dtype": dtype, "batch_size": shape[0], "channels_over_bias": ratio}]

    return Job(name=f"{what}, {dtype}, batch {shape[0]}", kind="attention", seconds=3.0, run=measure)


def _training(setup: Setup, model: str, dtype: str, *, compiled: bool = False) -> Job:
    batch, run = 4 if setup.small else 128, _run(compiled)

    def measure() -> tuple[list[list[str]], list[Any]]:
        dense = partial(timm.create_model, model, **setup.options(model))
        ratios = training.compare(dense, batch, 0.7, setup.device, dtype, setup.rounds, compiled=compiled)
        rows = [
            [f"{model}, a training step, sparse ÷ dense, {what}", dtype, run, f"{batch}", "0.7", *_timed(ratio)]
            + ["", "", ""]
            for what, ratio in ratios.items()
        ]
        about = {"what": "training step", "model": model, "dtype": dtype, "compiled": compiled, "batch_size": batch}
        return rows, [{**about, "loss": what, "sparse_over_dense": ratio} for what, ratio in ratios.items()]

    return Job(
        name=f"a training step of {model}, {dtype}, {run}, batch {batch}",
        kind=f"{run} training",
        seconds=90.0 if compiled else 12.0,
        run=measure,
    )


def _run(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def _timed(ratio: Ratio) -> list[str]:
    lower, upper = ratio.quartiles
    first, second = (1000 * seconds for seconds in ratio.medians)
    return [f"{first:.2f} → {second:.2f}", f"{ratio.median:.2f} ({lower:.2f} … {upper:.2f})"]


def _peaks(first: int | None, second: int | None) -> str:
    return "" if first is None or second is None else f"{first / 2**20:.0f} → {second / 2**20:.0f}"


if __name__ == "__main__":
    typer.run(main)

"""Measuring speed: dense and sparse in turn, so that a machine whose speed drifts misleads nobody."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tokenprune.analysis.runtimes import Timer, Timers, in_turn, runtime_named, synchronize, timers_of, twin
from tokenprune.api import dense, frozen_stages, refuse_prompts, sparsifier_of, unsparsify, unwrap
from tokenprune.backbones.probing import eval_mode, random_inputs
from tokenprune.errors import UnsupportedModelError
from tokenprune.pruning.frozen import CutStage, FrozenStage

MIN_PAIRS = 8
"""With fewer pairs, their spread cannot be estimated."""
MAX_NOISE = 0.1
"""Interquartile range over the median: above it, a difference of some percent is lost in the noise."""


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """Images per second, unpruned and pruned, measured in pairs.

    Attributes:
        input_size: Channels, height and width of the images.
        batch_size: Images in a batch.
        keep_ratios: Cumulative keep ratios, one a stage.
        dense_seconds: Seconds of each unpruned batch.
        sparse_seconds: Seconds of the pruned batch that ran beside it.
        dense_peak_bytes: Most memory of the accelerator that tensors held during an unpruned batch, weights
            included; ``None`` on a CPU, which does not count it.
        sparse_peak_bytes: The same of a pruned batch.
        limit_seconds: Seconds of a batch in the same round whose sequence was merely cut off at the stages, so that
            choosing and gathering tokens cost nothing; ``None`` where that was not measured.
        runtime: What ran them.
    """

    input_size: tuple[int, ...]
    batch_size: int
    keep_ratios: tuple[float, ...]
    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]
    dense_peak_bytes: int | None = None
    sparse_peak_bytes: int | None = None
    limit_seconds: tuple[float, ...] | None = None
    runtime: str = "eager"

    @property
    def dense_latency(self) -> float:
        """Median seconds of an unpruned batch."""
        return statistics.median(self.dense_seconds)

    @property
    def sparse_latency(self) -> float:
        """Median seconds of a pruned batch."""
        return statistics.median(self.sparse_seconds)

    @property
    def dense_images_per_second(self) -> float:
        """Median over the unpruned batches."""
        return self.batch_size / self.dense_latency

    @property
    def sparse_images_per_second(self) -> float:
        """Median over the pruned batches."""
        return self.batch_size / self.sparse_latency

    @property
    def speedups(self) -> tuple[float, ...]:
        """Dense ÷ sparse seconds of each pair."""
        return tuple(before / after for before, after in zip(self.dense_seconds, self.sparse_seconds, strict=True))

    @property
    def speedup(self) -> float:
        """Median of the pairs' speed-ups."""
        return statistics.median(self.speedups)

    @property
    def limit(self) -> float | None:
        """Median of dense ÷ cut-off seconds: the speed-up that there is to have here; ``None`` if not measured."""
        if self.limit_seconds is None:
            return None
        return statistics.median(
            before / cut for before, cut in zip(self.dense_seconds, self.limit_seconds, strict=True)
        )

    @property
    def spread(self) -> tuple[float, float]:
        """The pairs' speed-ups at the lower and the upper quartile."""
        lower, _, upper = statistics.quantiles(self.speedups, n=4)
        return lower, upper

    @property
    def noise(self) -> float:
        """From the lower to the upper quartile of the pairs' speed-ups, as a fraction of the median."""
        lower, upper = self.spread
        return (upper - lower) / self.speedup

    @property
    def doubt(self) -> str | None:
        """Why the speed-up is not to be trusted; ``None`` if nothing speaks against it.

        The rule: at least 8 pairs, of whose speed-ups the middle half spans at most 10 % of the median.
        """
        if len(self.speedups) < MIN_PAIRS:
            return f"{len(self.speedups)} pairs are too few to estimate the noise; measure {MIN_PAIRS} or more."
        if self.noise > MAX_NOISE:
            return (
                f"too noisy: the middle half of the speed-ups spans {self.noise:.0%} of their median, more than "
                f"{MAX_NOISE:.0%}; let nothing else run, or measure more pairs."
            )
        return None

    def to_json(self) -> str:
        """All attributes, and the figures derived from them, as a JSON object."""
        derived = {
            "dense_images_per_second": self.dense_images_per_second,
            "sparse_images_per_second": self.sparse_images_per_second,
            "speedup": self.speedup,
            "spread": self.spread,
            "limit": self.limit,
            "dense_latency": self.dense_latency,
            "sparse_latency": self.sparse_latency,
            "noise": self.noise,
            "doubt": self.doubt,
        }
        return json.dumps({**asdict(self), **derived})

    def __str__(self) -> str:
        lower, upper = self.spread
        how = "" if self.runtime == "eager" else f", runtime {self.runtime}"
        return (
            f"{self.dense_images_per_second:.1f} images/s dense, {self.sparse_images_per_second:.1f} sparse, "
            f"speed-up {self.speedup:.2f} (quartiles {lower:.2f} … {upper:.2f}) at batch {self.batch_size}{how}"
        )


def throughput(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch_size: int = 16,
    pairs: int = 15,
    warmup: int = 3,
    limit: bool = False,
    runtime: str = "eager",
    progress: Callable[[int, int], None] | None = None,
) -> ThroughputReport:
    """Time a sparsified model, unpruned and pruned in turn, on random images.

    With an adaptive budget it is timed at the plan's numbers of tokens, since those of random images say nothing.

    Every other pair begins with the pruned one, so that what comes first gains or loses nothing by it.

    Args:
        model: A sparsified model, on its device and in its dtype, possibly compiled or frozen; its mode and
            settings are left as they are.
        input_size: Channels, height and width of the images.
        batch_size: Images in a batch.
        pairs: Pairs of batches that are counted.
        warmup: Pairs that run before and are not counted.
        limit: Whether to measure in each round what there is to gain as well: a batch whose sequence is merely cut
            off at the stages. It is left out of the report of a model that could not be frozen, see `freeze`.
        runtime: What runs the model, dense, sparse and cut off. ``"eager"``: PyTorch, with the model as it is.
            ``"compile"``: `torch.compile`, each whole, on CUDA with ``mode="reduce-overhead"``. ``"onnx"`` and
            ``"pt2"``: what `export` writes, the former by ONNX Runtime on the CPU, in a process of its own with as
            many threads as PyTorch has here, and the latter as a program that was loaded again.
        progress: Called after each pair with the number of pairs done and of all.

    Raises:
        StateError: The model is not sparsified, or reads prompts beside images; see `prefill_times`.
        ValueError: There are fewer than two pairs, too few for a spread, ``warmup`` is negative, the batch empty, or
            the runtime unknown.
        UnsupportedModelError: The runtime cannot compile the model whole, or does not run on its device.
        ExportError: The model cannot be exported.
        ModuleNotFoundError: ``runtime="onnx"`` needs packages that are missing; the message names the extra.
    """
    (report,) = throughputs(
        model, input_size, batch_sizes=[batch_size], pairs=pairs, warmup=warmup, limit=limit, runtime=runtime,
        progress=None if progress is None else lambda batch, done, every: progress(done, every),
    )  # fmt: skip
    return report


def throughputs(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch_sizes: Sequence[int],
    pairs: int = 15,
    warmup: int = 3,
    limit: bool = False,
    runtime: str = "eager",
    progress: Callable[[int, int, int], None] | None = None,
) -> list[ThroughputReport]:
    """`throughput` for several batch sizes, a report of each: files for a runtime are written once.

    Args:
        model: As for `throughput`, and so are all others but these.
        input_size: The same.
        batch_sizes: Images in a batch, each.
        pairs: The same.
        warmup: The same.
        limit: The same.
        runtime: The same.
        progress: Called after each pair with the batch size, the number of pairs done and of all.
    """
    for batch in batch_sizes:
        if batch < 1:
            raise ValueError(f"batch_size={batch}: at least 1 image is needed.")
    if pairs < 2:
        raise ValueError(f"pairs={pairs}: at least 2 are needed for a spread.")
    if warmup < 0:
        raise ValueError(f"warmup={warmup}: a number of pairs from 0.")
    prepare = runtime_named(runtime)
    refuse_prompts(model, "prefill_times")
    plan, inner, reports = sparsifier_of(model).plan, unwrap(model), []
    with torch.no_grad():
        preparing = (
            _in_place(model, input_size, limit=limit)
            if runtime == "eager"
            else prepare(_variants(inner, input_size, limit=limit), input_size)
        )
        with preparing as timers:
            for batch in batch_sizes:
                images = random_inputs(inner, images=(batch, *input_size))["images"]
                each, tell = timers(images), None if progress is None else partial(progress, batch)
                times = in_turn(each, rounds=pairs, warmup=warmup, progress=tell)
                peaks = [None if runtime == "onnx" else _peak_bytes(timer, images.device) for timer in each[:2]]
                reports.append(
                    ThroughputReport(
                        input_size=tuple(input_size),
                        batch_size=batch,
                        keep_ratios=plan.keep_ratios,
                        dense_seconds=times[0],
                        sparse_seconds=times[1],
                        dense_peak_bytes=peaks[0],
                        sparse_peak_bytes=peaks[1],
                        limit_seconds=times[2] if len(times) > 2 else None,
                        runtime=runtime,
                    )
                )
    return reports


@contextmanager
def _in_place(model: nn.Module, input_size: Sequence[int], *, limit: bool) -> Iterator[Timers]:
    """Timers of a model as it is, in whatever wrappers: dense, sparse and, if it can be, cut off."""
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    cut = _cut_stages(inner, input_size) if limit else None

    def timers(images: Tensor) -> list[Timer]:
        (sparse,) = timers_of([model], images)
        within: list[Callable[[], AbstractContextManager[None]]] = [partial(dense, model), nullcontext]
        if cut is not None:
            within.append(partial(sparsifier.running_on, cut, inner))
        return [partial(_timed_within, context, sparse) for context in within]

    with (
        eval_mode(model),
        sparsifier.budgeting("fixed"),
        sparsifier.executing(sparsifier.inference_execution),
    ):
        yield timers


def _timed_within(context: Callable[[], AbstractContextManager[None]], timer: Timer) -> float:
    with context():
        return timer()


def _variants(model: nn.Module, input_size: Sequence[int], *, limit: bool) -> list[nn.Module]:
    """Models of their own with the weights of one that is sparsified: dense, sparse and, if it can be, cut off."""
    made = [twin(model).eval() for _ in range(2)]
    unsparsify(made[0])
    sparsifier = sparsifier_of(made[1])
    sparsifier.budget = "fixed"
    sparsifier.execution = sparsifier.inference_execution
    if limit:
        cut = twin(made[1])
        stages = _cut_stages(cut, input_size)
        if stages is not None:
            sparsifier_of(cut).freeze(stages, cut)
            made.append(cut)
    return made


def _cut_stages(model: nn.Module, input_size: Sequence[int]) -> tuple[FrozenStage, ...] | None:
    try:
        return frozen_stages(model, random_inputs(model, images=(1, *input_size))["images"], CutStage)
    except UnsupportedModelError:
        return None


def _peak_bytes(timer: Timer, device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    torch.accelerator.reset_peak_memory_stats(device)
    timer()
    synchronize(device)
    return int(torch.accelerator.max_memory_allocated(device))

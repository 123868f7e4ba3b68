"""Measuring speed: dense and sparse in turn, so that a machine whose speed drifts misleads nobody."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from tokenprune.api import dense, frozen_stages, refuse_prompts, sparsifier_of, unwrap
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
    """

    input_size: tuple[int, ...]
    batch_size: int
    keep_ratios: tuple[float, ...]
    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]
    dense_peak_bytes: int | None = None
    sparse_peak_bytes: int | None = None
    limit_seconds: tuple[float, ...] | None = None

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
        return (
            f"{self.dense_images_per_second:.1f} images/s dense, {self.sparse_images_per_second:.1f} sparse, "
            f"speed-up {self.speedup:.2f} (quartiles {lower:.2f} … {upper:.2f}) at batch {self.batch_size}"
        )


def throughput(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch_size: int = 16,
    pairs: int = 15,
    warmup: int = 3,
    limit: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ThroughputReport:
    """Time a sparsified model, unpruned and pruned in turn, on random images.

    With an adaptive budget it is timed at the plan's numbers of tokens, since those of random images say nothing.

    Every other pair begins with the pruned one, so that what comes first gains or loses nothing by it.

    Args:
        model: A sparsified model, on its device and in its dtype, possibly compiled; its mode and
            settings are left as they are.
        input_size: Channels, height and width of the images.
        batch_size: Images in a batch.
        pairs: Pairs of batches that are counted.
        warmup: Pairs that run before and are not counted.
        limit: Whether to measure in each round what there is to gain as well: a batch whose sequence is merely cut
            off at the stages. It is left out of the report of a model that could not be frozen, see `freeze`.
        progress: Called after each pair with the number of pairs done and of all.

    Raises:
        StateError: The model is not sparsified, or reads prompts beside images; see `prefill_times`.
        ValueError: There are fewer than two pairs, too few for a spread, ``warmup`` is negative, or the batch empty.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 image is needed.")
    if pairs < 2:
        raise ValueError(f"pairs={pairs}: at least 2 are needed for a spread.")
    if warmup < 0:
        raise ValueError(f"warmup={warmup}: a number of pairs from 0.")
    refuse_prompts(model, "prefill_times")
    sparsifier = sparsifier_of(model)
    images = random_inputs(unwrap(model), images=(batch_size, *input_size))["images"]
    dense_seconds: list[float] = []
    sparse_seconds: list[float] = []
    cut, cut_seconds = _cut_stages(model, images[:1]) if limit else None, []
    with (
        eval_mode(model),
        sparsifier.budgeting("fixed"),
        sparsifier.executing(sparsifier.inference_execution),
        torch.no_grad(),
    ):
        for pair in range(-warmup, pairs):
            seconds = [_seconds(model, images, pruned=pruned) for pruned in (pair % 2 == 1, pair % 2 == 0)]
            before, after = reversed(seconds) if pair % 2 else seconds
            if pair >= 0:
                dense_seconds.append(before)
                sparse_seconds.append(after)
            if cut is not None:
                with sparsifier.running_on(cut, unwrap(model)):
                    seconds_cut = _seconds(model, images, pruned=True)
                if pair >= 0:
                    cut_seconds.append(seconds_cut)
            if progress is not None:
                progress(pair + warmup + 1, pairs + warmup)
        peaks = [_peak_bytes(model, images, pruned=pruned) for pruned in (False, True)]
    return ThroughputReport(
        input_size=tuple(input_size),
        batch_size=batch_size,
        keep_ratios=sparsifier.plan.keep_ratios,
        dense_seconds=tuple(dense_seconds),
        sparse_seconds=tuple(sparse_seconds),
        dense_peak_bytes=peaks[0],
        sparse_peak_bytes=peaks[1],
        limit_seconds=None if cut is None else tuple(cut_seconds),
    )


def _cut_stages(model: nn.Module, image: Tensor) -> tuple[FrozenStage, ...] | None:
    try:
        return frozen_stages(model, image, CutStage)
    except UnsupportedModelError:
        return None


def _run(model: nn.Module, images: Tensor, *, pruned: bool) -> None:
    with nullcontext() if pruned else dense(model):
        model(images)


def _seconds(model: nn.Module, images: Tensor, *, pruned: bool) -> float:
    _synchronize(images)
    start = time.perf_counter()
    _run(model, images, pruned=pruned)
    _synchronize(images)
    return time.perf_counter() - start


def _peak_bytes(model: nn.Module, images: Tensor, *, pruned: bool) -> int | None:
    if images.device.type == "cpu":
        return None
    torch.accelerator.reset_peak_memory_stats(images.device)
    _run(model, images, pruned=pruned)
    _synchronize(images)
    return int(torch.accelerator.max_memory_allocated(images.device))


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)

"""Measuring speed: dense and sparse in turn, so that a machine whose speed drifts misleads nobody."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from tokenprune.probing import eval_mode, random_inputs
from tokenprune.verbs import dense, sparsifier_of, unwrap


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """Images per second, unpruned and pruned, measured in pairs.

    Attributes:
        input_size: Channels, height and width of the images.
        batch_size: Images in a batch.
        keep_ratios: Cumulative keep ratios, one a stage.
        dense_seconds: Seconds of each unpruned batch.
        sparse_seconds: Seconds of the pruned batch that ran beside it.
    """

    input_size: tuple[int, ...]
    batch_size: int
    keep_ratios: tuple[float, ...]
    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]

    @property
    def dense_images_per_second(self) -> float:
        """Median over the unpruned batches."""
        return self.batch_size / statistics.median(self.dense_seconds)

    @property
    def sparse_images_per_second(self) -> float:
        """Median over the pruned batches."""
        return self.batch_size / statistics.median(self.sparse_seconds)

    @property
    def speedups(self) -> tuple[float, ...]:
        """Dense ÷ sparse seconds of each pair."""
        return tuple(before / after for before, after in zip(self.dense_seconds, self.sparse_seconds, strict=True))

    @property
    def speedup(self) -> float:
        """Median of the pairs' speed-ups."""
        return statistics.median(self.speedups)

    @property
    def spread(self) -> tuple[float, float]:
        """The pairs' speed-ups at the lower and the upper quartile."""
        lower, _, upper = statistics.quantiles(self.speedups, n=4)
        return lower, upper

    def to_json(self) -> str:
        """All attributes, and the figures derived from them, as a JSON object."""
        derived = {
            "dense_images_per_second": self.dense_images_per_second,
            "sparse_images_per_second": self.sparse_images_per_second,
            "speedup": self.speedup,
            "spread": self.spread,
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
) -> ThroughputReport:
    """Time a sparsified model, unpruned and pruned in turn, on random images.

    Args:
        model: A sparsified model, on its device and in its dtype, possibly compiled; its mode and
            settings are left as they are.
        input_size: Channels, height and width of the images.
        batch_size: Images in a batch.
        pairs: Pairs of batches that are counted.
        warmup: Pairs that run before and are not.

    Raises:
        StateError: The model is not sparsified.
        ValueError: There are fewer than two pairs, too few for a spread, or ``warmup`` is negative.
    """
    if pairs < 2:
        raise ValueError(f"pairs={pairs}: at least 2 are needed to tell the spread.")
    if warmup < 0:
        raise ValueError(f"warmup={warmup}: a number of pairs from 0.")
    sparsifier = sparsifier_of(model)
    images = random_inputs(unwrap(model), images=(batch_size, *input_size))["images"]
    dense_seconds: list[float] = []
    sparse_seconds: list[float] = []
    with eval_mode(model), sparsifier.executing("gather"), torch.no_grad():
        for pair in range(-warmup, pairs):
            with dense(model):
                before = _seconds(model, images)
            after = _seconds(model, images)
            if pair >= 0:
                dense_seconds.append(before)
                sparse_seconds.append(after)
    return ThroughputReport(
        input_size=tuple(input_size),
        batch_size=batch_size,
        keep_ratios=sparsifier.plan.keep_ratios,
        dense_seconds=tuple(dense_seconds),
        sparse_seconds=tuple(sparse_seconds),
    )


def _seconds(model: nn.Module, images: Tensor) -> float:
    _synchronize(images)
    start = time.perf_counter()
    model(images)
    _synchronize(images)
    return time.perf_counter() - start


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)

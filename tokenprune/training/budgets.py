"""Calibrating an adaptive budget: thresholds by which images keep as many tokens as planned on average.

Shapes: I images, B of them in a batch, m patch tokens that reach a stage, S stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.api import sparsifier_of, unwrap
from tokenprune.backbones.probing import call, eval_mode
from tokenprune.errors import StateError
from tokenprune.pruning.budget import Thresholds
from tokenprune.pruning.executions import default_execution, execution_class
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.training.batches import Inputs, all_inputs


@dataclass(frozen=True, kw_only=True)
class BudgetReport:
    """What `calibrate_budget` found for one plan.

    Attributes:
        thresholds: What was stored with the model.
        kept: For each stage the fraction of an image's patch tokens that was kept, one number for each image.
    """

    thresholds: Thresholds
    kept: tuple[tuple[float, ...], ...]

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """The plan's cumulative ratios, one a stage."""
        return self.thresholds.keep_ratios

    @property
    def num_images(self) -> int:
        """How many images were looked at."""
        return len(self.kept[0])

    @property
    def mean_kept(self) -> tuple[float, ...]:
        """For each stage the mean fraction that was kept: the plan's ratio, but for rounding and scores that tie."""
        return tuple(sum(fractions) / len(fractions) for fractions in self.kept)

    def __str__(self) -> str:
        lines = [f"{self.num_images} images"]
        for stage, (ratio, mean, fractions) in enumerate(zip(self.keep_ratios, self.mean_kept, self.kept, strict=True)):
            lines.append(
                f"stage {stage}: {ratio:.1%} planned, {mean:.1%} kept on average, "
                f"from {min(fractions):.1%} to {max(fractions):.1%} of an image"
            )
        return "\n".join(lines)


def calibrate_budget(
    model: nn.Module,
    images: Iterable[Any],
    *,
    keep_ratios: Sequence[float | Sequence[float]] | None = None,
    floor_ratio: float = 0.25,
) -> tuple[BudgetReport, ...]:
    """Find the thresholds by which a model with an adaptive budget keeps as many tokens as planned on average.

    Each stage gets a threshold on its scorer's scores: an image keeps the tokens above it, and the mean over all
    ``images`` is the plan's number. Nothing is trained, and labels are not looked at. Stages are calibrated one after
    the other, as what reaches a stage depends on those before it; so ``images`` is read once for each stage and plan.

    Thresholds belong to the weights they were found with, and go where these go: into state dicts and saved models.
    After training, calibrate again. They are used where ``model.tokenprune.budget`` is ``"adaptive"``, which is not
    set here, and those for other ratios stay.

    Args:
        model: A sparsified model, on its device and in its dtype; all but its thresholds is left as it is.
        images: Batches that can be read several times, such as a DataLoader or a list: tensors (B, …), mappings of
            the model's arguments, or tuples that begin with one of these. A few hundred images like those that the
            model is to see are good.
        keep_ratios: At which ratios, each as ``model.tokenprune.keep_ratio`` takes it; ``None`` means the present ones.
        floor_ratio: The fraction of the planned number that every image keeps, whatever its scores, in (0, 1].

    Returns:
        What was found, one report for each of ``keep_ratios``.

    Raises:
        StateError: The model is not sparsified, or runs dense.
        PlanError: Ratios make no plan.
        ValueError, TypeError: There are no images, or nothing that the model could be given; ``floor_ratio`` is outside
            of its range.
    """
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    if not sparsifier.enabled:
        raise StateError("the model runs dense here (inside tokenprune.dense); calibrate it where it is pruned.")
    if not 0 < floor_ratio <= 1:
        raise ValueError(f"floor_ratio={floor_ratio}: expected a fraction of the planned number, above 0 and up to 1.")
    if iter(images) is images:
        raise TypeError("images is an iterator, which can be read only once; pass a DataLoader or a list of batches.")
    plans = [sparsifier.plan] if keep_ratios is None else [sparsifier.plan.with_keep_ratio(one) for one in keep_ratios]
    with _as_calibrated(inner, sparsifier):
        reports = [_calibrated(inner, sparsifier, plan, images, floor_ratio) for plan in plans]
    found = {one.keep_ratios: one for one in (*sparsifier.thresholds, *(report.thresholds for report in reports))}
    sparsifier.thresholds = tuple(found.values())
    return tuple(reports)


def calibrate_anew(model: nn.Module, images: Sequence[Any], *, adaptive: bool) -> None:
    """New thresholds where a model has some, which its scores have changed since.

    Args:
        model: A sparsified model.
        images: As `calibrate_budget` takes them.
        adaptive: Whether to find some for the model's own keep ratios in any case.
    """
    sparsifier = sparsifier_of(model)
    for known in sparsifier.thresholds:
        calibrate_budget(model, images, keep_ratios=[known.keep_ratios], floor_ratio=known.floor_ratio)
    if adaptive and sparsifier.keep_ratio not in [known.keep_ratios for known in sparsifier.thresholds]:
        calibrate_budget(model, images)


class _Scored:
    """The scores by which a stage decided on the images of a batch, and how many it is to keep.

    Attributes:
        scores: (B, m), −∞ for what did not reach the stage.
        reached: (B,) int64, how many tokens of each image reached it.
        num_keep: How many of each image are planned.
        num_patches: N, how many an image has.
    """

    def __init__(self, scores: Tensor, left: Tensor | None, num_keep: int, num_patches: int) -> None:
        scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        there = torch.ones_like(scores) if left is None else left
        self.scores = scores.masked_fill(there == 0, -math.inf).cpu()
        self.reached = (there > 0).sum(dim=1).cpu()
        self.num_keep, self.num_patches = num_keep, num_patches

    def counts(self, score: float, floor_ratio: float) -> Tensor:
        """How many tokens of each image are kept by a threshold, (B,)."""
        one = Thresholds(keep_ratios=(), scores=(score,), floor_ratio=floor_ratio).at(0, self.num_keep)
        assert one is not None
        return one.num_keep(self.scores, None).minimum(self.reached)


def _calibrated(
    model: nn.Module, sparsifier: Sparsifier, plan: Plan, images: Iterable[Any], floor_ratio: float
) -> BudgetReport:
    """The thresholds of a plan, found stage by stage."""
    sparsifier.keep_ratio = plan.keep_ratios
    parameter = next(model.parameters())
    found = Thresholds(keep_ratios=plan.keep_ratios, scores=(), floor_ratio=floor_ratio)
    kept: list[tuple[float, ...]] = []
    for stage, probability in enumerate(plan.keep_probabilities):
        if probability == 1:
            score, fractions = None, kept[-1] if kept else None
        else:
            with sparsifier.trying(found):
                inputs = all_inputs(images, device=parameter.device, dtype=parameter.dtype)
                seen = [_scored(model, sparsifier, stage, one) for one in inputs]
            if not seen:
                raise ValueError("images yields no batch; give at least one.")
            score = _threshold(seen, floor_ratio)
            fractions = tuple(int(count) / one.num_patches for one in seen for count in one.counts(score, floor_ratio))
        found = replace(found, scores=(*found.scores, score))
        kept.append(fractions or ())
    number = max(map(len, kept))
    return BudgetReport(thresholds=found, kept=tuple(fractions or (1.0,) * number for fractions in kept))


def _scored(model: nn.Module, sparsifier: Sparsifier, stage: int, inputs: Inputs) -> _Scored:
    call(model, inputs)
    trace = sparsifier.trace
    assert trace is not None
    before, selection = (trace.start, *trace.selections)[stage : stage + 2]
    assert selection.scores is not None
    planned = sparsifier.plan.num_keep(trace.num_patches)[stage]
    return _Scored(selection.scores.detach(), before.left, planned, trace.num_patches)


def _threshold(seen: Sequence[_Scored], floor_ratio: float) -> float:
    """The score above which as many tokens of all images are as are planned, or the nearest number of them."""
    pool = torch.cat([one.scores[one.scores > -math.inf] for one in seen]).unique()  # ascending
    if not len(pool):  # a scorer that tells no two tokens apart, and keeps none
        return 0.0
    wanted = sum(one.num_keep * len(one.scores) for one in seen)

    def above(index: int) -> float:
        """A threshold between two scores, so that rounding hardly ever decides."""
        if index == 0:
            return float(torch.nextafter(pool[0], pool.new_tensor(-math.inf)))
        lower, upper = pool[index - 1], pool[index]
        middle = lower + (upper - lower) / 2
        return float(middle if lower < middle < upper else lower)

    def excess(index: int) -> int:
        return sum(int(one.counts(above(index), floor_ratio).sum()) for one in seen) - wanted

    low, high = 0, len(pool) - 1  # the lowest threshold keeps the most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if excess(middle) >= 0 else (low, middle - 1)
    best = min((low, min(low + 1, len(pool) - 1)), key=lambda index: abs(excess(index)))
    return above(best)


@contextmanager
def _as_calibrated(model: nn.Module, sparsifier: Sparsifier) -> Iterator[None]:
    """In eval mode, in an execution in which images may keep different numbers; afterwards all is as it was."""
    ratios, trace = sparsifier.keep_ratio, sparsifier.trace
    execution = default_execution(training=False, by_image=True)
    if execution_class(execution).obstacles(sparsifier.backbone):
        execution = default_execution(training=True, by_image=True)
    with eval_mode(model), sparsifier.budgeting("fixed"), sparsifier.executing(execution), torch.no_grad():
        try:
            yield
        finally:
            sparsifier.keep_ratio, sparsifier.trace = ratios, trace

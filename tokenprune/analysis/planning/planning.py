"""`plan_for`: a budget in, keep ratios out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.analysis.planning.costs import PlanCosts
from tokenprune.analysis.planning.search import PlanSearch
from tokenprune.analysis.planning.stopwatch import Stopwatch
from tokenprune.api import sparsifier_of, unwrap
from tokenprune.backbones.probing import eval_mode
from tokenprune.errors import PlanError, StateError
from tokenprune.pruning.executions import default_execution
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.sparsifier import Sparsifier
from tokenprune.training.batches import Inputs, all_inputs, num_images
from tokenprune.training.preserving import forked_random_state

SLACK = 0.01
"""How far above the dense model's multiply-adds a budget may lie: they are quoted rounded."""


def plan_for(
    model: nn.Module,
    images: Any = None,
    *,
    gmacs: float | None = None,
    speedup: float | None = None,
    agreement: float | None = None,
    input_size: Sequence[int] | None = None,
    batch_size: int = 16,
    pairs: int = 15,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Find the keep ratios of a sparsified model that meet a budget.

    Without images every stage keeps the same fraction ρ of what reaches it, to a token, and the ρ is found that the
    budget allows.
    With images, the pruning is divided among the stages in the way that loses the least at the same cost: every other
    image is searched on, and the rest decide whether what was found is better there than ρ, ρ², ρ³ …, which is
    returned if it is not. Labels are not looked at, and nothing is trained.

    ``model.tokenprune.keep_ratio = plan.keep_ratios`` applies the plan.

    Args:
        model: A sparsified model with the scorers that it will run with; everything in it is left as it is.
        images: An iterable of batches, some hundred images in all: each a tensor (B, K, H, W), a mapping of the
            model's arguments, or a tuple whose first item is one of these. They are read once, and held in memory.
        gmacs: Multiply-adds of one image at most, in 10⁹, as `tokenprune.flops` counts them.
        speedup: Dense ÷ pruned seconds of a batch, measured on this machine by `tokenprune.throughput`.
        agreement: The least share of the images whose best class is the dense model's, up to 1, for the cheapest plan
            that holds it; the mean cosine of features for a model without classes.
        input_size: Channels, height and width of the images that are counted and timed. ``None`` takes those of
            ``images``, or the size that the model was built for.
        batch_size: Images in a timed batch.
        pairs: Timed pairs of batches, dense and pruned, for each plan that is tried.
        progress: Called with what is being done.

    Returns:
        The plan, with the stages of the model.

    Raises:
        StateError: The model is not sparsified, or runs dense.
        PlanError: No budget is given, or several; the budget cannot be met, and the message says what can; or
            agreement is asked for without images.
        TypeError: ``images`` is no iterable of batches.
        CountingError: The model has an operator that cannot be counted.
    """
    sparsifier, inner = sparsifier_of(model), unwrap(model)
    _check_budget(gmacs=gmacs, speedup=speedup, agreement=agreement)
    if agreement is not None and images is None:
        raise PlanError("agreement is measured on images, and none are given; pass batches of some hundred.")
    if not sparsifier.enabled:
        raise StateError("the model runs dense here (inside tokenprune.dense), so that no plan can be tried.")
    batches = None if images is None else _read(images, next(inner.parameters()))
    size = tuple(input_size or _size_of(batches) or sparsifier.backbone.input_size(inner))
    tell = progress or (lambda what: None)
    with _unchanged(inner, sparsifier):
        tell("counting multiply-adds")
        costs = PlanCosts(inner, size)
        search = None if batches is None else PlanSearch(inner, costs, batches, tell)
        if agreement is not None:
            assert search is not None
            ratios = search.cheapest(float(agreement))
        else:
            decays = (1.0,) * len(costs.stages)
            if gmacs is not None:
                budget, stopwatch = _within(costs, float(gmacs)), None
            else:
                assert speedup is not None
                stopwatch = Stopwatch(model, costs, tell, input_size=size, batch_size=batch_size, pairs=pairs)
                budget = stopwatch.budget(float(speedup), decays, costs.dense / speedup)
            if search is not None:
                decays = search.decays(budget)
                if stopwatch is not None and decays != search.geometric:
                    budget = stopwatch.budget(float(speedup or 1.0), decays, budget)
            ratios = costs.at_most(decays, budget)
        return Plan(stages=costs.stages, keep_ratios=ratios)


def _check_budget(**budgets: Any) -> None:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
        raise PlanError(f"a plan meets one budget out of gmacs, speedup and agreement, and {listed} is given.")
    ((name, value),) = given.items()
    lowest, highest = {"gmacs": (0.0, math.inf), "speedup": (1.0, math.inf), "agreement": (0.0, 1.0)}[name]
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and 0 < float(value) < math.inf and lowest <= float(value) <= highest):
        allowed = f"from {lowest:g} on" if lowest else "above 0" + (f" and up to {highest:g}" if highest == 1 else "")
        raise PlanError(f"{name}={value!r}: expected a number {allowed}.")


def _read(images: Any, parameter: nn.Parameter) -> list[Inputs]:
    batches = list(all_inputs(images, device=parameter.device, dtype=parameter.dtype))
    if sum(map(num_images, batches)) < 2:
        raise PlanError("images hold fewer than two: some are searched on, and others compared on; give some hundred.")
    return batches


def _size_of(batches: list[Inputs] | None) -> tuple[int, ...] | None:
    """Channels, height and width of the images, where a batch is or has a tensor of four dimensions."""
    if batches is None:
        return None
    first = batches[0]
    tensors = [first] if isinstance(first, Tensor) else list(first.values())
    return next((tuple(one.shape[1:]) for one in tensors if isinstance(one, Tensor) and one.dim() == 4), None)


def _within(costs: PlanCosts, gmacs: float) -> float:
    """A budget in multiply-adds, if plans can meet it."""
    dense, cheapest = costs.dense / 1e9, costs.cheapest / 1e9
    if not cheapest <= gmacs <= dense * (1 + SLACK):
        raise PlanError(
            f"gmacs={gmacs:g} cannot be met with stages {costs.stages}: what can is from {cheapest:.4g}, with one "
            f"token kept, to {dense:.4g}, with all of them."
        )
    return gmacs * 1e9


@contextmanager
def _unchanged(model: nn.Module, sparsifier: Sparsifier) -> Iterator[None]:
    """Run a model as inference does, and afterwards restore what trying plans on it changes."""
    before, trace = sparsifier.keep_ratio, sparsifier.trace
    device = next(model.parameters()).device
    with forked_random_state(device), eval_mode(model), sparsifier.executing(default_execution(training=False)):
        try:
            with torch.no_grad():
                yield
        finally:
            sparsifier.keep_ratio, sparsifier.trace = before, trace

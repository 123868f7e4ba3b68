"""The keep ratios at which a method costs so many multiply-adds."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, cast

from torch import nn

import tokenprune
from recipes.dynamicvit import attached
from recipes.frontier.grid import Method

CALIBRATED_AT = 0.5


def sparsified(dense: nn.Module, method: Method, keep_ratio: Any = None) -> nn.Module:
    """The dense model, changed in place: with three stages, or for ToMe one in every block.

    Args:
        dense: The dense model.
        method: Its scorer and reduction.
        keep_ratio: One ratio a stage, or ρ; by default one at which the method can stand.
    """
    model: nn.Module
    if method.scorer == "tome":
        depth = len(cast(Any, dense).blocks)
        model = tokenprune.sparsify(
            dense, stages=range(depth), keep_ratio=keep_ratio or (1.0,) * depth, scorer="tome", pruned=method.pruned
        )
    else:
        model = tokenprune.sparsify(
            dense, keep_ratio=keep_ratio or CALIBRATED_AT, scorer=method.scorer, pruned=method.pruned
        )
    return model


def plan_at(dense: nn.Module, method: Method, budget: float) -> dict[str, Any]:
    """``keep_ratios`` and ``gmacs`` of a method at a budget, at most: ρ, ρ², ρ³, or the paper's schedule for ToMe.

    Args:
        dense: The dense model, which is sparsified.
        method: What is to meet the budget.
        budget: GMACs.
    """
    model = sparsified(dense, method)
    if method.scorer == "tome":
        ratios = _tome_ratios(model, budget)
    else:
        ratios = tokenprune.plan_for(model, gmacs=budget).keep_ratios
    return {"keep_ratios": list(ratios), "gmacs": _gmacs(model, ratios)}


def _tome_ratios(model: nn.Module, budget: float) -> tuple[float, ...]:
    """ToMe's: the same number of tokens merged in every block, or one more in the first ones where that meets it."""
    attachment = attached(model)
    num_patches, depth = _num_patches(model), len(attachment.stages)

    def ratios_of(total: int) -> tuple[float, ...]:
        r, more = divmod(total, depth)
        first = tokenprune.tome_keep_ratios(num_patches, r=r + 1, num_stages=more) if more else ()
        left = round(first[-1] * num_patches) if first else num_patches
        rest = tokenprune.tome_keep_ratios(left, r=r, num_stages=depth - more)
        return (*first, *(round(ratio * left) / num_patches for ratio in rest))

    totals = range(num_patches * depth)
    return ratios_of(bisect_left(totals, -budget, key=lambda total: -_gmacs(model, ratios_of(total))))


def _num_patches(model: nn.Module) -> int:
    grid = attached(model).backbone.grid_size
    assert grid is not None
    return grid[0] * grid[1]


def _gmacs(model: nn.Module, keep_ratios: Any) -> float:
    attached(model).keep_ratio = keep_ratios
    return tokenprune.flops(model, attached(model).backbone.input_size(model)).sparse_gmacs

"""Multiply-adds of each of several images, which keep different numbers of tokens.

What a block costs is a polynomial of second degree in the tokens it runs on: attention grows with their square, and
everything else with their number. Likewise a stage in the patch tokens that reach it, and the rest in the tokens behind
the last block. So three counts at known numbers give the cost at any number, exactly.

Shapes: B images, N patch tokens of an image, m of them that reach a stage, T tokens of a sequence, S stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.backbones.probing import eval_mode
from tokenprune.errors import CountingError
from tokenprune.pruning.places import stage_before
from tokenprune.pruning.plan import Plan
from tokenprune.pruning.selection import Selection
from tokenprune.pruning.sparsifier import Sparsifier


class Costs(NamedTuple):
    """Multiply-adds of a pass, of one image or of one for which the numbers are known.

    Attributes:
        blocks: Of each block.
        stages: Of each stage.
        rest: Of everything else.
    """

    blocks: Sequence[int]
    stages: Sequence[int]
    rest: int


class _Numbers(NamedTuple):
    """Of one image: T in front of each block and behind the last one, and m in front of each stage."""

    tokens: Sequence[int]
    reached: Sequence[int]


def count_by_image(
    model: nn.Module, sparsifier: Sparsifier, images: Tensor, count: Callable[[Tensor], Costs]
) -> tuple[int, ...]:
    """The multiply-adds of each image, with the tokens that the model keeps of it.

    Args:
        model: The model.
        sparsifier: What is attached to it.
        images: (B, …), inputs of the model.
        count: The costs of a pass on one image, as the model is set.

    Raises:
        CountingError: There are too few patch tokens to tell how costs grow.
    """
    with eval_mode(model), torch.no_grad():
        model(images)
        numbers = _numbers_by_image(sparsifier, len(images))
        assert sparsifier.trace is not None
        probes = _probes(sparsifier.plan, sparsifier.trace.num_patches)
        seen: list[tuple[_Numbers, Costs]] = []
        plan = sparsifier.plan
        with sparsifier.budgeting("fixed"):
            try:
                for ratios in probes:
                    sparsifier.keep_ratio = ratios
                    with sparsifier.executing(sparsifier.inference_execution):
                        costs = count(images[:1])
                        model(images[:1])
                    seen.append((_numbers_by_image(sparsifier, 1)[0], costs))
            finally:
                sparsifier.keep_ratio = plan.keep_ratios
    return tuple(_cost(one, seen) for one in numbers)


def _numbers_by_image(sparsifier: Sparsifier, num_images: int) -> list[_Numbers]:
    """What the last pass ran on."""
    trace, backbone, plan = sparsifier.trace, sparsifier.backbone, sparsifier.plan
    assert trace is not None
    behind = (trace.start, *trace.selections)  # of no stage, of the first one …
    last = len(backbone.blocks)
    tokens = []
    for block in range(last + 1):
        selection = trace.start if block == last and trace.restored else behind[stage_before(plan, block) + 1]
        tokens.append(_lengths(selection, backbone.num_prefix_at(block), num_images))
    reached = [_lengths(selection, 0, num_images, patches=True) for selection in behind[:-1]]
    return [
        _Numbers([column[image] for column in tokens], [column[image] for column in reached])
        for image in range(num_images)
    ]


def _lengths(selection: Selection, num_prefix: int, num_images: int, *, patches: bool = False) -> list[int]:
    """How many tokens of each image go on behind a stage, or how many patch tokens."""
    layout = selection.layout
    number = [layout.num_patches] * num_images if selection.left is None else _sums(selection.left)
    if patches:
        return number
    summary = [layout.num_summary] * num_images if selection.summaries is None else _sums(selection.summaries)
    return [num_prefix + one + other + layout.num_suffix for one, other in zip(number, summary, strict=True)]


def _sums(values: Tensor) -> list[int]:
    found: list[int] = values.sum(dim=1).long().tolist()
    return found


def _probes(plan: Plan, num_patches: int) -> list[list[float]]:
    """Three plans whose numbers of tokens differ, with stages that prune where those of ``plan`` do."""
    num_stages = len(plan.stages)
    starts = (num_stages, (num_stages + num_patches - 1) // 2, num_patches - 1)
    if len({*starts}) < 3 or starts[1] <= num_stages:
        raise CountingError(
            f"{num_patches} patch tokens are too few to tell how the cost of {num_stages} stages grows with them."
        )
    probes = []
    for start in starts:
        counts: list[int] = []
        for probability in plan.keep_probabilities:
            before = counts[-1] if counts else num_patches
            counts.append(before if probability == 1 else start if before == num_patches else before - 1)
        probes.append([number / num_patches for number in counts])
    return probes


def _cost(numbers: _Numbers, seen: Sequence[tuple[_Numbers, Costs]]) -> int:
    """What an image costs, by the costs at other numbers."""
    total = Fraction(0)
    for block, tokens in enumerate(numbers.tokens[:-1]):
        total += _interpolated(tokens, {one.tokens[block]: costs.blocks[block] for one, costs in seen})
    for stage, reached in enumerate(numbers.reached):
        total += _interpolated(reached, {one.reached[stage]: costs.stages[stage] for one, costs in seen})
    total += _interpolated(numbers.tokens[-1], {one.tokens[-1]: costs.rest for one, costs in seen})
    return round(total)


def _interpolated(number: int, known: Mapping[int, int]) -> Fraction:
    """The polynomial through all that is known, Lagrange's, at a number."""
    total = Fraction(0)
    for one, value in known.items():
        term = Fraction(value)
        for other in known:
            if other != one:
                term *= Fraction(number - other, one - other)
        total += term
    return total

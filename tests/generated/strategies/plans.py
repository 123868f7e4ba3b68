"""Stages and keep ratios."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from tests.generated.strategies.common import FLOATS, HUGE, ODD

IN_RANGE = st.floats(min_value=0.05, max_value=1.0)
_RATIO_TYPES: tuple[Callable[[float], Any], ...] = (float, np.float64, np.float32, lambda ratio: Fraction(ratio))
OUT_OF_RANGE = st.one_of(
    FLOATS.filter(lambda ratio: not 0 < ratio <= 1),
    st.integers(max_value=0),
    st.integers(min_value=2),
    HUGE,
    st.sampled_from([True, False, Decimal("0.5"), np.float32("nan"), torch.tensor(0.5), Fraction(1, 10**400)]),
)


@st.composite
def good_ratio(draw: st.DrawFn) -> Any:
    """One number, of any type that is one."""
    ratio = draw(st.sampled_from(_RATIO_TYPES))(draw(IN_RANGE))
    return draw(st.sampled_from([ratio, ratio, 1, 1.0]))


@st.composite
def good_ratios(draw: st.DrawFn, number: int) -> Any:
    """One number, or one for each of so many stages that never rise."""
    if draw(st.booleans()):
        return draw(good_ratio())
    ratios = draw(st.lists(good_ratio(), min_size=number, max_size=number))
    return draw(st.sampled_from([list, tuple, np.array]))(sorted(ratios, key=float, reverse=True))


@st.composite
def bad_ratios(draw: st.DrawFn, number: int) -> Any:
    """What cannot be the keep ratios of so many stages."""
    ratios = sorted(draw(st.lists(IN_RANGE, min_size=number, max_size=number)), reverse=True)
    kind = draw(st.sampled_from(["odd", "number", "one of them", "too many", "too few", "rising", "tensor"]))
    if kind == "odd":
        return draw(ODD)
    if kind == "number":
        return draw(OUT_OF_RANGE)
    if kind == "one of them":
        ratios[draw(st.integers(0, number - 1))] = draw(st.one_of(OUT_OF_RANGE, ODD))
        return ratios
    if kind == "too few":
        return ratios[1:]
    if kind == "rising" and number > 1 and ratios[0] > ratios[-1]:
        return ratios[::-1]
    if kind == "tensor":
        return torch.tensor(ratios)
    return (*ratios, ratios[-1])


@st.composite
def good_stages(draw: st.DrawFn, depth: int) -> Any:
    """Ascending block indices."""
    stages = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    return draw(st.sampled_from([tuple, list, np.array, iter]))(stages)


@st.composite
def bad_stages(draw: st.DrawFn, depth: int) -> Any:
    """What cannot be the stages of a model of that depth."""
    stages = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    kind = draw(st.sampled_from(["odd", "number", "one of them", "none", "descending", "twice", "out of range"]))
    if kind == "odd":
        return draw(ODD.filter(lambda value: value is not None))
    if kind == "number":
        return draw(st.one_of(st.integers(), FLOATS, HUGE))
    if kind == "one of them":
        odd = st.one_of(ODD, FLOATS, st.sampled_from([True, -1, 1.0, np.float64(2), torch.tensor(1), Decimal(1)]))
        stages[draw(st.integers(0, len(stages) - 1))] = draw(odd)
        return stages
    if kind == "descending" and len(stages) > 1:
        return stages[::-1]
    if kind == "twice":
        return sorted([*stages, stages[0]])
    if kind == "out of range":
        return [*stages, draw(st.one_of(st.integers(min_value=depth), HUGE.filter(lambda one: one != 2**63)))]
    return draw(st.sampled_from([(), [], set()]))


def is_plan(stages: Any, ratios: Any) -> bool:
    """Whether two lists make a plan, said in other words than the library's."""
    numbers = all(type(one) is int and one >= 0 for one in stages)
    inside = all(type(one) in (int, float) and math.isfinite(one) and 0 < one <= 1 for one in ratios)
    if not (numbers and inside and stages and len(stages) == len(ratios)):
        return False
    return stages == sorted(set(stages)) and ratios == sorted(ratios, reverse=True)

"""Means of what is logged, over steps and over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Averages:
    """Weighted means of named scalars, summed on the device and read seldom."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # one a name, and last the weights

    def __bool__(self) -> bool:
        return self._sums is not None

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        numbers = torch.stack([value.detach().float() for value in values.values()])
        added = torch.cat([numbers, numbers.new_ones(1)]) * weight
        self._names, self._sums = tuple(values), added if self._sums is None else self._sums + added

    def read(self, accelerator: Any) -> dict[str, float]:
        """The means over all that was added, in all processes; each of them must ask."""
        *sums, weight = accelerator.reduce(self._sums, "sum").tolist()
        return {name: value / weight for name, value in zip(self._names, sums, strict=True)}

"""Scorers that remember or learn from the attention that they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune import Candidates, ScorerContext
from tokenprune.scorers import ClassAttention

NUM_HEADS = 2


class Recording(ClassAttention):
    """Remembers what it was given."""

    def forward(self, candidates: Candidates) -> Tensor:
        self.seen = candidates
        return super().forward(candidates)


class Learned(tokenprune.Scorer):
    """A learned score on top of the attention, sampled in training."""

    probabilistic, needs_attention = True, True

    def __init__(self, context: ScorerContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, candidates: Candidates) -> Tensor:
        return candidates.attention.log().clamp(min=-9) * self.weight[0] + 4 * self.weight[1]


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    yield seen
    handle.remove()

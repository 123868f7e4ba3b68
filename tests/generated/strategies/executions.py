"""Steps in the life of a sparsified model, and scores of any numbers."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.generated.strategies.common import ODD, mixed

_BROKEN_IMAGES = st.sampled_from([
    None, [], "picture", torch.zeros(2, 3, 32), torch.zeros(2, 5, 32, 32), torch.zeros(2, 3, 3, 3), torch.zeros(3),
])  # fmt: skip
STEPS = st.one_of(
    st.tuples(
        st.just("execution"), mixed(st.sampled_from(["mask", "gather", "varlen", "auto"]), st.one_of(ODD, st.text()))
    ),
    st.tuples(st.sampled_from(["ratio", "train", "eval", "dense"]), st.none()),
    st.tuples(st.sampled_from(["run", "copy"]), st.booleans()),
    st.tuples(st.just("broken"), _BROKEN_IMAGES),
)
"""What is done with a sparsified model: the name of a step, and what it is done with."""


@st.composite
def _scores(draw: st.DrawFn) -> Tensor:
    batch, number = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    special = [0.0, 1.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45]
    numbers = st.one_of(st.floats(width=32), st.sampled_from(special))
    rows = st.lists(numbers, min_size=number, max_size=number)
    return torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))


SCORES = _scores()
"""(B, n) of any numbers that there are."""

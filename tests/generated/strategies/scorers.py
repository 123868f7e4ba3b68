"""Scorers that work, callables that build none, and scorers that fail while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.generated.strategies.common import ODD, Odd, Users, fail
from tokenprune import Candidates, Scorer


class Spread(Scorer):
    """Scores far apart, other ones for every image, the same for a patch in every execution."""

    def forward(self, candidates: Candidates) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        scores = torch.randn(len(candidates.patches), candidates.num_patches, generator=generator)
        return candidates.at_candidates(self.changed(scores))

    def changed(self, scores: Tensor) -> Tensor:
        return scores


class Bent(Spread):
    """`Spread`, of which something is done to the scores."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def changed(self, scores: Tensor) -> Any:
        return self.change(scores)


class Learned(Spread):
    """`Spread` with weights, whose decisions are sampled in training."""

    probabilistic = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, 1)

    def forward(self, candidates: Candidates) -> Tensor:
        return self.weight(candidates.patches).squeeze(-1) + super().forward(candidates)


class Attentive(Spread):
    """`Spread` that looks at attention."""

    needs_attention = True

    def forward(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None and candidates.attention.shape == candidates.patches.shape[:2]
        return super().forward(candidates) + candidates.attention


class Raising(Scorer):
    """One that fails."""

    def forward(self, candidates: Candidates) -> Tensor:
        raise Users("out of scores")


class Returning(Scorer):
    """One that gives whatever it is told to make of the scores that it should give."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, candidates: Candidates) -> Any:
        return self.make(candidates.patches.mean(dim=2))


def _returning(make: Callable[[Tensor], Any]) -> Callable[[Any], Scorer]:
    return lambda context: Returning(make)


def _extreme(number: float, low: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda scores: scores.masked_fill(scores > low, number)


GOOD_SCORERS: dict[str, Any] = {
    "predictor": "predictor",
    "cls_attention": "cls_attention",
    "informative": "informative",
    "redundancy": "redundancy",
    "random": "random",
    "static": "static",
    "spread": lambda context: Spread(),
    "learned": lambda context: Learned(context.embed_dim),
    "attentive": lambda context: Attentive(),
    "double precision": lambda context: Bent(Tensor.double),
    "half precision": lambda context: Bent(Tensor.bfloat16),
    "whole numbers": lambda context: Bent(lambda scores: (scores * 1e6).long()),
    "yes and no": lambda context: Bent(lambda scores: scores > 0),
    "all alike": lambda context: Bent(torch.zeros_like),
    "infinite": lambda context: Bent(_extreme(math.inf)),
    "minus infinity for most": lambda context: Bent(_extreme(-math.inf, low=-1.0)),
    "minus infinity for all": lambda context: Bent(_extreme(-math.inf, low=-math.inf)),
    "the largest numbers": lambda context: Bent(lambda scores: scores * 1e38),
}
# What is refused when the model is sparsified.
BAD_SCORERS = st.one_of(
    ODD.filter(lambda value: value is not float and value is not Odd),
    st.text(max_size=6).filter(lambda name: name not in GOOD_SCORERS),
    st.sampled_from([
        Spread(), Spread, float, Odd, fail, lambda: Spread(), lambda context: None, lambda context: Spread,
        lambda context: nn.Identity(), lambda context: "static", lambda context: [Spread()], print, nn.Linear(2, 2),
        lambda context: context.nonsense, 7, 0.5, True,
    ]),
)  # fmt: skip
# What is refused when the model runs, if a stage asks.
FAILING_SCORERS: dict[str, Any] = {
    "raises": lambda context: Raising(),
    "no forward": lambda context: Scorer(),
    **{
        name: _returning(make)
        for name, make in {
            "nothing": lambda scores: None,
            "a number": lambda scores: 0.5,
            "a list": lambda scores: scores.tolist(),
            "a tuple": lambda scores: (scores, scores),
            "an array": lambda scores: scores.detach().numpy(),
            "for all channels": lambda scores: scores.unsqueeze(2),
            "for one image": lambda scores: scores[:1],
            "one too few": lambda scores: scores[:, 1:],
            "one too many": lambda scores: torch.cat([scores, scores[:, :1]], dim=1),
            "turned around": lambda scores: scores.T,
            "no dimension": lambda scores: scores.mean(),
            "complex numbers": lambda scores: scores.to(torch.complex64),
        }.items()
    },
}

"""Reductions that work, callables that build none, and reductions that fail while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.generated.strategies.common import ODD, Odd, fail
from tests.generated.strategies.scorers import Spread
from tokenprune import Reduced, Reduction, Split


class Told(Reduction):
    """One that makes of a split whatever it is told to."""

    def __init__(self, make: Callable[[Split], Any], *, restores: bool = False, num_summary: int = 0) -> None:
        super().__init__()
        self.make, self.restores, self.num_summary = make, restores, num_summary

    def forward(self, split: Split) -> Any:
        return self.make(split)


class Weighted(Reduction):
    """One with weights of its own, and two summary tokens."""

    num_summary = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, width)

    def forward(self, split: Split) -> Reduced:
        pruned = split.pruned.unsqueeze(-1)
        mean = (split.patches * pruned).sum(dim=1, keepdim=True) / pruned.sum(dim=1, keepdim=True).clamp(min=1)
        summary = self.weight(mean)
        return Reduced(split.patches, summary=torch.cat([summary, -summary], dim=1))


def _first_kept(split: Split) -> Tensor:
    """For each pruned token the first one that is kept."""
    places = torch.arange(split.keep.shape[1]).expand_as(split.keep)
    first = split.keep.detach().argmax(dim=1, keepdim=True).expand_as(places)
    return torch.where(split.pruned.detach() > 0, first, places)


def _told(make: Callable[[Split], Any], **options: Any) -> Callable[[Any], Reduction]:
    return lambda context: Told(make, **options)


GOOD_REDUCTIONS: dict[str, Any] = {
    **{name: name for name in ("drop", "preserve", "fuse", "merge", "fuse_preserve", "merge_preserve", "merge_sizes")},
    "weighted": lambda context: Weighted(context.embed_dim),
    "as they are": _told(lambda split: Reduced(split.patches)),
    "brighter": _told(lambda split: Reduced(split.patches * (1 + split.pruned.amax(1)[:, None, None] / 2))),
    "in double precision": _told(
        lambda split: Reduced(split.patches.double(), summary=split.patches[:, :1].double() * 0), num_summary=1
    ),
    "hosts": _told(lambda split: Reduced(split.patches, hosts=_first_kept(split)), restores=True),
    "hosts that nobody needs": _told(lambda split: Reduced(split.patches, hosts=_first_kept(split))),
    "a summary, restored": _told(
        lambda split: Reduced(split.patches, summary=split.patches.new_ones(len(split.patches), 1, 1).expand(
            -1, -1, split.patches.shape[2])), restores=True, num_summary=1,
    ),
}  # fmt: skip
SUMMING = frozenset({"fuse", "fuse_preserve", "weighted", "in double precision", "a summary, restored"})
"""Those with tokens that have no place in the image."""
BAD_REDUCTIONS = st.one_of(
    ODD,
    st.text(max_size=6).filter(lambda name: name not in GOOD_REDUCTIONS),
    st.sampled_from([
        Reduction(), Weighted, float, Odd, fail, lambda: Reduction(), lambda context: None, lambda context: Reduction,
        lambda context: nn.Identity(), lambda context: "drop", lambda context: Spread(), print, nn.Linear(2, 2), True,
    ]),
)  # fmt: skip
FAILING_REDUCTIONS: dict[str, Any] = {
    "raises": _told(fail),
    "no forward": lambda context: Reduction(),
    **{
        name: _told(make, num_summary=1)
        for name, make in {
            "nothing": lambda split: None,
            "tokens alone": lambda split: split.patches,
            "a tuple": lambda split: (split.patches, None, None),
            "no patches": lambda split: Reduced(None),
            "patches of another width": lambda split: Reduced(split.patches[..., 1:]),
            "one patch too few": lambda split: Reduced(split.patches[:, 1:]),
            "one image": lambda split: Reduced(split.patches[:1]),
            "patches without channels": lambda split: Reduced(split.patches[..., 0]),
            "a summary of another width": lambda split: Reduced(split.patches, summary=split.patches[:, :1, 1:]),
            "a summary without tokens": lambda split: Reduced(split.patches, summary=split.patches[:, 0]),
            "a summary of one image": lambda split: Reduced(split.patches, summary=split.patches[:1, :1]),
            "summaries that were not announced": lambda split: Reduced(split.patches, summary=split.patches[:, :2]),
            "no summary": lambda split: Reduced(split.patches, summary=split.patches[:, :0]),
            "a summary that is a list": lambda split: Reduced(split.patches, summary=[split.patches]),
        }.items()
    },
    **{
        name: _told(make, restores=True)
        for name, make in {
            "a summary that was not announced": lambda split: Reduced(split.patches, summary=split.patches[:, :1]),
            "hosts that are numbers": lambda split: Reduced(split.patches, hosts=split.keep),
            "hosts of some": lambda split: Reduced(split.patches, hosts=_first_kept(split)[:, 1:]),
            "hosts of one image": lambda split: Reduced(split.patches, hosts=_first_kept(split)[0]),
            "hosts that are a list": lambda split: Reduced(split.patches, hosts=_first_kept(split).tolist()),
        }.items()
    },
}

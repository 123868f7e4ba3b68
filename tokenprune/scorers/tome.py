"""ToMe's bipartite matching: half of the tokens look for the one of the other half that they are to be merged into.

Shapes: B images, n patch tokens, l of them that are left, D channels of a key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.scorers.base import Candidates, Scored, Scorer, ScorerContext, register_scorer
from tokenprune.tokens import select

_NEVER = 2.0
"""The score of a token that is merged into none; cosine similarities lie within -1 … 1."""


class ToMe(Scorer):
    """Tokens alternate between two sets, A and B; the more similar one of A is to its best partner in B, the lower.

    Token Merging: Your ViT But Faster (ToMe, arXiv 2210.09461), section 3 and appendix D. Similarities are cosines of
    keys, mean over heads. Tokens of B are never merged away, prefix tokens take no part, though they count where
    tokens alternate. What is left of A goes in front of B, and the next stage alternates in that order. With the
    reduction ``"merge_sizes"`` it is the paper's algorithm: a stage stands inside its block, between attention and
    MLP, and has the keys of that very attention.

    Raises:
        PlanError: More tokens are to be merged than A has.
    """

    needs_keys = True
    inside_block = True

    def forward(self, candidates: Candidates) -> Scored:
        assert candidates.keys is not None and candidates.num_left is not None
        order = _order(candidates)  # (B, l), positions among the candidates
        start = candidates.prefix.shape[1] % 2  # tokens at even places are in A, and prefix tokens come first
        sources, targets = order[:, start::2], order[:, 1 - start :: 2]
        _check_number(candidates, sources.shape[1] if targets.shape[1] else 0)
        units = F.normalize(select(candidates.keys, order), dim=-1)
        with torch.autocast(units.device.type, enabled=False):
            similarity = units[:, start::2] @ units[:, 1 - start :: 2].transpose(1, 2)  # (B, A, B)
        best = similarity.max(dim=2)
        everyone = torch.arange(candidates.patches.shape[1], device=order.device).expand(order.shape[0], -1)
        scores = torch.full_like(everyone, _NEVER, dtype=units.dtype)
        places = torch.arange(order.shape[1], device=order.device)
        behind = places + torch.where(places % 2 == start, 0, order.shape[1])  # A in front of B, each in its order
        return Scored(
            scores.scatter(1, sources, -best.values),
            hosts=everyone.scatter(1, sources, targets.gather(1, best.indices)),
            notes=torch.zeros_like(everyone).scatter(1, order, behind.expand_as(order)),
        )


def tome_keep_ratios(num_patches: int, *, r: int, num_stages: int) -> tuple[float, ...]:
    """The cumulative keep ratios of ToMe, which merges ``r`` tokens at every stage, and half of those left at most.

    Args:
        num_patches: N, the patch tokens of an image.
        r: How many to merge at each stage.
        num_stages: How many stages there are; in the paper one in every block.

    Returns:
        One ratio a stage, to be given as ``keep_ratio``.

    Raises:
        ValueError: A number is below 1, or ``r`` below 0.
    """
    if num_patches < 1 or num_stages < 1 or r < 0:
        raise ValueError(
            f"num_patches={num_patches}, num_stages={num_stages}, r={r}: expected at least one patch and one stage, "
            "and no less than 0 tokens to merge."
        )
    left, ratios = num_patches, []
    for _ in range(num_stages):
        left -= min(r, left // 2)
        ratios.append(left / num_patches)
    return tuple(ratios)


def _order(candidates: Candidates) -> Tensor:
    """The positions of the candidates that are left (B, l), in the order in which they alternate."""
    assert candidates.keys is not None
    batch, length = candidates.keys.shape[:2]
    places = candidates.notes
    if places is None:
        places = torch.arange(length, device=candidates.keys.device).expand(batch, -1)
    if candidates.keep is not None:
        places = places.masked_fill(candidates.keep == 0, torch.iinfo(torch.int64).max)
    return places.argsort(dim=1, stable=True)[:, : candidates.num_left]


def _check_number(candidates: Candidates, most: int) -> None:
    assert candidates.num_left is not None and candidates.num_keep is not None
    number = candidates.num_left - candidates.num_keep
    if number > most:
        raise PlanError(
            f"scorer='tome' is to merge {number} of {candidates.num_left} tokens at a stage, and can merge {most}, "
            "about half of them; take higher keep ratios, such as those of tokenprune.tome_keep_ratios, or more stages."
        )


@register_scorer("tome")
def build(context: ScorerContext) -> ToMe:
    """A `ToMe` scorer, the same for every stage.

    Raises:
        PlanError: The stage is to keep less than half of the tokens that reach it.
    """
    if context.keep_probability < 0.5 - 1e-6:
        raise PlanError(
            f"scorer='tome' merges at most half of the tokens that reach a stage, and one of these stages is to keep "
            f"{context.keep_probability:.3g} of them; take higher keep ratios, or more stages."
        )
    return ToMe()
